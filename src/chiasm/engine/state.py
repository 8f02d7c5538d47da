"""Where a run stands: everything a checkpoint carries besides weights and optimiser."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4


@dataclass(kw_only=True)
class RunState:
    """Plain numbers and strings only, so that a checkpoint loads without running code from it.

    Attributes:
        epoch: epochs completed, so also the index of the epoch under way.
        batch: batches done in the epoch under way.
        updates: optimiser steps done.
        seconds: training time spent before this process took over, in seconds.
        train_seconds: the part of `seconds` spent on steps rather than on validation and saving.
        images: training images seen, per process.
        epoch_seconds: time spent on the epoch under way before this process took over.
        epoch_loss: sum of the training losses of the epoch under way, one per batch.
        best_score: the best validation score so far, 0..1; -1 before the first.
        best_epoch: the epoch it was reached after, from 1.
        stale: epochs since.
        history: one row per completed epoch, the lines of metrics.csv.
        finished: nothing is left to do.
        world_size: processes that train together.
        precision: what `auto` came to on the machine the run began on, in Lightning's words.
        data: fingerprint of the data trained on.
        id: what the run is known by where many are kept.
    """

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    images: int = 0
    epoch_seconds: float = 0.0
    epoch_loss: float = 0.0
    best_score: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    world_size: int = 1
    precision: str = ""
    data: str = ""
    id: str = field(default_factory=lambda: uuid4().hex)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, values: dict[str, Any]) -> None:
        """Take over the values of a checkpoint, in place; where there was classification alone, the score was top-1."""
        for name, value in values.items():
            setattr(self, "best_score" if name == "best_top1" else name, value)

    @property
    def best_row(self) -> dict[str, float]:
        """The line of metrics.csv of the best epoch; empty before the first."""
        return self.history[self.best_epoch - 1] if self.best_epoch else {}


class Stopwatch:
    """Wall time in seconds that continues across processes: starts at `before`."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
