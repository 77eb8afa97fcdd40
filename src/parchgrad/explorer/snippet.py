"""Write the Python script that reproduces what the explorer shows."""

import math
from collections.abc import Sequence

import parchgrad
from parchgrad.errors import on_one_line
from parchgrad.explorer.inputs import CELLS, COLUMNS, ROWS, Network, Photograph, View
from parchgrad.statistics.selectors import find_selector

__all__ = ["mosaic_snippet", "single_snippet"]


def single_snippet(
    network: Network, photograph: Photograph, view: View, target: int, against: str | None = None
) -> str:
    """Script that reproduces the attribution of one image and its picture; `against` is the name of that class."""
    score, category = view.score(target), network.classifier.categories[target]
    explained = category if against is None else f"{category} rather than {against}"
    kind = ("blend_signed", "signed_heatmap") if view.signed else ("blend", "heatmap")
    opacity = f", opacity={view.opacity:g}" if view.opacity < 1 else ""
    return f"""\
{_imports([photograph], numeric=(), visual=(kind[0], "shared_top"))}
{_explainers(network, view)}

x = classifier.preprocess({photograph.code()}).unsqueeze(0)
target = {"pg." * (against is not None)}{score!r}  # {on_one_line(explained)}
attribution = explainer.attribute(x, target=target)

# On one scale with the plain map.
heat = pg.{kind[1]}(attribution)[0]
plain_heat = pg.{kind[1]}(plain.attribute(x, target=target))[0]
top = shared_top([plain_heat, heat])
picture = {kind[0]}(classifier.preprocess.picture(x[0]), heat, top=top{opacity})
imsave("map.png", picture.clip(0, 1))
"""


def mosaic_snippet(network: Network, photographs: Sequence[Photograph], view: View, targets: Sequence[int]) -> str:
    """Script that reproduces the grid pointing game on a mosaic."""
    read = "".join(f"    {photograph.code()},\n" for photograph in photographs)
    names = ", ".join(on_one_line(network.classifier.categories[target]) for target in targets)
    return f"""\
{_imports(photographs, numeric=("import torch",), visual=())}
{_explainers(network, view)}

photographs = [
{read}]
images = torch.stack([classifier.preprocess(photograph) for photograph in photographs])
x = mosaic(images, rows={ROWS}, columns={COLUMNS})
targets = torch.tensor({list(targets)})  # {names}
x = x.expand(len(targets), -1, -1, -1)
attribution = explainer.attribute(x, target=targets)

# Share of each map in the cell of its class; chance is {1 / CELLS:g}.
shares = cell_shares(pg.heatmap(attribution), rows={ROWS}, columns={COLUMNS}).diagonal()
plain_shares = cell_shares(pg.heatmap(plain.attribute(x, target=targets)), rows={ROWS}, columns={COLUMNS}).diagonal()
print(f"plain {{plain_shares.mean():.2f}}, ParchGrad {{shares.mean():.2f}}")
"""


def _imports(photographs: Sequence[Photograph], *, numeric: Sequence[str], visual: Sequence[str]) -> str:
    of_others, own = list(numeric), ["import parchgrad as pg"]
    if visual:
        of_others.append("from matplotlib.image import imsave")
    if any(photograph.path is None for photograph in photographs):
        of_others += ["from PIL import Image", "from skimage import data"]
    if any(photograph.path is not None for photograph in photographs):
        own.append("from parchgrad.data.images import read_image")
    if visual:
        own.append(f"from parchgrad.visual import {', '.join(visual)}")
    else:
        own.append("from parchgrad.evaluation.localisation import cell_shares, mosaic")
    # `import` lines come before `from` lines.
    return "\n".join([*sorted(of_others, key=lambda line: line.startswith("from")), "", *own, ""])


def _explainers(network: Network, view: View) -> str:
    """Lines that load the network and make the explainers with and without ParchGrad."""
    lines = [f"classifier = pg.load_model({view.network!r})"]
    selector, suits = find_selector(view.selector), find_selector(view.selector).suits(view.softness)
    name, view = view.selector, view.resolved()
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
    if name != View.selector or arguments:
        is_own = selector.kind.__name__ in parchgrad.__all__
        if not is_own:
            lines.append(f"from {selector.kind.__module__} import {selector.kind.__name__}")
        lines.append(f"selector = {'pg.' * is_own}{selector.kind.__name__}({', '.join(arguments)})")
        explained.append("selector")
    method = [] if view.method == "gradient" else [f"method={view.method!r}"]
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
    lines += [
        f"explainer = pg.Explainer({', '.join([*explained, *method])})",
        f"plain = pg.Explainer({', '.join(['classifier.model', 'None', *method])})",
    ]
    return "\n".join(lines)
