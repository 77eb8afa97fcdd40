"""The command that serves the web explorer."""

import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from parchgrad.cli.shared import (
    ClassesFile,
    ModelName,
    WeightsFile,
    console,
    error_console,
    interrupted_by_signals,
    load_classifier,
)


def explore(
    host: Annotated[str, typer.Option(help="Address to bind to; 0.0.0.0 allows other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 uses any free port.")] = 7860,
    model: ModelName = "efficientnet_lite0",
    weights: WeightsFile = None,
    classes: ClassesFile = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="File of channel statistics of that network, for the selectors class and instance.",
            show_default="bundled, for efficientnet_lite0",
        ),
    ] = None,
    max_megabytes: Annotated[float, typer.Option(help="Size limit of an uploaded file.")] = 20,
    max_megapixels: Annotated[float, typer.Option(help="Size limit of an image.")] = 50,
    max_stored_megabytes: Annotated[float, typer.Option(help="Size limit of all uploaded files together.")] = 2000,
    open_browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in a browser.")] = False,
) -> None:
    """Explore images on a page in the browser, offline. Needs the extra `web`."""
    with interrupted_by_signals(), ExitStack() as served:
        with suppress(KeyboardInterrupt):
            with error_console.status("Starting"):
                from parchgrad.explorer.server import serve
                from parchgrad.explorer.settings import OwnNetwork, WebSettings, is_loopback

                classifier = load_classifier(model, weights=weights, classes=classes)
                files = {"weights": weights, "classes": classes}
                options = "".join(f", {name}={str(file)!r}" for name, file in files.items() if file is not None)
                settings = WebSettings(
                    host=host,
                    port=port,
                    network=classifier.name,
                    own=OwnNetwork(classifier, f"pg.load_network({model!r}{options})"),
                    statistics=statistics,
                    max_megabytes=max_megabytes,
                    max_megapixels=max_megapixels,
                    max_stored_megabytes=max_stored_megabytes,
                    # Other machines must not trigger downloads.
                    any_network=is_loopback(host),
                )
                url = served.enter_context(serve(settings, open_browser=open_browser))
            console.print(f"Open {url} (press Ctrl-C to stop)", highlight=False, soft_wrap=True)
            threading.Event().wait()
        error_console.print("Stopping.", highlight=False)
