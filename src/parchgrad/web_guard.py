"""What stands before the web explorer: which requests are refused, and what a browser is told to hold the page to."""

import json
import re
from typing import Any

__all__ = ["RequestGuard"]

# Body of a request that carries settings; files come by another way.
_LARGEST_MESSAGE = 1_000_000
# Everything on the page comes from this server; a browser holds it to that.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


class RequestGuard:
    """Refuses requests by which the server would fetch what is elsewhere, or hold more than it should."""

    def __init__(self, app: Any, *, largest_file: int) -> None:
        """Stand before an ASGI application, with the size in bytes of the largest file that it takes."""
        self._app = app
        # A form has some lines around its file.
        self._largest_form = largest_file + 10_000

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request that is refused, and hand others on; see the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        if re.search(r"/(file=|proxy=|stream/)\s*\w+:", path) or "/proxy=" in path:
            await _refuse(send, 403, "Only files of this server are given.")
            return
        if scope["method"] in ("POST", "PUT", "PATCH"):
            is_form = headers.get(b"content-type", b"").startswith(b"multipart/")
            largest = self._largest_form if is_form and path.endswith("/upload") else _LARGEST_MESSAGE
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > largest:
                await _refuse(send, 413, "This is larger than what is taken here.")
                return
            if not (is_form and path.endswith("/upload")):
                body = await _read(receive, largest)
                if body is None or _names_address(body):
                    await _refuse(send, 413 if body is None else 403, "Only files that were uploaded are read.")
                    return
                receive = _again(body, receive)
        await self._app(scope, receive, _with_policy(send))


async def _read(receive: Any, largest: int) -> bytes | None:
    """The body of a request; None if it is too large."""
    body = b""
    while True:
        message: dict[str, Any] = await receive()
        if message["type"] != "http.request":
            return body
        body += bytes(message.get("body", b""))
        if len(body) > largest:
            return None
        if not message.get("more_body"):
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
            # One letter before the colon is a disk of Windows.
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
