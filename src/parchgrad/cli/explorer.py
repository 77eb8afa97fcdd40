"""The command that serves the web explorer."""

import logging
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from parchgrad.cli.shared import console, error_console, interrupted_by_signals


def explore(
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 opens it to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 takes one that is free.")] = 7860,
    model: Annotated[
        str, typer.Option(help="The network chosen first, by its torchvision or timm name.")
    ] = "efficientnet_lite0",
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Channel statistics of that network, for the selectors class and instance.",
            show_default="those that come with the package, for efficientnet_lite0",
        ),
    ] = None,
    max_megabytes: Annotated[float, typer.Option(help="Size of the largest file that is taken.")] = 20,
    max_megapixels: Annotated[float, typer.Option(help="Size of the largest photograph that is taken.")] = 50,
    max_stored_megabytes: Annotated[float, typer.Option(help="Size of all files that are kept together.")] = 2000,
    open_browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in a browser.")] = False,
) -> None:
    """Explore photographs on a page in the browser, offline; needs the extra web."""
    with interrupted_by_signals(), ExitStack() as served:
        with suppress(KeyboardInterrupt):
            with error_console.status("Starting"):
                from parchgrad.web import WebSettings, is_loopback, serve

                logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
                settings = WebSettings(
                    host=host,
                    port=port,
                    network=model,
                    statistics=statistics,
                    max_megabytes=max_megabytes,
                    max_megapixels=max_megapixels,
                    max_stored_megabytes=max_stored_megabytes,
                    # What strangers type is not downloaded.
                    any_network=is_loopback(host),
                )
                url = served.enter_context(serve(settings, open_browser=open_browser))
            console.print(f"Look at {url} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
            threading.Event().wait()
        error_console.print("Stopping.", highlight=False)
