"""How well every pixel was classified: IoU, accuracy, and how near the borders lie.

`SegmentationMetrics` keeps a confusion matrix and a few numbers per image. Pixels that no class is known of (`IGNORE`)
are passed over. The boundary score is that of Csurka, Larlus and Perronnin, "What is a good evaluation measure for
semantic segmentation?" (BMVC 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from chiasm.data.annotated import IGNORE
from chiasm.results import Segmentation
from chiasm.tasks.classify_metrics import frequent_confusions

# A border is found where one lies nearer than this, as a share of the image's diagonal.
TOLERANCE = 0.0075


@dataclass(frozen=True, kw_only=True)
class ClassOverlap:
    """One class; None where its whole is empty.

    Attributes:
        share: of the known pixels, 0..1.
        iou: pixels that are of this class and given it, of those that are or are given it.
        accuracy: share of its pixels that are given it (recall).
        precision: share of the pixels given it that are of it.
        boundary: the border's F-score, mean over the images in which the class has a border.
    """

    label: str
    share: float
    iou: float | None
    accuracy: float | None
    precision: float | None
    boundary: float | None


@dataclass(frozen=True, kw_only=True)
class SegmentationScores:
    """All that `SegmentationMetrics` measures, 0..1; None where there is no known pixel.

    Attributes:
        images, pixels: how many were measured on; unknown pixels are not counted.
        miou: IoU, mean over the classes that occur in the truth or in the results.
        pixel_accuracy: share of the pixels that are right.
        mean_accuracy: `accuracy`, mean over the classes that occur in the truth.
        boundary: the borders' F-score, mean over the classes of an image, then over the images.
        confusion: [true][predicted] pixel counts in the order of `labels`.
        image_miou: `miou` of each image in the order they came.
    """

    labels: tuple[str, ...]
    images: int
    pixels: int
    miou: float | None
    pixel_accuracy: float | None
    mean_accuracy: float | None
    boundary: float | None
    classes: tuple[ClassOverlap, ...]
    confusion: tuple[tuple[int, ...], ...]
    image_miou: tuple[float | None, ...]

    def confusions(self, count: int = 10) -> list[tuple[str, str, int]]:
        """The `count` most frequent mistakes: true class, predicted class, pixels."""
        return frequent_confusions(self.labels, self.confusion, count)


class _Seen(NamedTuple):
    """What is kept of one image: its mean IoU, and by class the F-score of the border where there is one."""

    miou: float | None
    boundary: dict[int, float]


class SegmentationMetrics:
    """Collects results with the true class maps; `compute` gives the scores.

    Args:
        labels: the class names; the values of results and of truths are indices of these.
        boundary: whether borders are compared as well, which takes most of the time.
    """

    def __init__(self, labels: Sequence[str], *, boundary: bool = True) -> None:
        self.labels = tuple(labels)
        self.boundary = boundary
        self._confusion = np.zeros((len(self.labels), len(self.labels)), dtype=np.int64)
        self._images: list[_Seen] = []

    def __len__(self) -> int:
        return len(self._images)

    def update(self, results: Sequence[Segmentation], truths: Sequence[np.ndarray | Tensor]) -> None:
        """Add results with the class maps (H, W) of the same images, uint8 with `IGNORE` where no class is known.

        Raises:
            ValueError: for maps of another size, or with a value that is no class.
        """
        for result, truth in zip(results, truths, strict=True):
            predicted, classes = result.classes, np.asarray(truth)
            if predicted.shape != classes.shape:
                raise ValueError(f"{result.source}: {predicted.shape} pixels, its truth has {classes.shape}")
            known = classes != IGNORE
            count = len(self.labels)
            pairs = classes[known].astype(np.int64) * count + predicted[known]
            if pairs.size and (pairs.max() >= count * count or predicted[known].max() >= count):
                raise ValueError(f"{result.source}: expected indices of {count} classes")
            confusion = np.bincount(pairs, minlength=count * count).reshape(count, count)
            self._confusion += confusion
            borders = boundary_scores(np.where(known, predicted, IGNORE), classes) if self.boundary else {}
            self._images.append(_Seen(_mean(_ious(confusion)), borders))

    def state(self) -> tuple[np.ndarray, list[_Seen]]:
        """All that was added, for `merge` of another process."""
        return self._confusion.copy(), list(self._images)

    def merge(self, state: tuple[np.ndarray, Sequence[_Seen]]) -> None:
        """Add what another collected, behind one's own."""
        self._confusion += state[0]
        self._images += state[1]

    def compute(self) -> SegmentationScores:
        """The scores of all images so far."""
        confusion = self._confusion
        right, occurring, given = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        ious, accuracies, precisions = _ious(confusion), _ratios(right, occurring), _ratios(right, given)
        total = int(occurring.sum())
        borders = [
            _mean([image.boundary[k] for image in self._images if k in image.boundary]) for k in range(len(self.labels))
        ]
        return SegmentationScores(
            labels=self.labels,
            images=len(self),
            pixels=total,
            miou=_mean(ious),
            pixel_accuracy=int(right.sum()) / total if total else None,
            mean_accuracy=_mean(accuracies),
            boundary=_mean([_mean(list(image.boundary.values())) for image in self._images]),
            classes=tuple(
                ClassOverlap(
                    label=label,
                    share=int(occurring[k]) / total if total else 0.0,
                    iou=ious[k],
                    accuracy=accuracies[k],
                    precision=precisions[k],
                    boundary=borders[k],
                )
                for k, label in enumerate(self.labels)
            ),
            confusion=tuple(tuple(row) for row in confusion.tolist()),
            image_miou=tuple(image.miou for image in self._images),
        )


def boundary_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """The F-score, 0..1, of each class that has a border in either of two class maps (H, W) with `IGNORE`.

    Precision is the share of the predicted border that lies near the true one (`TOLERANCE`), recall the reverse. A
    border runs between two classes: the image's edge is none, nor is the edge of what is unknown.
    """
    from scipy.spatial import KDTree

    reach = TOLERANCE * math.hypot(*truth.shape)

    def near(points: np.ndarray, others: np.ndarray) -> float:
        tree = KDTree(others, balanced_tree=False, compact_nodes=False)
        return float((tree.query(points, distance_upper_bound=reach)[0] < reach).mean())

    found, true = _border(predicted), _border(truth)
    scores = {}
    for k in np.union1d(predicted[found], truth[true]).tolist():
        ours, theirs = np.argwhere(found & (predicted == k)), np.argwhere(true & (truth == k))
        precision, recall = (near(ours, theirs), near(theirs, ours)) if len(ours) and len(theirs) else (0.0, 0.0)
        scores[k] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return scores


def _border(classes: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a class beside which, on one of four sides, is one of another class."""
    border = np.zeros(classes.shape, dtype=bool)
    for first, second in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        one, other = classes[first], classes[second]
        differ = (one != other) & (one != IGNORE) & (other != IGNORE)
        border[first] |= differ
        border[second] |= differ
    return border


def _ious(confusion: np.ndarray) -> list[float | None]:
    right = confusion.diagonal()
    return _ratios(right, confusion.sum(0) + confusion.sum(1) - right)


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> list[float | None]:
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return [part / whole if whole else None for part, whole in pairs]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
