"""How well images were classified: accuracy, each class, calibration, and what the branches are worth to each other.

`ClassificationMetrics` takes results as they come and keeps a few numbers per image, so a thousand classes and a
million images are no matter. Confusion and calibration error are computed by torchmetrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_confusion_matrix

from chiasm.results import Classification

BINS = 15


@dataclass(frozen=True, kw_only=True)
class Share:
    """`right` of `count` images, with the 95 % Wilson interval of the share.

    The interval says where the share would lie on ever more images of the same kind; it is wide for few images.
    """

    right: int
    count: int

    @property
    def value(self) -> float | None:
        """0..1, or None when there are no images."""
        return self.right / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval's ends, 0..1, or None when there are no images."""
        if not self.count:
            return None
        z = 1.959964  # the normal distribution's 97.5 % point
        p, n = self.right / self.count, self.count
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def to_dict(self) -> dict[str, object]:
        return {"value": self.value, "right": self.right, "count": self.count, "interval": self.interval}


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class.

    Attributes:
        count: images of this class.
        precision: share of the images given this class that are of it; None when none was given it.
        recall: share of the images of this class that were given it; None when there are none.
        f1: harmonic mean of both, from the counts; None when the class neither occurs nor was given.
    """

    label: str
    count: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether a stated probability is the share that is right.

    Attributes:
        ece: expected calibration error, 0..1: the gap between both, averaged over the images (15 equal bins).
        counts: images per bin of stated probability.
        confidence: mean stated probability per bin; None for an empty bin.
        accuracy: share that is right per bin; None for an empty bin.
    """

    ece: float
    counts: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class BranchScore:
    """One branch alone."""

    name: str
    top1: Share
    calibration: Calibration


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The votes of the branches beside each other.

    Attributes:
        share: images on which all branches vote for one class, of all images.
        when_agreed: the model's top-1 on those.
        when_not: the model's top-1 on the others.
        right_alone: where they disagree, on how many images each branch is right.
        none_right: where they disagree, on how many images no branch is right.
        either_right: images on which a branch or more is right, of all: the most that choosing between them could give.
    """

    share: Share
    when_agreed: Share
    when_not: Share
    right_alone: dict[str, int]
    none_right: int
    either_right: Share


@dataclass(frozen=True, kw_only=True)
class ClassificationScores:
    """All that `ClassificationMetrics` measures.

    Attributes:
        k: how many classes `topk` looks at: 5, or one less than the classes when there are fewer than six.
        topk: the true class is among the `k` most probable.
        balanced_accuracy: recall averaged over the classes that occur, each counting alike.
        macro_f1: F1 averaged over the classes that occur.
        confusion: [true][predicted] image counts in the order of `labels`.
        branches, agreement: empty and None for a one-branch model.
    """

    labels: tuple[str, ...]
    top1: Share
    k: int
    topk: Share
    balanced_accuracy: float
    macro_f1: float
    calibration: Calibration
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    branches: tuple[BranchScore, ...] = ()
    agreement: Agreement | None = None

    def confusions(self, count: int = 10) -> list[tuple[str, str, int]]:
        """The `count` most frequent mistakes: true class, predicted class, images."""
        return frequent_confusions(self.labels, self.confusion, count)


@dataclass
class _Votes:
    """What is kept of one voter (the model or a branch): its class and the probability it gave, per image."""

    predicted: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


class ClassificationMetrics:
    """Collects results with their true classes; `compute` gives the scores.

    Args:
        labels: the class names in the order of the probabilities.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.k = max(1, min(5, len(self.labels) - 1))
        self._targets: list[int] = []
        self._among_k: list[bool] = []
        self._model = _Votes()
        self._branches: dict[str, _Votes] = {}

    def __len__(self) -> int:
        return len(self._targets)

    def update(self, results: Sequence[Classification], targets: Sequence[int]) -> None:
        """Add results; `targets` are the indices of their true classes in `labels`."""
        for result, target in zip(results, targets, strict=True):
            self._targets.append(int(target))
            self._among_k.append(self.labels[target] in (label for label, _ in result.top(self.k)))
            for votes, values in (
                (self._model, result.probabilities),
                *((self._branches.setdefault(name, _Votes()), values) for name, values in result.branches.items()),
            ):
                votes.predicted.append(int(values.argmax()))
                votes.confidence.append(float(values.max()))

    def compute(self) -> ClassificationScores:
        """The scores of all images so far; there must be one or more."""
        targets, predicted = torch.tensor(self._targets), torch.tensor(self._model.predicted)
        matrix = multiclass_confusion_matrix(predicted, targets, num_classes=len(self.labels))
        classes = _class_scores(self.labels, matrix)
        occurring = [score for score in classes if score.count]
        return ClassificationScores(
            labels=self.labels,
            top1=_share(predicted == targets),
            k=self.k,
            topk=_share(torch.tensor(self._among_k)),
            balanced_accuracy=sum(score.recall or 0.0 for score in occurring) / len(occurring),
            macro_f1=sum(score.f1 or 0.0 for score in occurring) / len(occurring),
            calibration=_calibration(self._model, targets),
            classes=classes,
            confusion=tuple(tuple(row) for row in matrix.tolist()),
            branches=tuple(
                BranchScore(
                    name=name,
                    top1=_share(torch.tensor(votes.predicted) == targets),
                    calibration=_calibration(votes, targets),
                )
                for name, votes in self._branches.items()
            ),
            agreement=_agreement(self._branches, predicted == targets, targets) if self._branches else None,
        )


def frequent_confusions(
    labels: Sequence[str], matrix: Sequence[Sequence[int]], count: int
) -> list[tuple[str, str, int]]:
    """The `count` largest cells off the diagonal of a confusion matrix: true class, predicted class, number."""
    pairs = [
        (labels[i], labels[j], number)
        for i, row in enumerate(matrix)
        for j, number in enumerate(row)
        if i != j and number
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


def _share(right: Tensor) -> Share:
    return Share(right=int(right.sum()), count=len(right))


def _class_scores(labels: Sequence[str], matrix: Tensor) -> tuple[ClassScore, ...]:
    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    right, occurring, given = matrix.diag().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist()
    return tuple(
        ClassScore(
            label=label,
            count=occurring[i],
            precision=ratio(right[i], given[i]),
            recall=ratio(right[i], occurring[i]),
            f1=ratio(2 * right[i], occurring[i] + given[i]),
        )
        for i, label in enumerate(labels)
    )


def _calibration(votes: _Votes, targets: Tensor) -> Calibration:
    right = torch.tensor(votes.predicted) == targets
    # torchmetrics gives a probability of exactly 1 a sixteenth bin of its own: stay a hair below.
    stated = torch.tensor(votes.confidence, dtype=torch.float64).clamp(max=1 - 1e-12)
    # The error of a yes/no statement, applied to "my class is right", is the top-label error of the classes and needs
    # one number per image in place of one per class.
    ece = float(binary_calibration_error(stated, right.long(), n_bins=BINS))
    bins = torch.bucketize(stated, torch.linspace(0, 1, BINS + 1, dtype=torch.float64), right=True) - 1
    counts = torch.bincount(bins, minlength=BINS)

    def mean(values: Tensor) -> tuple[float | None, ...]:
        sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, values.double())
        return tuple(float(total / count) if count else None for total, count in zip(sums, counts, strict=True))

    return Calibration(ece=ece, counts=tuple(counts.tolist()), confidence=mean(stated), accuracy=mean(right))


def _agreement(branches: dict[str, _Votes], model_right: Tensor, targets: Tensor) -> Agreement:
    votes = torch.tensor([branch.predicted for branch in branches.values()])  # (branches, images)
    right = votes == targets
    agreed = (votes == votes[0]).all(0)
    return Agreement(
        share=_share(agreed),
        when_agreed=_share(model_right[agreed]),
        when_not=_share(model_right[~agreed]),
        right_alone={name: int(right[i][~agreed].sum()) for i, name in enumerate(branches)},
        none_right=int((~right.any(0) & ~agreed).sum()),
        either_right=_share(right.any(0)),
    )
