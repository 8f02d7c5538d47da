"""Who may use a server: anyone on this machine, or whoever has its key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

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
