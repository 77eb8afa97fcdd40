"""Read the settings of an evaluation from TOML and flags, and run it."""

import difflib
import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import torch

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import check_outputs, locked, safe_stem
from parchgrad.data.folders import PhotographFolder
from parchgrad.data.imagenet import BoxedFolder
from parchgrad.data.perturbed import Blur, Jigsaw
from parchgrad.data.samples import DrawnSamples, LabelledImages, Pairs, Samples
from parchgrad.data.shapes import SHAPE_CATEGORIES, GeneratedShapes
from parchgrad.errors import (
    ImageError,
    InputError,
    ModelWarning,
    SettingError,
    StatisticsError,
    StatisticsWarning,
    reason_of,
    warn,
)
from parchgrad.evaluation.grid_pointing import make_mosaics
from parchgrad.evaluation.leaderboard import MakeMethod, leaderboard_methods, methods_that_fit
from parchgrad.evaluation.runs import TargetChoice, check_run_folder, evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Grid
from parchgrad.explain.outputs import Logits
from parchgrad.models.classifier import Classifier
from parchgrad.models.own_networks import check_network_name, load_network
from parchgrad.models.shapes_networks import SHAPES_NETWORKS
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.collect import collect_statistics
from parchgrad.statistics.processes import is_first_process
from parchgrad.statistics.selectors import find_selector
from parchgrad.workflows.presets import find_preset

with needs_extra("evaluation"):
    from pydantic import TypeAdapter, ValidationError
    from torchvision import datasets

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

__all__ = ["DATA_SETS", "DataSettings", "EvaluationSettings", "evaluate_all", "open_data", "read_settings"]

DataName = Literal["shapes", "folder", "imagenet", "cifar10", "cifar100", "mnist", "fashion_mnist"]
_TORCHVISION: Mapping[str, Callable[..., Any]] = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "mnist": datasets.MNIST,
    "fashion_mnist": datasets.FashionMNIST,
}
DATA_SETS = ("shapes", "folder", "imagenet", *_TORCHVISION)
"""Names of the data sets."""

# Limits of a settings file, a hundred times larger than usual.
_MOST_BYTES = 100_000


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The images to evaluate.

    Attributes:
        name: one of `DATA_SETS`: `"shapes"` are generated; `"folder"` has a folder of images for each class;
            `"imagenet"` also has ILSVRC's boxes; the others are torchvision's test sets.
        root: folder of the images; nothing is downloaded.
        annotations: folder of ILSVRC's XML files, for `"imagenet"`.
        count: number of images, chosen at random; None uses all; required for generated images.
        seed: random seed of the choice and of generated images.
        mosaics: number of mosaics for the grid pointing game, instead of single images; 0 for none.
        confidence: minimum probability of images in mosaics, in [0, 1].
        jigsaw: number of swaps between cells of a 4 x 4 grid; 0 for none.
        blur: standard deviation of a Gaussian blur, in pixels; 0 for none.

    Raises:
        SettingError: if a setting is out of range, or missing for the data set.
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
            raise SettingError(f"`name` is {self.name!r}, but it must be one of {', '.join(DATA_SETS)}.")
        needed = {"shapes": ("count",), "imagenet": ("root", "annotations")}.get(self.name, ("root",))
        for setting in needed:
            if getattr(self, setting) is None:
                raise SettingError(f"The data set {self.name!r} needs {setting!r}. Set `{setting}`.")
        for setting in ("mosaics", "jigsaw", "blur"):
            # Written this way so that NaN fails too.
            if not 0 <= getattr(self, setting) < math.inf:
                raise SettingError(f"`{setting}` is {getattr(self, setting)}, but it must be finite and at least 0.")
        if not 0 <= self.confidence <= 1:
            raise SettingError(f"`confidence` is {self.confidence}, but it must be in [0, 1].")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        models: names of the models; see `load_network`.
        data: the images.
        compare: what to compare: the settings of the `"grid"`, or the methods of the `"leaderboard"` that fit the
            model; see `leaderboard_methods`.
        grid: the settings to compare.
        scores: the scores and their settings.
        target: class to explain, `"label"` or `"predicted"`.
        statistics: channel statistics for the selectors and methods that need them: a file, or labelled images from
            which they are collected for each model on first use; None uses bundled ones.
        batch_size: number of images that are loaded and scored together, at least 1.
        seed: random seed of random maps and random channels.
        weights: file of the weights of a single model; see `load_network`.
        classes: file of its class names; see `load_network`.
    """

    models: tuple[str, ...]
    data: DataSettings
    compare: Literal["grid", "leaderboard"] = "grid"
    grid: Grid = field(default_factory=Grid)
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    target: TargetChoice = "label"
    statistics: str | DataSettings | None = None
    batch_size: int = 16
    seed: int = 0
    weights: str | None = None
    classes: str | None = None

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        if self.compare == "leaderboard" and self.grid != Grid():
            raise SettingError(
                "`grid` has settings, but `compare` is 'leaderboard', whose methods have their own. "
                "Leave the grid's settings out, or do without the preset."
            )
        for name in ("weights", "classes"):
            if getattr(self, name) is not None and len(self.models) > 1:
                raise SettingError(f"`{name}` belongs to a single `model`, but there are {len(self.models)}. Pass one.")
        if not isinstance(self.statistics, DataSettings):
            return
        # The seed identifies generated images, the folder others.
        same = "seed" if self.data.name == "shapes" else "root"
        if self.data.name == self.statistics.name and getattr(self.data, same) == getattr(self.statistics, same):
            raise SettingError(
                f"[statistics] and [data] have the same {same!r}, so the statistics would be of the explained images. "
                f"Set another {same!r} in [statistics]."
            )


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise SettingError(f"`seed` is {seed}, but it must be a whole number from 0 to 2**63 - 1.")


def read_settings(
    path: str | Path | None, overrides: Mapping[str, Any] | None = None, *, preset: str | None = None
) -> EvaluationSettings:
    r"""Read an evaluation's settings from a TOML file.

    The file has the settings of `EvaluationSettings` at the top level (`model` is one name or several), and tables
    `[data]`, `[grid]` and `[scores]` for `DataSettings`, `Grid` and `ScoreSettings`. `statistics` is a path, or a table
    like `[data]`. A single value means a list of one, `"inf"` means infinity, and `"none"` means None, except in
    `conserves`, where it is a value.

    Args:
        path: path of the file; None uses only the overrides.
        overrides: settings that override those of the file, in the same tables; None values override nothing.
        preset: name in `PRESETS` whose settings the file and the overrides complete or override.

    Raises:
        InputError: if the file cannot be read or is not valid TOML.
        SettingError: if a setting or preset is unknown, or a setting is missing, out of range, or of the wrong type.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "study.toml")
        ...     _ = path.write_text('model = "resnet18"\n[data]\nname = "folder"\nroot = "photos"')
        ...     read_settings(path, {"data": {"root": "pictures"}}).data.root
        'pictures'
    """
    asked = _merged({} if preset is None else find_preset(preset), {} if path is None else _read_toml(path))
    asked = _merged(asked, overrides or {})
    absent = [name for name in ("model", "data") if not asked.get(name)]
    if absent:
        place = "The evaluation" if path is None else repr(str(path))
        raise SettingError(
            f"{place} does not set {' and '.join(f'`{name}`' for name in absent)}. Pass both, such as 'resnet18' and "
            "'folder', or a TOML file that sets them."
        )
    asked["models"] = asked.pop("model")
    return _build(asked)


def open_data(settings: DataSettings, classifier: Classifier, *, labelled: bool = True) -> Samples:
    """Open a data set with the classifier's preprocessing.

    Args:
        settings: which images.
        classifier: the network.
        labelled: whether the images need labels; mosaics always do.

    Raises:
        ImageError: if the images are missing or do not match the classes.
        SettingError: if a setting is out of range.
        InputError: if there are not enough confidently classified images for the mosaics.
    """
    found = _open(settings, classifier, labelled=labelled or settings.mosaics > 0)
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
    """Evaluate every model in its own folder, and resume existing runs.

    Args:
        settings: settings of the evaluation.
        folder: folder of the runs, created if missing. Each is named after its model, with `--` for a colon or slash.
        device: device of the models.
        on_progress: called with the model's name and its numbers of finished and of all rows; during the collection of
            statistics, as `collect_statistics` calls it.

    Returns:
        The folders of the runs, for `make_report`.

    Raises:
        ParchGradError: if models, data and settings do not match; see `evaluate`.
    """
    # Invalid settings and names must fail before anything slow starts.
    compared, runs = settings.grid.settings() if settings.compare == "grid" else (), []
    for name in settings.models:
        check_network_name(name)
    for name in settings.models:
        classifier = load_network(name, weights=settings.weights, classes=settings.classes)
        classifier.model.to(device)
        run = Path(folder) / safe_stem(classifier.name)
        with warnings.catch_warnings():
            # They would repeat for each layer and process.
            warnings.simplefilter("ignore", StatisticsWarning)
            held = _statistics_for(classifier, settings, run, on_progress)
        images = open_data(settings.data, classifier, labelled=settings.target == "label")
        methods = None
        if settings.compare == "leaderboard":
            methods = _leaderboard(classifier, images, statistics=held, seed=settings.seed)
        evaluate(
            classifier.model,
            images,
            compared,
            run,
            name=classifier.name,
            methods=methods,
            scores=settings.scores,
            target=settings.target,
            statistics=held,
            batch_size=settings.batch_size,
            seed=settings.seed,
            picture=classifier.preprocess.picture,
            on_progress=None if on_progress is None else _of_model(on_progress, classifier.name),
        )
        runs.append(run)
    return tuple(runs)


def _statistics_for(
    classifier: Classifier,
    settings: EvaluationSettings,
    run: Path,
    on_progress: Callable[[str, int, int | None], None] | None,
) -> ChannelStatistics | None:
    """Load the statistics that the settings name, or collect them into the run's folder; None if none are needed."""
    named = (find_selector(selector) for selector in settings.grid.selectors if selector is not None)
    if settings.compare == "grid" and not any(selector.needs_statistics for selector in named):
        return None
    if settings.statistics is None:
        try:
            found = ChannelStatistics.bundled(classifier.name)
        except StatisticsError:
            # The leaderboard then leaves the published method out.
            if settings.compare == "leaderboard":
                return None
            raise
    elif isinstance(settings.statistics, str):
        found = ChannelStatistics.load(settings.statistics)
    else:
        images, path = open_data(settings.statistics, classifier), run / "statistics.safetensors"
        # Collecting is slow, so check first that the evaluation will accept the folder.
        check_run_folder(run)
        check_outputs([path], force=True)
        with locked(path) if is_first_process() else nullcontext():
            found = _collected(classifier, settings, images, path, on_progress)
    found.check_model(classifier.model)
    return found


def _leaderboard(
    classifier: Classifier, images: Samples, *, statistics: ChannelStatistics | None, seed: int
) -> dict[str, MakeMethod]:
    """The methods of the leaderboard that fit a model, with a warning that names the others."""
    model = classifier.model
    first = images[0].image.unsqueeze(0).to(next(model.parameters()))
    methods = leaderboard_methods(model, statistics=statistics, seed=seed)
    with torch.no_grad():
        predicted = Logits(model, None)(first).argmax(dim=1)
    found, left_out = methods_that_fit(model, methods, first, predicted)
    if left_out:
        reasons = "; ".join(f"{title} ({reason})" for title, reason in left_out.items())
        warn(f"Methods that do not fit {classifier.name} are left out: {reasons}.", ModelWarning)
    return found


def _collected(
    classifier: Classifier,
    settings: EvaluationSettings,
    images: Samples,
    path: Path,
    on_progress: Callable[[str, int, int | None], None] | None,
) -> ChannelStatistics:
    """Statistics of these images, loaded if they were collected before."""
    if path.exists():
        found = ChannelStatistics.load(path)
        if found.metadata.get("data") != images.fingerprint:
            raise SettingError(
                f"The run in {str(path.parent)!r} has statistics of other images than [statistics]. Choose another "
                "folder, or use the images of the run."
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


def _open(settings: DataSettings, classifier: Classifier, *, labelled: bool) -> Samples:
    transform, categories = classifier.preprocess, classifier.categories
    if settings.name == "shapes":
        if categories != SHAPE_CATEGORIES:
            names = ", ".join(repr(name) for name in SHAPES_NETWORKS)
            raise SettingError(f"{classifier.name} does not classify generated shapes. Use one of the models {names}.")
        return GeneratedShapes(count=cast(int, settings.count), seed=settings.seed)
    root = str(settings.root)
    if settings.name == "imagenet":
        return BoxedFolder(
            root, str(settings.annotations), transform.transform, categories=categories, synsets=classifier.synsets
        )
    if settings.name == "folder":
        photographs = PhotographFolder(root, transform)
        try:
            photographs = photographs.with_categories(categories, classifier.synsets)
        except ImageError as error:
            if labelled:
                raise ImageError(
                    f"{error} Predicted classes need no class folders. Pass `target='predicted'` without `mosaics`."
                ) from error
        return LabelledImages(photographs, categories=categories)
    kind = _TORCHVISION[settings.name]
    try:
        held = kind(root, train=False, transform=transform, download=False)
    except Exception as error:
        # torchvision raises all kinds of errors for damaged files.
        raise ImageError(
            f"{root!r} does not contain torchvision's {settings.name}. Download it there with torchvision, or pass "
            "another `root`."
        ) from error
    if len(held.classes) != len(categories):
        raise SettingError(
            f"{settings.name} has {len(held.classes)} classes, but {classifier.name} has {len(categories)}. Use a "
            "model that was trained on it."
        )
    return LabelledImages(held)


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise InputError(f"{str(path)!r} is not a settings file: it must have at most {_MOST_BYTES:,} bytes.")
        read: dict[str, Any] = tomllib.loads(content.decode())
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"Cannot read {str(path)!r} ({reason_of(error)}). Check the path.") from error
    except (ValueError, RecursionError) as error:
        # Numbers with thousands of digits raise a plain ValueError.
        raise InputError(f"{str(path)!r} is not valid TOML ({reason_of(error)}). Fix that line.") from error
    return read


def _merged(given: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(given)
    for name, value in overrides.items():
        table = found.get(name)
        if isinstance(value, Mapping) and isinstance(table, Mapping):
            found[name] = _merged(table, value)
        elif isinstance(value, Mapping) and name not in found:
            # Not by recursion, since the tables of a file may be nested to any depth.
            found[name] = {key: inner for key, inner in value.items() if inner is not None}
        elif value is not None and not isinstance(value, Mapping):
            found[name] = value
    # Anything but a table is kept where a table is expected, so that it is reported as an error.
    return found


def _build(asked: Mapping[str, Any]) -> EvaluationSettings:
    """Make the settings of tables, checking every type; pydantic's JSON mode takes lists for tuples, but no guesses."""
    try:
        text = json.dumps(_prepared(asked, EvaluationSettings, "the settings"))
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        # A date, or a number of more digits than Python writes.
        raise SettingError(f"A setting cannot be read ({reason_of(error)}). Use texts and numbers.") from error
    try:
        return TypeAdapter(EvaluationSettings).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, SettingError):
        raise reason
    # The rest of the place are positions in lists and members of unions.
    name = ".".join(part for part in map(str, first["loc"]) if part in _NAMES)
    if first["type"] in ("missing", "missing_argument"):
        raise SettingError(f"{name!r} is missing in the settings. Add it.")
    given = repr(first["input"])
    shown = given if len(given) <= 100 else f"{given[:97]}..."
    raise SettingError(f"{name!r} in the settings is {shown}. {first['msg']}.")


def _prepared(table: Mapping[str, Any], kind: type, place: str) -> dict[str, Any]:
    """Check the names in a table, and write what TOML cannot express: None, and a list of one as its value."""
    types = get_type_hints(kind)
    for name in table:
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"Perhaps you meant {near[0]!r}" if near else f"Use one of {', '.join(sorted(types))}"
            raise SettingError(f"Unknown setting {name!r} in {place}. {hint}.")
    return {name: _value(value, name, types[name]) for name, value in table.items()}


def _value(value: Any, name: str, kind: Any = None) -> Any:
    if isinstance(value, Mapping):
        inner = next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)
        return _prepared(value, cast(type, inner), f"[{name}]") if inner else value
    if get_origin(kind) is tuple and not isinstance(value, list | tuple):
        value = [value]
    if isinstance(value, list | tuple):
        return [_value(item, name) for item in value]
    if value == "none" and name != "conserves":
        return None
    return math.inf if value == "inf" else value


_NAMES = {item.name for kind in (EvaluationSettings, DataSettings, Grid, ScoreSettings) for item in fields(kind)}
