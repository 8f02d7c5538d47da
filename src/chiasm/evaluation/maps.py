"""A segmenter measured on images with class maps: overlap of each class, borders, the worst and the best images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from chiasm.data.annotated import IGNORE, MapSplit
from chiasm.errors import DataError, ImageError
from chiasm.evaluation.measured import LISTED, Manner, Measured
from chiasm.evaluation.reading import compare
from chiasm.predictor import Predictor
from chiasm.report.evaluation import Setting, share
from chiasm.report.evaluation_maps import MapCase, maps_page
from chiasm.report.html import Page
from chiasm.report.pairs import Pair, map_pair
from chiasm.tasks.segment_metrics import SegmentationScores

if TYPE_CHECKING:
    from rich.console import Console

Place = tuple[MapSplit, int]


@dataclass(frozen=True, kw_only=True)
class MapsMeasured(Measured):
    """The measurements of a segmenter.

    Attributes:
        worst, best: images by mIoU.
        pictures: the first of both, the model's map beside the true one.
    """

    scores: SegmentationScores
    worst: tuple[MapCase, ...]
    best: tuple[MapCase, ...]
    failures: tuple[ImageError, ...]
    pictures: tuple[tuple[Pair, ...], tuple[Pair, ...]]

    @property
    def images(self) -> int:
        return self.scores.images

    def to_dict(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "images": scores.images,
            "pixels": scores.pixels,
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "boundary": scores.boundary,
            "classes": [asdict(score) for score in scores.classes],
            "labels": list(scores.labels),
            "confusion": [list(row) for row in scores.confusion],
            "worst": [asdict(case) for case in self.worst],
            "best": [asdict(case) for case in self.best],
        }

    def page(self, setting: Setting) -> Page:
        return maps_page(self.scores, setting, worst=self.pictures[0], best=self.pictures[1], failures=self.failures)

    def print(self, console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        scores = self.scores
        console.print(
            f"mIoU {share(scores.miou)}, pixels right {share(scores.pixel_accuracy)}, mean recall of the classes "
            f"{share(scores.mean_accuracy)}, borders {share(scores.boundary)}\n"
        )
        hardest = sorted((s for s in scores.classes if s.iou is not None), key=lambda s: s.iou or 0.0)[:20]
        classes = Table(box=None, pad_edge=False, header_style="bold")
        classes.add_column("class, hardest first", overflow="fold")
        for column in ("of the pixels", "IoU", "recall", "precision", "borders"):
            classes.add_column(column, justify="right")
        for score in hardest:
            values = (score.share, score.iou, score.accuracy, score.precision, score.boundary)
            classes.add_row(Text(score.label), *map(share, values))
        console.print(classes)


def measure(
    predictor: Predictor,
    places: Sequence[Place],
    lookup: Sequence[int],
    stranger: Callable[[int], DataError],
    manner: Manner,
) -> MapsMeasured:
    """Measure a segmenter.

    Args:
        predictor: of a segmenter.
        places: the images: splits and indices in them.
        lookup: of each class of the data that of the model; -1 where the model has none.
        stranger: the error for a class of the data that the model has not, raised where it occurs in an image.
        manner: how.

    Raises:
        DataError: for such a class, when none of the images can be read, or no pixel is of a known class.
    """
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(lookup)] = [max(0, label) for label in lookup]
    strange = np.array([k for k, label in enumerate(lookup) if label < 0], dtype=np.uint8)

    def read(index: int) -> tuple[Tensor, np.ndarray]:
        split, i = places[index]
        image, classes = split.sample(i)
        found = np.isin(strange, classes.numpy())
        if found.any():
            raise stranger(int(strange[found][0]))
        return image, table[classes.numpy()]

    metrics, measured, failures = compare(predictor, read, len(places), manner)
    scores: SegmentationScores = metrics.compute()
    if not scores.pixels:
        raise DataError(f"none of the {len(measured)} images has a pixel of a known class; label some.")
    cases = [
        MapCase(source=places[index][0].sources[places[index][1]], index=index, miou=miou)
        for index, miou in zip(measured, scores.image_miou, strict=True)
        if miou is not None
    ]
    worst = sorted(cases, key=lambda case: (case.miou, case.index))
    best = sorted(cases, key=lambda case: (-case.miou, case.index))
    # A pair is two pictures, and no image is among the best and the worst.
    pairs = min(manner.gallery // 2, len(cases) // 2)

    def drawn(case: MapCase) -> Pair:
        image, truth = read(case.index)
        return map_pair(case, image, predictor(image)[0], truth)

    return MapsMeasured(
        scores=scores,
        worst=tuple(worst[:LISTED]),
        best=tuple(best[:LISTED]),
        failures=failures,
        pictures=(tuple(map(drawn, worst[:pairs])), tuple(map(drawn, best[:pairs]))),
    )
