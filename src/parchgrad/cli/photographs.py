"""The commands explain, sweep, animate and demo."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

import typer
from rich.markup import escape

from parchgrad._io.files import check_outputs, distinct_stems
from parchgrad.cli.shared import (
    METHOD,
    OWN_NETWORK,
    ClassesFile,
    ModelName,
    WeightsFile,
    check_selector,
    check_selectors,
    complete_selectors,
    console,
    error_console,
    images_in,
    load_classifier,
    make_table,
    parse_layers,
    place_of,
    printable,
)
from parchgrad.errors import SettingError

if TYPE_CHECKING:
    from PIL import Image

    from parchgrad.core.edit import Edit
    from parchgrad.core.selectors import RegisteredSelector
    from parchgrad.models.classifier import Classifier
    from parchgrad.statistics import ChannelStatistics
    from parchgrad.visual.sweeps import Sweep
    from parchgrad.workflows.photographs import Explanation


# Images held in memory together with their maps.
_AT_ONCE = 8
_FIGURES = "Figures"
_BOXES = "Detections"

# Options that several commands share.
Images: TypeAlias = Annotated[
    list[Path], typer.Argument(help="Images, or folders of images: JPEG, PNG or anything Pillow reads.")
]
SelectorName: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How channels are ranked, such as evidence, energy or class; see `parchgrad selectors`.",
        autocompletion=complete_selectors,
        callback=check_selector,
    ),
]
TargetName: TypeAlias = Annotated[
    str | None, typer.Option(help="Class to explain, by name or index.", show_default="predicted class")
]
StatisticsFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="File of channel statistics, for the selectors class and instance; see `parchgrad stats`.",
        show_default="bundled, for efficientnet_lite0",
    ),
]
Quantile: TypeAlias = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="SHARE",
        min=0,
        max=1,
        help="Share of the channels at or above the threshold, in (0, 1].",
        show_default=False,
    ),
]
Softness: TypeAlias = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="WIDTH",
        min=0,
        max=1,
        help="Width of the ramp around the threshold, in [0, 1]; 0 is the published hard cut.",
        show_default=False,
    ),
]
LayerTexts: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="TEXT",
        help="Layers to edit: 'auto' (what suits the network), 'all', a ratio (0.5: the upper half of the path), "
        "patterns ('layer3.*,conv1', or the option several times), or 'published' (as in the paper).",
        show_default=False,
    ),
]
Gamma: TypeAlias = Annotated[
    float,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="FACTOR",
        min=0,
        help="Factor of the kept signal relative to the rest; 'inf' prunes the rest.",
    ),
]
Conservation: TypeAlias = Annotated[
    Literal["energy", "independent", "exact", "none"] | None,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="NAME",
        help="What a layer conserves: the norm of its gradient (energy), the variance of the sum over its channels, "
        "estimated (independent, as published) or exact, or nothing (none).",
        show_default=False,
    ),
]
Gates: TypeAlias = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="WIDTH",
        min=0,
        help="Width of the soft gates of rectifiers and max pooling, in standard deviations; 0 is the true derivative.",
        show_default=False,
    ),
]
Antialias: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--antialias/--no-antialias",
        help="Smooth the gradient at the input of strided operations.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
Balance: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--balance/--no-balance",
        help="Balance attention, normalisations, gates and smooth activations.",
        show_default=False,
        rich_help_panel=METHOD,
    ),
]
MethodName: TypeAlias = Annotated[
    str,
    typer.Option(
        rich_help_panel=METHOD,
        metavar="NAME",
        help="gradient, input_x_gradient, integrated_gradients, smoothgrad, or a Captum class name.",
    ),
]
Values: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Values, separated by commas: '0.5,0.2,0.1'.", show_default="six values, from many channels to few"
    ),
]
DeviceName: TypeAlias = Annotated[
    str, typer.Option(help="Device of the model: 'cpu', 'cuda', 'cuda:1', 'mps'.", rich_help_panel=OWN_NETWORK)
]
Over: TypeAlias = Annotated[
    Literal["quantile", "alpha"],
    typer.Option(help="Setting to vary: quantile, or alpha (the p-value at the threshold) for class and instance."),
]
SharedScale: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--shared-scale",
        rich_help_panel=_FIGURES,
        help="Draw all maps on one scale, in multiples of a map's mean. By default each map has its own scale.",
    ),
]
Colormap: TypeAlias = Annotated[
    str,
    typer.Option(metavar="NAME", help="Matplotlib's name of the colour map for magnitudes.", rich_help_panel=_FIGURES),
]
Smoothing: TypeAlias = Annotated[
    float,
    typer.Option(
        metavar="SIGMA",
        help="Smooth the drawn maps with a Gaussian of this many pixels.",
        min=0.0,
        rich_help_panel=_FIGURES,
    ),
]
Resolution: TypeAlias = Annotated[
    int, typer.Option("--dpi", help="Resolution of the figures, in dots per inch.", min=1, rich_help_panel=_FIGURES)
]
FigureFormat: TypeAlias = Annotated[
    Literal["png", "pdf", "svg"], typer.Option("--format", help="Format of the figures.", rich_help_panel=_FIGURES)
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Overwrite existing results.")]


def explain(
    images: Images,
    model: ModelName = "efficientnet_lite0",
    target: TargetName = None,
    selector: SelectorName = "evidence",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/explain"),
    force: Force = False,
    stability: Annotated[
        bool,
        typer.Option(
            "--stability",
            help="Measure how stable each map is under imperceptible noise; takes five more maps per image.",
        ),
    ] = False,
    signed: Annotated[
        bool,
        typer.Option(
            "--signed",
            help="Draw a second panel with signed maps: brighter pixels raise the score where it is red, darker ones "
            "where it is blue.",
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--versus",
            metavar="CLASS",
            help="Explain why the target rather than this class, given by name or index; 'runner-up' is the other most "
            "probable class, 'rest' all other classes.",
            show_default="the target alone",
        ),
    ] = None,
    weights: WeightsFile = None,
    classes: ClassesFile = None,
    device: DeviceName = "cpu",
    form: FigureFormat = "png",
    colormap: Colormap = "inferno",
    smooth: Annotated[
        float | None,
        typer.Option(
            metavar="SIGMA",
            help="Smooth the drawn maps with a Gaussian of this many pixels; the .npy files stay as they are.",
            show_default="0; signed maps: 1% of the shorter side",
            min=0.0,
            rich_help_panel=_FIGURES,
        ),
    ] = None,
    shared_scale: SharedScale = False,
    dpi: Resolution = 200,
    quantile: Quantile = None,
    softness: Softness = None,
    layers: LayerTexts = None,
    gamma: Gamma = math.inf,
    conserve: Conservation = None,
    gates: Gates = None,
    antialias: Antialias = None,
    balance: Balance = None,
    method: MethodName = "gradient",
    statistics: StatisticsFile = None,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="X1,Y1,X2,Y2",
            help="Explain what a detector of torchvision finds at this box, in pixels; needs --label and a detector as "
            "--model, such as fasterrcnn_resnet50_fpn.",
            rich_help_panel=_BOXES,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Class of the detection at --box, by name or index.", rich_help_panel=_BOXES),
    ] = None,
) -> None:
    """Explain images: write a panel, the raw signed map (.npy) and all settings (.json) for each.

    The defaults are the best known settings. For the published method use
    --selector class --layers published --softness 0 --conserve independent
    """
    asked = _Options.of(locals())
    images = images_in(images, out)
    if box is not None or label is not None:
        _check_box(asked, box, label, against, stability=stability)
    with error_console.status("Starting") as status:
        from parchgrad.data.images import read_image, stored_frame

        # Check everything before writing the first file, and the input files before the slow imports.
        for path in images:
            stored_frame(path)
        _check_used([selector], asked)

        from parchgrad.visual import check_colormap, save_figure
        from parchgrad.workflows.photographs import UNSTABLE, Explanation

        check_colormap(colormap)
        stems = distinct_stems(images)
        signed_panels = [out / f"{stem}-signed.{form}" for stem in stems] if signed else []
        own = [file for stem in stems for file in Explanation.files(out, stem, form)]
        check_outputs([*own, *signed_panels], force=force, inputs=images)
        if box is not None and label is not None:
            explained = _prepare_box(asked, selector, box, label, status.update)
        else:
            explained = _prepare_class(asked, selector, against, stability, status.update)
        look: dict[str, Any] = {"shared_scale": shared_scale, "smooth": smooth}
        columns = ("image", "explained class", *(["stability"] if stability else []), "also predicted")
        table, done = make_table(*columns), 0
        edited: list[str] = []
        unstable: list[str] = []
        try:
            for start in range(0, len(images), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                # Results of images with the same name are numbered.
                names = [
                    path.name if stem == path.stem else f"{path} ({stem})"
                    for path, stem in zip(images[part], stems[part], strict=True)
                ]
                for found in explained([read_image(path) for path in images[part]], names=names):
                    status.update(f"Explaining, {done} of {len(images)} done")
                    found.save(out, stems[done], form=form, dpi=dpi, colormap=colormap, force=force, **look)
                    if signed:
                        save_figure(found.signed_figure(**look), signed_panels[done], dpi=dpi, force=force)
                    done, edited = done + 1, found.settings["layers"]
                    others = [shown for shown in found.predictions if shown.index != found.target.index][:3]
                    measured = [] if found.stability is None else [f"{found.stability:.2f}"]
                    if found.stability is not None and found.stability < UNSTABLE:
                        unstable.append(found.name)
                    shown = str(found.target) if found.against is None else f"{found.target}, not {found.against}"
                    table.add_row(printable(found.name), shown, *measured, ", ".join(map(str, others)))
        except KeyboardInterrupt:
            kept = f"{done} of {len(images)} images are done, in {escape(str(out))}. Pass only the others to continue."
            error_console.print(f"Stopped. {kept}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None

    console.print(table)
    edits = f"{len(edited)} layers edited, {edited[0]} to {edited[-1]}" if len(edited) > 1 else f"{edited[0]} edited"
    console.print(f"\n{edits}", highlight=False)
    console.print(f"Panels, maps and settings are in {escape(str(out))}", highlight=False, soft_wrap=True)
    if unstable:
        named = ", ".join(map(printable, unstable[:3])) + (", ..." if len(unstable) > 3 else "")
        error_console.print(
            f"[bold yellow]Warning:[/] {len(unstable)} of {len(images)} maps ({named}) have a stability below "
            f"{UNSTABLE:g}. Imperceptible noise changes them, so they explain little. Try the default settings.",
            highlight=False,
            soft_wrap=True,
        )


def sweep(
    images: Images,
    model: ModelName = "efficientnet_lite0",
    target: TargetName = None,
    selector: SelectorName = "evidence",
    over: Over = "quantile",
    values: Values = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/sweep"),
    force: Force = False,
    weights: WeightsFile = None,
    classes: ClassesFile = None,
    device: DeviceName = "cpu",
    form: FigureFormat = "png",
    columns: Annotated[int, typer.Option(rich_help_panel=_FIGURES, help="Number of pictures per row.", min=1)] = 4,
    colormap: Colormap = "inferno",
    smooth: Smoothing = 0.0,
    shared_scale: SharedScale = False,
    dpi: Resolution = 200,
    softness: Softness = None,
    layers: LayerTexts = None,
    gamma: Gamma = math.inf,
    conserve: Conservation = None,
    gates: Gates = None,
    antialias: Antialias = None,
    balance: Balance = None,
    method: MethodName = "gradient",
    statistics: StatisticsFile = None,
) -> None:
    """Explain images at several quantiles or alphas: write a panel for each."""
    images = images_in(images, out)
    paths = [out / f"{stem}.{form}" for stem in distinct_stems(images)]
    check_outputs(paths, force=force, inputs=images)
    asked = _Options.of(locals())
    with error_console.status("Starting") as status:
        from parchgrad.visual import check_colormap, save_figure

        check_colormap(colormap)
        sweeps = _make_sweeps(images, [selector], asked, over, values, status.update)
        for path, (found,) in zip(paths, sweeps, strict=True):
            figure = found.figure(columns=columns, shared_scale=shared_scale, smooth=smooth, colormap=colormap)
            save_figure(figure, path, dpi=dpi, force=force)
            _say_sweeps(path, {"mean weight": found})


def animate(
    images: Images,
    model: ModelName = "efficientnet_lite0",
    target: TargetName = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="How channels are ranked; see `parchgrad selectors`. Repeat the option to show several side by side.",
            show_default="evidence",
            autocompletion=complete_selectors,
            callback=check_selectors,
        ),
    ] = None,
    over: Over = "quantile",
    values: Values = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/animate"),
    force: Force = False,
    weights: WeightsFile = None,
    classes: ClassesFile = None,
    device: DeviceName = "cpu",
    form: Annotated[
        Literal["gif", "webp", "mp4"],
        typer.Option("--format", help="Format of the animation; mp4 needs ffmpeg.", rich_help_panel=_FIGURES),
    ] = "gif",
    most_kilobytes: Annotated[
        int, typer.Option(rich_help_panel=_FIGURES, help="Size limit of a file; panels shrink to fit.", min=1)
    ] = 1500,
    colormap: Colormap = "inferno",
    smooth: Smoothing = 0.0,
    shared_scale: SharedScale = False,
    softness: Softness = None,
    layers: LayerTexts = None,
    gamma: Gamma = math.inf,
    conserve: Conservation = None,
    gates: Gates = None,
    antialias: Antialias = None,
    balance: Balance = None,
    method: MethodName = "gradient",
    statistics: StatisticsFile = None,
) -> None:
    """Animate the maps of images over several quantiles or alphas: write an animation for each."""
    selectors = list(dict.fromkeys(selector or ["evidence"]))
    images = images_in(images, out)
    paths = [out / f"{stem}.{form}" for stem in distinct_stems(images)]
    check_outputs(paths, force=force, inputs=images)
    asked = _Options.of(locals())
    with error_console.status("Starting") as status:
        from parchgrad.visual import check_colormap
        from parchgrad.visual.animation import check_format, save_animation

        check_format(paths[0])
        check_colormap(colormap)
        sweeps = _make_sweeps(images, selectors, asked, over, values, status.update)
        for path, row in zip(paths, sweeps, strict=True):
            panels = {_find_selector(name).title: found for name, found in zip(selectors, row, strict=True)}
            save_animation(
                panels,
                path,
                most_bytes=1000 * most_kilobytes,
                shared_scale=shared_scale,
                smooth=smooth,
                colormap=colormap,
                force=force,
            )
            _say_sweeps(path, panels)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("outputs/demo"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing page.")] = False,
) -> None:
    """Explain four photographs and play the grid pointing game on them, offline; write a page."""
    with error_console.status("Explaining four photographs and their mosaic"):
        from parchgrad.workflows.demonstration import CHANCE, Demonstration, demonstrate

        check_outputs(Demonstration.files(out), force=force)
        found = demonstrate()
        page = found.save(out, force=force)
    table = make_table("class", *found.shares)
    for index, category in enumerate(found.categories):
        table.add_row(category, *(f"{shares[index]:.2f}" for shares in found.shares.values()))
    table.add_row("[bold]mean", *(f"[bold]{shares.mean():.2f}" for shares in found.shares.values()))
    console.print("Share of the map in the cell of its class, 2 x 2 mosaic", style="bold")
    console.print(table)
    console.print(f"Chance is {CHANCE:.2f}. Higher is better.")
    console.print(f"Open {escape(str(page))}", highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options that the commands share; None uses the selector's default."""

    model: str
    target: str | None
    statistics: Path | None
    quantile: float | None = None
    softness: float | None
    layers: list[str] | None
    gamma: float
    conserve: Literal["energy", "independent", "exact", "none"] | None
    gates: float | None
    antialias: bool | None
    balance: bool | None
    method: str
    device: str
    weights: Path | None
    classes: Path | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "_Options":
        """Pick the options out of a command's parameters."""
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given})


def _check_box(asked: _Options, box: str | None, label: str | None, against: str | None, *, stability: bool) -> None:
    """Refuse options that do not go with a box."""
    if box is None or label is None:
        raise SettingError("--box and --label belong together. Pass both, or neither.")
    for option, value in (
        ("target", asked.target),
        ("versus", against),
        ("weights", asked.weights),
        ("classes", asked.classes),
    ):
        if value is not None:
            raise SettingError(f"--{option} is set, which does not go with --box. Leave it out.")
    if stability:
        raise SettingError("--stability does not go with --box. Leave it out.")


def _prepare_box(
    asked: _Options, selector: str, box: str, label: str, say: Callable[[str], None]
) -> "Callable[..., list[Explanation]]":
    """Load the detector, and return a function that explains images."""
    from parchgrad.explain.scores import BoxScore
    from parchgrad.models.detector import load_detector
    from parchgrad.workflows.detection import explain_box

    try:
        # Checked before the detector is loaded.
        corners = BoxScore(box=[float(corner) for corner in box.split(",")], label=0).box
    except ValueError:
        raise SettingError(
            f"--box is {box!r}, but it must be four numbers X1,Y1,X2,Y2 with X1 < X2 and Y1 < Y2."
        ) from None
    if _find_selector(selector).needs_statistics:
        raise SettingError(f"--selector is {selector!r}, whose statistics are of classes. Leave it out for a box.")
    # As `explain_box`.
    (edit,) = _make_edits(replace(asked, balance=bool(asked.balance)), [selector])
    place = place_of(asked.device)
    say(f"Loading {escape(asked.model)}")
    with redirect_stdout(sys.stderr):
        detector = load_detector(asked.model)
    detector.model.to(place)
    index = detector.find_category(label)
    say("Explaining")

    def explain_all(images: "Sequence[Image.Image]", *, names: Sequence[str]) -> "list[Explanation]":
        return [
            explain_box(detector, image, edit, box=corners, label=index, method=asked.method, name=name)
            for image, name in zip(images, names, strict=True)
        ]

    return explain_all


def _prepare_class(
    asked: _Options, selector: str, against: str | None, stability: bool, say: Callable[[str], None]
) -> "Callable[..., list[Explanation]]":
    """Load the classifier, and return a function that explains images."""
    from parchgrad.workflows.photographs import explain_images

    classifier, index, (edit,) = _prepare(asked, [selector], say)
    is_named = against not in (None, "runner-up", "rest")
    other = classifier.find_category(cast(str, against)) if is_named else against
    return partial(
        explain_images,
        classifier,
        edit=edit,
        target=index,
        against=cast(Any, other),
        method=asked.method,
        stability=stability,
    )


def _make_sweeps(
    images: Sequence[Path],
    names: Sequence[str],
    asked: _Options,
    over: str,
    values: str | None,
    say: Callable[[str], None],
) -> "Iterator[list[Sweep]]":
    """Sweep one image after another, for each selector."""
    unranked = [name for name in names if not _find_selector(name).has("alpha")]
    if over == "alpha" and unranked:
        raise SettingError(
            f"--over is alpha, but the selector {unranked[0]} has no p-values. Pass --selector class or instance, or "
            "--over quantile."
        )
    _check_used(names, asked)
    from parchgrad.data.images import read_image, stored_frame

    # Check the images before the slow imports.
    for path in images:
        stored_frame(path)
    given = None if values is None else _parse_values(values)

    from parchgrad.visual.sweeps import ALPHAS, alpha_sweep, quantile_sweep

    classifier, target, edits = _prepare(asked, names, say)

    def swept(picture: "Image.Image", edit: "Edit") -> "Sweep":
        if over == "quantile":
            return quantile_sweep(classifier, picture, edit, quantiles=given, target=target, method=asked.method)
        return alpha_sweep(classifier, picture, edit, alphas=given or ALPHAS, target=target, method=asked.method)

    for path in images:
        picture = read_image(path)
        yield [swept(picture, edit) for edit in edits]


def _find_selector(name: str) -> "RegisteredSelector":
    """Call `parchgrad.statistics.selectors.find_selector`, imported lazily."""
    from parchgrad.statistics.selectors import find_selector

    if name == "none":
        raise SettingError(
            "--selector is 'none', but each figure already shows the plain map beside ParchGrad's. Leave it out, or "
            "pass the name of a selector; see `parchgrad selectors`."
        )
    return find_selector(name)


def _check_used(names: Sequence[str], asked: _Options) -> None:
    """Refuse options that no selector uses."""
    for option in ("statistics", "quantile", "softness"):
        if getattr(asked, option) is not None and not any(_find_selector(name).has(option) for name in names):
            raise SettingError(f"--{option} is set, but the selector {names[0]} has none. Leave it out.")


def _make_edits(asked: _Options, names: Sequence[str], held: "ChannelStatistics | None" = None) -> "list[Edit]":
    """Make an edit for each selector."""
    from parchgrad.core.edit import Edit

    return [
        Edit(
            selector=_find_selector(name).make(quantile=asked.quantile, softness=asked.softness, statistics=held),
            layers=parse_layers(",".join(asked.layers)) if asked.layers else None,
            gamma=asked.gamma,
            conserve=asked.conserve,
            gates=asked.gates,
            antialias=asked.antialias,
            balance=asked.balance,
        )
        for name in names
    ]


def _prepare(
    asked: _Options, names: Sequence[str], say: Callable[[str], None]
) -> "tuple[Classifier, int | None, list[Edit]]":
    """Load the network, look up the class, and make an edit for each selector, with statistics if needed."""
    from parchgrad.statistics import ChannelStatistics

    held = None
    if any(_find_selector(name).needs_statistics for name in names):
        file = asked.statistics
        held = ChannelStatistics.bundled(asked.model) if file is None else ChannelStatistics.load(file)
    edits = _make_edits(asked, names, held)
    place = place_of(asked.device)
    say(f"Loading {escape(asked.model)}")
    classifier = load_classifier(asked.model, weights=asked.weights, classes=asked.classes)
    if held is not None:
        held.check_model(classifier.model)
    classifier.model.to(place)
    target = None if asked.target is None else classifier.find_category(asked.target)
    say("Explaining")
    return classifier, target, edits


def _parse_values(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(f"--values is {text!r}. Pass numbers separated by commas, such as 0.5,0.2,0.1.") from error


def _say_sweeps(path: Path, sweeps: "Mapping[str, Sweep]") -> None:
    """Print the explained class, the path of the picture, and the mean weight of a channel at each value."""
    first = next(iter(sweeps.values()))
    table = make_table(first.setting, *sweeps)
    for column in table.columns:
        column.justify = "right"
    for place, value in enumerate(first.values):
        table.add_row(f"{value:g}", *(_kept_words(found, place) for found in sweeps.values()))
    console.print(
        f"{escape(str(first.target))}, {escape(str(path))}, {path.stat().st_size / 1000:,.0f} kB",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(
        "Mean weight of a channel over the edited layers; a channel without a gradient counts as 0.\n",
        highlight=False,
    )


def _kept_words(found: "Sweep", place: int) -> str:
    untouched, layers = found.untouched[place], len(found.layers)
    if untouched == layers:
        return "none: plain"
    return f"{found.kept[place]:.1%}" + (f", {untouched} of {layers} layers plain" if untouched else "")
