"""Ctrl-C and SIGTERM: finish the step, write the checkpoint, then stop with the exit code that scripts expect."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from chiasm.errors import InterruptedRunError

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupt:
    """While entered, the first signal is noted in `received`, for training to act on after its step; a second one, or
    any signal while `patient` is off, stops at once with `InterruptedRunError`.

    Outside the main thread Python lets nobody handle signals, so there it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.patient = False
        self.hint = "nothing was trained yet"
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def rearm(self) -> None:
        """Take the signals back from Lightning, which installs a handler of its own when it starts."""
        for number in self._before:
            signal.signal(number, self._handle)

    def error(self, hint: str) -> InterruptedRunError:
        """The error that ends the run after the signal received."""
        number = self.received or signal.SIGINT
        name = "Ctrl-C" if number is signal.SIGINT else number.name
        return InterruptedRunError(f"stopped by {name}; {hint}", EXIT_CODES[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        if not (first and self.patient):
            raise self.error(self.hint)
