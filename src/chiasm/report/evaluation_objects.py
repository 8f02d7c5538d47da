"""The page of a detector's evaluation: average precision, each class, and images with what was found in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chiasm.errors import ImageError
from chiasm.report import plots
from chiasm.report.evaluation import Setting, evaluation_page, share, tail
from chiasm.report.html import Card, Html, Page, columns, details, figure, table, text
from chiasm.report.pairs import Pair, pairs_piece
from chiasm.tasks.detect_metrics import COCO_LIMIT, DetectionScores

# Classes in the figure of classes; with more, the weakest are shown and all are in the table.
CLASSES_SHOWN = 25
TO_JUDGE = 10  # objects that a class must have to be called the hardest


@dataclass(frozen=True, kw_only=True)
class ObjectCase:
    """One image and how its objects were found, at a score and an overlap of 0.5.

    Attributes:
        source: its path or name.
        index: its place among the images measured.
        f1: 0..1; None where there is no object and none was seen.
        right, false, missed: objects found, detections of nothing, objects not found.
    """

    source: str
    index: int
    f1: float | None
    right: int
    false: int
    missed: int


def objects_page(
    scores: DetectionScores,
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
        worst, best: images with what was found in them, of `ObjectCase`.
        failures: the images that could not be read.
    """
    worst_said = "Objects missed, or seen where there is nothing: some may be annotated wrongly."
    return evaluation_page(
        f"How well are the objects of {setting.subject} found?",
        f"{scores.images:,} images, {scores.objects:,} objects, {_classes(scores)}",
        _headline(scores),
        _meaning(scores),
        [
            ("How exactly, and how large", _overlaps(scores)),
            ("Class by class", _by_class(scores)),
            ("The worst images", pairs_piece(worst_said, worst, list(map(_caption, worst)), scores.labels)),
            ("The best images", pairs_piece("Most is found here.", best, list(map(_caption, best)), scores.labels)),
        ],
        failures,
        setting,
    )


def _headline(scores: DetectionScores) -> list[Card]:
    main, total, kind = scores.main, scores.total, "mask" if scores.masks else "box"
    items = [
        Card(share(main.ap), f"{kind} AP", "average precision, mean over overlaps of 50 to 95 %"),
        Card(share(main.ap50), f"{kind} AP50", "the same at an overlap of 50 %"),
    ]
    if scores.masks:
        items.append(Card(share(scores.boxes.ap), "box AP", "boxes compared with boxes"))
    found = total.right / scores.objects if scores.objects else None
    believed = total.right / (total.right + total.false) if total.right + total.false else None
    items.append(Card(share(found), "of the objects found", "recall at a score of 50 %"))
    items.append(Card(share(believed), "of the detections right", "precision at a score of 50 %"))
    return items


def _meaning(scores: DetectionScores) -> list[str]:
    total = scores.total
    sentences = [
        f"Of {scores.objects:,} objects {total.right:,} are found, {total.missed:,} are not, and {total.false:,} times "
        "one is seen where there is none: counting detections with a score of 50 % or more, right where they name the "
        "class and overlap the object (intersection over union) by 50 % or more. Another threshold trades one kind of "
        "mistake for the other; average precision looks at all of them.",
    ]
    known = [score for score in scores.main.classes if score.ap is not None and score.objects >= TO_JUDGE]
    if len(known) > 1:
        weakest = min(known, key=lambda score: score.ap or 0.0)
        sentences.append(
            f"The hardest class is '{weakest.label}': AP {share(weakest.ap)} on its {weakest.objects:,} objects."
        )
    if scores.limit > COCO_LIMIT:
        sentences.append(
            f"Some images hold more than {COCO_LIMIT} objects of one class, so up to {scores.limit} detections of a "
            f"class count in an image; programs that count {COCO_LIMIT}, as COCO does, give lower numbers."
        )
    return sentences


def _classes(scores: DetectionScores) -> str:
    occurring = sum(1 for score in scores.boxes.classes if score.objects)
    known = len(scores.labels)
    return (
        f"{known} {'class' if known == 1 else 'classes'}" if occurring == known else f"{occurring} of {known} classes"
    )


def _overlaps(scores: DetectionScores) -> list[Html]:
    headers = ["", "AP", "AP50", "AP75", "small", "medium", "large", f"AR{scores.limit}"]
    numbers = table(headers, [[name, *map(share, found.row)] for name, found in scores.kinds.items()])
    if not scores.objects:
        return [numbers]
    curves = {name: found.curve for name, found in scores.kinds.items()}
    drawing = figure(
        plots.precision_recall(curves),
        "The lower the score from which detections count, the more objects are found and the more are false. Mean over "
        "the classes, overlap 50 %.",
    )
    said = text(
        "AP50 counts detections that overlap an object by 50 % or more, AP75 by 75 %; AP is the mean from 50 to 95 %. "
        "Small objects are below 32 × 32 pixels, large ones above 96 × 96. AR is the share of the objects found where "
        "the score does not matter. A dash: no object of that size."
    )
    return [numbers, columns(drawing, said)]


def _by_class(scores: DetectionScores) -> list[Html]:
    ranked = sorted(
        (score for score in scores.main.classes if score.objects), key=lambda score: (score.ap is None, score.ap or 0.0)
    )
    shown = ranked[:CLASSES_SHOWN]
    numbers = _class_table(scores, scores.labels)
    if len(shown) < 2:
        return [numbers]
    kind = "masks" if scores.masks else "boxes"
    which = "" if len(shown) == len(ranked) else f" The {len(shown)} weakest of {len(ranked)} classes."
    drawing = figure(
        plots.bars([(score.label, {"AP": score.ap, "AP50": score.ap50}) for score in shown], x="average precision"),
        f"Average precision of the {kind}, hardest first.{which}",
    )
    if len(shown) == len(scores.labels):
        return [columns(drawing, numbers)]
    weakest = _class_table(scores, [score.label for score in shown])
    return [columns(drawing, weakest), details("All classes", numbers)]


def _class_table(scores: DetectionScores, labels: Sequence[str]) -> Html:
    """The classes `labels`, in that order."""
    rows = []
    for number in map(scores.labels.index, labels):
        parts = [found.classes[number] for found in scores.kinds.values()]
        values = [share(value) for part in parts for value in (part.ap, part.ap50)]
        rows.append([parts[0].label, f"{parts[0].objects:,}", *values])
    measures = [f"{name} {measure}" for name in scores.kinds for measure in ("AP", "AP50")]
    return table(["class", "objects", *measures], rows)


def _caption(pair: Pair) -> list[str]:
    case: ObjectCase = pair.case
    return [
        f"F1 {share(case.f1)}",
        f"{case.right:,} found, {case.missed:,} missed, {case.false:,} of nothing",
        tail(case.source),
    ]
