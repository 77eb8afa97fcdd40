"""Serve the explorer: the HTTP server, its port, and its temporary folder."""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from parchgrad._io.extras import needs_extra
from parchgrad.errors import SettingError
from parchgrad.explorer.inputs import CELLS
from parchgrad.explorer.page import build_app
from parchgrad.explorer.rendering import style
from parchgrad.explorer.settings import WebSettings

with needs_extra("web"):
    import gradio as gr
    from starlette.middleware import Middleware

    from parchgrad.explorer.guard import RequestGuard

__all__ = ["serve"]


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
    # Before the slow start; a free port is chosen only at its end, since another process could take it meanwhile.
    _free_port(settings)
    with tempfile.TemporaryDirectory(prefix="parchgrad-", ignore_cleanup_errors=True) as folder, _files_in(folder):
        app = build_app(settings)
        largest_file = int(settings.max_megabytes * 2**20)
        try:
            _, url, _ = app.launch(
                server_name=settings.host,
                server_port=_free_port(settings),
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
                state_session_capacity=settings.max_sessions,
                theme=_theme(),
                css=style(),
                app_kwargs={
                    "middleware": [
                        Middleware(
                            RequestGuard,
                            folder=Path(folder),
                            largest_file=largest_file,
                            # The images of a mosaic come in one form.
                            files=CELLS,
                            most_stored=int(settings.max_stored_megabytes * 2**20),
                            frame_ancestors=settings.frame_ancestors,
                        )
                    ]
                },
            )
            yield url
        finally:
            app.close(verbose=False)


def _theme() -> gr.themes.Base:
    # Plain strings are system fonts; Gradio's font objects would be downloaded.
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        spacing_size="sm",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )


def _free_port(settings: WebSettings) -> int:
    """Check the port, or find a free one."""
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
