"""chiasm serve: models behind an HTTP API and a page, until stopped."""

from __future__ import annotations

import logging
import os
from typing import Any

from chiasm.config import ServeConfig
from chiasm.errors import ChiasmError

_log = logging.getLogger("chiasm.serve")

KEY = "CHIASM_API_KEY"  # the environment's variable: unlike a flag it is not in the list of processes


def serve(**flags: Any) -> None:
    """Serve models until SIGTERM or Ctrl-C; the keyword arguments are the fields of `ServeConfig`.

    What was accepted until then is answered before this returns.

    Raises:
        ModelFileError, UnknownNameError: when one of `models` names none.
        ChiasmError: for settings that cannot be, a server open to the network without a key, a port that is taken, or
            when the libraries of the extra `serve` are missing.
    """
    config = ServeConfig.from_flags(**flags)
    _check(config)
    try:
        from chiasm.serving.access import check_opening
        from chiasm.serving.server import listen, serve_until_stopped
    except ImportError as error:
        raise ChiasmError(f"serving needs {error.name}: pip install 'chiasm[serve]'") from error
    from chiasm.serving.served import Models, Served, named
    from chiasm.serving.service import Service

    key = config.api_key or os.environ.get(KEY) or None
    check_opening(config.host, key)
    names = named(config.models)
    opened = listen(config.host, config.port)
    try:
        models = [Served(name, ref, device=config.device, image_size=config.image_size) for name, ref in names.items()]
        service = Service(Models(models), config)
    except BaseException:
        opened.close()
        raise
    for served in models:
        if not served.info.trained:
            _log.warning("%s has random weights: what it says is chance, not knowledge.", served.name)
    host, port = opened.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    what = ", ".join(f"{served.name} ({served.info.task})" for served in models)

    def tell() -> None:
        print(f"chiasm serves {what} at {address}; Ctrl-C stops it", flush=True)

    serve_until_stopped(service, opened, key=key, cors=config.cors, quiet=config.quiet, tell=tell)


def show(result: None, config: ServeConfig) -> int:
    """Nothing is left to say; returns the exit code."""
    return 0


def _check(config: ServeConfig) -> None:
    if not config.models:
        raise ChiasmError("which model? Give a model file or run folder, or several as NAME=PATH.")
    for name, least, most in (("batch", 1, 10_000), ("queue", 1, 1_000_000), ("wait_ms", 0, 10_000)):
        if not least <= getattr(config, name) <= most:
            raise ChiasmError(f"{name} is {getattr(config, name):g}: expected {least} to {most}.")
    if not 0 <= config.port <= 65535:
        raise ChiasmError(f"port is {config.port}: expected 0 (any that is free) to 65535.")
    for name, most in (("max_mb", 1000), ("max_megapixels", 150), ("timeout", 3600)):
        if not 0 < getattr(config, name) <= most:
            raise ChiasmError(f"{name} is {getattr(config, name):g}: expected more than 0, at most {most}.")
    if not 0 <= config.threshold <= 1:
        raise ChiasmError(f"threshold is {config.threshold}: expected a score from 0 to 1.")
    for origin in config.cors:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise ChiasmError(f"cors is {origin!r}: expected an origin such as https://example.org.")
