"""How well objects were found: average precision as COCO defines it, for boxes and for masks.

Lin et al., "Microsoft COCO: Common Objects in Context" (ECCV 2014), computed by pycocotools' own evaluator. Of each
image boxes and run lengths are kept, no masks.

COCO counts the 100 surest detections of a class in an image. Where an image holds more objects of one class than that
(cell nuclei, say), the limit is raised to the next whole hundred that holds them all, or the objects beyond the
hundredth could not be found; `DetectionScores.limit` says which limit holds, and `compute(limit=100)` gives COCO's own.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from chiasm.data.annotated import Objects
from chiasm.errors import DataError
from chiasm.results import Detections
from chiasm.results.masks import encode_mask, encode_outline

COCO_LIMIT = 100
# The picture of one image, right and wrong: detections at least this sure, overlapping by COCO's lowest threshold.
SURE, OVERLAP = 0.5, 0.5
RECALLS = tuple(i / 100 for i in range(101))


@dataclass(frozen=True, kw_only=True)
class ClassPrecision:
    """One class.

    Attributes:
        objects: of this class in the truth, without crowds.
        ap: average precision, 0..1, mean over the overlaps 0.5 to 0.95; None where there are no objects.
        ap50: the same at the overlap 0.5.
    """

    label: str
    objects: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, kw_only=True)
class PrecisionScores:
    """Average precision, 0..1, mean over the classes that occur; None where there is no object of that size.

    Attributes:
        ap: mean over the overlaps (IoU) 0.5, 0.55 ... 0.95.
        ap50, ap75: at one overlap.
        small, medium, large: `ap` of objects below 32², up to 96², and above 96² pixels; None where not asked for.
        ar: average recall over the same overlaps, COCO's AR100.
        curve: precision at each recall of `RECALLS`, overlap 0.5; () where there are no objects.
        classes: in the order of the labels.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    small: float | None
    medium: float | None
    large: float | None
    ar: float | None
    curve: tuple[float, ...]
    classes: tuple[ClassPrecision, ...]

    @property
    def row(self) -> tuple[float | None, ...]:
        """AP, AP50, AP75, small, medium, large, AR."""
        return self.ap, self.ap50, self.ap75, self.small, self.medium, self.large, self.ar


@dataclass(frozen=True, kw_only=True)
class ImageMatches:
    """One image: objects found, detections of nothing, objects not found (score and overlap 0.5 or more)."""

    right: int
    false: int
    missed: int

    @property
    def f1(self) -> float | None:
        """0..1; None where there is no object and none was seen."""
        total = 2 * self.right + self.false + self.missed
        return 2 * self.right / total if total else None


@dataclass(frozen=True, kw_only=True)
class DetectionScores:
    """All that `DetectionMetrics` measures.

    Attributes:
        images, objects: how many were measured on; crowds are no objects.
        limit: detections of one class in one image that count.
        boxes: boxes compared with boxes.
        masks: masks compared with masks, or None.
        matches: per image in the order they came, by mask where there are masks.
    """

    labels: tuple[str, ...]
    images: int
    objects: int
    limit: int
    boxes: PrecisionScores
    masks: PrecisionScores | None
    matches: tuple[ImageMatches, ...]

    @property
    def kinds(self) -> dict[str, PrecisionScores]:
        """What was compared: 'boxes', and 'masks' where there are."""
        return {"boxes": self.boxes} | ({"masks": self.masks} if self.masks else {})

    @property
    def main(self) -> PrecisionScores:
        """Of the masks where there are, else of the boxes."""
        return self.masks or self.boxes

    @property
    def total(self) -> ImageMatches:
        """`matches` of all images together."""
        right, false, missed = (
            sum(getattr(image, name) for image in self.matches) for name in ("right", "false", "missed")
        )
        return ImageMatches(right=right, false=false, missed=missed)


class _Seen(NamedTuple):
    """What is kept of one image: its objects, then what was found. Boxes are left, top, width, height."""

    image_id: int | str
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    outlines: tuple[dict[str, Any], ...]
    found_boxes: np.ndarray
    found_classes: np.ndarray
    scores: np.ndarray
    found_outlines: tuple[dict[str, Any], ...]


class DetectionMetrics:
    """Collects results with the true objects; `compute` gives the scores.

    Args:
        labels: the class names; classes of results and of objects are indices of these.
        masks: whether masks are compared as well.
    """

    def __init__(self, labels: Sequence[str], masks: bool) -> None:
        self.labels = tuple(labels)
        self.masks = masks
        self._images: list[_Seen] = []

    def __len__(self) -> int:
        return len(self._images)

    def update(self, results: Sequence[Detections], truths: Sequence[Objects]) -> None:
        """Add results with the objects of the same images, both in pixels of one frame.

        Raises:
            DataError: when masks are to be compared and objects have boxes alone.
            ValueError: when results have no masks, or are for images of another size.
        """
        for result, truth in zip(results, truths, strict=True):
            if result.size != (truth.height, truth.width):
                raise ValueError(
                    f"{result.source}: {result.size} pixels, its objects are in {truth.height, truth.width}"
                )
            if self.masks and len(truth.outlines) != len(truth):
                raise DataError(f"image {truth.image_id} has boxes without masks; it is for the task 'detect'.")
            masks = result.masks if self.masks else ()
            if masks is None:
                raise ValueError(f"{result.source}: detections without masks")
            self._images.append(
                _Seen(
                    image_id=truth.image_id,
                    size=result.size,
                    boxes=_left_top_size(truth.boxes.numpy()),
                    classes=truth.labels.numpy(),
                    crowd=truth.crowd.numpy(),
                    areas=truth.areas.numpy().astype(np.float64),
                    outlines=tuple(encode_outline(o, *result.size) for o in truth.outlines) if self.masks else (),
                    found_boxes=_left_top_size(result.boxes),
                    found_classes=np.asarray(result.classes),
                    scores=np.asarray(result.scores, dtype=np.float64),
                    found_outlines=tuple(map(encode_mask, masks)),
                )
            )

    def state(self) -> list[_Seen]:
        """All that was added, for `merge` of another process."""
        return list(self._images)

    def merge(self, state: Sequence[_Seen]) -> None:
        """Add what another collected, behind one's own."""
        self._images += state

    def found(self) -> Iterator[list[dict[str, Any]]]:
        """Of each image what was found, as COCO writes results; 'category_id' is the index of the class."""
        for image in self._images:
            rows: list[dict[str, Any]] = []
            for i, box in enumerate(image.found_boxes.tolist()):
                row: dict[str, Any] = {"image_id": image.image_id, "category_id": int(image.found_classes[i])}
                row |= {"bbox": [round(side, 3) for side in box], "score": round(float(image.scores[i]), 6)}
                rows.append(row | ({"segmentation": image.found_outlines[i]} if self.masks else {}))
            yield rows

    def compute(self, *, limit: int | None = None, sizes: bool = True) -> DetectionScores:
        """The scores of all images so far; without any object they are None.

        Args:
            limit: detections of one class in one image that count; None for 100, or as many as an image has objects.
            sizes: whether small, medium and large objects are looked at, which takes four times as long.
        """
        if limit is None:
            most = max((max(_objects(image).values(), default=0) for image in self._images), default=0)
            limit = max(COCO_LIMIT, -(-most // 100) * 100)
        boxes, matches = self._evaluate("bbox", limit, sizes)
        masks = None
        if self.masks:
            masks, matches = self._evaluate("segm", limit, sizes)
        return DetectionScores(
            labels=self.labels,
            images=len(self),
            objects=sum(score.objects for score in boxes.classes),
            limit=limit,
            boxes=boxes,
            masks=masks,
            matches=matches,
        )

    def _evaluate(self, kind: str, limit: int, sizes: bool) -> tuple[PrecisionScores, tuple[ImageMatches, ...]]:
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval(self._coco(kind, found=False), self._coco(kind, found=True), kind)
            params = evaluator.params
            params.maxDets = [limit]
            if not sizes:
                params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
            evaluator.evaluate()
            evaluator.accumulate()
        # (overlaps, recalls, classes, sizes) and (overlaps, classes, sizes); -1 where a class has no such object.
        precision, recall = evaluator.eval["precision"][..., 0], evaluator.eval["recall"][..., 0]
        overlaps = {f"{value:.2f}": i for i, value in enumerate(params.iouThrs)}
        at_50 = precision[overlaps["0.50"], ..., 0]
        objects = sum(map(_objects, self._images), Counter[int]())
        scores = PrecisionScores(
            ap=_mean(precision[..., 0]),
            ap50=_mean(at_50),
            ap75=_mean(precision[overlaps["0.75"], ..., 0]),
            **{name: _mean(precision[..., i]) if sizes else None for i, name in enumerate(_SIZES, 1)},
            ar=_mean(recall[..., 0]),
            curve=tuple(at_50[:, list(objects)].mean(1).tolist()) if objects else (),
            classes=tuple(
                ClassPrecision(
                    label=label, objects=objects[k], ap=_mean(precision[:, :, k, 0]), ap50=_mean(at_50[:, k])
                )
                for k, label in enumerate(self.labels)
            ),
        )
        return scores, self._matches(evaluator.evalImgs, len(params.areaRng))

    def _coco(self, kind: str, *, found: bool) -> Any:
        """The objects, or what was found, as pycocotools has them after reading a file; ids count from 1."""
        from pycocotools import mask as coco_mask
        from pycocotools.coco import COCO

        annotations: list[dict[str, Any]] = []
        for number, image in enumerate(self._images):
            boxes, classes = (image.found_boxes, image.found_classes) if found else (image.boxes, image.classes)
            outlines = image.found_outlines if found else image.outlines
            areas = image.areas
            if found:
                # Of what is compared, masks or boxes: detections of nothing count for the size they have.
                # One by one: pycocotools counts the masks of a list in eight bits.
                areas = boxes[:, 2] * boxes[:, 3] if kind == "bbox" else np.array([coco_mask.area(o) for o in outlines])
            for i in range(len(boxes)):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(classes[i]),
                    "bbox": boxes[i].tolist(),
                    "area": float(areas[i]),
                    "iscrowd": 0 if found else int(image.crowd[i]),
                }
                annotation |= {"score": float(image.scores[i])} if found else {}
                annotation |= {"segmentation": outlines[i]} if kind == "segm" else {}
                annotations.append(annotation)
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": number, "height": image.size[0], "width": image.size[1]}
                for number, image in enumerate(self._images)
            ],
            "categories": [{"id": k, "name": label} for k, label in enumerate(self.labels)],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    def _matches(self, evaluated: Sequence[dict[str, Any] | None], sizes: int) -> tuple[ImageMatches, ...]:
        """Counts per image from what pycocotools keeps by class, size and image; the lowest overlap comes first."""
        images = len(self)
        right, false, missed = (np.zeros(images, dtype=int) for _ in range(3))
        for k in range(len(self.labels)):
            for i, entry in enumerate(evaluated[k * sizes * images :][:images]):
                if entry is None:
                    continue
                counted = (np.asarray(entry["dtScores"]) >= SURE) & ~entry["dtIgnore"][0].astype(bool)
                hits = int((counted & (entry["dtMatches"][0] > 0)).sum())
                right[i] += hits
                false[i] += int(counted.sum()) - hits
                missed[i] += int((entry["gtIgnore"] == 0).sum()) - hits
        rows = zip(right.tolist(), false.tolist(), missed.tolist(), strict=True)
        return tuple(ImageMatches(right=r, false=f, missed=m) for r, f, m in rows)


_SIZES = ("small", "medium", "large")


def _left_top_size(boxes: np.ndarray) -> np.ndarray:
    """(N, 4): left, top, right, bottom to left, top, width, height, as COCO has them."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _objects(image: _Seen) -> Counter[int]:
    """How many objects of each class; crowds are not counted."""
    return Counter(image.classes[~image.crowd].tolist())


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
