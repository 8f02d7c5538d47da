"""A detector measured on images with objects: average precision of boxes and masks, the worst and the best images.

The objects found become detections.json, a list in COCO's results format, which `COCO(file).loadRes` of pycocotools
accepts: image and category ids are those of the data's own file where it is COCO's; else images are counted from 1 in
the order of the split, and categories from 1 in the order of the model's classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chiasm.data.annotated import Objects, ObjectSplit
from chiasm.errors import DataError, ImageError
from chiasm.evaluation.measured import LISTED, Manner, Measured
from chiasm.evaluation.reading import compare
from chiasm.predictor import Predictor
from chiasm.report.evaluation import Setting, share
from chiasm.report.evaluation_objects import ObjectCase, objects_page
from chiasm.report.html import Page
from chiasm.report.pairs import Pair, objects_pair
from chiasm.tasks.detect_metrics import SURE, DetectionMetrics, DetectionScores

if TYPE_CHECKING:
    from rich.console import Console

Place = tuple[ObjectSplit, int]


@dataclass(frozen=True, kw_only=True)
class ObjectsMeasured(Measured):
    """The measurements of a detector.

    Attributes:
        worst, best: images by F1 at a score and an overlap of 0.5.
        pictures: the first of both, what was found beside what is there.
        rows: all that was found, in COCO's results format.
    """

    scores: DetectionScores
    worst: tuple[ObjectCase, ...]
    best: tuple[ObjectCase, ...]
    failures: tuple[ImageError, ...]
    pictures: tuple[tuple[Pair, ...], tuple[Pair, ...]]
    rows: tuple[dict[str, Any], ...]

    @property
    def images(self) -> int:
        return self.scores.images

    def to_dict(self) -> dict[str, Any]:
        scores, total = self.scores, self.scores.total
        return {
            "images": scores.images,
            "objects": scores.objects,
            "boxes": asdict(scores.boxes),
            "masks": scores.masks and asdict(scores.masks),
            "limit": scores.limit,
            "at_score_50": asdict(total) | {"f1": total.f1},
            "labels": list(scores.labels),
            "worst": [asdict(case) for case in self.worst],
            "best": [asdict(case) for case in self.best],
        }

    def page(self, setting: Setting) -> Page:
        return objects_page(self.scores, setting, worst=self.pictures[0], best=self.pictures[1], failures=self.failures)

    def print(self, console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        scores = self.scores
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = ("", "AP", "AP50", "AP75", "small", "medium", "large", f"AR{scores.limit}")
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for name, found in scores.kinds.items():
            table.add_row(name, *map(share, found.row))
        console.print(table)
        total = scores.total
        console.print(
            f"at a score of 50 %: {total.right:,} of {scores.objects:,} objects found, {total.missed:,} missed, "
            f"{total.false:,} detections of nothing"
        )
        console.print()
        classes = Table(box=None, pad_edge=False, header_style="bold")
        classes.add_column("class, hardest first", overflow="fold")
        classes.add_column("objects", justify="right")
        for name in scores.kinds:
            for measure in ("AP", "AP50"):
                classes.add_column(f"{name} {measure}" if scores.masks else measure, justify="right")
        hardest = sorted((c for c in scores.main.classes if c.objects), key=lambda c: c.ap or 0.0)[:20]
        for label in [score.label for score in hardest]:
            number = scores.labels.index(label)
            own = [found.classes[number] for found in scores.kinds.values()]
            numbers = [share(value) for score in own for value in (score.ap, score.ap50)]
            classes.add_row(Text(label), f"{own[0].objects:,}", *numbers)
        console.print(classes)

    def files(self) -> dict[str, str]:
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        return {"detections.json": f"[\n{lines}\n]\n"}


def measure(
    predictor: Predictor, places: Sequence[Place], lookup: Sequence[int], classes: Sequence[str], manner: Manner
) -> ObjectsMeasured:
    """Measure a detector.

    Args:
        predictor: of a detector; with masks where the objects have some.
        places: the images: splits and indices in them.
        lookup: of each label of the data its class as the model counts them.
        classes: the data's class names, in the order of its labels.
        manner: how.

    Raises:
        DataError: when none of the images can be read, or no object is known, so that nothing could be scored.
    """
    if not any(bool((~split.objects(i).crowd).any()) for split, i in places):
        raise DataError(
            f"none of the {len(places)} images has an object, so average precision is undefined; choose another "
            "--split, or annotate some."
        )
    ids = _image_ids(places)
    table = torch.tensor(lookup, dtype=torch.int64)

    def read(index: int) -> tuple[Tensor, Objects]:
        split, i = places[index]
        objects = split.objects(i)
        return split.read(i), replace(objects, image_id=ids[index], labels=table[objects.labels])

    metrics, measured, failures = compare(predictor, read, len(places), manner)
    scores: DetectionScores = metrics.compute()
    cases = [
        ObjectCase(
            source=places[index][0].sources[places[index][1]],
            index=index,
            f1=matches.f1,
            right=matches.right,
            false=matches.false,
            missed=matches.missed,
        )
        for index, matches in zip(measured, scores.matches, strict=True)
        if matches.f1 is not None
    ]
    worst = sorted(cases, key=lambda case: (case.f1, -case.false - case.missed, case.index))
    best = sorted(cases, key=lambda case: (-(case.f1 or 0.0), -case.right, case.index))
    # A pair is two pictures, and no image is among the best and the worst.
    pairs = min(manner.gallery // 2, len(cases) // 2)

    def drawn(case: ObjectCase) -> Pair:
        image, truth = read(case.index)
        return objects_pair(case, image, predictor(image)[0].above(SURE), truth)

    return ObjectsMeasured(
        scores=scores,
        worst=tuple(worst[:LISTED]),
        best=tuple(best[:LISTED]),
        failures=failures,
        pictures=(tuple(map(drawn, worst[:pairs])), tuple(map(drawn, best[:pairs]))),
        rows=tuple(_rows(metrics, [places[index] for index in measured], classes)),
    )


def _image_ids(places: Sequence[Place]) -> list[int | str]:
    """Those of the data; where images of several splits share one, all are counted from 1."""
    ids = [split.objects(i).image_id for split, i in places]
    return ids if len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))


def _rows(metrics: DetectionMetrics, places: Sequence[Place], classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """In COCO's results format; classes that the data's COCO file has no category for cannot be told in it."""
    for image, (split, _) in zip(metrics.found(), places, strict=True):
        of_class: dict[int, Any] = {k: k + 1 for k in range(len(metrics.labels))}
        if split.categories:
            id_of = {classes[label]: key for label, key in split.categories.items()}
            of_class = {k: id_of[label] for k, label in enumerate(metrics.labels) if label in id_of}
        for row in image:
            if (label := row["category_id"]) in of_class:
                yield row | {"category_id": of_class[label]}
