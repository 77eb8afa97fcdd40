"""Write the Python script that reproduces what the explorer shows."""

import math
from collections.abc import Sequence

import parchgrad
from parchgrad.errors import on_one_line
from parchgrad.explain.methods import METHODS
from parchgrad.explorer.inputs import CELLS, COLUMNS, GRAD_CAM, ROWS, ImageSource, Network, View
from parchgrad.statistics.selectors import find_selector

__all__ = ["mosaic_snippet", "single_snippet"]


def single_snippet(network: Network, image: ImageSource, view: View, target: int, against: str | None = None) -> str:
    """Script that reproduces the maps of one image and their pictures; `against` is the name of that class."""
    score, category = view.score(target), network.classifier.categories[target]
    explained = category if against is None else f"{category} rather than {against}"
    heat, blend = ("signed_heatmap", "blend_signed") if view.signed else ("heatmap", "blend")
    opacity = f", opacity={view.opacity:g}" if view.opacity < 1 else ""
    of_score = "" if against is None else ", score=lambda _: target"
    index = "target" if against is None else str(target)
    maps = {"plain": f"pg.{heat}(plain.attribute(x, target=target))[0]", "parchgrad": f"pg.{heat}(attribution)[0]"}
    if view.comparison == GRAD_CAM:
        maps["grad_cam"] = f"grad_cam(classifier.model{of_score})(x, torch.tensor([{index}]))[0]"
    elif view.comparison is not None:
        maps["comparison"] = f"pg.{heat}(comparison.attribute(x, target=target))[0]"
    return f"""\
{_imports([image], view, visual=blend)}
{_explainers(network, view)}

x = classifier.preprocess({image.code()}).unsqueeze(0)
target = {"pg." * (against is not None)}{score!r}  # {on_one_line(explained)}
attribution = explainer.attribute(x, target=target)
maps = {{
{_entries(maps)}}}

# Each map on its own scale.
picture = classifier.preprocess.picture(x[0])
for name, heat in maps.items():
    imsave(f"{{name}}.png", {blend}(picture, heat{opacity}).clip(0, 1))
"""


def mosaic_snippet(network: Network, images: Sequence[ImageSource], view: View, targets: Sequence[int]) -> str:
    """Script that reproduces the grid pointing game on a mosaic."""
    read = "".join(f"    {image.code()},\n" for image in images)
    names = ", ".join(on_one_line(network.classifier.categories[target]) for target in targets)
    maps = {"plain": "pg.heatmap(plain.attribute(x, target=targets))", "ParchGrad": "pg.heatmap(attribution)"}
    if view.comparison == GRAD_CAM:
        maps["Grad-CAM"] = "grad_cam(classifier.model)(x, targets)"
    elif view.comparison is not None:
        maps[view.titles[2]] = "pg.heatmap(comparison.attribute(x, target=targets))"
    return f"""\
{_imports(images, view)}
{_explainers(network, view)}

images = [
{read}]
inputs = torch.stack([classifier.preprocess(image) for image in images])
x = mosaic(inputs, rows={ROWS}, columns={COLUMNS})
targets = torch.tensor({list(targets)})  # {names}
x = x.expand(len(targets), -1, -1, -1)
attribution = explainer.attribute(x, target=targets)
maps = {{
{_entries(maps)}}}

# Share of each map in the cell of its class; chance is {1 / CELLS:g}.
for name, heats in maps.items():
    shares = cell_shares(heats, rows={ROWS}, columns={COLUMNS}).diagonal()
    print(f"{{name}} {{shares.nanmean():.2f}}")
"""


def _entries(maps: dict[str, str]) -> str:
    return "".join(f'    "{name}": {code},\n' for name, code in maps.items())


def _imports(images: Sequence[ImageSource], view: View, *, visual: str | None = None) -> str:
    """Lines that import what a script needs; `visual` names the function that draws, None means a mosaic."""
    has_grad_cam = view.comparison == GRAD_CAM
    of_others, own = [], ["import parchgrad as pg"]
    if has_grad_cam or visual is None:
        of_others.append("import torch")
    if visual is not None:
        of_others.append("from matplotlib.image import imsave")
    if any(image.path is None for image in images):
        of_others += ["from PIL import Image", "from skimage import data"]
    if any(image.path is not None for image in images):
        own.append("from parchgrad.data.images import read_image")
    if visual is None:
        own.append("from parchgrad.evaluation.localisation import cell_shares, mosaic")
    if has_grad_cam:
        own.append("from parchgrad.evaluation.methods import grad_cam")
    if visual is not None:
        own.append(f"from parchgrad.visual import {visual}")
    return "\n".join([*of_others, "", *own, ""])


def _explainers(network: Network, view: View) -> str:
    """Lines that load the network and make the explainers of the maps."""
    lines = [f"classifier = {network.code}"]
    lines += [*_explainer(network, view, "explainer", "selector"), _plain("plain", view.method)]
    if view.comparison in METHODS:
        lines.append(_plain("comparison", view.comparison))
    elif view.comparison not in (None, GRAD_CAM):
        other = view.with_defaults_of(view.comparison)
        lines += [line for line in _explainer(network, other, "comparison", "other") if line not in lines]
    return "\n".join(lines)


def _plain(name: str, method: str) -> str:
    return f"{name} = pg.Explainer({', '.join(['classifier.model', 'None', *_method(method)])})"


def _method(method: str) -> list[str]:
    return [] if method == "gradient" else [f"method={method!r}"]


def _explainer(network: Network, view: View, name: str, selector_name: str) -> list[str]:
    """Lines that make an explainer with ParchGrad, and before it its selector if that is not the default."""
    lines = []
    selector, suits = find_selector(view.selector), find_selector(view.selector).suits(view.softness)
    view = view.resolved()
    arguments = [
        f"{setting}={value!r}"
        for setting, value in (("quantile", view.quantile), ("softness", view.softness))
        if selector.has(setting) and value != selector.default(setting)
    ]
    if selector.needs_statistics and network.statistics is not None:
        source = f"bundled({view.network!r})" if network.file is None else f"load({network.file!r}, classifier.model)"
        lines.append(f"statistics = pg.ChannelStatistics.{source}")
        test = network.statistics.test if selector.has("test") else "welch"
        # Always write their quantile, which has no default because of alpha.
        arguments = ["statistics", f"quantile={view.quantile!r}", *(a for a in arguments if a.startswith("softness"))]
        arguments += [] if test == "welch" else [f"test={test!r}"]
    explained = ["classifier.model"]
    if view.selector != View.selector or arguments:
        is_own = selector.kind.__name__ in parchgrad.__all__
        if not is_own:
            lines.append(f"from {selector.kind.__module__} import {selector.kind.__name__}")
        lines.append(f"{selector_name} = {'pg.' * is_own}{selector.kind.__name__}({', '.join(arguments)})")
        explained.append(selector_name)
    explained += [
        f"{setting}={value!r}"
        for setting, value, usual in (
            ("layers", view.layer_choice, suits.layers),
            ("gamma", view.gamma, math.inf),
            ("gates", view.gates, suits.gates),
            ("antialias", view.antialias, suits.antialias),
            ("balance", view.balance, suits.balance),
        )
        if value != usual
    ]
    return [*lines, f"{name} = pg.Explainer({', '.join([*explained, *_method(view.method)])})"]
