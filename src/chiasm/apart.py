"""A work in a process of its own on the CPU, as a network has one in use: its time, run by run, and its peak memory.

Works of one process share what its memory allocator holds: one leaves behind what another finds, so that a network is
faster or slower by its company, and nobody's peak can be told. The process is a copy of a server that has imported the
libraries, where the system has such a thing, and waits while it is not asked.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from chiasm.data.machine import hold_what_is_used, keep_freed_memory
from chiasm.errors import ChiasmError, first_line

WARM = 2  # runs before anything is measured: the first ones settle what is kept


class Apart:
    """A work that runs in a process of its own when it is called.

    Args:
        build: makes the work; called in that process, so it must be a function of a module or a `functools.partial` of
            one.
        threads: that the process uses.
        spare: bytes of freed memory that the process keeps (`keep_freed_memory`); None for what the system does.
        exact: that the process holds no more memory than is in use (`hold_what_is_used`); slower.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        ChiasmError: where the work failed, or ran out of memory or time, in one line; here and whenever it is asked.
    """

    def __init__(
        self,
        build: Callable[[], Callable[[], object]],
        *,
        threads: int,
        spare: int | None = None,
        exact: bool = False,
        timeout: float = 600,
    ) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["chiasm.works"])
        self._timeout = timeout
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, threads, spare, exact), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self) -> float:
        """Seconds of one run; one before it, which finds the caches as others left them, does not count."""
        return self._ask("time")

    def peak(self) -> int:
        """Bytes that one run needs at its peak: weights, activations, gradients, all but the libraries themselves.

        What only building and earlier runs needed does not count, where the system can forget it (Linux).

        Raises:
            ChiasmError: also where the system does not tell (Windows).
        """
        return int(self._ask("peak"))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str) -> float:
        with suppress(OSError):  # where it has ended, `_answer` says how
            self._pipe.send(what)
        return self._answer()

    def _answer(self) -> float:
        answer: Any
        try:
            answer = self._pipe.recv() if self._pipe.poll(self._timeout) else f"not done within {self._timeout:.0f} s"
        except (EOFError, OSError):
            self._process.join(1)
            code = self._process.exitcode
            killed = code == -signal.SIGKILL if sys.platform != "win32" else False
            answer = "the system ended it, for want of memory as it seems" if killed else f"its process ended ({code})"
        except BaseException:  # Ctrl-C while it is awaited
            self.close()
            raise
        if not isinstance(answer, str):
            return float(answer)
        self.close()
        raise ChiasmError(answer)


def _serve(pipe: Any, build: Callable[[], Callable[[], object]], threads: int, spare: int | None, exact: bool) -> None:
    """What the process does: build, get warm, and run the work each time it is asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(threads)
    if spare is not None:
        keep_freed_memory(spare)
    if exact:
        hold_what_is_used()
    try:
        before = _resident()
        work = build()
        for _ in range(WARM):
            work()
        answer: Any = 0
    except Exception as error:
        answer = first_line(error)
    while True:
        try:
            pipe.send(answer)
            asked = pipe.recv()
        except (EOFError, OSError):  # nobody is there any more
            return
        try:
            answer = _peak(work, before) if asked == "peak" else _seconds(work)
        except Exception as error:
            answer = first_line(error)


def _peak(work: Callable[[], object], before: dict[str, int]) -> int:
    _forget_peak()
    work()
    after = _resident()
    if not before or not after:
        raise ChiasmError("this system does not tell what memory a process holds.")
    # Files in memory are the libraries' code, read in as it is used.
    return max((after["VmHWM"] - after["RssFile"]) - (before["VmRSS"] - before["RssFile"]), 0)


def _seconds(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _resident() -> dict[str, int]:
    """Bytes of this process in memory by Linux's names: 'VmRSS' now, 'VmHWM' at the peak, 'RssFile' of mapped files;
    nothing where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        sizes = {
            line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM", "RssFile"))
        }
        return {name: int(size) * 1024 for name, size in sizes.items()}
    except OSError:
        try:
            import resource  # elsewhere the peak is all that is told, if anything
        except ImportError:
            return {}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"VmRSS": peak, "VmHWM": peak, "RssFile": 0}


def _forget_peak() -> None:
    """Give freed memory back and let the peak begin here, where the system can (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):
        return
