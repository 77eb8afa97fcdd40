"""Request filter and security headers of the web explorer."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from starlette.formparsers import MultiPartException

from parchgrad._io.files import folder_size

__all__ = ["RequestGuard"]

# Largest body of a request without files, in bytes.
_LARGEST_MESSAGE = 1_000_000
# Bytes of a form besides its files.
_FORM_LINES = 10_000
# Browsers may load resources from this server only.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors "
)
_TOO_LARGE = 413, "The upload is too large."
_FULL = 507, "The server's file storage is full. Try again in a few hours."


class RequestGuard:
    """Refuses requests that would make the server fetch remote resources or exceed its storage."""

    def __init__(
        self,
        app: Any,
        *,
        folder: Path,
        largest_file: int,
        files: int,
        most_stored: int,
        frame_ancestors: str = "'none'",
    ) -> None:
        """Wrap an ASGI application.

        Args:
            app: the application, which limits the size of each file itself.
            folder: folder of uploaded files.
            largest_file: size limit of a file in bytes.
            files: number of files of that size that a form may contain.
            most_stored: size limit of the folder in bytes.
            frame_ancestors: origins that may embed the page in a frame.
        """
        self._app = app
        self._folder, self._most_stored = folder, most_stored
        self._policy = f"{_POLICY}{frame_ancestors}".encode()
        self._largest_form = files * largest_file + _FORM_LINES
        # Bytes of forms that are still arriving.
        self._arriving = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse a request or pass it on; see the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        # A single letter before the colon is a Windows drive.
        if re.search(r"/(file[=/]|proxy=|stream/)\s*[\w+.-]{2,}:", path) or "/proxy=" in path:
            await _refuse(send, 403, "This server does not proxy remote files.")
            return
        if path.endswith("/deep_link"):
            # Each link would save the whole session to a file that is never removed.
            await _refuse(send, 404, "Deep links are disabled.")
            return
        if scope["method"] in ("POST", "PUT", "PATCH"):
            length = headers.get(b"content-length", b"")
            announced = int(length) if length.isdigit() else 0
            if path.endswith("/upload") and headers.get(b"content-type", b"").startswith(b"multipart/"):
                await self._take_form(scope, receive, send, announced)
                return
            body = b"" if announced > _LARGEST_MESSAGE else await _read(receive, _LARGEST_MESSAGE)
            if body is None:
                # The client has disconnected.
                return
            if max(announced, len(body)) > _LARGEST_MESSAGE:
                await _refuse(send, *_TOO_LARGE)
                return
            if _names_address(body):
                await _refuse(send, 403, "Only uploaded files can be read.")
                return
            receive = _again(body, receive)
        await self._app(scope, receive, self._with_policy(send))

    async def _take_form(self, scope: Any, receive: Any, send: Any, announced: int) -> None:
        """Pass on a form with files while it stays within the limits, whatever size it announces."""
        stored = await asyncio.to_thread(folder_size, self._folder)
        arrived, refusal = 0, None

        def refused(size: int) -> tuple[int, str] | None:
            if size > self._largest_form:
                return _TOO_LARGE
            return _FULL if stored + self._arriving + size - arrived > self._most_stored else None

        async def counting() -> Any:
            nonlocal arrived, refusal
            message = await receive()
            if message["type"] != "http.request":
                # Starlette removes a form's files only after this error.
                raise MultiPartException("The upload was interrupted.")
            size = len(message.get("body", b""))
            refusal = refused(arrived + size)
            if refusal is not None:
                raise MultiPartException(refusal[1])
            arrived += size
            self._arriving += size
            return message

        async def answering(message: Any) -> None:
            if refusal is None:
                await guarded(message)
            elif message["type"] == "http.response.start":
                await _refuse(send, *refusal)

        guarded = self._with_policy(send)
        early = refused(announced)
        if early is not None:
            await _refuse(send, *early)
            return
        try:
            await self._app(scope, counting, answering)
        finally:
            self._arriving -= arrived

    def _with_policy(self, send: Any) -> Any:
        added = [
            (b"content-security-policy", self._policy),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        return sending


async def _read(receive: Any, largest: int) -> bytes | None:
    """Read a request body, stopping after more than `largest` bytes; None if the client disconnects."""
    body = b""
    while len(body) <= largest:
        message: dict[str, Any] = await receive()
        if message["type"] != "http.request":
            return None
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            break
    return body


def _again(body: bytes, receive: Any) -> Any:
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> Any:
        # Some handlers wait for the disconnect message after the body.
        return next(parts, None) or await receive()

    return replay


def _names_address(body: bytes) -> bool:
    """Whether a message has a file as a URL, which Gradio would fetch, or as inline data of unchecked size."""
    try:
        waiting = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return True
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if re.match(r"\s*[\w+.-]{2,}:", str(item.get("path"))) or re.match(r"\s*data:", str(item.get("url"))):
                return True
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return False


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": reason, "detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
