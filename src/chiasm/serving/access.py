"""Who may use a server: whoever is on this machine, but no page of another site, or whoever has its key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from chiasm.errors import ChiasmError
from chiasm.serving.refusals import Refusal

LEAST = 8  # characters of a key

_BEARER = HTTPBearer(auto_error=False, description="the server's key")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="the server's key")


def check_opening(host: str, key: str | None) -> None:
    """Refuse to open a server to the network without a key, or with a weak one.

    Raises:
        ChiasmError: with what to type.
    """
    if key is not None and (len(key) < LEAST or not key.isascii() or not key.isprintable() or " " in key):
        raise ChiasmError(f"the API key: expected {LEAST} or more letters, digits and signs, no spaces.")
    if key is None and not is_loopback(host):
        raise ChiasmError(
            f"--host {host} opens the server to the network: set a key, such as 'export "
            "CHIASM_API_KEY=$(openssl rand -hex 16)', or keep to --host 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_check(key: str) -> Callable[..., Awaitable[None]]:
    """A dependency of FastAPI's that lets requests with this key pass."""

    async def check(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)] = None,
        header: Annotated[str | None, Security(_HEADER)] = None,
    ) -> None:
        given = bearer.credentials if bearer else header or ""
        # In constant time: how much of a key is right cannot be told from how long it takes to say no.
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Refusal(401, "key", "this server needs its key: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'.")

    return check


class HereAlone:
    """ASGI middleware of a server without a key: what a browser here sends for a page of another site is refused.

    Such a page could else have the server work (a form or a script that sends to 127.0.0.1), and read its answers under
    a name of its own that it lets point to this machine (DNS rebinding).

    Args:
        app: what answers; the request's `Entry` is told of a refusal.
        origins: whose pages may ask, beside the server's own.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["entry"].code = refusal.code
        await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        # Programs of old send no Host; browsers always do.
        if host is not None and not is_loopback(_name(host)):
            return Refusal(
                403, "host", f"Host is {host[:100]!r}: a server without a key answers to localhost and 127.0.0.1 alone."
            )
        if origin is None or origin.lower() in {f"{scope['scheme']}://{host}".lower(), *self._origins}:
            return None
        return Refusal(
            403, "origin", f"Origin is {origin[:100]!r}: other sites' pages are answered if --cors names them."
        )


def _name(host: str) -> str:
    """The name within a Host header, without port and brackets; empty where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
