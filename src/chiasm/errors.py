"""Errors that teach: what was seen, what was expected, what to type.

Every error a person can cause is a `ChiasmError`. Its message is one line; the command prints it without a traceback
and exits with `exit_code`. Programming errors stay ordinary Python exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ChiasmError(Exception):
    """A mistake in what was given to chiasm, told in one line. `exit_code` is what the command ends with."""

    exit_code = 2


class UnknownNameError(ChiasmError):
    """A name (model, option, class, column ...) that does not exist; the message suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        near = nearest(name, known)
        suggestion = f"; did you mean {' or '.join(near)}?" if near else "."
        super().__init__(f"unknown {kind} '{name}'{suggestion}{' ' + hint if hint else ''}")


class ImageError(ChiasmError):
    """An image that cannot be used. `path` names the file and `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class TooManyPixelsError(ImageError):
    """An image that is larger than what is read."""


class DataError(ChiasmError):
    """Data that cannot be used for what was asked: a missing path, an empty class, one class only ..."""


class ModelFileError(ChiasmError):
    """A model file or run folder that cannot be read, or is not what was expected there."""


class CheckpointError(ChiasmError):
    """Weights that do not fit the model, or a checkpoint that cannot be read without running code from it."""


class TrainingError(ChiasmError):
    """Training that cannot go on (loss is NaN, the disk is full); the last complete checkpoint is kept."""

    exit_code = 3


class InterruptedRunError(ChiasmError):
    """Training stopped by Ctrl-C (exit code 130) or SIGTERM (143) after its checkpoint was written."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` known names most like `name`, best first; empty when none is near."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.6)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
