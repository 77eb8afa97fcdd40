"""The web explorer: a page that explains images, as a thin layer over the library."""

import contextlib
import errno
import functools
import hashlib
import html
import ipaddress
import json
import math
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import save_array, writing
from parchgrad._io.images import data_url
from parchgrad._io.templates import render
from parchgrad.core.layers import has_published_layers
from parchgrad.errors import ImageError, ParchGradError, SettingError
from parchgrad.explain.methods import METHODS
from parchgrad.explorer.inputs import CELLS, EXAMPLES, Photograph, View, check_photograph
from parchgrad.explorer.loading import Loading, StillLoadingError
from parchgrad.explorer.views import Exploration, Explorer, Game, tinted
from parchgrad.models.loading import OFFLINE_MODEL, SHAPES_MODEL
from parchgrad.statistics.selectors import find_selector, registered_selectors
from parchgrad.visual import save_figure
from parchgrad.visual.animation import save_animation
from parchgrad.visual.maps import COLOUR_MAP, SIGNED_COLOUR_MAP
from parchgrad.workflows.demonstration import example_photographs
from parchgrad.workflows.photographs import UNSTABLE

with needs_extra("web"):
    import gradio as gr
    from starlette.middleware import Middleware

    from parchgrad.explorer.guard import RequestGuard

__all__ = ["WebSettings", "build_app", "is_loopback", "serve"]

T = TypeVar("T")
TITLE = "ParchGrad explorer"
# Pillow's own limit.
_MOST_MEGAPIXELS = 178
# It has the same defaults as the selectors with statistics.
_FALLBACK = "energy"
# Seconds between checks for a network that is loading.
_ASKED_AGAIN = 1.0
# Longest name or layer pattern, in characters.
_LONGEST_TEXT = 1000
_LAYERS = {
    "Automatic": "auto",
    "Upper half": "0.5",
    "Upper 3/4": "0.75",
    "All": "all",
    "Published set": "published",
}
_ALONE = "alone"
_COMPARED = [("Nothing", _ALONE), ("The runner-up", "runner-up"), ("All other classes", "rest")]
_GATES = {"Off": 0, "1": 1, "2": 2, "4": 4, "8": 8}
_HEAD = """<div class='pg-head'><h1>ParchGrad</h1>
<p>See which parts of an image support a class, through the channels that matter</p></div>"""
_NO_MOSAIC = f"Drop {CELLS} images or use the examples. Each class is explained on all {CELLS} at once."
_PLACES = ("top left", "top right", "bottom left", "bottom right")
_SUITED = ("layers", "quantile", "softness", "gates", "antialias", "balance")
_SUITS = {
    name: [getattr(View(selector=name).resolved(), setting) for setting in _SUITED] for name in registered_selectors()
}
# Settings that the user has changed keep their values.
_SUGGEST = f"""(selector, ...current) => {{
  const chosen = document.documentElement.dataset, names = {json.dumps(_SUITED)};
  chosen.selector = selector;
  const suits = {json.dumps(_SUITS)}[selector];
  return suits ? suits.map((value, place) => chosen[names[place]] ? current[place] : value) : current;
}}"""
_BLEND = "(opacity) => { document.documentElement.style.setProperty('--map-opacity', opacity); }"
_FETCH = "() => { document.querySelector('#fetched')?.click(); }"
_ON_LOAD = """() => {
  document.documentElement.lang = "en";
  for (const said of document.querySelectorAll("#status, #steadiness")) said.setAttribute("role", "status");
  const nameGroups = () => {
    for (const group of document.querySelectorAll("fieldset")) {
      group.setAttribute("aria-label", group.querySelector("[data-testid=block-info]")?.textContent.trim() ?? "");
    }
  };
  nameGroups();
  // Its groups exist only once it is open.
  document.querySelector("#more")?.addEventListener("click", () => setTimeout(nameGroups, 200));
  // Gradio selects the first option when the current one is chosen again.
  document.addEventListener("keydown", (event) => {
    const field = event.key === "Enter" && event.target.closest?.("#settings .block");
    if (field && field.querySelector("[role=option].active[aria-selected=true]")) {
      event.preventDefault();
      event.stopPropagation();
      event.target.blur();
    }
  }, true);
}"""


@dataclass(frozen=True, kw_only=True)
class WebSettings:
    """Settings of the explorer's server.

    Attributes:
        host: address to bind to; other machines can connect unless it is a loopback address.
        port: port, below 65536; 0 uses any free port.
        network: network that is selected initially.
        statistics: file of channel statistics of that network; None uses the bundled ones, if any.
        max_megabytes: size limit of an uploaded file; a mosaic may have four of that size.
        max_megapixels: size limit of an image, at most 178.
        max_stored_megabytes: size limit of all uploaded files together, which are kept for a few hours; further uploads
            are refused.
        any_network: whether users may enter any network name, which may trigger downloads and use much memory.
        max_waiting: maximum number of waiting requests.

    Raises:
        SettingError: if a number is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    network: str = OFFLINE_MODEL
    statistics: Path | None = None
    max_megabytes: float = 20
    max_megapixels: float = 50
    max_stored_megabytes: float = 2000
    any_network: bool = True
    max_waiting: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise SettingError(f"`port` is {self.port}, but it must be from 0 to 65535.")
        for name in ("max_megabytes", "max_megapixels", "max_stored_megabytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"`{name}` is {getattr(self, name)}, but it must be positive.")
        if self.max_megapixels > _MOST_MEGAPIXELS:
            raise SettingError(
                f"`max_megapixels` is {self.max_megapixels:g}, but it must be at most {_MOST_MEGAPIXELS}, the limit of "
                "Pillow."
            )

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks to choose from."""
        return tuple(dict.fromkeys((self.network, OFFLINE_MODEL, SHAPES_MODEL)))


@dataclass(frozen=True)
class _Refused:
    """Why a file was refused."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """State of one user's page, to detect changes and to save what is displayed.

    Attributes:
        listed: image and network of the list of classes.
        target: class chosen from the list.
        against: what it is compared with; see `View`.
        network: network of the list of selectors.
        view: settings of the displayed result; None if there is an error instead.
        photographs: images of the displayed mosaic; empty for a single image.
        note: additional status text for `view`.
    """

    listed: tuple[Photograph, str] | None = None
    target: int | None = None
    against: Any = None
    network: str = ""
    view: View | None = None
    photographs: tuple[Photograph, ...] = ()
    note: str = ""


def build_app(settings: WebSettings) -> gr.Blocks:
    """Build the page and its event handlers; see `serve`.

    Args:
        settings: settings of the server.

    Raises:
        ParchGradError: if the network cannot be loaded, or the statistics do not match it.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 7200)) as app:
        page = _Page(settings)
        page.listen(app)
    app.queue(max_size=settings.max_waiting, default_concurrency_limit=1, api_open=False)
    return app


class _Page:
    """Components and event handlers of the page, shared by all users.

    The state of a user comes in with an event and goes out with its results.
    """

    def __init__(self, settings: WebSettings) -> None:
        statistics = {} if settings.statistics is None else {settings.network: settings.statistics}
        self._settings = settings
        self._explorer = Explorer(statistics=statistics)
        self._loading = Loading(self._explorer)
        # PyTorch keeps threads and memory for every thread that runs a network, and Gradio uses dozens.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        self._photograph, self._mosaic = gr.State(Photograph(EXAMPLES[0])), gr.State(())
        self._shown, self._mode = gr.State(_Shown()), gr.State("single")
        gr.HTML(_HEAD, elem_id="head")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=2, min_width=280, elem_id="settings"):
                self._add_settings()
            with gr.Column(scale=5, min_width=320, elem_id="shown"):
                self._add_pictures()
            with gr.Column(elem_id="taken-away"):
                self._add_downloads()

    def _add_settings(self) -> None:
        settings = self._settings
        with gr.Column(elem_id="of-one"):
            self.file = gr.Image(
                label="Image", sources=["upload"], type="filepath", height=150, buttons=[], elem_id="photograph"
            )
            self.example = gr.Radio(EXAMPLES, value=EXAMPLES[0], label="Or choose an example", elem_id="examples")
            self.top = gr.Radio([], label="Class: most probable", elem_id="predictions")
            with gr.Row():
                self.target = gr.Dropdown([], label="Or search a class", min_width=130, elem_id="class")
                self.against = gr.Dropdown(
                    list(_COMPARED), value=_ALONE, label="Rather than", min_width=130, elem_id="rather-than"
                )
            # Identifies the browser's list of classes, so that choices from an outdated list are ignored.
            self.stamp = gr.Textbox("", visible="hidden", label="List of classes", elem_id="stamp")
        first = View().resolved()
        with gr.Row():
            self.selector = gr.Dropdown(
                self._selectors(settings.network),
                value=first.selector,
                label="Selector",
                min_width=130,
                elem_id="selector",
            )
            self.layers = gr.Dropdown(
                self._layers(settings.network),
                value=first.layers,
                label="Layers, or a pattern",
                allow_custom_value=True,
                min_width=130,
                elem_id="layers",
            )
        self.quantile = gr.Slider(
            0.01,
            1,
            value=first.quantile,
            step=0.01,
            label="Quantile: channels at or above the threshold",
            elem_id="quantile",
        )
        self.softness = gr.Slider(
            0, 1, value=first.softness, step=0.05, label="Softness: 0 is a hard cut", elem_id="softness"
        )
        with gr.Row():
            self.method = gr.Dropdown(
                [(name.replace("_", " ").capitalize(), name) for name in METHODS],
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

    def _add_pictures(self) -> None:
        with gr.Row(elem_id="look"):
            self.opacity = gr.Slider(0, 1, value=1, step=0.01, label="Opacity of the maps", elem_id="opacity")
            self.signed = gr.Checkbox(False, label="Signed: red for the class, blue against it", elem_id="signed")
        with gr.Tabs():
            with gr.Tab("One image") as self.single_tab:
                self.result = gr.HTML(_message("Explaining the first image ..."), elem_id="result")
                with gr.Row(elem_id="steady"):
                    self.measure = gr.Button("Measure stability", size="sm", elem_id="measure")
                    self.steadiness = gr.HTML("", elem_id="steadiness")
            with gr.Tab("Mosaic of four", elem_id="mosaic-tab") as self.mosaic_tab:
                self.files = gr.File(
                    label=f"Drop {CELLS} images of different classes",
                    file_count="multiple",
                    file_types=["image"],
                    height=150,
                    elem_id="files",
                )
                self.take_examples = gr.Button("Use the four examples", size="sm", elem_id="take-examples")
                self.game = gr.HTML(_message(_NO_MOSAIC), elem_id="game")
        self.status = gr.HTML("", elem_id="status")
        # Polls while a network is loading.
        self.again = gr.Timer(_ASKED_AGAIN, active=False)

    def _add_downloads(self) -> None:
        with gr.Row(elem_id="downloads"):
            self.savers = {
                kind: gr.Button(text, size="sm", elem_id=f"save-{kind}") for kind, (text, _) in _DOWNLOADS.items()
            }
        # Hidden: the buttons above set its file and then click it.
        self.fetched = gr.DownloadButton("", elem_id="fetched", visible="hidden")
        self.code = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="code")

    def listen(self, app: gr.Blocks) -> None:
        """Connect events to their handlers."""
        # One queue for all handlers keeps results in order.
        of_user = [self._mode, self._photograph, self._mosaic, self._shown]
        edit = [self.selector, self.layers, self.quantile, self.softness, self.prune, self.gamma]
        edit += [self.gates, self.antialias, self.balance]
        of_view = [*edit, self.method, self.signed, self.opacity]
        shown = [self.result, self.game, self.status, self.code]
        shown += [self.top, self.target, self.stamp, self.selector, self.layers, self.steadiness, self.against]
        shown += [self._shown, self.again]
        shows: dict[str, Any] = {
            "fn": _complete(self._on_worker(self._show), shown),
            "inputs": [*of_user, self.network, self.target, self.against, self.stamp, *of_view],
            "outputs": shown,
            # Gradio would check values against choices that may have changed meanwhile.
            "preprocess": False,
            "concurrency_id": "network",
            "show_progress": "full",
            "show_progress_on": self.status,
        }
        # One listener for all settings, so that after rapid changes only the last state is computed.
        settings = [self.target, self.against, self.network, *edit, self.method, self.signed]
        triggers = [app.load, self.again.tick, *(setting.change for setting in settings)]
        gr.on(triggers, trigger_mode="always_last", api_name="show", **shows)
        shows["api_visibility"] = "private"
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.top.input(None, self.top, self.target, js="(index) => index")
        # At once, so that the other list is right even where no map can be made.
        self.target.input(None, self.target, self.top, js="(index) => index")
        suited = [getattr(self, name) for name in _SUITED]
        self.selector.input(None, [self.selector, *suited], suited, js=_SUGGEST)
        for name, own in zip(_SUITED, suited, strict=True):
            own.input(None, js=f"() => {{ document.documentElement.dataset.{name} = 'chosen'; }}")
        self.prune.input(lambda prune: _Update({"visible": not prune}), self.prune, self.gamma, **private)
        self.opacity.input(None, self.opacity, None, js=_BLEND)
        rewritten = [self._shown, self.code]
        self.opacity.change(
            _complete(self._on_worker(self._rewrite), rewritten),
            [self._shown, self.opacity],
            rewritten,
            concurrency_id="network",
            **private,
        )
        taken: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "files"}
        of_one, of_four = [self._photograph, self.file, self.example], [self._mosaic, self.files]
        # Without preprocessing: Gradio would open the file, and fail silently if it is not an image.
        taking = gr.on(
            [self.file.upload, self.file.clear],
            _complete(self._take, of_one),
            self.file,
            of_one,
            preprocess=False,
            api_name="take",
            **taken,
        )
        taking.then(**shows)
        take_example, take_four = _complete(self._take_example, of_one), _complete(self._take_four, of_four)
        self.example.input(take_example, self.example, of_one, api_name="take_example", **taken).then(**shows)
        changed = [self.files.upload, self.files.clear, self.files.delete]
        gr.on(changed, take_four, self.files, of_four, api_name="take_four", **taken).then(**shows)
        self.take_examples.click(self._take_four_examples, None, of_four, api_name="take_four_examples", **taken).then(
            **shows
        )
        for mode, tab in (("single", self.single_tab), ("mosaic", self.mosaic_tab)):
            tab.select(None, js=f"() => {{ document.documentElement.dataset.mode = '{mode}'; }}")
            tab.select(lambda mode=mode: mode, None, self._mode, **private).then(**shows)
        of_shown: dict[str, Any] = {
            "inputs": self._shown,
            "concurrency_id": "network",
            "show_progress": "full",
            "show_progress_on": self.status,
        }
        self.measure.click(self._on_worker(self._measure), outputs=self.steadiness, api_name="measure", **of_shown)
        for kind, button in self.savers.items():
            save = self._on_worker(functools.partial(self._save, kind))
            outputs = [self.fetched, self.status]
            button.click(save, outputs=outputs, api_visibility="private", **of_shown).then(None, js=_FETCH)
        app.load(None, js=_ON_LOAD)
        for part in app.blocks.values():
            if isinstance(part, gr.components.Component) and not isinstance(part, gr.State):
                _let_update(part)

    def _on_worker(self, handler: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(handler)
        def run(*inputs: Any) -> T:
            return self._worker.submit(handler, *inputs).result()

        return run

    def _classes(self, network: str) -> list[tuple[str, int]]:
        return sorted((name, index) for index, name in enumerate(self._explorer.classifier(network).categories))

    def _selectors(self, network: str) -> list[tuple[str, str]]:
        known = self._explorer.selectors(network)
        return [(found.title, name) for name, found in registered_selectors().items() if name in known]

    def _layers(self, network: str) -> list[tuple[str, str]]:
        has_published = has_published_layers(self._explorer.classifier(network).model)
        return [(label, name) for label, name in _LAYERS.items() if has_published or name != "published"]

    def _take(self, file: dict[str, Any] | None) -> dict[Any, Any]:
        """Accept an image that was dropped, pasted or chosen."""
        if file is None:
            return {self._photograph: _Refused("")}
        found = (
            self._checked(str(file["path"])) if file.get("path") else _Refused("The upload is empty. Choose an image.")
        )
        if isinstance(found, _Refused):
            # Do not display a refused file.
            return {self._photograph: found, self.file: None, self.example: None}
        return {self._photograph: found, self.example: None}

    def _take_example(self, name: str) -> dict[Any, Any]:
        return {self._photograph: Photograph(name), self.file: None}

    def _take_four(self, paths: Sequence[str] | None) -> dict[Any, Any]:
        return {self._mosaic: tuple(self._checked(path) for path in paths or ())}

    def _take_four_examples(self) -> dict[Any, Any]:
        return {self._mosaic: tuple(map(Photograph, EXAMPLES)), self.files: None}

    def _checked(self, path: str) -> Photograph | _Refused:
        try:
            check_photograph(path, megapixels=self._settings.max_megapixels)
        except ImageError as error:
            return _Refused(str(error))
        return Photograph(Path(path).name, Path(path))

    def _show(
        self,
        mode: str,
        photograph: Photograph | _Refused,
        mosaic: Sequence[Photograph | _Refused],
        shown: _Shown,
        network: str,
        target: int | None,
        against: int | str,
        stamp: str,
        selector: str,
        layers: str,
        quantile: float,
        softness: float,
        prune: bool,
        gamma: float,
        gates: float,
        antialias: bool,
        balance: bool,
        method: str,
        signed: bool,
        opacity: float,
    ) -> dict[Any, Any]:
        """Explain the image or mosaic with the current settings; errors are displayed in place of the result."""
        began, is_coming = time.perf_counter(), False
        place = self.game if mode == "mosaic" else self.result
        offered: dict[Any, Any] = {}
        try:
            _check_texts(network=network, selector=selector, method=method, layers=layers)
            self._check_network(network)
            self._loading.require(network)
            known = self._explorer.selectors(network)
            if network != shown.network:
                lists = ((self.selector, self._selectors), (self.layers, self._layers))
                offered = {part: _Update({"choices": choices(network)}) for part, choices in lists}
            note = ""
            wanted = find_selector(selector)
            if wanted.needs_statistics and selector not in known:
                note = f" {wanted.title} needs statistics, which {network} does not have. Using gradient energy."
                selector = _FALLBACK
                offered[self.selector] = _Update({"choices": self._selectors(network), "value": selector})
            shown = replace(shown, network=network)
            view = View(
                network=network,
                target=_chosen(shown, photograph, network, target, stamp),
                against=_compared(shown, network, against, stamp),
                selector=selector,
                method=method,
                layers=layers,
                quantile=_number("quantile", quantile, 0, 1),
                softness=_number("softness", softness, 0, 1),
                gamma=math.inf if prune else 10 ** _number("gamma", gamma, -1, 3),
                gates=_number("gates", gates, 0, 1000),
                antialias=bool(antialias),
                balance=bool(balance),
                signed=bool(signed),
                opacity=_number("opacity", opacity, 0, 1),
            )
            found = self._play(mosaic, view, shown) if mode == "mosaic" else self._explore(photograph, view, shown)
            now = found[self._shown]
            # The fallback also changes the selector list, which triggers this handler again.
            note = note or (shown.note if now.view == shown.view else "")
            said = f"{time.perf_counter() - began:.2f} s. {found[self.status]}{note}"
            settled: dict[Any, Any] = {self.status: _status(said), self._shown: replace(now, note=note)}
            if (now.view, now.listed) != (shown.view, shown.listed):
                # The measured stability is of another map.
                settled[self.steadiness] = ""
            return found | offered | settled | {self.again: _Update({"active": False})}
        except (_NothingYetError, StillLoadingError) as missing:
            told = _message(str(missing))
            is_coming = isinstance(missing, StillLoadingError)
        except ParchGradError as error:
            told = _message(str(error), refused=True)
        shown = replace(shown, view=None, photographs=())
        if mode == "single" and isinstance(photograph, _Refused):
            # The listed classes belong to a removed image.
            offered |= {part: _Update({"choices": [], "value": None}) for part in (self.top, self.target)}
            offered[self.against] = _Update({"choices": _COMPARED, "value": _ALONE})
            shown = replace(shown, listed=None)
        told_instead = {place: told, self.status: "", self.code: "", self.steadiness: "", self._shown: shown}
        return offered | told_instead | {self.again: _Update({"active": is_coming})}

    def _check_network(self, network: str) -> None:
        if not (self._settings.any_network or network in self._settings.networks):
            raise SettingError(
                f"The network {network!r} is not available. Choose one of {', '.join(self._settings.networks)}."
            )

    def _explore(self, photograph: Photograph | _Refused, view: View, shown: _Shown) -> dict[Any, Any]:
        listed = (_usable([photograph])[0], view.network)
        if view.target is None and view.against == self._explorer.ranked(*listed)[0]:
            # Chosen for the image before, and now the explained class itself.
            view = replace(view, against=None)
        found = self._explorer.explore(listed[0], view)
        held, chosen = [item.index for item in found.predictions], found.target.index
        lists: dict[Any, Any] = {self.top: _Update({"value": chosen if chosen in held else None})}
        if shown.listed != listed:
            ranked = [(f"{item.category}  {item.probability:.1%}", item.index) for item in found.predictions]
            # Send the long list only for a new network.
            is_new = shown.listed is None or shown.listed[1] != view.network
            classes = self._classes(view.network) if is_new else []
            compared = _ALONE if view.against is None else view.against
            lists = {
                self.top: _Update({"choices": ranked, "value": chosen}),
                self.target: _Update({"value": chosen} | ({"choices": classes} if is_new else {})),
                self.against: _Update({"value": compared} | ({"choices": _COMPARED + classes} if is_new else {})),
                self.stamp: _stamp(listed),
            }
        return lists | {
            self.result: _single_page(found),
            self.status: _edited(found.layers),
            self._shown: _Shown(
                listed=listed,
                target=chosen,
                against=view.against,
                network=view.network,
                view=replace(view, target=chosen),
            ),
            self.code: found.code,
        }

    def _play(self, mosaic: Sequence[Photograph | _Refused], view: View, shown: _Shown) -> dict[Any, Any]:
        photographs = _usable(mosaic)
        if len(photographs) < CELLS:
            raise _NothingYetError(f"Add {CELLS - len(photographs)} more." if photographs else _NO_MOSAIC)
        found = self._explorer.play(photographs[:CELLS], view)
        more = f" Using the first {CELLS} of {len(photographs)} images." if len(photographs) > CELLS else ""
        return {
            self.game: _mosaic_page(found),
            self.status: f"{CELLS} classes explained.{more}",
            self._shown: replace(shown, network=view.network, view=view, photographs=photographs[:CELLS]),
            self.code: found.code,
        }

    def _rewrite(self, shown: _Shown, opacity: float) -> dict[Any, Any]:
        """Update the code for a new opacity; the browser blends the picture itself."""
        if shown.view is None or shown.view.opacity == opacity:
            return {}
        try:
            changed = replace(shown, view=replace(shown.view, opacity=_number("opacity", opacity, 0, 1)))
            return {self._shown: changed, self.code: self._found(changed).code}
        except ParchGradError:
            # The file is gone; the next event reports it.
            return {}

    def _measure(self, shown: _Shown) -> str:
        """Measure the stability of the displayed map."""
        if shown.view is None or shown.listed is None:
            return _status("There is no map yet.")
        try:
            return _steadiness(self._explorer.stability(_usable([shown.listed[0]])[0], shown.view))
        except ParchGradError as error:
            return _status(str(error))

    def _save(self, kind: str, shown: _Shown) -> dict[Any, Any]:
        """Save the displayed result to a file."""
        if shown.view is None:
            return {self.fetched: None, self.status: _status("There is nothing to save yet.")}
        try:
            found = self._found(shown)
            # A new folder for each request, so that users cannot overwrite each other's files.
            cache = Path(self.fetched.GRADIO_CACHE)
            cache.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(dir=cache), f"{_stem(found)}.{kind}")
            _, write = _DOWNLOADS[kind]
            write(self._explorer, found, path)
        except ParchGradError as error:
            return {self.fetched: None, self.status: _status(str(error))}
        return {self.fetched: str(path), self.status: _status(f"Saved as {path.name}.")}

    def _found(self, shown: _Shown) -> Exploration | Game:
        view = shown.view or View()
        if shown.photographs:
            return self._explorer.play(shown.photographs, view)
        return self._explorer.explore(_usable([shown.listed[0]] if shown.listed else [])[0], view)


class _NothingYetError(ParchGradError):
    """The user has not provided all images yet."""


@dataclass(frozen=True)
class _Update:
    """Changed properties of a component; empty if nothing changes.

    Gradio makes a component for each of its own updates and keeps it in the session. This update avoids that.
    """

    properties: Mapping[str, Any] = field(default_factory=dict)


def _complete(handler: Callable[..., dict[Any, Any]], outputs: Sequence[Any]) -> Callable[..., dict[Any, Any]]:
    """Add an empty update for every output that a handler omits."""

    @functools.wraps(handler)
    def run(*inputs: Any) -> dict[Any, Any]:
        unchanged = {part: _Update() for part in outputs if not isinstance(part, gr.State)}
        return unchanged | handler(*inputs)

    return run


def _let_update(part: Any) -> None:
    """Let a component accept `_Update` from handlers."""
    usual = part.postprocess

    @functools.wraps(usual)
    def postprocess(value: Any) -> Any:
        return gr.update(**value.properties) if isinstance(value, _Update) else usual(value)

    part.postprocess = postprocess


def _usable(photographs: Sequence[Photograph | _Refused]) -> tuple[Photograph, ...]:
    for item in photographs:
        if isinstance(item, _Refused):
            raise ImageError(item.reason) if item.reason else _NothingYetError("Drop an image or choose an example.")
    return tuple(item for item in photographs if isinstance(item, Photograph))


def _chosen(
    shown: _Shown, photograph: Photograph | _Refused, network: str, target: int | None, stamp: str
) -> int | None:
    """The class to explain; None for the predicted class if the image or network is new."""
    if shown.listed != (photograph, network):
        return None
    if target is None or stamp != _stamp(shown.listed):
        return shown.target
    if not isinstance(target, int):
        raise SettingError(f"`target` is {str(target)[:40]!r}, but it must be a whole number.")
    return target


def _compared(shown: _Shown, network: str, against: int | str, stamp: str) -> Any:
    """What to compare the class with; None if the network is new, since its classes are others."""
    if shown.listed is None or shown.listed[1] != network:
        return None
    if stamp != _stamp(shown.listed):
        return shown.against
    return None if against == _ALONE else against


def _check_texts(**settings: object) -> None:
    """Check text values, since API clients can send anything."""
    for name, value in settings.items():
        if not isinstance(value, str):
            raise SettingError(f"`{name}` is {str(value)[:40]!r}, but it must be a string.")
        if len(value) > _LONGEST_TEXT:
            raise SettingError(f"`{name}` has {len(value):,} characters, but it must have at most {_LONGEST_TEXT:,}.")


def _number(name: str, value: object, least: float, most: float) -> float:
    if not isinstance(value, (int, float)) or not least <= value <= most:
        raise SettingError(f"`{name}` is {str(value)[:40]}, but it must be a number from {least} to {most}.")
    return value


def _stamp(listed: object) -> str:
    """Short identifier of a list of classes."""
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def _save_png(explorer: Explorer, found: Exploration | Game, path: Path) -> None:
    save_figure(found.figure(), path)


def _save_npy(explorer: Explorer, found: Exploration | Game, path: Path) -> None:
    with writing(path) as temporary:
        save_array(found.attribution.numpy(), temporary)


def _save_gif(explorer: Explorer, found: Exploration | Game, path: Path) -> None:
    if isinstance(found, Game):
        raise SettingError("A GIF needs a single image. Switch to the tab 'One image'.")
    title = f"{found.view.method.replace('_', ' ')} + ParchGrad"
    save_animation({title: explorer.sweep(found.photograph, found.view)}, path, most_bytes=_LARGEST_GIF)


_DOWNLOADS: Mapping[str, tuple[str, Callable[[Explorer, Exploration | Game, Path], None]]] = {
    "png": ("Figure (PNG)", _save_png),
    "gif": ("All quantiles (GIF)", _save_gif),
    "npy": ("Raw attribution (npy)", _save_npy),
}
# Enough for full-size panels.
_LARGEST_GIF = 4_000_000


def _stem(found: Exploration | Game) -> str:
    """Descriptive file name for a result."""
    view = found.view
    shown = (
        [
            found.photograph.name.rsplit(".", 1)[0],
            found.target.category,
            "" if found.against is None else f"rather than {found.against}",
        ]
        if isinstance(found, Exploration)
        else ["mosaic", *(item.category for item in found.targets)]
    )
    settings = [view.network, view.method, view.selector, f"layers {view.layers}"]
    settings += [f"q{view.quantile:g}"] if find_selector(view.selector).has("quantile") else []
    settings += [f"s{view.softness:g}", f"gates{view.gates:g}", *(["strides"] if view.antialias else [])]
    settings += ["balance"] if view.balance else []
    settings += [] if math.isinf(view.gamma) else [f"gamma{_plain_number(view.gamma)}"]
    settings += ["signed"] if view.signed else []

    def joined(parts: Sequence[str]) -> str:
        return "_".join(re.sub(r"[^\w.]+", "-", part).strip("-.")[:40] for part in parts if part)

    # Shorten the class names only: the settings tell files apart.
    return f"{joined(shown)[:100]}_{joined(settings)}"


def _plain_number(value: float) -> str:
    """Format with three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):g}"


def _steadiness(stability: float) -> str:
    """Describe a stability, with a warning if it is low."""
    if math.isnan(stability):
        return _status("Stability is undefined: the map is zero everywhere.")
    said = f"<strong>stability {stability:.2f}</strong>. "
    if stability < UNSTABLE:
        told = "Warning: invisible noise changes much of this map, so it explains little."
        return f"<span class='pg-status pg-warning' role='alert'>{said}{told}</span>"
    told = "hardly changes this map." if stability >= _STEADY else "changes parts of this map."
    return f"<span class='pg-status'>{said}Invisible noise {told}</span>"


# Threshold of the mean cosine between maps.
_STEADY = 0.9


def _edited(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return f"1 layer edited, {layers[0]}."
    return f"{len(layers)} layers edited, from {layers[0]} to {layers[-1]}."


def _single_page(found: Exploration) -> str:
    view = found.view
    top, pictures = tinted(found.maps(), signed=view.signed)
    selector = find_selector(view.selector)
    setting = [selector.title.lower()]
    setting += [f"quantile {view.quantile:g}"] if selector.has("quantile") else []
    setting += [] if math.isinf(view.gamma) else [f"gamma {_plain_number(view.gamma)}"]
    return _render(
        "explorer_single.html",
        view,
        top,
        photograph=found.photograph.name,
        picture=data_url(found.picture, "PNG"),
        maps=[data_url(picture, "PNG") for picture in pictures],
        category=found.target.category,
        probability=found.target.probability,
        against=found.against,
        setting=", ".join(setting),
    )


def _mosaic_page(found: Game) -> str:
    plain, partitioned = found.maps()
    top, pictures = tinted([*plain, *partitioned], signed=found.view.signed)
    return _render(
        "explorer_mosaic.html",
        found.view,
        top,
        picture=data_url(found.picture),
        chance=1 / CELLS,
        mean=np.mean(found.shares),
        plain_mean=np.mean(found.plain_shares),
        repeated=len({item.index for item in found.targets}) < CELLS,
        rows=[
            {
                "category": found.targets[cell].category,
                "place": _PLACES[cell],
                "cell": cell,
                "share": found.shares[cell],
                "plain_share": found.plain_shares[cell],
                "maps": [data_url(pictures[cell], "PNG"), data_url(pictures[CELLS + cell], "PNG")],
            }
            for cell in range(CELLS)
        ],
    )


def _render(template: str, view: View, top: float, **values: Any) -> str:
    colour_map = matplotlib.colormaps[SIGNED_COLOUR_MAP if view.signed else COLOUR_MAP]
    colours = [matplotlib.colors.to_hex(colour) for colour in colour_map(np.linspace(0, 1, 12))]
    method = view.method.replace("_", " ").capitalize()
    return render(template, colours=colours, top=top, method=method, signed=view.signed, **values)


def _message(text: str, *, refused: bool = False) -> str:
    return f"<div class='pg-message{' pg-refused' if refused else ''}' role='alert'>{html.escape(text)}</div>"


def _status(text: str) -> str:
    return f"<span class='pg-status'>{html.escape(text)}</span>"


def _style() -> str:
    thumbnails = []
    for photograph in example_photographs():
        small = photograph.convert("RGB")
        small.thumbnail((240, 160))
        thumbnails.append(data_url(small))
    return render("explorer.css", thumbnails=thumbnails)


def _theme() -> gr.themes.Base:
    # Plain strings are system fonts; Gradio's font objects would be downloaded.
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )


@contextlib.contextmanager
def serve(settings: WebSettings | None = None, *, open_browser: bool = False) -> Iterator[str]:
    """Serve the explorer while the block runs, and return its URL.

    Uploaded files are kept in a temporary folder, which is removed at the end.

    Args:
        settings: settings of the server.
        open_browser: whether to open the page in a local browser.

    Raises:
        SettingError: if the address cannot be bound, for example because the port is in use.
        ParchGradError: if the network cannot be loaded, or the statistics do not match it.
    """
    settings = settings or WebSettings()
    port = _free_port(settings)
    with tempfile.TemporaryDirectory(prefix="parchgrad-", ignore_cleanup_errors=True) as folder, _files_in(folder):
        app = build_app(settings)
        largest_file = int(settings.max_megabytes * 2**20)
        try:
            _, url, _ = app.launch(
                server_name=settings.host,
                server_port=port,
                inbrowser=open_browser,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=largest_file,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                # Each session keeps its last page, about 5 MB for a mosaic.
                state_session_capacity=200,
                theme=_theme(),
                css=_style(),
                app_kwargs={
                    "middleware": [
                        Middleware(
                            RequestGuard,
                            folder=Path(folder),
                            largest_file=largest_file,
                            # The images of a mosaic come in one form.
                            files=CELLS,
                            most_stored=int(settings.max_stored_megabytes * 2**20),
                        )
                    ]
                },
            )
            yield url
        finally:
            app.close(verbose=False)


def is_loopback(host: str) -> bool:
    """Whether an address is only reachable from this machine.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(settings: WebSettings) -> int:
    """Check the port, or find a free one, before the slow start."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
            port: int = probe.getsockname()[1]
            return port
    except OSError as error:
        remedy = "Choose another `port`" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "Check `host`"
        raise SettingError(
            f"Cannot serve the explorer at {settings.host}:{settings.port} ({error.strerror or error}). {remedy}."
        ) from error


@contextlib.contextmanager
def _files_in(folder: str) -> Iterator[None]:
    """Make Gradio keep its files in a folder, through its environment variable."""
    earlier = os.environ.get("GRADIO_TEMP_DIR")
    # Gradio also creates empty folders at its default location; remove them afterwards.
    usual = Path(earlier or Path(tempfile.gettempdir(), "gradio"))
    made = [path for path in (usual / "vibe_edit_history", usual) if not path.exists()]
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if earlier is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = earlier
