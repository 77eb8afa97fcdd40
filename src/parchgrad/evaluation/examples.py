"""Examples: the images of a run where the leading setting helps most and least, with their maps, in one file."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from parchgrad.data.samples import Samples
from parchgrad.errors import InputError, SettingError, reason_of
from parchgrad.evaluation.methods import CONTROLS, Method
from parchgrad.evaluation.scores import HEADLINES, SCORES
from parchgrad.evaluation.summary import valid_mean
from parchgrad.files import writing
from parchgrad.tensor_files import read_tensors
from parchgrad.visual.maps import normalise, shared_top

__all__ = ["EXAMPLES_FILE", "Choice", "Example", "Examples", "MakePicture", "choose_examples", "make_examples"]

Levels: TypeAlias = NDArray[np.uint8]
MakePicture: TypeAlias = Callable[[Tensor], NDArray[Any]]
"""A preprocessed image (C, H, W) in, a picture (H, W, 3) in [0, 1] out."""

EXAMPLES_FILE = "examples.safetensors"
"""Name of the file in the folder of a run."""

_FORMAT = "parchgrad examples 2"
_PLAIN, _, _, _GRAD_CAM, _ = CONTROLS
_MOST = 3


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image that is shown.

    Attributes:
        index: of the image in the data.
        image: its name.
        label: its class.
        target: the class that is explained.
        predicted: the class that the network takes it for.
        values: score of each setting that is shown; None where nothing can be said.
        gain: how much better the leading setting is than the plain gradient, negative where it is worse; without a
            plain gradient the score itself, negative where less is better.
    """

    index: int
    image: str
    label: int
    target: int
    predicted: int
    values: tuple[float | None, ...]
    gain: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which images are shown, and the maps of which settings.

    Attributes:
        score: name of the score that they are chosen by.
        leading: title of the setting that is best by the mean of that score.
        settings: titles of those whose maps are shown: plain gradient, leading setting, Grad-CAM, as far as they are
            in the run.
        best: the images of the largest gains, the largest first.
        worst: the images of the smallest gains, the smallest first; none of them is among the best.
    """

    score: str
    leading: str
    settings: tuple[str, ...]
    best: tuple[Example, ...]
    worst: tuple[Example, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """All images, the best before the worst."""
        return self.best + self.worst


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """Pictures and maps of the images that are shown.

    Attributes:
        choice: which images and settings.
        categories: names of the classes that occur, by index.
        pictures: of each image, (H, W, 3), 256 levels.
        maps: of each image, (settings, H, W), 256 levels, the maps of an image by one scale; see `shared_top`.
    """

    choice: Choice
    categories: Mapping[int, str]
    pictures: tuple[Levels, ...]
    maps: tuple[Levels, ...]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, over an earlier one of that name; it appears only when it is whole.

        Raises:
            OutputError: if the file cannot be written.
        """
        # An array for each image, since images may differ in size.
        arrays = {f"picture/{place}": values for place, values in enumerate(self.pictures)}
        arrays |= {f"maps/{place}": values for place, values in enumerate(self.maps)}
        # safetensors writes an array as it lies in memory, whatever its axes.
        arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        header = {"choice": json.dumps(asdict(self.choice)), "categories": json.dumps(list(self.categories.items()))}
        with writing(Path(path)) as temporary:
            save_file(arrays, temporary, {"format": _FORMAT, **header})

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """Read a file written by `save`. Nothing in it is executed.

        Raises:
            InputError: if the file is missing, damaged, or of another kind.
        """
        try:
            header, tensors = read_tensors(path)
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            if header.get("format") != _FORMAT:
                raise ValueError("it is a file of another kind or release")
            choice = _read_choice(json.loads(header["choice"]))
            categories = {int(index): str(name) for index, name in json.loads(header["categories"])}
            places = range(len(choice.examples))
            pictures, maps = (tuple(arrays[f"{kind}/{place}"] for place in places) for kind in ("picture", "maps"))
            for example, picture, own in zip(choice.examples, pictures, maps, strict=True):
                fits = picture.ndim == 3 and own.shape == (len(choice.settings), *picture.shape[:2])
                if (
                    not fits
                    or picture.size == 0
                    or picture.shape[2] != 3
                    or {picture.dtype, own.dtype} != {np.dtype(np.uint8)}
                ):
                    raise ValueError(f"the maps of {example.image!r} do not fit its picture")
                if not {example.label, example.target, example.predicted} <= categories.keys():
                    raise ValueError(f"a class of {example.image!r} has no name")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise InputError(
                f"{str(path)!r} cannot be read as the examples of a run ({reason_of(error)}); delete it, and run the "
                "evaluation again, which makes it anew."
            ) from error
        return cls(choice=choice, categories=categories, pictures=pictures, maps=maps)


def choose_examples(rows: Sequence[Mapping[str, Any]]) -> Choice | None:
    """Choose the images where the leading setting gains most and least over the plain gradient.

    The score is the first of `HEADLINES` that there are values of. The settings that compete are those that edit the
    gradient by chosen channels, or all but the controls where there are none; one that has the score of fewer than half
    as many images as another does not lead. Images without the score take no part,
    and of fewer than six no image is shown twice.

    Args:
        rows: of one run; see `read_rows`.

    Returns:
        The choice, the same for the same rows; None where no setting competes or no image has the score.

    Raises:
        InputError: if a row does not say which image and classes it is of.

    Example:
        >>> common = {"label": 0, "target": 0, "predicted": 0}
        >>> rows = [
        ...     {"setting": setting, "selector": selector, "index": index, "image": f"{index}", "aopc": aopc, **common}
        ...     for setting, selector, scores in (("gradient", None, (0.1, 0.2)), ("edit", "energy", (0.3, 0.1)))
        ...     for index, aopc in enumerate(scores)
        ... ]
        >>> choice = choose_examples(rows)
        >>> choice.leading, choice.best[0].image, choice.worst[0].image
        ('edit', '0', '1')
    """
    score = next((name for name in HEADLINES if any(not math.isnan(row.get(name, math.nan)) for row in rows)), None)
    if score is None:
        return None
    by_setting: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], {})[row["index"]] = row
    sign = -1 if SCORES[score].better == "lower" else 1

    def value(title: str, index: int) -> float:
        return float(by_setting[title].get(index, {}).get(score, math.nan))

    means = {
        title: valid_mean([value(title, index) for index in by_setting[title]]) for title in _competing(by_setting)
    }
    most = max((mean.valid for mean in means.values()), default=0)
    if most == 0:
        return None
    # A mean over a few lucky images does not lead.
    leading = max(
        (title for title, mean in means.items() if 2 * mean.valid >= most), key=lambda title: sign * means[title].value
    )
    gains = {
        index: sign * (value(leading, index) - (value(_PLAIN, index) if _PLAIN in by_setting else 0.0))
        for index in by_setting[leading]
    }
    ranked = sorted(
        (index for index in gains if not math.isnan(gains[index])), key=lambda index: (-gains[index], index)
    )
    if not ranked:
        return None
    settings = tuple(title for title in (_PLAIN, leading, _GRAD_CAM) if title in by_setting)

    def example(index: int) -> Example:
        row = by_setting[leading][index]
        missing = [name for name in ("image", "label", "target", "predicted") if name not in row]
        if missing:
            raise InputError(f"A row of {leading!r} has no {missing[0]!r}; remove it, and run the evaluation again.")
        values = [value(title, index) for title in settings]
        return Example(
            index=index,
            image=row["image"],
            label=row["label"],
            target=row["target"],
            predicted=row["predicted"],
            values=tuple(None if math.isnan(found) else found for found in values),
            gain=gains[index],
        )

    # Of few images the better half is shown as the best, with the one in the middle.
    best, worst = ranked[: min(_MOST, math.ceil(len(ranked) / 2))], ranked[::-1][: min(_MOST, len(ranked) // 2)]
    return Choice(
        score=score,
        leading=leading,
        settings=settings,
        best=tuple(map(example, best)),
        worst=tuple(map(example, worst)),
    )


def make_examples(
    choice: Choice,
    data: Samples,
    methods: Mapping[str, Method],
    *,
    model: nn.Module,
    picture: MakePicture | None = None,
) -> Examples:
    """Draw the pictures of the chosen images, and make their maps again.

    Args:
        choice: which images and settings.
        data: the images.
        methods: for each setting of the choice what makes its maps.
        model: the classifier, whose weights say on which device and in which type.
        picture: makes the picture of a preprocessed image; None scales each image by its own range.

    Raises:
        SettingError: if `picture` makes something else than a picture of the image's size.

    Example:
        >>> class Noise:
        ...     categories, fingerprint = ("a", "b"), "two noisy images"
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, index):
        ...         return Sample(image=torch.rand(3, 8, 8), label=index, name=f"noise {index}")
        >>> from parchgrad.data.samples import Sample
        >>> chosen = Example(index=1, image="noise 1", label=1, target=1, predicted=0, values=(0.5,), gain=0.5)
        >>> choice = Choice(score="aopc", leading="edit", settings=("edit",), best=(chosen,), worst=())
        >>> def method(images, target):
        ...     return images.mean(1)
        >>> found = make_examples(choice, Noise(), {"edit": method}, model=nn.Linear(1, 1))
        >>> found.pictures[0].shape, found.maps[0].shape, found.categories
        ((8, 8, 3), (1, 8, 8), {0: 'a', 1: 'b'})
    """
    weight = next(model.parameters())
    pictures, maps = [], []
    for example in choice.examples:
        image = data[example.index].image
        pictures.append(_levels(_draw(image, picture)))
        images, target = image.unsqueeze(0).to(weight), torch.tensor([example.target], device=weight.device)
        heats = [methods[title](images, target)[0].detach().cpu() for title in choice.settings]
        # A map that is not finite has no score, and nothing that could be drawn.
        heats = [heat if heat.isfinite().all() else torch.zeros_like(heat) for heat in heats]
        top = shared_top(heats)
        maps.append(np.stack([_levels(normalise(heat, top=top)) for heat in heats]))
    held = {index for example in choice.examples for index in (example.label, example.target, example.predicted)}
    categories = {
        index: data.categories[index] if index < len(data.categories) else f"class {index}" for index in sorted(held)
    }
    return Examples(choice=choice, categories=categories, pictures=tuple(pictures), maps=tuple(maps))


def _competing(by_setting: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    firsts = {title: next(iter(found.values())) for title, found in by_setting.items() if title not in CONTROLS}
    plain = [title for title, row in firsts.items() if not isinstance(row.get("selector"), str)]
    # Random channels and masks that are not the selector's own are controls too.
    edited = [
        title
        for title, row in firsts.items()
        if title not in plain and row["selector"] != "random" and row.get("masks", "own") == "own"
    ]
    return edited or plain


def _draw(image: Tensor, picture: MakePicture | None) -> NDArray[Any]:
    """A picture (H, W, 3) in [0, 1] of an image of any number of channels."""
    if picture is None:
        values = image.detach().cpu().double()
        values = (values - values.min()) / (values.max() - values.min()).clamp(min=torch.finfo(values.dtype).tiny)
        # Channels that are no colours have no picture but their mean.
        drawn = (values if len(values) == 3 else values.mean(dim=0, keepdim=True)).permute(1, 2, 0).numpy()
    else:
        drawn = np.asarray(picture(image))
    height, width = image.shape[1:]
    if drawn.shape not in ((height, width, 1), (height, width, 3)):
        raise SettingError(
            f"picture made an array of shape {drawn.shape} of an image of {height} x {width} pixels; let it make one "
            f"of shape {(height, width, 3)}."
        )
    return np.broadcast_to(drawn, (height, width, 3))


def _levels(values: NDArray[Any]) -> Levels:
    levels: Levels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return levels


def _read_choice(described: Mapping[str, Any]) -> Choice:
    groups = {
        group: tuple(Example(**{**entry, "values": tuple(entry["values"])}) for entry in described[group])
        for group in ("best", "worst")
    }
    return Choice(**{**described, "settings": tuple(described["settings"]), **groups})
