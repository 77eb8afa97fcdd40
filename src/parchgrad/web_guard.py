"""What stands before the web explorer: which requests are refused, and what a browser is told to hold the page to."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from starlette.formparsers import MultiPartException

__all__ = ["RequestGuard"]

# Body of a request that carries settings; files come by another way.
_LARGEST_MESSAGE = 1_000_000
# Lines around the files in a form.
_FORM_LINES = 10_000
# Everything on the page comes from this server; a browser holds it to that.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_TOO_LARGE = 413, "This is larger than what is taken here."
_FULL = 507, "The server holds as many files as it may; try again in some hours."


class RequestGuard:
    """Refuses requests by which the server would fetch what is elsewhere, or hold more than it should."""

    def __init__(self, app: Any, *, folder: Path, largest_file: int, files: int, most_stored: int) -> None:
        """Stand before an ASGI application.

        Args:
            app: to hand requests on to; it holds each file to its size.
            folder: where files are kept.
            largest_file: size of the largest, in bytes.
            files: how many of that size one form may hold.
            most_stored: bytes that the folder may hold.
        """
        self._app = app
        self._folder, self._most_stored = folder, most_stored
        self._largest_form = files * largest_file + _FORM_LINES
        # Of forms that are on their way.
        self._arriving = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request that is refused, and hand others on; see the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        # One letter before the colon is a disk of Windows.
        if re.search(r"/(file[=/]|proxy=|stream/)\s*[\w+.-]{2,}:", path) or "/proxy=" in path:
            await _refuse(send, 403, "Only files of this server are given.")
            return
        if path.endswith("/deep_link"):
            # Each would write all that a session holds into a file that stays.
            await _refuse(send, 404, "There are no links to what a page shows.")
            return
        if scope["method"] in ("POST", "PUT", "PATCH"):
            length = headers.get(b"content-length", b"")
            announced = int(length) if length.isdigit() else 0
            if path.endswith("/upload") and headers.get(b"content-type", b"").startswith(b"multipart/"):
                await self._take_form(scope, receive, send, announced)
                return
            body = b"" if announced > _LARGEST_MESSAGE else await _read(receive, _LARGEST_MESSAGE)
            if body is None:
                # Cut off: there is nobody to answer.
                return
            if max(announced, len(body)) > _LARGEST_MESSAGE:
                await _refuse(send, *_TOO_LARGE)
                return
            if _names_address(body):
                await _refuse(send, 403, "Only files that were uploaded are read.")
                return
            receive = _again(body, receive)
        await self._app(scope, receive, _with_policy(send))

    async def _take_form(self, scope: Any, receive: Any, send: Any, announced: int) -> None:
        """Hand on a form with files as long as it stays within bounds, whatever size it announces."""
        stored = await asyncio.to_thread(_size, self._folder)
        arrived, refusal = 0, None

        def refused(size: int) -> tuple[int, str] | None:
            if size > self._largest_form:
                return _TOO_LARGE
            return _FULL if stored + self._arriving + size - arrived > self._most_stored else None

        async def counting() -> Any:
            nonlocal arrived, refusal
            message = await receive()
            if message["type"] != "http.request":
                # As an error of the form: for that alone its files are removed.
                raise MultiPartException("The form was cut off.")
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

        guarded = _with_policy(send)
        early = refused(announced)
        if early is not None:
            await _refuse(send, *early)
            return
        try:
            await self._app(scope, counting, answering)
        finally:
            self._arriving -= arrived


def _size(folder: Path) -> int:
    """Bytes in the files of a folder, some of which may go while they are counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


async def _read(receive: Any, largest: int) -> bytes | None:
    """The body of a request, or more than `largest` bytes of it; None if it is cut off."""
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
        # After the body comes the end of the connection, for which some wait.
        return next(parts, None) or await receive()

    return replay


def _names_address(body: bytes) -> bool:
    """Whether a message names a file by an address, which Gradio would fetch, or brings it along unmeasured."""
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


def _with_policy(send: Any) -> Any:
    added = [
        (b"content-security-policy", _POLICY.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sending
