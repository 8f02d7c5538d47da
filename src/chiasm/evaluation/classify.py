"""A classifier measured on labelled images: scores, the most confident mistakes, where the branches disagree."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chiasm.data.loader import eval_loader
from chiasm.data.samples import eval_samples
from chiasm.data.source import Split
from chiasm.errors import DataError, ImageError
from chiasm.evaluation.measured import LISTED, Manner, Measured
from chiasm.predictor import Predictor
from chiasm.report.evaluation import Setting, share
from chiasm.report.evaluation_classes import Case, Illustrated, classes_page, interval, percent
from chiasm.report.html import Page
from chiasm.results import Classification
from chiasm.tasks.classify_metrics import ClassificationScores

if TYPE_CHECKING:
    from rich.console import Console


class Answers:
    """What a classifier says of every readable image of a split, in order; iterate for (index, result).

    Args:
        predictor: of a classifier.
        split: labelled images.
        batch_size, workers: as for `Manner`.

    Attributes:
        failures: the images that could not be read so far.
    """

    def __init__(self, predictor: Predictor, split: Split, *, batch_size: int, workers: int | None) -> None:
        self._predictor = predictor
        samples = eval_samples(split, "classify", predictor.info.preprocess)
        self._loader = eval_loader(samples, batch_size=batch_size, workers=workers)
        self.failures = self._loader.failures

    def __iter__(self) -> Iterator[tuple[int, Classification]]:
        for images, _, places in self._loader:
            indices = places.tolist()
            results = self._predictor.answer(images, [self._loader.split.sources[i] for i in indices])
            yield from zip(indices, results, strict=True)


@dataclass(frozen=True, kw_only=True)
class Classified(Measured):
    """The measurements of a classifier.

    Attributes:
        mistakes: the most confident ones, worst first.
        disagreements: images on which the branches disagree, the surest first; empty for a one-branch model.
        pictures: the first of both with their images.
    """

    scores: ClassificationScores
    mistakes: tuple[Case, ...]
    disagreements: tuple[Case, ...]
    failures: tuple[ImageError, ...]
    pictures: tuple[tuple[Illustrated, ...], tuple[Illustrated, ...]]

    @property
    def images(self) -> int:
        return self.scores.top1.count

    def to_dict(self) -> dict[str, Any]:
        scores, agreement = self.scores, self.scores.agreement
        return {
            "images": scores.top1.count,
            "top1": scores.top1.to_dict(),
            f"top{scores.k}": scores.topk.to_dict(),
            "balanced_accuracy": scores.balanced_accuracy,
            "macro_f1": scores.macro_f1,
            "calibration": asdict(scores.calibration),
            "branches": {
                branch.name: {"top1": branch.top1.to_dict(), "calibration": asdict(branch.calibration)}
                for branch in scores.branches
            },
            "agreement": agreement
            and {
                "share": agreement.share.to_dict(),
                "top1_when_agreed": agreement.when_agreed.to_dict(),
                "top1_when_not": agreement.when_not.to_dict(),
                "right_where_they_disagree": {**agreement.right_alone, "none": agreement.none_right},
                "either_right": agreement.either_right.to_dict(),
            },
            "classes": [asdict(score) for score in scores.classes],
            "labels": list(scores.labels),
            "confusion": [list(row) for row in scores.confusion],
            "mistakes": [asdict(case) for case in self.mistakes],
            "disagreements": [asdict(case) for case in self.disagreements],
        }

    def page(self, setting: Setting) -> Page:
        mistakes, disagreements = self.pictures
        return classes_page(
            self.scores, setting, mistakes=mistakes, disagreements=disagreements, failures=self.failures
        )

    def print(self, console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        scores = self.scores
        voters = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("answer of", "top-1", "95 % interval", "calibration error"):
            voters.add_column(column, justify="left" if column == "answer of" else "right")
        rows = [("the model", scores.top1, scores.calibration)]
        rows += [(f"{branch.name} branch alone", branch.top1, branch.calibration) for branch in scores.branches]
        for name, top1, calibration in rows:
            voters.add_row(name, percent(top1), interval(top1), f"{calibration.ece:.1%}")
        console.print(voters)
        if scores.k > 1:
            console.print(
                f"top-{scores.k} {percent(scores.topk)}, mean recall of the classes {scores.balanced_accuracy:.1%}"
            )
        if (agreement := scores.agreement) is not None:
            console.print(
                f"the branches agree on {percent(agreement.share)}; the model is right on "
                f"{percent(agreement.when_agreed)} of those and on {percent(agreement.when_not)} of the others"
            )
            right = [f"{name} {number:,}" for name, number in agreement.right_alone.items()]
            console.print(f"right where they disagree: {', '.join(right)}, none {agreement.none_right:,}")
        console.print()

        hardest = sorted((s for s in scores.classes if s.count), key=lambda s: s.f1 or 0.0)[:20]
        classes = Table(box=None, pad_edge=False, header_style="bold")
        classes.add_column("class, hardest first", overflow="fold")
        for column in ("images", "precision", "recall", "F1"):
            classes.add_column(column, justify="right")
        for score in hardest:
            classes.add_row(
                Text(score.label), f"{score.count:,}", share(score.precision), share(score.recall), share(score.f1)
            )
        console.print(classes)


def measure(predictor: Predictor, split: Split, lookup: Sequence[int], manner: Manner) -> Classified:
    """Measure a classifier.

    Args:
        predictor: of a classifier.
        split: labelled images.
        lookup: of each label of the split its class as the model counts them.
        manner: how.

    Raises:
        DataError: when none of the images can be read.
    """
    answers = Answers(predictor, split, batch_size=manner.batch_size, workers=manner.workers)
    metrics = predictor.task.metrics()
    mistakes, disagreements = _Top(max(LISTED, manner.gallery)), _Top(max(LISTED, manner.gallery))
    for index, result in manner.watched(answers, len(split)):
        target = lookup[split.labels[index]]
        metrics.update([result], [target])
        true = result.labels[target]
        if result.label != true:
            mistakes.add(result.score, _case(index, true, result))
        if result.agreement is False:
            disagreements.add(min(float(p.max()) for p in result.branches.values()), _case(index, true, result))
    if not len(metrics):
        raise DataError(f"none of the {len(split)} images can be read; the first: {answers.failures[0]}")
    cases = mistakes.best(), disagreements.best()
    return Classified(
        scores=metrics.compute(),
        mistakes=cases[0],
        disagreements=cases[1],
        failures=tuple(answers.failures),
        pictures=(_illustrated(cases[0][: manner.gallery], split), _illustrated(cases[1][: manner.gallery], split)),
    )


def _case(index: int, true: str, result: Classification) -> Case:
    return Case(
        source=result.source,
        index=index,
        true=true,
        predicted=result.label,
        probability=result.score,
        votes={name: (vote, float(result.branches[name].max())) for name, vote in result.votes.items()},
    )


def _illustrated(cases: Sequence[Case], split: Split) -> tuple[Illustrated, ...]:
    from PIL import Image

    return tuple(
        Illustrated(case=case, image=Image.fromarray(split.read(case.index).permute(1, 2, 0).numpy())) for case in cases
    )


class _Top:
    """The `count` cases of the highest value; among equals the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[float, int, Case]] = []

    def add(self, value: float, case: Case) -> None:
        heapq.heappush(self._heap, (value, -case.index, case))
        if len(self._heap) > self.count:
            heapq.heappop(self._heap)

    def best(self) -> tuple[Case, ...]:
        return tuple(case for _, _, case in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))
