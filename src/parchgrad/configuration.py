"""What an evaluation is asked to do, as a TOML file says it, and the evaluation of all of it."""

import difflib
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torchvision import datasets

from parchgrad.data.folders import PhotographFolder, match_classes
from parchgrad.data.imagenet import BoxedFolder
from parchgrad.data.perturbed import Blur, Jigsaw
from parchgrad.data.samples import DrawnSamples, LabelledImages, Pairs, Samples
from parchgrad.data.shapes import SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.errors import ImageError, InputError, SettingError, StatisticsWarning
from parchgrad.evaluation.grid_pointing import make_mosaics
from parchgrad.evaluation.runs import Grid, TargetChoice, evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.models import Classifier, load_model
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
                raise SettingError(f"The data set {self.name!r} needs the setting {setting!r}; give it in [data].")
        if self.mosaics < 0 or self.jigsaw < 0 or self.blur < 0:
            raise SettingError("mosaics, jigsaw and blur must not be negative; leave out what is not wanted.")


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


def read_settings(path: str | Path) -> EvaluationSettings:
    r"""Read an evaluation's settings from a TOML file.

    The file has the settings of `EvaluationSettings` at its top (`model` is a name or several), and tables `[data]`,
    `[grid]` and `[scores]` with those of `DataSettings`, `Grid` and `ScoreSettings`. `statistics` is the path of a
    file, or a table with the settings of `DataSettings`.

    Raises:
        InputError: if the file cannot be read or is no TOML.
        SettingError: if a setting is unknown, missing, or out of range.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "study.toml")
        ...     _ = path.write_text('model = "resnet18"\n[data]\nname = "folder"\nroot = "photos"')
        ...     read_settings(path).data.root
        'photos'
    """
    try:
        with Path(path).open("rb") as file:
            read = tomllib.load(file)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror or error}); check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} is no TOML ({error}); mend the line that it names.") from error
    models = read.pop("model", None)
    if not models or not isinstance(models, str | list):
        raise SettingError(f'{str(path)!r} names no model; add a line such as: model = "resnet18".')
    if "data" not in read:
        raise SettingError(f"{str(path)!r} names no data; add a table [data] with a name.")
    read["models"] = [models] if isinstance(models, str) else models
    if "gammas" in read.get("grid", {}):
        read["grid"]["gammas"] = [float(gamma) for gamma in read["grid"]["gammas"]]
    if "selectors" in read.get("grid", {}):
        # TOML has no word for nothing.
        read["grid"]["selectors"] = [None if name == "none" else name for name in read["grid"]["selectors"]]
    for table, kind in (
        ("data", DataSettings),
        ("grid", Grid),
        ("scores", ScoreSettings),
        ("statistics", DataSettings),
    ):
        if table in read and not (table == "statistics" and isinstance(read[table], str)):
            read[table] = _build(kind, read[table], f"[{table}]")
    return _build(EvaluationSettings, read, "the file")


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
    runs = []
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
            settings.grid.settings(),
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
        if path.exists():
            found = ChannelStatistics.load(path)
            if found.metadata.get("data") != images.fingerprint:
                raise SettingError(
                    f"The run in {str(run)!r} has statistics of other images than [statistics] names; choose another "
                    "folder, or the images that it was started with."
                )
        else:
            found = collect_statistics(
                classifier.model,
                Pairs(images),
                batch_size=settings.batch_size,
                metadata={"model": classifier.name, "data": images.fingerprint},
                on_progress=on_progress,
            )
            if is_first_process():
                found.save(path)
    found.check_model(classifier.model)
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
    except RuntimeError as error:
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


def _build(kind: type[T], given: Mapping[str, Any], place: str) -> T:
    """Make settings of a kind from a table, whose lists become tuples."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]  # all of these are dataclasses
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"there are: {', '.join(sorted(known))}"
            raise SettingError(f"There is no setting {name!r} in {place}; {hint}.")
    try:
        return kind(**{name: _frozen(value) for name, value in given.items()})
    except TypeError as error:
        raise SettingError(f"The settings in {place} are not complete ({error}); add what is missing.") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
