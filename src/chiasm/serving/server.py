"""The server's life: it listens, gets ready, and on SIGTERM or Ctrl-C finishes what it accepted."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn

from chiasm.errors import ChiasmError
from chiasm.serving.app import create_app
from chiasm.serving.log import log_to_stderr, stop_logging
from chiasm.serving.service import Service

_log = logging.getLogger("chiasm.serve")

_AGAIN = 0.3  # seconds within which signals are one: a key that bounces, a group of processes that is told twice
_THREADS = 5.0  # seconds for threads to end at the very end, when nobody waits for them any more


class Server(uvicorn.Server):
    """A server that refuses new work while it finishes the old.

    uvicorn's own stops listening at once; a load balancer that asks `/ready` would not be told why. A second signal
    ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, tell: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._tell: Callable[[], None] | None = tell
        self._told = 0.0  # when the first signal came
        self._stopping: float | None = None  # since when

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's, which sends the signal again at the end: a server that was told to stop has done well.
        if self._told and time.monotonic() - self._told > _AGAIN:
            _end(128 + sig)
        self._told = self._told or time.monotonic()
        self._service.state = "stopping"

    async def on_tick(self, counter: int) -> bool:
        if self._tell and self._service.state == "ready":
            self._tell()
            self._tell = None
        if self._service.state == "stopping":
            self._stopping = self._stopping or time.monotonic()
            # Who is still sending an image after the time in which one is answered is not waited for.
            passed = time.monotonic() - self._stopping
            idle = passed > _AGAIN and not self._service.active
            self.should_exit = self.should_exit or idle or passed > self._service.limits.seconds
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        ChiasmError: for a port that is taken or may not be used, or a host that is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ChiasmError(
            f"cannot listen at {host}, port {port} ({reason}); another --port may be free, 0 takes any."
        ) from error
    opened.setblocking(False)
    return opened


def serve_until_stopped(
    service: Service,
    opened: socket.socket,
    *,
    key: str | None,
    cors: list[str],
    quiet: bool,
    tell: Callable[[], None],
    made: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve at a socket until a signal, or `server.handle_exit`, ends it.

    Args:
        service: not started yet.
        opened: of `listen`; closed at the end.
        key, cors: as for `create_app`.
        quiet: no line per request.
        tell: called once the server is ready.
        made: is given the server before it runs.
    """
    app = create_app(service, key=key, cors=cors)

    @asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        service.start()
        yield
        # Here signals still count. A thread that is deep in a damaged image cannot be told to stop.
        ending = threading.Thread(target=service.stop, daemon=True)
        ending.start()
        end = time.monotonic() + _THREADS
        while ending.is_alive():
            if time.monotonic() > end:
                _log.warning("a thread does not end: the process does, nobody waits for an answer any more")
                _end(0 if service.failure is None else 1)
            await asyncio.sleep(0.02)

    app.router.lifespan_context = life
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http="h11",  # the one that bounds the length of headers
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(service.limits.seconds),  # for answers that are on their way
            h11_max_incomplete_event_size=64 << 10,
        ),
        service,
        tell,
    )
    handler = log_to_stderr(quiet=quiet)
    made(server)
    try:
        server.run(sockets=[opened])
    finally:
        service.stop()
        opened.close()
        stop_logging(handler)
    if service.failure is not None:
        raise service.failure


def _end(code: int) -> None:
    """End the process whatever its threads are at; the interpreter's own end would wait for them."""
    with suppress(Exception):  # a signal may come in the middle of a line
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
