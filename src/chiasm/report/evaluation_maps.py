"""The page of a segmenter's evaluation: overlap of each class, what is taken for what, and images with their maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chiasm.errors import ImageError
from chiasm.report import plots
from chiasm.report.evaluation import Setting, evaluation_page, share, tail
from chiasm.report.html import Card, Html, Page, columns, details, figure, table, text
from chiasm.report.pairs import Pair, pairs_piece
from chiasm.tasks.segment_metrics import TOLERANCE, ClassOverlap, SegmentationScores

# Classes in the figure of classes; with more, the weakest are shown and all are in the table.
CLASSES_SHOWN = 25


@dataclass(frozen=True, kw_only=True)
class MapCase:
    """One image and how well its pixels were classified.

    Attributes:
        source: its path or name.
        index: its place among the images measured.
        miou: 0..1, mean over the classes that occur in it or were given.
    """

    source: str
    index: int
    miou: float


def maps_page(
    scores: SegmentationScores,
    setting: Setting,
    *,
    worst: Sequence[Pair],
    best: Sequence[Pair],
    failures: Sequence[ImageError],
) -> Page:
    """Build the page.

    Args:
        scores: what was measured.
        setting: how it was measured.
        worst, best: images with their maps, of `MapCase`.
        failures: the images that could not be read.
    """
    occurring, known = sum(1 for score in scores.classes if score.share), len(scores.labels)
    worst_said = "Where the maps differ most: some may be annotated wrongly."
    return evaluation_page(
        f"How well are the pixels of {setting.subject} classified?",
        f"{scores.images:,} images, {f'{known}' if occurring == known else f'{occurring} of {known}'} classes",
        _headline(scores),
        _meaning(scores),
        [
            ("Class by class", _by_class(scores)),
            ("What is taken for what", _confusion(scores)),
            ("The worst images", pairs_piece(worst_said, worst, list(map(_caption, worst)), scores.labels)),
            ("The best images", pairs_piece("Where they agree.", best, list(map(_caption, best)), scores.labels)),
        ],
        failures,
        setting,
    )


def _headline(scores: SegmentationScores) -> list[Card]:
    return [
        Card(share(scores.miou), "mIoU", "overlap (IoU), mean over the classes"),
        Card(share(scores.pixel_accuracy), "of the pixels right", "pixel accuracy"),
        Card(share(scores.mean_accuracy), "right, class by class", "mean accuracy: each class counts alike"),
        Card(share(scores.boundary), "of the borders right", f"F-score within {TOLERANCE:.2%} of the diagonal"),
    ]


def _meaning(scores: SegmentationScores) -> list[str]:
    largest = max(scores.classes, key=lambda score: score.share)
    sentences = [
        f"{share(scores.pixel_accuracy)} of {scores.pixels:,} pixels are given their class. Always answering "
        f"'{largest.label}', the largest class, would get {share(largest.share)}; so the overlap of each class tells "
        "more: the pixels that both the model and the truth give it, of those that either does."
    ]
    known = [score for score in scores.classes if score.iou is not None]
    if len(known) > 1:
        weakest = min(known, key=lambda score: score.iou or 0.0)
        sentences.append(f"The hardest class is '{weakest.label}': IoU {share(weakest.iou)}.")
    return sentences


def _by_class(scores: SegmentationScores) -> list[Html]:
    known = [score for score in scores.classes if score.iou is not None]
    ranked = sorted(known, key=lambda score: score.iou or 0.0)
    shown = ranked[:CLASSES_SHOWN]
    which = "" if len(shown) == len(ranked) else f" The {len(shown)} weakest of {len(ranked)} classes."
    drawing = figure(
        plots.bars([(score.label, {"IoU": score.iou, "borders": score.boundary}) for score in shown], x="share"),
        "IoU: pixels that are of a class and given it, of those that are or are given it. Borders: F-score of the "
        f"class's border. Hardest first.{which}",
    )
    numbers = _class_table(scores.classes)
    if len(shown) == len(scores.labels):
        return [columns(drawing, numbers)]
    return [columns(drawing, _class_table(shown)), details("All classes", numbers)]


def _class_table(classes: Sequence[ClassOverlap]) -> Html:
    rows = [
        [score.label, *map(share, (score.share, score.iou, score.accuracy, score.precision, score.boundary))]
        for score in classes
    ]
    return table(["class", "of the pixels", "IoU", "recall", "precision", "borders"], rows)


def _confusion(scores: SegmentationScores) -> list[Html]:
    drawing = figure(
        plots.confusion(scores.labels, scores.confusion, percent=True),
        "Rows are true classes, columns what their pixels were taken for, in percent of the row. Blue is right, orange "
        "wrong.",
    )
    pairs = scores.confusions(12)
    if not pairs:
        return [drawing, text("No mistakes.")]
    of_class = dict(zip(scores.labels, map(sum, scores.confusion), strict=True))
    rows = [[true, taken, share(count / scores.pixels), share(count / of_class[true])] for true, taken, count in pairs]
    return [columns(drawing, table(["true", "taken for", "of all pixels", "of the class"], rows, words=2))]


def _caption(pair: Pair) -> list[str]:
    case: MapCase = pair.case
    return [f"mIoU {share(case.miou)}", tail(case.source)]
