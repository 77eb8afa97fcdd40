"""Runs: a grid of settings over a data set, one row for each image and setting, resumed where they stopped.

A run is a folder: `run.json` says what is evaluated on what, and each process appends its rows to a file of its own,
`rows-0.jsonl` and so on. A row is a JSON object on a line. What stands there is never scored again, so that a run goes
on after it was stopped, with more settings, or with another number of processes. A finished run has its examples, in
`examples.safetensors`.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from parchgrad._version import __version__
from parchgrad.checks import check_kind, check_whole_number
from parchgrad.data.samples import Sample, Samples
from parchgrad.errors import InputError, OutputError, SettingError, StatisticsError, reason_of
from parchgrad.evaluation.examples import EXAMPLES_FILE, Choice, Examples, MakePicture, choose_examples, make_examples
from parchgrad.evaluation.localisation import boxes_to_region
from parchgrad.evaluation.methods import Method
from parchgrad.evaluation.scores import SCORES, ScoreSettings, score_maps
from parchgrad.evaluation.settings import Grid, Setting, make_method
from parchgrad.files import locked, refuse_special, writing
from parchgrad.layers import bare_model, check_evaluation_mode
from parchgrad.statistics import ChannelStatistics

__all__ = ["Row", "TargetChoice", "check_run_folder", "evaluate", "read_rows"]

Row = dict[str, Any]
"""Scores of one map by name, beside the names of the model, the setting and the image."""
TargetChoice = Literal["label", "predicted"]
_FORMAT = 2
# What a row holds beside the scores, by kind; what has no value is null.
_TEXTS = ("model", "setting", "image", "group", "method", "selector", "conserve", "masks")
_WHOLE_NUMBERS = ("index", "label", "target", "predicted")
_NUMBERS = ("probability", "seconds", "quantile", "softness", "gates")
_NEEDED = ("model", "setting", "index", "seconds")
# How every row starts, as `_score` and `json.dumps` make it.
_ROW_START = b'{"model": '
# Beyond it sums of cubes leave what a float can hold.
_LARGEST = 1e100


def evaluate(
    model: nn.Module,
    data: Samples,
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
    """Score the maps of every setting on every image, and append a row for each to the run's folder.

    What the folder holds already is skipped: an interrupted run goes on, and finished settings cost nothing. Several
    processes share the images; under torchrun without further words. The same process of a run cannot be started twice
    at a time. Once every setting has a row of every image, the images where the leading setting helps most and least
    are kept with their maps; see `choose_examples`.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        data: the images.
        settings: what is compared; see `Grid`.
        folder: of the run, made where there is none.
        name: of the model in the rows.
        methods: further methods, of any kind: for each title what makes the method for a model. In a run a title stands
            for its method: give a method that has changed another one.
        scores: which scores, and how; None takes the defaults.
        target: which class is explained: `"label"` or `"predicted"`.
        statistics: for the selectors that need some.
        batch_size: images that are loaded and scored together, at least 1.
        seed: of random maps and random channels.
        process: number of this process, from zero, and of all of them; None asks torchrun's environment.
        picture: makes the picture (H, W, 3) in [0, 1] of a preprocessed image (C, H, W) for the examples; None scales
            each image by its own range.
        on_progress: called with the rows that this process has, and those it will have.

    Raises:
        SettingError: if a setting is out of range, two methods have one title, or the folder holds a run of something
            else.
        InputError: if the images differ in size, or a file of the run is damaged.
        OutputError: if the folder cannot be written or holds files that are of no run, or this process of the run is
            going on already.
        ModelError: if the model is in training mode, or wrapped in DataParallel.
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
        raise SettingError(f"target is {target!r}, but it must be one of {', '.join(get_args(TargetChoice))}.")
    check_whole_number("batch_size", batch_size, 1)
    model = bare_model(model)
    check_evaluation_mode(model)
    _check_given(data, settings, methods, scores, statistics)
    rank, count = process or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if not 0 <= rank < count:
        raise SettingError(f"This is process {rank} of {count}, but they are counted from zero; name one of them.")
    chosen = scores or ScoreSettings()
    entries = [
        *(_entry_of(setting, statistics, seed) for setting in dict.fromkeys(settings)),
        *(_Entry(title, {**_OWN, "method": title}, make) for title, make in (methods or {}).items()),
    ]
    titles = [entry.title for entry in entries]
    for title in titles:
        if titles.count(title) > 1:
            raise SettingError(f"Two methods are called {title!r}; give one of them another title.")
    made = {entry: entry.make(model) for entry in entries}
    place = Path(folder)
    check_run_folder(place)
    with locked(place / f"rows-{rank}.jsonl"):
        _join_run(
            place,
            {
                "format": _FORMAT,
                "model": name,
                "weights": _weight_digest(model),
                "data": data.fingerprint,
                "images": len(data),
                "target": target,
                "scores": asdict(chosen),
                "seed": seed,
                "statistics": None if statistics is None else _digest(json.dumps(statistics.metadata, default=str)),
                # Another release may call something else by the same title.
                "parchgrad": __version__,
            },
        )
        done = {(row["setting"], row["index"]) for row in read_rows(place)}
        own = range(rank, len(data), count)
        pending = {entry: {index for index in own if (entry.title, index) not in done} for entry in entries}
        total = len(own) * len(entries)
        finished = total - sum(len(indices) for indices in pending.values())
        wanted = sorted(set().union(*pending.values())) if pending else []
        with _Appender(place / f"rows-{rank}.jsonl") as rows:
            for start in range(0, len(wanted), batch_size):
                batch = _load(data, wanted[start : start + batch_size], model, target)
                for entry, method in made.items():
                    places = [place for place, index in enumerate(batch.indices) if index in pending[entry]]
                    if not places:
                        continue
                    rows.append(_score(model, entry, method, batch.take(places), chosen, name))
                    finished += len(places)
                    if on_progress is not None:
                        on_progress(finished, total)
        _keep_examples(place, data, entries, model, statistics=statistics, seed=seed, picture=picture)


def _check_given(data: object, settings: object, methods: object, scores: object, statistics: object) -> None:
    """Raise `SettingError` naming the first of the arguments that is of another kind."""
    named = (hasattr(data, name) for name in ("__len__", "__getitem__", "categories", "fingerprint"))
    if not all(named):
        raise SettingError(
            f"data is of type {type(data).__name__}, but images with labels, categories and a fingerprint are needed; "
            "wrap a data set of pairs in parchgrad.data.samples.LabelledImages."
        )
    if isinstance(settings, Grid):
        raise SettingError("settings is a Grid, but its settings are needed; give grid.settings().")
    check_kind("settings", settings, Sequence, "give grid.settings()", wanted="a list of settings")
    for setting in cast(Sequence[object], settings):
        check_kind("One of the settings", setting, Setting, "make it with Setting(...)")
    if methods is not None:
        check_kind("methods", methods, Mapping, "give {title: make_method}", wanted="a dictionary")
    if scores is not None:
        check_kind("scores", scores, ScoreSettings, "give ScoreSettings(families=...)")
    if statistics is not None:
        read = "read a file with ChannelStatistics.load(path)"
        check_kind("statistics", statistics, ChannelStatistics, read, error=StatisticsError)


def read_rows(folder: str | Path) -> list[Row]:
    """Read the rows of a run, those of all processes, by setting in order of appearance, and by image.

    Raises:
        InputError: if there is no run in the folder, or a file of it is damaged.
    """
    place = Path(folder)
    if not (place / "run.json").is_file():
        raise InputError(f"There is no run in {str(folder)!r}; name the folder that an evaluation wrote.")
    found: dict[tuple[str, int], Row] = {}
    for file in sorted(place.glob("rows-*.jsonl")):
        for number, line in enumerate(_complete_lines(file), start=1):
            try:
                row = _checked_row(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"Line {number} of {str(file)!r} is no row of a run ({reason_of(error)}); remove it, and run the "
                    "evaluation again."
                ) from error
            found.setdefault((row["setting"], row["index"]), row)
    order = {title: place for place, title in enumerate(dict.fromkeys(title for title, _ in found))}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], key[1]))]


def _checked_row(value: object) -> Row:
    """What a line holds, with NaN for null; a ValueError if it is no row, or one that no evaluation wrote."""
    if not isinstance(value, dict) or not value.keys() >= set(_NEEDED):
        raise ValueError("it names no model, setting, image and time")
    row = {field: math.nan if found is None else found for field, found in value.items()}
    for field, found in row.items():
        if value[field] is None:
            fits = field not in (*_NEEDED, *_WHOLE_NUMBERS)
        elif field in _TEXTS:
            fits = isinstance(found, str)
        elif field in _WHOLE_NUMBERS:
            fits = type(found) is int and 0 <= found <= _LARGEST
        elif field == "gamma":
            fits = found == "inf" or _is_number(found)
        elif field == "layers":
            fits = isinstance(found, str) or _is_number(found)
            fits = fits or (isinstance(found, list) and all(isinstance(name, str) for name in found))
        elif field == "antialias":
            fits = isinstance(found, bool)
        elif field in _NUMBERS or field in SCORES:
            fits = _is_number(found)
        else:
            # What another release adds is left alone, but for scores at ratios that are none.
            score, _, ratio = field.partition("@")
            fits = score not in SCORES or (_is_number(found) and _is_level(score, float(ratio)))
        if not fits:
            raise ValueError(f"{field[:40]!r} has no such value")
    return row


def _is_number(value: object) -> bool:
    # Put so that NaN fails too; a truth value is an int.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_level(score: str, level: float) -> bool:
    """Whether a score can be reported at this share, or noise level, which may exceed 1."""
    return 0 <= level <= 1 or (SCORES[score].family == "stability" and 1 < level < math.inf)


@dataclass(frozen=True, eq=False)
class _Entry:
    """One way of explaining in a run: its title and description in the rows, and what makes it for a model."""

    title: str
    described: Mapping[str, Any]
    make: Callable[[nn.Module], Method]


def _entry_of(setting: Setting, statistics: ChannelStatistics | None, seed: int) -> _Entry:
    described = {**asdict(setting), "gamma": "inf" if math.isinf(setting.gamma) else setting.gamma}
    return _Entry(setting.title, described, lambda model: make_method(model, setting, statistics=statistics, seed=seed))


# A method of the caller's own has none of the settings.
_OWN: Mapping[str, Any] = dict.fromkeys(field.name for field in fields(Setting))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Batch:
    """Some images of the data, with what the classifier says of them."""

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
        raise InputError(f"The images have shapes {listed}; bring them to one size, or take batch_size=1.")
    weight = next(model.parameters())
    images = torch.stack([sample.image for sample in samples]).to(weight)
    with torch.no_grad():
        logits = model(images)
        probability, predicted = logits.softmax(dim=1).max(dim=1)
    for sample in samples:
        if not 0 <= sample.label < logits.shape[1]:
            raise InputError(
                f"The image {sample.name!r} is of class {sample.label}, but the model has {logits.shape[1]} classes; "
                "take data of the classes that it knows."
            )
    labels = torch.tensor([sample.label for sample in samples], device=images.device)
    return _Batch(
        indices=indices,
        samples=samples,
        images=images,
        target=labels if target == "label" else predicted,
        predicted=predicted,
        probability=probability,
    )


def _score(
    model: nn.Module, entry: _Entry, method: Method, batch: _Batch, scores: ScoreSettings, name: str
) -> list[Row]:
    """Rows of a batch under one setting."""
    start = time.perf_counter()
    heat = method(batch.images, batch.target).detach()
    if heat.is_cuda:
        # A GPU answers before it has finished.
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
            "label": sample.label,
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
    """Keep the images that a report shows, once every setting has a row of every image."""
    rows = read_rows(folder)
    described = {row["setting"]: row for row in rows}
    # Of several processes the one that finishes last sees that all is there.
    if len(rows) < len(described) * len(data) or not described.keys() >= {entry.title for entry in entries}:
        return
    choice = choose_examples(rows)
    if choice is None or _holds(folder / EXAMPLES_FILE, choice):
        return
    known = {entry.title: entry.make for entry in entries}
    for title in choice.settings:
        # Rows of an earlier evaluation say its settings, but not how a method of the caller's own is made.
        if title not in known and not math.isnan(described[title].get("gates", math.nan)):
            known[title] = _entry_of(_setting_of(described[title]), statistics, seed).make
    if known.keys() >= set(choice.settings):
        methods = {title: known[title](model) for title in choice.settings}
        make_examples(choice, data, methods, model=model, picture=picture).save(folder / EXAMPLES_FILE)


def _setting_of(row: Row) -> Setting:
    """The setting that a row is of, which this evaluation may not have asked for."""
    found: dict[str, Any] = {}
    for name in {item.name for item in fields(Setting)} & row.keys():
        value = float(row[name]) if name == "gamma" else row[name]
        # Rows say NaN for nothing, which is the default.
        if not (isinstance(value, float) and math.isnan(value)):
            found[name] = tuple(value) if isinstance(value, list) else value
    return Setting(**found)


def _holds(path: Path, choice: Choice) -> bool:
    """Whether a file holds the examples of this choice; one that is damaged or missing does not."""
    with suppress(InputError):
        return Examples.load(path).choice == choice
    return False


def _region(sample: Sample) -> Tensor | None:
    """Where the class is seen: the exact mask before the boxes."""
    if sample.mask is not None or sample.boxes is None:
        return sample.mask
    height, width = sample.image.shape[1:]
    return boxes_to_region(sample.boxes, height=height, width=width)


class _Appender:
    """Appends rows to a file, a whole batch at once; a line that an interrupted run left unfinished is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Appender":
        try:
            if self._path.is_symlink():
                raise self._cannot("it is a link")
            if self._path.exists():
                refuse_special(self._path)
                self._cut()
            # Without a buffer, which would be written once more when it is closed, though the disk be full.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise self._cannot(reason_of(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _cut(self) -> None:
        whole = sum(len(line) for line in _complete_lines(self._path))
        with self._path.open("rb") as file:
            file.seek(whole)
            # After a power cut some file systems leave zeros.
            unfinished = file.read().rstrip(b"\0")
        # What an evaluation did not write is not cut.
        if not (_ROW_START.startswith(unfinished) or unfinished.startswith(_ROW_START)):
            raise self._cannot("its last line is no row of a run")
        os.truncate(self._path, whole)

    def append(self, rows: Sequence[Row]) -> None:
        left = memoryview("".join(f"{_line_of(row)}\n" for row in rows).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot(reason_of(error)) from error

    def _cannot(self, reason: str) -> OutputError:
        return OutputError(f"{str(self._path)!r} cannot be written ({reason}); choose another folder.")


def _line_of(row: Row) -> str:
    """A row as a line of its file, made sure that it can be read again."""
    try:
        line = json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False)
        _checked_row(json.loads(line))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The row of {row['setting']!r} and the image {row['image']!r} cannot be kept ({reason_of(error)}); give "
            "samples and settings values of the kinds that they ask for."
        ) from error
    return line


def _plain(value: object) -> object:
    """JSON knows neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _complete_lines(file: Path) -> Iterator[bytes]:
    try:
        refuse_special(file)
        with file.open("rb") as opened:
            yield from (line for line in opened if line.endswith(b"\n"))
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({reason_of(error)}); choose another folder.") from error


def check_run_folder(folder: Path) -> None:
    """Raise `OutputError` if a folder holds files named as those of a run, and not the description of one.

    Example:
        >>> check_run_folder(Path("a folder to be made"))
    """
    # Before it is asked whether there is a description, which every process writes ahead of its rows.
    others = [file.name for file in (*sorted(folder.glob("rows-*.jsonl")), folder / EXAMPLES_FILE) if file.exists()]
    if others and not (folder / "run.json").exists():
        raise OutputError(
            f"{str(folder)!r} holds {others[0]!r}, but no 'run.json' that says of which run; choose another folder."
        )


def _join_run(folder: Path, described: Mapping[str, Any]) -> None:
    """Write what is evaluated, or make sure that the folder's run evaluates the same."""
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
        raise InputError(f"{str(path)!r} cannot be read ({reason_of(error)}); choose another folder.") from error
    different = [key for key, value in wanted.items() if not isinstance(found, dict) or found.get(key) != value]
    if "format" in different:
        raise SettingError(
            f"The run in {str(folder)!r} is in the format of another release of ParchGrad. Choose another folder."
        )
    if different:
        raise SettingError(
            f"The run in {str(folder)!r} differs in {', '.join(different)}; choose another folder, or the settings "
            "that it was started with."
        )


def _weight_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
