"""`chiasm serve` as a process of its own, for as long as it is measured."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def server(*words: str, log: IO[str] | None = None) -> Iterator[str]:
    """`chiasm serve` with these words at a free port, and its address; stopped by SIGTERM, which must end it with 0.

    Args:
        words: models and options.
        log: where its lines go; stderr.
    """
    command = [sys.executable, "-m", "chiasm", "serve", *words, "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        found = re.search(r"at (http://\S+);", told)
        if found is None:
            raise SystemExit(f"the server did not start: {told}")
        try:
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
    if process.returncode:
        raise SystemExit(f"the server ended with {process.returncode}")
