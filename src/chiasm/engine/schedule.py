"""The learning rate: linear warm-up, then half a cosine, over steps or over wall time.

It is a function of how far the run is and of nothing else, so there is no state to restore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_AT_MOST = 0.2  # of the run, so that a short run with a recipe's long warm-up still reaches the peak


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Peak and final rate with the lengths, in optimiser steps, of warm-up and run (`total` None: by wall time)."""

    peak: float
    final: float
    warmup: float
    total: int | None

    def rate(self, updates: int, time_share: float = 0.0) -> float:
        """The learning rate of step number `updates` (from 0).

        `time_share` is the share of the time budget that is spent, 0..1; it is not looked at when `total` is given.
        """
        if self.total is None:
            warm = max(self._warm(updates, self.warmup), time_share / WARMUP_AT_MOST)
            return min(1.0, warm) * self._cosine(time_share)
        warmup = min(self.warmup, WARMUP_AT_MOST * self.total)
        progress = (updates - warmup) / max(1.0, self.total - 1 - warmup)
        return self._warm(updates, warmup) * self._cosine(progress)

    @staticmethod
    def _warm(updates: int, warmup: float) -> float:
        return min(1.0, (updates + 1) / (warmup + 1))

    def _cosine(self, progress: float) -> float:
        progress = min(1.0, max(0.0, progress))
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
