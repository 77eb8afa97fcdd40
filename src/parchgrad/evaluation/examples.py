"""Examples: the images of a run that the leading setting helps most and least, with their maps, in one file."""

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

from parchgrad._io.files import writing
from parchgrad._io.images import to_bytes
from parchgrad._io.tensors import read_tensors
from parchgrad.data.samples import Samples
from parchgrad.errors import InputError, SettingError, reason_of
from parchgrad.evaluation.methods import CONTROLS, Method
from parchgrad.evaluation.report import pair_rows
from parchgrad.evaluation.rows import Row
from parchgrad.evaluation.scores import SCORES
from parchgrad.evaluation.verdict import find_leader
from parchgrad.visual.maps import normalise

__all__ = ["EXAMPLES_FILE", "Choice", "Example", "Examples", "MakePicture", "choose_examples", "make_examples"]

Levels: TypeAlias = NDArray[np.uint8]
MakePicture: TypeAlias = Callable[[Tensor], NDArray[Any]]
"""Maps a preprocessed image (C, H, W) to a picture (H, W, 3) in [0, 1]."""

EXAMPLES_FILE = "examples.safetensors"
"""Name of the file in a run's folder."""

_FORMAT = "parchgrad examples 3"
_PLAIN, _, _, _GRAD_CAM, _ = CONTROLS
_MOST = 3


@dataclass(frozen=True, kw_only=True)
class Example:
    """An example image.

    Attributes:
        index: index of the image in the data.
        image: name of the image.
        label: class of the image.
        target: explained class.
        predicted: predicted class.
        values: score of each setting in the choice; None where it is undefined.
        gain: how much better the leading setting is than the plain gradient, negative if it is worse; without a plain
            gradient, the score itself, negated if lower is better.
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
    """The images and settings that a report shows.

    Attributes:
        score: name of the score that ranks the images.
        leading: title of the setting with the best mean of that score.
        settings: titles of the settings with maps: plain gradient, leading setting and Grad-CAM, if they are in the
            run.
        best: the images with the largest gains, the largest first.
        worst: the images with the smallest gains, the smallest first; disjoint from `best`.
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
    """Pictures and maps of the example images.

    Attributes:
        choice: the images and settings.
        categories: names of the classes that occur, by index.
        pictures: picture of each image, (H, W, 3), 256 levels.
        maps: maps of each image, (settings, H, W), 256 levels, each on its own scale; see `normalise`.
    """

    choice: Choice
    categories: Mapping[int, str]
    pictures: tuple[Levels, ...]
    maps: tuple[Levels, ...]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file atomically, overwriting an existing one.

        Raises:
            OutputError: if the file cannot be written.
        """
        # An array for each image, since images may differ in size.
        arrays = {f"picture/{place}": values for place, values in enumerate(self.pictures)}
        arrays |= {f"maps/{place}": values for place, values in enumerate(self.maps)}
        # safetensors writes raw memory and ignores strides.
        arrays = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        header = {"choice": json.dumps(asdict(self.choice)), "categories": json.dumps(list(self.categories.items()))}
        with writing(Path(path)) as temporary:
            save_file(arrays, temporary, {"format": _FORMAT, **header})

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """Read a file written by `save`, without executing anything in it.

        Raises:
            InputError: if the file is missing, damaged or of another kind.
        """
        try:
            header, tensors = read_tensors(path)
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            if header.get("format") != _FORMAT:
                raise ValueError("it has another format, perhaps of another release")
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
                f"Cannot read the examples of a run from {str(path)!r} ({reason_of(error)}). Delete the file and run "
                "the evaluation again to recreate it."
            ) from error
        return cls(choice=choice, categories=categories, pictures=pictures, maps=maps)


def choose_examples(rows: Sequence[Row]) -> Choice | None:
    """Choose the images where the leading setting gains most and least over the plain gradient.

    See `find_leader` for the score and the leading setting. Only images with rows of every setting and with the score
    count, and no image is chosen twice.

    Args:
        rows: rows of one run; see `read_rows`.

    Returns:
        The choice, deterministic for given rows; None if no setting competes or no image has the score.

    Raises:
        InputError: if a row lacks its image or classes.

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
    paired = pair_rows(rows)
    leader = find_leader(paired)
    if leader is None:
        return None
    score, leading = leader.score, leader.setting
    by_setting = {title: {row["index"]: row for row in own} for title, own in paired.items()}
    sign = -1 if SCORES[score].better == "lower" else 1

    def value(title: str, index: int) -> float:
        return float(by_setting[title][index].get(score, math.nan))

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
            raise InputError(f"A row of {leading!r} has no {missing[0]!r}. Remove it and run the evaluation again.")
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

    # With few images, the better half, including the middle one, counts as the best.
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
    """Draw the pictures of the chosen images and recompute their maps.

    Args:
        choice: the images and settings.
        data: the images.
        methods: method of each setting in the choice.
        model: the classifier; its weights set device and dtype.
        picture: converts a preprocessed image to a picture; None scales each image by its own range.

    Raises:
        SettingError: if `picture` returns the wrong shape.

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
        pictures.append(to_bytes(_draw(image, picture)))
        images, target = image.unsqueeze(0).to(weight), torch.tensor([example.target], device=weight.device)
        heats = [methods[title](images, target)[0].detach().cpu() for title in choice.settings]
        # A map that is not finite cannot be drawn.
        heats = [heat if heat.isfinite().all() else torch.zeros_like(heat) for heat in heats]
        maps.append(np.stack([to_bytes(normalise(heat)) for heat in heats]))
    held = {index for example in choice.examples for index in (example.label, example.target, example.predicted)}
    categories = {
        index: data.categories[index] if index < len(data.categories) else f"class {index}" for index in sorted(held)
    }
    return Examples(choice=choice, categories=categories, pictures=tuple(pictures), maps=tuple(maps))


def _draw(image: Tensor, picture: MakePicture | None) -> NDArray[Any]:
    """Picture (H, W, 3) in [0, 1] of an image with any number of channels."""
    if picture is None:
        values = image.detach().cpu().double()
        values = (values - values.min()) / (values.max() - values.min()).clamp(min=torch.finfo(values.dtype).tiny)
        # Other than three channels are not colours: show their mean.
        drawn = (values if len(values) == 3 else values.mean(dim=0, keepdim=True)).permute(1, 2, 0).numpy()
    else:
        drawn = np.asarray(picture(image))
    height, width = image.shape[1:]
    if drawn.shape not in ((height, width, 1), (height, width, 3)):
        raise SettingError(
            f"`picture` returned shape {drawn.shape} for an image of {height} x {width} pixels. Return "
            f"{(height, width, 3)}."
        )
    return np.broadcast_to(drawn, (height, width, 3))


def _read_choice(described: Mapping[str, Any]) -> Choice:
    groups = {
        group: tuple(Example(**{**entry, "values": tuple(entry["values"])}) for entry in described[group])
        for group in ("best", "worst")
    }
    return Choice(**{**described, "settings": tuple(described["settings"]), **groups})
