"""What stands around every request: its line in the log, its numbers, the headers that keep a browser safe, and one
sound answer where the server itself fails."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiasm.serving.metrics import Metrics
from chiasm.serving.refusals import broken

_log = logging.getLogger("chiasm.serve")

# A page from here runs its own scripts alone, asks nobody else, and stands in nobody's frame.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "connect-src 'self' data: blob:; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


@dataclass
class Entry:
    """What a request's line in the log says besides time, path and status."""

    model: str | None = None
    images: int = 0
    code: str | None = None
    batches: list[int] = field(default_factory=list)


class Watch:
    """ASGI middleware; `request.state.entry` is the request's `Entry`.

    Args:
        app: what answers.
        metrics: where numbers go.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = Entry()
        scope.setdefault("state", {})["entry"] = entry
        start = time.perf_counter()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:
            _log.exception("a request failed")
            if status:
                raise
            entry.code = broken().code
            await broken().response()(scope, receive, sending)
        finally:
            self._note(scope, entry, status or 499, time.perf_counter() - start)

    def _note(self, scope: Scope, entry: Entry, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.request(route, status, seconds)
        if entry.code:
            self._metrics.rejected(entry.code)
        if not _log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "method": scope["method"][:16],
            "path": scope["path"][:200] if route != "other" else "other",
            "status": status,
            "ms": round(1000 * seconds, 1),
            "model": entry.model,
            "images": entry.images,
            "batch": max(entry.batches, default=0),
        }
        _log.info("request", extra={"fields": fields | ({"code": entry.code} if entry.code else {})})
