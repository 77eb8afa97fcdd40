"""Resumable runs: a grid of settings over a data set, with one row for each image and setting.

A run is a folder. `run.json` describes the model and data, and each process appends its rows to its own file
(`rows-0.jsonl` and so on), one JSON object per line. Existing rows are never scored again, so a run can continue after
it was stopped, with more settings or another number of processes. A finished run has examples in
`examples.safetensors`.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from parchgrad._io.checks import check_kind, check_whole_number
from parchgrad._io.digests import digest
from parchgrad._io.files import locked, refuse_special, writing
from parchgrad._version import __version__
from parchgrad.core.layers import bare_model, check_evaluation_mode
from parchgrad.data.samples import Sample, Samples, as_samples
from parchgrad.errors import InputError, OutputError, SettingError, StatisticsError, reason_of
from parchgrad.evaluation.examples import EXAMPLES_FILE, Choice, Examples, MakePicture, choose_examples, make_examples
from parchgrad.evaluation.localisation import boxes_to_region
from parchgrad.evaluation.methods import Method
from parchgrad.evaluation.rows import Row, RowFile, read_rows
from parchgrad.evaluation.scores import ScoreSettings, score_maps
from parchgrad.evaluation.settings import Grid, Setting, make_method
from parchgrad.explain.outputs import Logits
from parchgrad.statistics import ChannelStatistics

__all__ = ["TargetChoice", "check_run_folder", "evaluate"]

TargetChoice = Literal["label", "predicted"]
_FORMAT = 3


def evaluate(
    model: nn.Module,
    data: Samples | Dataset[Any],
    settings: Sequence[Setting],
    folder: str | Path,
    *,
    name: str = "model",
    methods: Mapping[str, Callable[[nn.Module], Method]] | None = None,
    scores: ScoreSettings | None = None,
    target: TargetChoice = "label",
    statistics: ChannelStatistics | None = None,
    batch_size: int = 16,
    seed: int = 0,
    process: tuple[int, int] | None = None,
    picture: MakePicture | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Score the maps of every setting on every image, and append one row each to the run's folder.

    Existing rows are skipped, so interrupted runs resume. Several processes share the images, automatically under
    torchrun. Once every setting has a row for every image, the images where the leading setting helps most and least
    are saved with their maps; see `choose_examples`.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        data: the images: samples; a `PhotographFolder`, labelled by `with_categories`, or without labels if `target` is
            `"predicted"`; or a data set with the model's classes, such as torchvision's `ImageFolder`.
        settings: settings to compare; see `Grid`.
        folder: folder of the run, created if missing.
        name: name of the model in the rows.
        methods: additional methods: for each title, a function that makes the method for a model. Rows are kept by
            title, so a method that has changed needs a new one.
        scores: the scores and their settings; None uses the defaults.
        target: class to explain, `"label"` or `"predicted"`.
        statistics: channel statistics, for the selectors that need them.
        batch_size: number of images that are loaded and scored together, at least 1.
        seed: random seed of random maps and random channels.
        process: rank of this process and number of processes; None reads torchrun's environment variables.
        picture: converts a preprocessed image (C, H, W) to a picture (H, W, 3) in [0, 1] for the examples; None scales
            each image by its own range.
        on_progress: called with the number of finished rows and of all rows of this process; None shows a progress bar
            on stderr.

    Raises:
        SettingError: if a setting is out of range, two methods have the same title, or the folder has a different run.
        InputError: if the images differ in size, or a file of the run is damaged.
        OutputError: if the folder cannot be written, has files of no run, or this process of the run is already
            running.
        ModelError: if the model is in training mode, is wrapped in DataParallel, or does not return logits (B, K).
        ParchGradError: if a setting does not fit the model; see `Explainer`.

    Example:
        >>> import tempfile
        >>> from torch.utils.data import Dataset
        >>> class Noise(Dataset):
        ...     categories, fingerprint = ("a", "b"), "two noisy images"
        ...     def __len__(self):
        ...         return 2
        ...     def __getitem__(self, index):
        ...         return Sample(image=torch.rand(3, 8, 8), label=index, name=f"noise {index}")
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     evaluate(model, Noise(), [Setting(), Setting(selector="energy")], folder)
        ...     [(row["setting"], row["image"]) for row in read_rows(folder)][:2]
        [('gradient', 'noise 0'), ('gradient', 'noise 1')]
    """
    if target not in get_args(TargetChoice):
        raise SettingError(f"`target` is {target!r}, but it must be one of {', '.join(get_args(TargetChoice))}.")
    check_whole_number("batch_size", batch_size, 1)
    model, data = bare_model(model), as_samples(data)
    check_evaluation_mode(model)
    _check_given(settings, methods, scores, statistics)
    rank, count = process or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if not 0 <= rank < count:
        raise SettingError(f"`process` is {(rank, count)}, but its rank must be at least 0 and below its count.")
    chosen = scores or ScoreSettings()
    entries = [
        *(_entry_of(setting, statistics, seed) for setting in dict.fromkeys(settings)),
        *(_Entry(title, {**_OWN, "method": title}, make) for title, make in (methods or {}).items()),
    ]
    titles = [entry.title for entry in entries]
    for title in titles:
        if titles.count(title) > 1:
            raise SettingError(f"Two methods have the title {title!r}. Rename one of them.")
    made = {entry: entry.make(model) for entry in entries}
    place = Path(folder)
    check_run_folder(place)
    with locked(place / f"rows-{rank}.jsonl"):
        _join_run(
            place,
            {
                "format": _FORMAT,
                "model": name,
                "weights": digest(model.state_dict()),
                "data": data.fingerprint,
                "images": len(data),
                "target": target,
                "scores": asdict(chosen),
                "seed": seed,
                "statistics": None if statistics is None else digest(statistics.metadata),
                # A title may mean something else in another release.
                "parchgrad": __version__,
            },
        )
        done = {(row["setting"], row["index"]) for row in read_rows(place)}
        own = range(rank, len(data), count)
        pending = {entry: {index for index in own if (entry.title, index) not in done} for entry in entries}
        total = len(own) * len(entries)
        finished = total - sum(len(indices) for indices in pending.values())
        wanted = sorted(set().union(*pending.values())) if pending else []
        with (
            RowFile(place / f"rows-{rank}.jsonl") as rows,
            tqdm(
                total=total, initial=finished, unit="map", desc=name, disable=on_progress is not None or rank > 0
            ) as bar,
        ):
            for start in range(0, len(wanted), batch_size):
                batch = _load(data, wanted[start : start + batch_size], model, target)
                for entry, method in made.items():
                    places = [place for place, index in enumerate(batch.indices) if index in pending[entry]]
                    if not places:
                        continue
                    rows.append(_score(model, entry, method, batch.take(places), chosen, name))
                    finished += len(places)
                    bar.update(len(places))
                    if on_progress is not None:
                        on_progress(finished, total)
        _keep_examples(place, data, entries, model, statistics=statistics, seed=seed, picture=picture)


def _check_given(settings: object, methods: object, scores: object, statistics: object) -> None:
    """Raise `SettingError` for the first argument of the wrong type."""
    if isinstance(settings, Grid):
        raise SettingError("`settings` is a Grid. Pass grid.settings().")
    check_kind("`settings`", settings, Sequence, "Pass grid.settings()", wanted="a list of settings")
    for setting in cast(Sequence[object], settings):
        check_kind("An item of `settings`", setting, Setting, "Make it with Setting(...)")
    if methods is not None:
        check_kind("`methods`", methods, Mapping, "Pass {title: make_method}", wanted="a dictionary")
    if scores is not None:
        check_kind("`scores`", scores, ScoreSettings, "Pass ScoreSettings(families=...)")
    if statistics is not None:
        read = "Read a file with ChannelStatistics.load(path)"
        check_kind("`statistics`", statistics, ChannelStatistics, read, error=StatisticsError)


@dataclass(frozen=True, eq=False)
class _Entry:
    """A method in a run: its title and description in the rows, and the function that makes it for a model."""

    title: str
    described: Mapping[str, Any]
    make: Callable[[nn.Module], Method]


def _entry_of(setting: Setting, statistics: ChannelStatistics | None, seed: int) -> _Entry:
    described = {**asdict(setting), "gamma": "inf" if math.isinf(setting.gamma) else setting.gamma}
    return _Entry(setting.title, described, lambda model: make_method(model, setting, statistics=statistics, seed=seed))


# The caller's own methods have none of the settings.
_OWN: Mapping[str, Any] = dict.fromkeys(field.name for field in fields(Setting))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Batch:
    """A batch of images with the model's predictions."""

    indices: list[int]
    samples: list[Sample]
    images: Tensor
    target: Tensor
    predicted: Tensor
    probability: Tensor

    def take(self, places: list[int]) -> "_Batch":
        if len(places) == len(self.indices):
            return self
        return _Batch(
            indices=[self.indices[place] for place in places],
            samples=[self.samples[place] for place in places],
            images=self.images[places],
            target=self.target[places],
            predicted=self.predicted[places],
            probability=self.probability[places],
        )


def _load(data: Samples, indices: list[int], model: nn.Module, target: TargetChoice) -> _Batch:
    samples = [data[index] for index in indices]
    shapes = {tuple(sample.image.shape) for sample in samples}
    if len(shapes) > 1:
        listed = " and ".join(str(shape) for shape in sorted(shapes)[:2])
        raise InputError(f"The images have shapes {listed}. Resize them to one size, or pass batch_size=1.")
    weight = next(model.parameters())
    images = torch.stack([sample.image for sample in samples]).to(weight)
    with torch.no_grad():
        logits = Logits(model, None)(images)
        probability, predicted = logits.softmax(dim=1).max(dim=1)
    if data.categories and len(data.categories) != logits.shape[1]:
        raise InputError(
            f"The data has {len(data.categories)} classes, but the model has {logits.shape[1]}. Use data with the "
            "model's classes, or a PhotographFolder, whose class folders are matched by name or ignored."
        )
    labels = predicted
    if target == "label":
        unknown = next((sample.name for sample in samples if sample.label is None), None)
        if unknown is not None:
            raise InputError(
                f"Image {unknown!r} has no label. Pass `target='predicted'`, or label the images by class folders with "
                "`PhotographFolder.with_categories`."
            )
        labels = torch.tensor([sample.label for sample in samples], device=images.device)
    return _Batch(
        indices=indices,
        samples=samples,
        images=images,
        target=labels,
        predicted=predicted,
        probability=probability,
    )


def _score(
    model: nn.Module, entry: _Entry, method: Method, batch: _Batch, scores: ScoreSettings, name: str
) -> list[Row]:
    """Rows of a batch for one setting."""
    start = time.perf_counter()
    heat = method(batch.images, batch.target).detach()
    if heat.is_cuda:
        # CUDA calls are asynchronous; wait to measure the full time.
        torch.cuda.synchronize(heat.device)
    seconds = (time.perf_counter() - start) / len(batch.indices)
    regions = [_region(sample) for sample in batch.samples]
    found = score_maps(model, method, batch.images, batch.target, heat, regions, scores, make_method=entry.make)
    columns = {score: values.tolist() for score, values in found.items()}
    return [
        {
            "model": name,
            "setting": entry.title,
            **entry.described,
            "index": index,
            "image": sample.name,
            "group": sample.group,
            # An image without a label is not held to be misclassified.
            "label": target if sample.label is None else sample.label,
            "target": target,
            "predicted": predicted,
            "probability": probability,
            "seconds": seconds,
            **{score: values[place] for score, values in columns.items()},
        }
        for place, (index, sample, target, predicted, probability) in enumerate(
            zip(
                batch.indices,
                batch.samples,
                batch.target.tolist(),
                batch.predicted.tolist(),
                batch.probability.tolist(),
                strict=True,
            )
        )
    ]


def _keep_examples(
    folder: Path,
    data: Samples,
    entries: Sequence[_Entry],
    model: nn.Module,
    *,
    statistics: ChannelStatistics | None,
    seed: int,
    picture: MakePicture | None,
) -> None:
    """Save the example images once every setting has a row for every image."""
    rows = read_rows(folder)
    described = {row["setting"]: row for row in rows}
    # Among several processes, the last to finish sees all rows.
    if len(rows) < len(described) * len(data) or not described.keys() >= {entry.title for entry in entries}:
        return
    choice = choose_examples(rows)
    if choice is None or _holds(folder / EXAMPLES_FILE, choice):
        return
    known = {entry.title: entry.make for entry in entries}
    for title in choice.settings:
        # Earlier settings can be rebuilt from their rows, but the caller's own methods cannot.
        if title not in known and not math.isnan(described[title].get("gates", math.nan)):
            known[title] = _entry_of(_setting_of(described[title]), statistics, seed).make
    if known.keys() >= set(choice.settings):
        methods = {title: known[title](model) for title in choice.settings}
        make_examples(choice, data, methods, model=model, picture=picture).save(folder / EXAMPLES_FILE)


def _setting_of(row: Row) -> Setting:
    """Rebuild the setting of a row, which may be from an earlier evaluation."""
    found: dict[str, Any] = {}
    for name in {item.name for item in fields(Setting)} & row.keys():
        value = float(row[name]) if name == "gamma" else row[name]
        # NaN in a row means the default.
        if not (isinstance(value, float) and math.isnan(value)):
            found[name] = tuple(value) if isinstance(value, list) else value
    return Setting(**found)


def _holds(path: Path, choice: Choice) -> bool:
    """Whether a file contains the examples of this choice; False if it is damaged or missing."""
    with suppress(InputError):
        return Examples.load(path).choice == choice
    return False


def _region(sample: Sample) -> Tensor | None:
    """Region of the class: the mask if there is one, else the boxes."""
    if sample.mask is not None or sample.boxes is None:
        return sample.mask
    height, width = sample.image.shape[1:]
    return boxes_to_region(sample.boxes, height=height, width=width)


def check_run_folder(folder: Path) -> None:
    """Raise `OutputError` if a folder has rows or examples of a run, but no run.json.

    Example:
        >>> check_run_folder(Path("a folder to be made"))
    """
    # List the rows before testing for run.json, since another process may write both in between.
    others = [file.name for file in (*sorted(folder.glob("rows-*.jsonl")), folder / EXAMPLES_FILE) if file.exists()]
    if others and not (folder / "run.json").exists():
        raise OutputError(
            f"{str(folder)!r} contains {others[0]!r}, but no 'run.json' that describes its run. Choose another folder."
        )


def _join_run(folder: Path, described: Mapping[str, Any]) -> None:
    """Write run.json, or check that the existing one describes the same run."""
    path, wanted = folder / "run.json", json.loads(json.dumps(described))
    check_run_folder(folder)
    if not path.exists():
        with writing(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        return
    try:
        refuse_special(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Cannot read {str(path)!r} ({reason_of(error)}). Choose another folder.") from error
    different = [key for key, value in wanted.items() if not isinstance(found, dict) or found.get(key) != value]
    if "format" in different:
        raise SettingError(
            f"The run in {str(folder)!r} has the format of another parchgrad release. Choose another folder."
        )
    if different:
        raise SettingError(
            f"The run in {str(folder)!r} was started with different {', '.join(different)}. Choose another folder, or "
            "use its settings."
        )
