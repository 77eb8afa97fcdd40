"""The page of the explorer: what its events do, as a thin layer over the library."""

import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import folder_size
from parchgrad.core.layers import has_published_layers
from parchgrad.errors import ImageError, OutputError, ParchGradError, SettingError
from parchgrad.explorer.downloads import DOWNLOADS, file_name
from parchgrad.explorer.inputs import CELLS, EXAMPLES, ImageSource, View, check_image, comparison_title
from parchgrad.explorer.layout import ALONE, COMPARED, NO_MOSAIC, Layout
from parchgrad.explorer.loading import Loading, StillLoadingError
from parchgrad.explorer.rendering import (
    describe_layers,
    describe_stability,
    message,
    mosaic_page,
    single_page,
    status,
)
from parchgrad.explorer.settings import WebSettings
from parchgrad.explorer.state import (
    NothingYetError,
    Refused,
    Shown,
    check_texts,
    checked_number,
    chosen_class,
    compared_class,
    stamp_of,
    usable_images,
)
from parchgrad.explorer.views import Exploration, Explorer, Game
from parchgrad.statistics.selectors import find_selector, registered_selectors

with needs_extra("web"):
    import gradio as gr

__all__ = ["build_app"]

T = TypeVar("T")
_TITLE = "ParchGrad explorer"
# It has the same defaults as the selectors with statistics.
_FALLBACK = "energy"
_LAYERS = {
    "Automatic": "auto",
    "Upper half": "0.5",
    "Upper 3/4": "0.75",
    "All": "all",
    "Published set": "published",
}
# Value of the list of third maps for none.
_NO_COMPARISON = "none"
_FETCH = "() => { document.querySelector('#fetched')?.click(); }"


def build_app(settings: WebSettings) -> gr.Blocks:
    """Build the page and its event handlers; see `serve`.

    Args:
        settings: settings of the server.

    Raises:
        ParchGradError: if the network cannot be loaded, or the statistics do not match it.
    """
    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 7200)) as app:
        _Page(settings).listen(app)
    app.queue(max_size=settings.max_waiting, default_concurrency_limit=1, api_open=False)
    return app


class _Page:
    """Event handlers of the page, shared by all users.

    The state of a user comes in with an event and goes out with its results.
    """

    def __init__(self, settings: WebSettings) -> None:
        statistics = {} if settings.statistics is None else {settings.network: settings.statistics}
        self._settings = settings
        self._explorer = Explorer(statistics=statistics, own=settings.own)
        self._loading = Loading(self._explorer)
        # PyTorch keeps threads and memory for every thread that runs a network, and Gradio uses dozens.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="network")
        network = settings.network
        self._parts = Layout(
            settings,
            selectors=self._selectors(network),
            layers=self._layers(network),
            comparisons=self._comparisons(network),
        )

    def listen(self, app: gr.Blocks) -> None:
        """Connect events to their handlers."""
        parts = self._parts
        parts.listen(app)
        # One queue for all handlers keeps results in order.
        of_user = [parts.mode, parts.image_state, parts.mosaic_state, parts.shown]
        edit = [parts.selector, parts.layers, parts.quantile, parts.softness, parts.prune, parts.gamma]
        edit += [parts.gates, parts.antialias, parts.balance]
        of_view = [*edit, parts.method, parts.comparison, parts.signed]
        shown = [parts.result, parts.game, parts.status, parts.code]
        shown += [parts.top, parts.target, parts.stamp, parts.selector, parts.layers, parts.steadiness, parts.against]
        shown += [parts.comparison, parts.shown, parts.again]
        shows: dict[str, Any] = {
            "fn": _complete(self._on_worker(self._show), shown),
            "inputs": [*of_user, parts.network, parts.target, parts.against, parts.stamp, *of_view, parts.opacity],
            "outputs": shown,
            # Gradio would check values against choices that may have changed meanwhile.
            "preprocess": False,
            "concurrency_id": "network",
            "show_progress": "full",
            "show_progress_on": parts.status,
        }
        # One listener for all settings, so that after rapid changes only the last state is computed.
        settings = [parts.target, parts.against, parts.network, *of_view]
        triggers = [app.load, parts.again.tick, *(setting.change for setting in settings)]
        gr.on(triggers, trigger_mode="always_last", api_name="show", **shows)
        shows["api_visibility"] = "private"
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        parts.prune.input(lambda prune: _Update({"visible": not prune}), parts.prune, parts.gamma, **private)
        rewritten = [parts.shown, parts.code]
        parts.opacity.change(
            _complete(self._on_worker(self._rewrite), rewritten),
            [parts.shown, parts.opacity],
            rewritten,
            concurrency_id="network",
            **private,
        )
        taken: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "files"}
        of_one, of_four = [parts.image_state, parts.file, parts.example], [parts.mosaic_state, parts.files]
        # Without preprocessing: Gradio would open the file, and fail silently if it is not an image.
        taking = gr.on(
            [parts.file.upload, parts.file.clear],
            _complete(self._take, of_one),
            parts.file,
            of_one,
            preprocess=False,
            api_name="take",
            **taken,
        )
        taking.then(**shows)
        take_example, take_four = _complete(self._take_example, of_one), _complete(self._take_four, of_four)
        parts.example.input(take_example, parts.example, of_one, api_name="take_example", **taken).then(**shows)
        changed = [parts.files.upload, parts.files.clear, parts.files.delete]
        gr.on(changed, take_four, parts.files, of_four, api_name="take_four", **taken).then(**shows)
        parts.take_examples.click(self._take_four_examples, None, of_four, api_name="take_four_examples", **taken).then(
            **shows
        )
        for mode, tab in (("single", parts.single_tab), ("mosaic", parts.mosaic_tab)):
            tab.select(lambda mode=mode: mode, None, parts.mode, **private).then(**shows)
        of_shown: dict[str, Any] = {
            "inputs": parts.shown,
            "concurrency_id": "network",
            "show_progress": "full",
            "show_progress_on": parts.status,
        }
        parts.measure.click(self._on_worker(self._measure), outputs=parts.steadiness, api_name="measure", **of_shown)
        for kind, button in parts.savers.items():
            save = self._on_worker(functools.partial(self._save, kind))
            outputs = [parts.fetched, parts.status]
            button.click(save, outputs=outputs, api_visibility="private", **of_shown).then(None, js=_FETCH)
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

    def _comparisons(self, network: str) -> list[tuple[str, str]]:
        known = self._explorer.comparisons(network)
        return [("None", _NO_COMPARISON), *((comparison_title(name), name) for name in known)]

    def _take(self, file: dict[str, Any] | None) -> dict[Any, Any]:
        """Accept an image that was dropped, pasted or chosen."""
        parts = self._parts
        if file is None:
            return {parts.image_state: Refused("")}
        found = (
            self._checked(str(file["path"])) if file.get("path") else Refused("The upload is empty. Choose an image.")
        )
        # Do not display a refused file.
        removed = {parts.file: None} if isinstance(found, Refused) else {}
        return {parts.image_state: found, parts.example: None} | removed

    def _take_example(self, name: str) -> dict[Any, Any]:
        return {self._parts.image_state: ImageSource(name), self._parts.file: None}

    def _take_four(self, paths: Sequence[str] | None) -> dict[Any, Any]:
        return {self._parts.mosaic_state: tuple(self._checked(path) for path in paths or ())}

    def _take_four_examples(self) -> dict[Any, Any]:
        return {self._parts.mosaic_state: tuple(map(ImageSource, EXAMPLES)), self._parts.files: None}

    def _checked(self, path: str) -> ImageSource | Refused:
        try:
            check_image(path, megapixels=self._settings.max_megapixels)
        except ImageError as error:
            return Refused(str(error))
        return ImageSource(Path(path).name, Path(path))

    def _show(
        self,
        mode: str,
        image: ImageSource | Refused,
        mosaic: Sequence[ImageSource | Refused],
        shown: Shown,
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
        comparison: str,
        signed: bool,
        opacity: float,
    ) -> dict[Any, Any]:
        """Explain the image or mosaic with the current settings; errors are displayed in place of the result."""
        began, is_coming, parts = time.perf_counter(), False, self._parts
        place = parts.game if mode == "mosaic" else parts.result
        offered: dict[Any, Any] = {}
        try:
            check_texts(network=network, selector=selector, method=method, layers=layers, comparison=comparison)
            self._check_network(network)
            self._loading.require(network)
            if network != shown.network:
                lists = (
                    (parts.selector, self._selectors),
                    (parts.layers, self._layers),
                    (parts.comparison, self._comparisons),
                )
                offered = {part: _Update({"choices": choices(network)}) for part, choices in lists}
            shown = replace(shown, network=network)
            selector, comparison, fallback, note = self._settled(network, selector, comparison)
            offered |= fallback
            view = View(
                network=network,
                target=chosen_class(shown, image, network, target, stamp),
                against=compared_class(shown, network, None if against == ALONE else against, stamp),
                selector=selector,
                method=method,
                comparison=None if comparison == _NO_COMPARISON else comparison,
                layers=layers,
                quantile=checked_number("quantile", quantile, 0, 1),
                softness=checked_number("softness", softness, 0, 1),
                gamma=math.inf if prune else 10 ** checked_number("gamma", gamma, -1, 3),
                gates=checked_number("gates", gates, 0, 1000),
                antialias=bool(antialias),
                balance=bool(balance),
                signed=bool(signed),
                opacity=checked_number("opacity", opacity, 0, 1),
            )
            found = self._play(mosaic, view, shown) if mode == "mosaic" else self._explore(image, view, shown)
            now = found[parts.shown]
            # The fallback also changes a list, which triggers this handler again.
            note = note or (shown.note if now.view == shown.view else "")
            said = f"{note} {time.perf_counter() - began:.2f} s. {found[parts.status]}".lstrip()
            settled: dict[Any, Any] = {parts.status: status(said), parts.shown: replace(now, note=note)}
            if (now.view, now.listed) != (shown.view, shown.listed):
                # The measured stability is of another map.
                settled[parts.steadiness] = ""
            return found | offered | settled | {parts.again: _Update({"active": False})}
        except (NothingYetError, StillLoadingError) as missing:
            told = message(str(missing))
            is_coming = isinstance(missing, StillLoadingError)
        except ParchGradError as error:
            told = message(str(error), refused=True)
        shown = replace(shown, view=None, images=())
        if mode == "single" and isinstance(image, Refused):
            # The listed classes belong to a removed image.
            offered |= {part: _Update({"choices": [], "value": None}) for part in (parts.top, parts.target)}
            offered[parts.against] = _Update({"choices": COMPARED, "value": ALONE})
            shown = replace(shown, listed=None)
        told_instead = {place: told, parts.status: "", parts.code: "", parts.steadiness: "", parts.shown: shown}
        return offered | told_instead | {parts.again: _Update({"active": is_coming})}

    def _check_network(self, network: str) -> None:
        if not (self._settings.any_network or network in self._settings.networks):
            raise SettingError(
                f"The network {network!r} is not available. Choose one of {', '.join(self._settings.networks)}."
            )

    def _settled(self, network: str, selector: str, comparison: str) -> tuple[str, str, dict[Any, Any], str]:
        """Replace what the network does not support: the selector, the third map, updates of lists, and a note."""
        parts, note, offered = self._parts, "", {}
        wanted = find_selector(selector)
        if wanted.needs_statistics and selector not in self._explorer.selectors(network):
            note = f"{wanted.title} needs statistics, which {network} does not have. Using gradient energy."
            selector = _FALLBACK
            offered[parts.selector] = _Update({"choices": self._selectors(network), "value": selector})
        choices = self._comparisons(network)
        if comparison not in dict(choices).values():
            note += f" No third map: {comparison_title(comparison)} does not work with {network}."
            comparison = _NO_COMPARISON
            offered[parts.comparison] = _Update({"choices": choices, "value": comparison})
        return selector, comparison, offered, note

    def _explore(self, image: ImageSource | Refused, view: View, shown: Shown) -> dict[Any, Any]:
        parts, listed = self._parts, (usable_images([image])[0], view.network)
        if view.target is None and view.against == self._explorer.ranked(*listed)[0]:
            # Chosen for the image before, and now the explained class itself.
            view = replace(view, against=None)
        found = self._explorer.explore(listed[0], view)
        held, chosen = [item.index for item in found.predictions], found.target.index
        lists: dict[Any, Any] = {parts.top: _Update({"value": chosen if chosen in held else None})}
        if shown.listed != listed:
            ranked = [(f"{item.category}  {item.probability:.1%}", item.index) for item in found.predictions]
            # Send the long list only for a new network.
            is_new = shown.listed is None or shown.listed[1] != view.network
            classes = self._classes(view.network) if is_new else []
            compared = ALONE if view.against is None else view.against
            lists = {
                parts.top: _Update({"choices": ranked, "value": chosen}),
                parts.target: _Update({"value": chosen} | ({"choices": classes} if is_new else {})),
                parts.against: _Update({"value": compared} | ({"choices": COMPARED + classes} if is_new else {})),
                parts.stamp: stamp_of(listed),
            }
        return lists | {
            parts.result: single_page(found),
            parts.status: describe_layers(found.layers),
            parts.shown: Shown(
                listed=listed,
                target=chosen,
                against=view.against,
                network=view.network,
                view=replace(view, target=chosen),
            ),
            parts.code: found.code,
        }

    def _play(self, mosaic: Sequence[ImageSource | Refused], view: View, shown: Shown) -> dict[Any, Any]:
        parts, images = self._parts, usable_images(mosaic)
        if len(images) < CELLS:
            raise NothingYetError(f"Add {CELLS - len(images)} more." if images else NO_MOSAIC)
        found = self._explorer.play(images[:CELLS], view)
        more = f" Using the first {CELLS} of {len(images)} images." if len(images) > CELLS else ""
        return {
            parts.game: mosaic_page(found),
            parts.status: f"{CELLS} classes explained.{more}",
            parts.shown: replace(shown, network=view.network, view=view, images=images[:CELLS]),
            parts.code: found.code,
        }

    def _rewrite(self, shown: Shown, opacity: float) -> dict[Any, Any]:
        """Update the code for a new opacity; the browser blends the picture itself."""
        if shown.view is None or shown.view.opacity == opacity:
            return {}
        try:
            changed = replace(shown, view=replace(shown.view, opacity=checked_number("opacity", opacity, 0, 1)))
            return {self._parts.shown: changed, self._parts.code: self._found(changed).code}
        except ParchGradError:
            # The file is gone; the next event reports it.
            return {}

    def _measure(self, shown: Shown) -> str:
        """Measure the stability of the displayed map."""
        if shown.view is None or shown.listed is None:
            return status("There is no map yet.")
        try:
            return describe_stability(self._explorer.stability(usable_images([shown.listed[0]])[0], shown.view))
        except ParchGradError as error:
            return status(str(error))

    def _save(self, kind: str, shown: Shown) -> dict[Any, Any]:
        """Save the displayed result to a file."""
        parts = self._parts
        if shown.view is None:
            return {parts.fetched: None, parts.status: status("There is nothing to save yet.")}
        try:
            found = self._found(shown)
            # A new folder for each request, so that users cannot overwrite each other's files.
            cache = Path(parts.fetched.GRADIO_CACHE)
            cache.mkdir(parents=True, exist_ok=True)
            if folder_size(cache) > self._settings.max_stored_megabytes * 2**20:
                raise OutputError("The server has no room for more files. Try again in an hour.")
            path = Path(tempfile.mkdtemp(dir=cache), file_name(found, kind))
            _, write = DOWNLOADS[kind]
            write(self._explorer, found, path)
        except ParchGradError as error:
            return {parts.fetched: None, parts.status: status(str(error))}
        return {parts.fetched: str(path), parts.status: status(f"Saved as {path.name}.")}

    def _found(self, shown: Shown) -> Exploration | Game:
        view = shown.view or View()
        if shown.images:
            return self._explorer.play(shown.images, view)
        return self._explorer.explore(usable_images([shown.listed[0]] if shown.listed else [])[0], view)


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
