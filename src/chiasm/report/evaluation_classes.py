"""The page of a classifier's evaluation: what the numbers are, what they mean, and the images behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chiasm.errors import ImageError
from chiasm.report import plots
from chiasm.report.evaluation import Setting, evaluation_page, share, tail
from chiasm.report.html import Card, Html, Page, Picture, columns, details, figure, gallery, table, text
from chiasm.tasks.classify_metrics import Calibration, ClassificationScores, Share

if TYPE_CHECKING:
    from PIL import Image

# Classes in the figure of classes; with more, the weakest are shown and all are in the table.
CLASSES_SHOWN = 25


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image and what was said of it.

    Attributes:
        source: its path or name.
        index: its place in the split.
        true, predicted: class names.
        probability: what the model gave `predicted`, 0..1.
        votes: each branch's class and its probability, by the branch's name; empty for a one-branch model.
    """

    source: str
    index: int
    true: str
    predicted: str
    probability: float
    votes: dict[str, tuple[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Illustrated:
    """A case with its image."""

    case: Case
    image: Image.Image


def classes_page(
    scores: ClassificationScores,
    setting: Setting,
    *,
    mistakes: Sequence[Illustrated],
    disagreements: Sequence[Illustrated],
    failures: Sequence[ImageError],
) -> Page:
    """Build the page.

    Args:
        scores: what was measured.
        setting: how it was measured.
        mistakes: the most confident ones, worst first.
        disagreements: images on which the branches disagree, the surest of each other first.
        failures: the images that could not be read.
    """
    return evaluation_page(
        f"How well are {setting.subject} classified?",
        f"{scores.top1.count:,} images, {_classes(scores)}",
        headline(scores),
        meaning(scores),
        [
            ("The branches", _branches(scores) if scores.agreement else []),
            ("What is taken for what", _confusion(scores)),
            ("Class by class", _by_class(scores)),
            ("Can its probabilities be believed?", _calibration(scores)),
            (
                "The most confident mistakes",
                _gallery("Wrong, and sure of it: worth a look first, for some may be labelled wrongly.", mistakes),
            ),
            (
                "Where the branches disagree",
                _gallery(
                    "Each branch is sure of another class: where local texture and global layout tell different "
                    "stories.",
                    disagreements,
                ),
            ),
        ],
        failures,
        setting,
    )


def headline(scores: ClassificationScores) -> list[Card]:
    """The numbers that come first."""
    items = [Card(percent(scores.top1), "right (top-1)", f"95 % interval {interval(scores.top1)}")]
    if scores.k > 1:
        items.append(Card(percent(scores.topk), f"among the best {scores.k}", f"top-{scores.k}"))
    items.append(
        Card(f"{scores.balanced_accuracy:.1%}", "right, class by class", "mean recall: each class counts alike")
    )
    items.append(Card(f"{scores.calibration.ece:.1%}", "calibration error", "mean gap of stated and true share (ECE)"))
    if scores.agreement is not None:
        items.append(Card(percent(scores.agreement.share), "branches agree", "share of the images"))
    return items


def meaning(scores: ClassificationScores) -> list[str]:
    """The numbers in plain sentences."""
    top1, frequent = scores.top1, max(scores.classes, key=lambda score: score.count)
    low, high = top1.interval or (0.0, 1.0)
    sentences = [
        f"{top1.right:,} of {top1.count:,} images were named right. On further images of the same kind, expect "
        f"{low:.1%} to {high:.1%} (95 % interval). Always answering '{frequent.label}', the most frequent class, would "
        f"get {frequent.count / top1.count:.1%}."
    ]
    gap = _excess(scores.calibration)
    manner = "too sure of itself" if gap > 0 else "too modest"
    if abs(gap) < 0.01:
        sentences.append("On average the model states as high a probability as the share it gets right.")
    else:
        stated = (top1.value or 0.0) + gap
        sentences.append(
            f"The model is {manner}: on average it states {stated:.1%} and is right in {percent(top1)} of the cases."
        )
    weakest = min((s for s in scores.classes if s.recall is not None), key=lambda s: s.recall or 0.0)
    sentences.append(
        f"The hardest class is '{weakest.label}': {weakest.recall or 0:.1%} of its {weakest.count:,} images are found."
    )
    return sentences


def percent(share: Share) -> str:
    return "–" if share.value is None else f"{share.value:.1%}"


def interval(share: Share) -> str:
    return "–" if share.interval is None else f"{share.interval[0]:.1%} to {share.interval[1]:.1%}"


def _classes(scores: ClassificationScores) -> str:
    occurring = sum(1 for score in scores.classes if score.count)
    known = len(scores.classes)
    return f"{known} classes" if occurring == known else f"{occurring} of {known} classes"


def _excess(calibration: Calibration) -> float:
    """Mean stated probability less the share that is right."""
    total = sum(calibration.counts)
    bins = zip(calibration.counts, calibration.confidence, calibration.accuracy, strict=True)
    return sum(n * ((c or 0.0) - (a or 0.0)) for n, c, a in bins) / total


def _branches(scores: ClassificationScores) -> list[Html]:
    agreement = scores.agreement
    assert agreement is not None
    voters = [("both together" if len(scores.branches) == 2 else "all together", scores.top1, scores.calibration)]
    voters += [(f"{branch.name} alone", branch.top1, branch.calibration) for branch in scores.branches]
    votes = [[name, percent(top1), interval(top1), f"{calibration.ece:.1%}"] for name, top1, calibration in voters]
    agreed, apart = agreement.when_agreed, agreement.when_not
    cases = [
        ["they agree", f"{agreed.count:,}", percent(agreement.share), percent(agreed)],
        [
            "they disagree",
            f"{apart.count:,}",
            percent(Share(right=apart.count, count=scores.top1.count)),
            percent(apart),
        ],
    ]
    pieces = [
        columns(
            table(["answer of", "right", "95 % interval", "calibration error"], votes),
            table(["when", "images", "share", "model is right"], cases),
        )
    ]
    if apart.count:
        right = [[f"{name} is right", f"{n:,}", f"{n / apart.count:.1%}"] for name, n in agreement.right_alone.items()]
        right.append(["none is right", f"{agreement.none_right:,}", f"{agreement.none_right / apart.count:.1%}"])
        pieces.append(
            columns(
                table(["where they disagree", "images", "share"], right),
                Html(
                    text(
                        f"Always knowing which branch to believe would make {percent(agreement.either_right)} right; "
                        f"taking their mean makes {percent(scores.top1)} right."
                    )
                    + (text(_warning_sign(agreed, apart)) if agreed.count else "")
                ),
            )
        )
    return pieces


def _warning_sign(agreed: Share, apart: Share) -> str:
    if agreed.interval and apart.interval and agreed.interval[0] > apart.interval[1]:
        return (
            f"Disagreement is a sign worth using: {percent(agreed)} of the answers are right where the branches agree, "
            f"{percent(apart)} where they do not. Let a person look at the latter."
        )
    return "On these images, agreement of the branches does not clearly tell right answers from wrong ones."


def _confusion(scores: ClassificationScores) -> list[Html]:
    drawing = figure(
        plots.confusion(scores.labels, scores.confusion),
        "Rows are true classes, columns what they were taken for; the deeper, the larger the share of the row. "
        "Blue is right, orange wrong.",
    )
    pairs = scores.confusions(12)
    if not pairs:
        return [drawing, text("No mistakes.")]
    counts = {score.label: score.count for score in scores.classes}
    rows = [[true, predicted, f"{n:,}", f"{n / counts[true]:.1%}"] for true, predicted, n in pairs]
    return [columns(drawing, table(["true", "taken for", "images", "of the class"], rows, words=2))]


def _by_class(scores: ClassificationScores) -> list[Html]:
    ranked = sorted(scores.classes, key=lambda s: (s.f1 is None, s.f1 or 0.0))
    shown = [score for score in ranked if score.count][:CLASSES_SHOWN]
    drawing = plots.bars(
        [(s.label, {"found (recall)": s.recall, "to be believed (precision)": s.precision}) for s in shown],
        x="share of images",
    )
    all_shown = len(shown) == len(ranked)
    which = "" if all_shown else f" The {len(shown)} weakest of {len(ranked)} classes."
    caption = (
        "Recall: how many of a class's images are found. Precision: how many of the images given this class are of it. "
        f"Hardest first.{which}"
    )
    rows = [[s.label, f"{s.count:,}", share(s.precision), share(s.recall), share(s.f1)] for s in scores.classes]
    numbers = table(["class", "images", "precision", "recall", "F1"], rows)
    if all_shown:
        return [columns(figure(drawing, caption), numbers)]
    return [figure(drawing, caption), details("All classes", numbers)]


def _calibration(scores: ClassificationScores) -> list[Html]:
    voters = {"model": scores.calibration}
    voters |= {f"{branch.name} branch": branch.calibration for branch in scores.branches}
    return [
        columns(
            figure(
                plots.reliability(voters),
                "On the dashed line a stated 80 % is right in 80 % of the cases; below it the model is too sure. "
                "Large dots stand for many images.",
            ),
            Html(
                text(
                    "A probability is worth believing when it is right as often as it says. The calibration error is "
                    "the gap between both, averaged over the images in 15 bins of stated probability."
                )
                + table(
                    ["answer of", "states", "is right", "error"],
                    [
                        [name, f"{_right(c) + _excess(c):.1%}", f"{_right(c):.1%}", f"{c.ece:.1%}"]
                        for name, c in voters.items()
                    ],
                )
            ),
        )
    ]


def _right(calibration: Calibration) -> float:
    bins = zip(calibration.counts, calibration.accuracy, strict=True)
    return sum(n * (a or 0.0) for n, a in bins) / sum(calibration.counts)


def _gallery(said: str, items: Sequence[Illustrated]) -> list[Html]:
    return [text(said), gallery(_picture(item) for item in items)] if items else []


def _picture(item: Illustrated) -> Picture:
    case = item.case
    lines = [f"is {case.true}"]
    lines.append(f"model: {case.predicted} {case.probability:.0%}")
    lines += [f"{name}: {vote} {score:.0%}" for name, (vote, score) in case.votes.items()]
    lines.append(tail(case.source))
    return Picture(item.image, lines)
