"""Components of the explorer's page, and what its script does in the browser."""

import json
from collections.abc import Sequence

from parchgrad._io.extras import needs_extra
from parchgrad.explain.methods import METHODS
from parchgrad.explorer.downloads import DOWNLOADS
from parchgrad.explorer.inputs import CELLS, EXAMPLES, ImageSource, View, method_title
from parchgrad.explorer.rendering import message, script
from parchgrad.explorer.settings import WebSettings
from parchgrad.explorer.state import Shown
from parchgrad.statistics.selectors import registered_selectors

with needs_extra("web"):
    import gradio as gr

__all__ = ["ALONE", "COMPARED", "NO_MOSAIC", "SUITED", "Choices", "Layout"]

Choices = Sequence[tuple[str, str]]
"""Options of a list: the text and the value of each."""

ALONE = "alone"
"""Value of the list of classes to compare with if the class is explained alone."""
COMPARED = [("Nothing", ALONE), ("The runner-up", "runner-up"), ("All other classes", "rest")]
"""First options of that list."""
NO_MOSAIC = f"Drop {CELLS} images or use the examples. Each class is explained on all {CELLS} at once."
"""Text in place of a mosaic."""
SUITED = ("layers", "quantile", "softness", "gates", "antialias", "balance")
"""Settings with a default of each selector."""

# Seconds between checks for a network that is loading.
_ASKED_AGAIN = 1.0
_GATES = {"Off": 0, "1": 1, "2": 2, "4": 4, "8": 8}
_HEAD = """<div class='pg-head'><h1>ParchGrad</h1>
<p>See which parts of an image support a class, through the channels that matter</p></div>"""
_DEFAULTS = {
    name: [getattr(View(selector=name).resolved(), setting) for setting in SUITED] for name in registered_selectors()
}
# Settings that the user has changed keep their values.
_SUGGEST = f"""(selector, ...current) => {{
  const chosen = document.documentElement.dataset, names = {json.dumps(SUITED)};
  chosen.selector = selector;
  const suits = {json.dumps(_DEFAULTS)}[selector];
  return suits ? suits.map((value, place) => chosen[names[place]] ? current[place] : value) : current;
}}"""
_BLEND = "(opacity) => { document.documentElement.style.setProperty('--map-opacity', opacity); }"


class Layout:
    """The components, arranged as settings, maps, and what belongs to the maps; users share them.

    `templates/explorer.css` places the three side by side or one below the other.
    """

    def __init__(self, settings: WebSettings, *, selectors: Choices, layers: Choices, comparisons: Choices) -> None:
        """Add the components to the page that is being built, with the choices for the initial network."""
        self.image_state, self.mosaic_state = gr.State(ImageSource(EXAMPLES[0])), gr.State(())
        self.shown, self.mode = gr.State(Shown()), gr.State("single")
        gr.HTML(_HEAD, elem_id="head")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=2, min_width=280, elem_id="settings"):
                self._add_images()
                self._add_settings(settings, selectors, layers)
            with gr.Column(scale=5, min_width=320, elem_id="shown"):
                self._add_maps()
            with gr.Column(elem_id="of-maps"):
                self._add_display(comparisons)

    def _add_images(self) -> None:
        with gr.Column(elem_id="of-one"):
            self.file = gr.Image(
                label="Image", sources=["upload"], type="filepath", height=64, buttons=[], elem_id="image"
            )
            self.example = gr.Radio(EXAMPLES, value=EXAMPLES[0], label="Or choose an example", elem_id="examples")
            self.top = gr.Radio([], label="Class: most probable", elem_id="predictions")
            with gr.Row():
                self.target = gr.Dropdown([], label="Or search a class", min_width=130, elem_id="class")
                self.against = gr.Dropdown(
                    COMPARED, value=ALONE, label="Rather than", min_width=130, elem_id="rather-than"
                )
            # Identifies the browser's list of classes, so that choices from an outdated list are ignored.
            self.stamp = gr.Textbox("", visible="hidden", label="List of classes", elem_id="stamp")
        with gr.Column(elem_id="of-four"):
            self.files = gr.File(
                label=f"Drop {CELLS} images of different classes",
                file_count="multiple",
                file_types=["image"],
                height=150,
                elem_id="files",
            )
            self.take_examples = gr.Button("Use the four examples", size="sm", elem_id="take-examples")

    def _add_settings(self, settings: WebSettings, selectors: Choices, layers: Choices) -> None:
        first = View().resolved()
        with gr.Row():
            self.selector = gr.Dropdown(
                selectors, value=first.selector, label="Selector", min_width=130, elem_id="selector"
            )
            self.layers = gr.Dropdown(
                layers,
                value=first.layers,
                label="Layers, or a pattern",
                allow_custom_value=True,
                min_width=130,
                elem_id="layers",
            )
        self.quantile = gr.Slider(
            0.01, 1, value=first.quantile, step=0.01, label="Quantile: share of channels", elem_id="quantile"
        )
        self.softness = gr.Slider(
            0, 1, value=first.softness, step=0.05, label="Softness: 0 is a hard cut", elem_id="softness"
        )
        with gr.Row():
            self.method = gr.Dropdown(
                [(method_title(name), name) for name in METHODS],
                value=METHODS[0],
                label="Method",
                min_width=130,
                elem_id="method",
            )
            self.network = gr.Dropdown(
                list(settings.networks),
                value=settings.network,
                label="Network" + (" or name" if settings.any_network else ""),
                allow_custom_value=settings.any_network,
                min_width=130,
                elem_id="network",
            )
        with gr.Accordion("More settings", open=False, elem_id="more"):
            self.gates = gr.Radio(
                list(_GATES.items()),
                value=first.gates,
                label="Soft gates",
                info="Smooth the gates of rectifiers and max pooling. Wider is smoother.",
                elem_id="gates",
            )
            self.antialias = gr.Checkbox(
                bool(first.antialias),
                label="Smooth strides",
                info="Remove the grid pattern of strided layers.",
                elem_id="antialias",
            )
            self.balance = gr.Checkbox(
                bool(first.balance),
                label="Balance",
                info="Hold attention, normalisations and gates constant.",
                elem_id="balance",
            )
            self.prune = gr.Checkbox(
                True,
                label="Prune the other channels",
                info="If off, gamma sets how much weaker they become.",
                elem_id="prune",
            )
            self.gamma = gr.Slider(
                -1, 3, value=1, step=0.05, label="Gamma, as a power of ten", visible=False, elem_id="gamma"
            )

    def _add_maps(self) -> None:
        with gr.Tabs():
            with gr.Tab("One image") as self.single_tab:
                self.result = gr.HTML(message("Explaining the first image ..."), elem_id="result")
            with gr.Tab("Mosaic of four") as self.mosaic_tab:
                self.game = gr.HTML(message(NO_MOSAIC), elem_id="game")
        self.status = gr.HTML("", elem_id="status")
        # Polls while a network is loading.
        self.again = gr.Timer(_ASKED_AGAIN, active=False)

    def _add_display(self, comparisons: Choices) -> None:
        with gr.Row(elem_id="look"):
            self.comparison = gr.Dropdown(
                comparisons,
                value=View.comparison if View.comparison in dict(comparisons).values() else comparisons[0][1],
                label="Third map",
                min_width=130,
                elem_id="comparison",
            )
            self.opacity = gr.Slider(0, 1, value=1, step=0.01, label="Opacity", elem_id="opacity")
            self.signed = gr.Checkbox(False, label="Signed: red positive, blue negative", elem_id="signed")
        with gr.Row(elem_id="downloads"):
            self.measure = gr.Button("Measure stability", size="sm", elem_id="measure")
            self.savers = {
                kind: gr.Button(text, size="sm", elem_id=f"save-{kind}") for kind, (text, _) in DOWNLOADS.items()
            }
        self.steadiness = gr.HTML("", elem_id="steadiness")
        # Hidden: the buttons above set its file and then click it.
        self.fetched = gr.DownloadButton("", elem_id="fetched", visible="hidden")
        self.code = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="code")

    def listen(self, app: gr.Blocks) -> None:
        """Connect the events that the browser handles without the server."""
        self.top.input(None, self.top, self.target, js="(index) => index")
        # At once, so that the other list is right even where no map can be made.
        self.target.input(None, self.target, self.top, js="(index) => index")
        suited = [getattr(self, name) for name in SUITED]
        self.selector.input(None, [self.selector, *suited], suited, js=_SUGGEST)
        for name, own in zip(SUITED, suited, strict=True):
            own.input(None, js=f"() => {{ document.documentElement.dataset.{name} = 'chosen'; }}")
        self.opacity.input(None, self.opacity, None, js=_BLEND)
        for mode, tab in (("single", self.single_tab), ("mosaic", self.mosaic_tab)):
            tab.select(None, js=f"() => {{ document.documentElement.dataset.mode = '{mode}'; }}")
        app.load(None, js=script())
