"""What an evaluation is asked to do, as a TOML file or flags say it, and the evaluation of all of it."""

import difflib
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torchvision import datasets

from parchgrad.data.folders import PhotographFolder, match_classes
from parchgrad.data.imagenet import BoxedFolder
from parchgrad.data.perturbed import Blur, Jigsaw
from parchgrad.data.samples import DrawnSamples, LabelledImages, Pairs, Samples
from parchgrad.data.shapes import SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.errors import ImageError, InputError, SettingError, StatisticsWarning, reason_of
from parchgrad.evaluation.grid_pointing import make_mosaics
from parchgrad.evaluation.runs import TargetChoice, check_run_folder, evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Grid
from parchgrad.files import check_outputs, locked, refuse_special
from parchgrad.models import Classifier, check_model_name, load_model
from parchgrad.selection import STATISTICAL_SELECTORS
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.collect import collect_statistics
from parchgrad.statistics.processes import is_first_process

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DATA_SETS", "DataSettings", "EvaluationSettings", "evaluate_all", "open_data", "read_settings"]

T = TypeVar("T")
DataName = Literal["shapes", "folder", "imagenet", "cifar10", "cifar100", "mnist", "fashion_mnist"]
_TORCHVISION: Mapping[str, Callable[..., Any]] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
}
DATA_SETS = ("shapes", "folder", "imagenet", *_TORCHVISION)
"""Names of the data sets."""

# Flags of settings that the command line leaves to be checked here; the types of others it checks itself.
_FLAGS = {
    "models": "--model",
    "name": "--data",
    "conserves": "--conserve",
    "families": "--scores",
    "target": "--target",
}
# Settings of an evaluation take a hundredth of that.
_MOST_BYTES, _MOST_DOTS = 100_000, 1000
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "'none'"}
# Python has two of them, for types of its own and for those of typing.
_UNIONS = (Union, UnionType)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images.

    Attributes:
        name: one of `DATA_SETS`: `"shapes"` are generated; `"folder"` has a folder of photographs for each class;
            `"imagenet"` has such a folder and ILSVRC's boxes; the others are torchvision's test sets.
        root: folder of the images; nothing is downloaded.
        annotations: folder of ILSVRC's XML files, for `"imagenet"`.
        count: how many images, drawn at random; None takes all, which generated ones have no end of.
        seed: of the draw, and of generated images.
        mosaics: number of mosaics for the grid pointing game, in place of single images; 0 for none.
        confidence: least probability of an image that takes part in mosaics.
        jigsaw: how often cells of a 4 x 4 grid change places; 0 for none.
        blur: standard deviation of a Gaussian blur, in pixels; 0 for none.

    Raises:
        SettingError: if a setting is out of range, or one that the data set needs is missing.
    """

    name: DataName
    root: str | None = None
    annotations: str | None = None
    count: int | None = None
    seed: int = 0
    mosaics: int = 0
    confidence: float = 0.9
    jigsaw: int = 0
    blur: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in DATA_SETS:
            raise SettingError(f"There is no data set {self.name!r}; there are: {', '.join(DATA_SETS)}.")
        needed = {"shapes": ("count",), "imagenet": ("root", "annotations")}.get(self.name, ("root",))
        for setting in needed:
            if getattr(self, setting) is None:
                raise SettingError(
                    f"The data set {self.name!r} needs the setting {setting!r}; give it in [data], or as --{setting}."
                )
        # Put so that NaN fails too.
        if not (self.mosaics >= 0 and self.jigsaw >= 0 and 0 <= self.blur < math.inf):
            raise SettingError(
                "mosaics, jigsaw and blur must not be negative or infinite; leave out what is not wanted."
            )
        if not 0 <= self.confidence <= 1:
            raise SettingError(f"confidence is {self.confidence}, but it must be a probability, in [0, 1].")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """All that an evaluation is asked to do.

    Attributes:
        models: names of the models; see `load_model`.
        data: which images.
        grid: which settings are compared.
        scores: which scores, and how.
        target: which class is explained: `"label"` or `"predicted"`.
        statistics: channel statistics for the selectors that need some: a file, or labelled images on which those of
            each model are collected when they are first needed; None takes bundled ones.
        batch_size: images that are loaded and scored together, at least 1.
        seed: of random maps and random channels.
    """

    models: tuple[str, ...]
    data: DataSettings
    grid: Grid = field(default_factory=Grid)
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    target: TargetChoice = "label"
    statistics: str | DataSettings | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        if not isinstance(self.statistics, DataSettings):
            return
        # Of generated images the seed says which they are, of others the folder.
        same = "seed" if self.data.name == "shapes" else "root"
        if self.data.name == self.statistics.name and getattr(self.data, same) == getattr(self.statistics, same):
            raise SettingError(
                f"[statistics] has the {same} of [data], so that statistics would be of the images that are explained; "
                f"give it another {same}."
            )


def _check_seed(seed: int) -> None:
    # What generators of random numbers take.
    if not 0 <= seed < 2**63:
        raise SettingError(f"seed is {seed}, but it must be a whole number of at least 0, below 2**63.")


def read_settings(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> EvaluationSettings:
    r"""Read an evaluation's settings from a TOML file.

    The file has the settings of `EvaluationSettings` at its top (`model` is a name or several), and tables `[data]`,
    `[grid]` and `[scores]` with those of `DataSettings`, `Grid` and `ScoreSettings`; `statistics` is the path of a
    file, or a table like `[data]`. A single value stands for a list of one. `"none"` stands for None, except in
    `conserves`, which has a value of that name, and `"inf"` for infinity.

    Args:
        path: of the file; None where the overrides say everything.
        overrides: settings that go before those of the file, in tables like its own; None overrides nothing.

    Raises:
        InputError: if the file cannot be read or is no TOML.
        SettingError: if a setting is unknown, missing, out of range, or of another type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "study.toml")
        ...     _ = path.write_text('model = "resnet18"\n[data]\nname = "folder"\nroot = "photos"')
        ...     read_settings(path, {"data": {"root": "pictures"}}).data.root
        'pictures'
    """
    asked = _merged({} if path is None else _read_toml(path), overrides or {})
    absent = [name for name in ("model", "data") if not asked.get(name)]
    if absent:
        place = "The evaluation" if path is None else repr(str(path))
        raise SettingError(
            f"{place} names no {' and no '.join(absent)}; give flags, such as --model shapes --data shapes "
            '--count 100, or a TOML file with model = "shapes" and a table [data].'
        )
    asked["models"] = asked.pop("model")
    return _build(EvaluationSettings, asked, "the settings" if path is None else "the file")


def open_data(settings: DataSettings, classifier: Classifier) -> Samples:
    """Open a data set, preprocessed as the classifier wants it.

    Raises:
        ImageError: if the images are not where the settings say, or do not fit the classes.
        SettingError: if a setting is out of range.
        InputError: if there are not enough confidently classified images for the mosaics.
    """
    found = _open(settings, classifier)
    if settings.count is not None and settings.name != "shapes":
        found = DrawnSamples(found, count=settings.count, seed=settings.seed)
    if settings.mosaics:
        found = make_mosaics(
            classifier.model, found, count=settings.mosaics, confidence=settings.confidence, seed=settings.seed
        )
    if settings.jigsaw:
        found = Jigsaw(found, grid=4, shuffles=settings.jigsaw, seed=settings.seed)
    if settings.blur:
        found = Blur(found, magnitude=settings.blur)
    return found


def evaluate_all(
    settings: EvaluationSettings,
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    on_progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[Path, ...]:
    """Evaluate every model, each in a folder of its own; what is there already is not done again.

    Args:
        settings: all that is asked for.
        folder: where the runs go; made where there is none.
        device: where the models run.
        on_progress: called with the model's name, the rows it has, and those it will have; while statistics are
            collected, as `collect_statistics` calls it.

    Returns:
        The folders of the runs, for `make_report`.

    Raises:
        ParchGradError: if models, data and settings do not go together; see `evaluate`.
    """
    # Made first, so that what is wrong with them is said before anything takes long.
    compared, runs = settings.grid.settings(), []
    for name in settings.models:
        check_model_name(name)
    for name in settings.models:
        classifier = load_model(name)
        classifier.model.to(device)
        held = None
        if any(selector in STATISTICAL_SELECTORS for selector in settings.grid.selectors):
            with warnings.catch_warnings():
                # Said once for each layer and process otherwise.
                warnings.simplefilter("ignore", StatisticsWarning)
                held = _statistics_for(classifier, settings, Path(folder) / name, on_progress)
        run = Path(folder) / name
        evaluate(
            classifier.model,
            open_data(settings.data, classifier),
            compared,
            run,
            name=name,
            scores=settings.scores,
            target=settings.target,
            statistics=held,
            batch_size=settings.batch_size,
            seed=settings.seed,
            # Every data set is preprocessed as the classifier wants it.
            picture=classifier.preprocess.picture,
            on_progress=None if on_progress is None else _of_model(on_progress, name),
        )
        runs.append(run)
    return tuple(runs)


def _statistics_for(
    classifier: Classifier,
    settings: EvaluationSettings,
    run: Path,
    on_progress: Callable[[str, int, int | None], None] | None,
) -> ChannelStatistics:
    """The statistics that the settings name; collected ones stand in the run's folder from then on."""
    if settings.statistics is None:
        found = ChannelStatistics.bundled(classifier.name)
    elif isinstance(settings.statistics, str):
        found = ChannelStatistics.load(settings.statistics)
    else:
        images, path = open_data(settings.statistics, classifier), run / "statistics.safetensors"
        # Collecting takes long, and the evaluation would refuse such a folder after it.
        check_run_folder(run)
        check_outputs([path], force=True)
        with locked(path) if is_first_process() else nullcontext():
            found = _collected(classifier, settings, images, path, on_progress)
    found.check_model(classifier.model)
    return found


def _collected(
    classifier: Classifier,
    settings: EvaluationSettings,
    images: Samples,
    path: Path,
    on_progress: Callable[[str, int, int | None], None] | None,
) -> ChannelStatistics:
    """The statistics of these images, read if they were collected before."""
    if path.exists():
        found = ChannelStatistics.load(path)
        if found.metadata.get("data") != images.fingerprint:
            raise SettingError(
                f"The run in {str(path.parent)!r} has statistics of other images than [statistics] names; choose "
                "another folder, or the images that it was started with."
            )
        return found
    found = collect_statistics(
        classifier.model,
        Pairs(images),
        batch_size=settings.batch_size,
        metadata={"model": classifier.name, "data": images.fingerprint},
        on_progress=on_progress,
    )
    if is_first_process():
        found.save(path, force=False)
    return found


def _of_model(on_progress: Callable[[str, int, int | None], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(name, done, total)


def _open(settings: DataSettings, classifier: Classifier) -> Samples:
    transform, categories = classifier.preprocess, classifier.categories
    if settings.name == "shapes":
        if categories != SHAPE_CATEGORIES:
            raise SettingError(f"{classifier.name} does not know the generated shapes; choose the model 'shapes'.")
        return GeneratedShapes(count=cast(int, settings.count), seed=settings.seed)
    root = str(settings.root)
    if settings.name == "imagenet":
        return BoxedFolder(
            root, str(settings.annotations), transform.transform, categories=categories, synsets=classifier.synsets
        )
    if settings.name == "folder":
        photographs = PhotographFolder(root, transform)
        if not photographs.folders:
            raise ImageError(f"The photographs below {root!r} are in no class folders; sort them into one per class.")
        class_of, _ = match_classes(photographs.folders, categories, classifier.synsets)
        return LabelledImages(photographs.with_classes(class_of), categories=categories)
    kind = _TORCHVISION[settings.name]
    try:
        held = kind(root, train=False, transform=transform, download=False)
    except Exception as error:
        # What torchvision reads of damaged files raises what it likes.
        raise ImageError(
            f"{root!r} does not hold torchvision's {settings.name}; download it there once with torchvision, "
            "or name the folder that has it."
        ) from error
    if len(held.classes) != len(categories):
        raise SettingError(
            f"{settings.name} has {len(held.classes)} classes, {classifier.name} {len(categories)}; choose a model "
            "that was trained on it."
        )
    return LabelledImages(held)


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        refuse_special(path)
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        # The parser takes time with the square of a key's parts.
        if len(content) > _MOST_BYTES or any(line.count(b".") > _MOST_DOTS for line in content.splitlines()):
            raise InputError(
                f"{str(path)!r} is no file of settings: these have {_MOST_BYTES:,} bytes at most, and {_MOST_DOTS:,} "
                "dots in a line; give another file."
            )
        read: dict[str, Any] = tomllib.loads(content.decode())
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({reason_of(error)}); check the path.") from error
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits are a plain ValueError.
        raise InputError(f"{str(path)!r} is no TOML ({reason_of(error)}); mend the line that it names.") from error
    return read


def _merged(given: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            table = found.get(name, {})
            # What the file gives in place of a table stays, so that it is said.
            if isinstance(table, Mapping):
                found[name] = _merged(table, value)
        elif value is not None:
            found[name] = value
    return found


def _build(kind: type[T], given: Mapping[str, Any], place: str) -> T:
    """Make settings of a kind from a table, each as the type of its field has it."""
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # all of these are dataclasses
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"there are: {', '.join(sorted(known))}"
            raise SettingError(f"There is no setting {name!r} in {place}; {hint}.")
    for name, item in known.items():
        if name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise SettingError(f"The settings in {place} are not complete without {_called(name)}; add it.")
    types, values = get_type_hints(kind), {}
    for name, value in given.items():
        try:
            values[name] = _convert(value, types[name], f"[{name}]")
        except ValueError as error:
            wanted = " or ".join(_words(types[name]))
            raise SettingError(f"{_called(name)} in {place} is {_short(value)}, but it must be {wanted}.") from error
    return kind(**values)


def _short(value: object) -> str:
    """A value of a file as it is quoted to its user, who knows the rest."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} without end"
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _called(name: str) -> str:
    return f"{name!r} ({_FLAGS[name]})" if name in _FLAGS else repr(name)


def _convert(value: Any, wanted: Any, place: str) -> Any:
    """A value of a file as the wanted type has it; a ValueError where it has no such value."""
    kinds = get_args(wanted)
    if is_dataclass(wanted) and isinstance(value, Mapping):
        return _build(cast(type, wanted), value, place)
    if get_origin(wanted) in _UNIONS:
        if (value is None and NoneType in kinds) or (value == "none" and _none_is_a_word(kinds)):
            return None
        for kind in kinds:
            try:
                return _convert(value, kind, place)
            except ValueError:
                continue
    elif get_origin(wanted) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, kinds[0], place) for item in items)
    elif (get_origin(wanted) is Literal and value in kinds) or type(value) is wanted:
        # TOML promises 64 bits, and what counts items takes no more.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError
        return value
    elif wanted is float and (type(value) is int or value == "inf"):
        with suppress(OverflowError):
            return float(value)
    raise ValueError


def _words(wanted: Any) -> list[str]:
    """What a type is called where people read it; a list is mentioned once, however deep."""
    if get_origin(wanted) is Literal:
        return [f"one of {', '.join(get_args(wanted))}"]
    kinds = get_args(wanted)
    meant = [kind for kind in kinds if kind is not ... and (kind is not NoneType or _none_is_a_word(kinds))]
    parts = [word for kind in meant for word in _words(kind)]
    if get_origin(wanted) not in _UNIONS:
        parts.append("a list of such" if parts else _WORDS.get(wanted, "a table"))
    return list(dict.fromkeys(parts))


def _none_is_a_word(kinds: Sequence[Any]) -> bool:
    """Whether "none" stands for None, which TOML has no word for, and not for a value of that name."""
    return NoneType in kinds and not any("none" in get_args(kind) for kind in kinds)
