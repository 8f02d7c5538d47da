"""Whether one classifier beats another: paired differences over seeds and images, with a correction for many tests.

Two accidents lie between an accuracy and the truth: the seed (weights and order of training) and the images it was
measured on. Two candidates share both, so their *difference* has less of either; what remains of each is estimated from
the runs themselves, and both are added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; without an interval where one value alone is no base for any."""

    mean: float
    half: float | None


@dataclass(frozen=True)
class Difference:
    """How far one candidate is above another.

    Attributes:
        mean: difference of the accuracies, -1..1, averaged over the seeds.
        half: half the width of its 95 % interval.
        p: two-sided p-value of no difference, before any correction.
        seeds: how many both were trained with.
    """

    mean: float
    half: float
    p: float
    seeds: int


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of one value per seed, with Student's interval."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(mean, None)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, float(student.ppf((1 + LEVEL) / 2, count - 1)) * error)


def compare_paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Difference:
    """How far the first is above the second.

    The variance of the mean difference is that between the seeds over their number, plus that between the images over
    theirs; degrees of freedom after Welch and Satterthwaite (Biometrics Bulletin 2(6), 1946). What seeds and images do
    together is counted in both, so the interval errs to the wide side. From one seed the luck of training cannot be
    seen: then the interval is about other images only.

    Args:
        ours, theirs: (seeds, images): 1 where an image was classified rightly, 0 where not, NaN where it could not be
            read. Each seed may have validation images of its own, the same for both; the interval is then wider yet.
    """
    by_seed = [np.asarray(a, float) - np.asarray(b, float) for a, b in zip(ours, theirs, strict=True)]
    means = [float(np.nanmean(difference)) for difference in by_seed]
    seeds, mean = len(means), float(np.mean(means))
    together = np.stack(by_seed)
    images = np.nanmean(together[:, ~np.isnan(together).all(0)], axis=0)
    parts = [(float(np.var(images, ddof=1)) / len(images), len(images) - 1)] if len(images) > 1 else []
    if seeds > 1:
        parts.append((float(np.var(means, ddof=1)) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0, seeds)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    error = math.sqrt(variance)
    p = 2 * float(student.sf(abs(mean) / error, freedom))
    return Difference(mean, float(student.ppf((1 + LEVEL) / 2, freedom)) * error, p, seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number after Holm (Scandinavian Journal of Statistics 6, 1979): below 0.05 together
    with a chance of 5 % at most that one of them is so by accident."""
    order = np.argsort(p_values, kind="stable")
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected
