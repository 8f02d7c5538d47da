"""What a model found beside what is there: two pictures of one image as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from chiasm.data.annotated import IGNORE, Objects
from chiasm.data.sheet_annotated import draw_map
from chiasm.report.html import Html, Picture, gallery, legend, text
from chiasm.results import Detections, Segmentation
from chiasm.results.drawing import colour_of, paint_boxes, paint_labels, paint_masks, place_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SIDE, _GAP = 420, 8  # of each of the two pictures, and between them, in pixels
_NAMED = 40  # classes in a legend


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image twice.

    Attributes:
        case: what was measured of it.
        image: left the model, right the truth.
        classes: indices of the classes to be seen.
    """

    case: Any
    image: Image.Image
    classes: frozenset[int]


def objects_pair(case: Any, image: Tensor, found: Detections, truth: Objects) -> Pair:
    """`image` is (3, H, W) uint8; objects found are drawn with their scores."""
    picture = _small(image)
    order = np.argsort(found.scores, kind="stable")
    told = [f"{found.names[i]} {found.scores[i]:.0%}" for i in order]
    masks = None if found.masks is None else found.masks[order]
    left = _painted(picture, found.size, found.boxes[order], found.classes[order].tolist(), masks, told)
    size, labels = (truth.height, truth.width), truth.labels.tolist()
    masks = truth.masks().numpy() if truth.outlines else None
    names = [found.labels[label] for label in labels]
    right = _painted(picture, size, truth.boxes.numpy(), labels, masks, names)
    return Pair(case=case, image=_beside(left, right), classes=frozenset(found.classes.tolist()) | frozenset(labels))


def map_pair(case: Any, image: Tensor, found: Segmentation, truth: np.ndarray) -> Pair:
    """`image` is (3, H, W) uint8, `truth` (H, W) uint8 with `IGNORE`."""
    picture = _small(image)
    seen = frozenset(np.union1d(np.unique(found.classes), np.unique(truth)).tolist()) - {IGNORE}
    return Pair(case=case, image=_beside(draw_map(picture, found.classes), draw_map(picture, truth)), classes=seen)


def pairs_piece(
    said: str, pairs: Sequence[Pair], captions: Sequence[Sequence[str]], labels: Sequence[str]
) -> list[Html]:
    """A gallery with what its colours mean; nothing where there are no pairs."""
    if not pairs:
        return []
    seen = sorted(frozenset().union(*(pair.classes for pair in pairs)))
    pictures = [Picture(pair.image, lines) for pair, lines in zip(pairs, captions, strict=True)]
    return [
        text(f"{said} Left what the model says, right the truth."),
        legend((colour_of(label), labels[label]) for label in seen[:_NAMED]),
        gallery(pictures, side=2 * _SIDE + _GAP, shape="wide"),
    ]


def _painted(
    picture: Image.Image,
    size: tuple[int, int],
    boxes: np.ndarray,
    labels: Sequence[int],
    masks: np.ndarray | None,
    texts: Sequence[str],
) -> Image.Image:
    """The picture, of an image of that height and width, with objects on it, the last on top."""
    colours = [colour_of(label) for label in labels]
    boxes = boxes * np.array([picture.width / size[1], picture.height / size[0]] * 2)
    places = place_labels(picture.size, boxes, texts)
    if masks is not None:
        resized = (np.asarray(Image.fromarray(mask).resize(picture.size)) for mask in masks)
        picture = paint_masks(picture, resized, colours)
    return paint_labels(paint_boxes(picture, boxes, colours), places, colours, texts)


def _small(image: Tensor) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    factor = _SIDE / max(picture.size)
    size = [max(1, round(side * factor)) for side in picture.size]
    return picture.resize(size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST)


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (left.width + _GAP + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + _GAP, 0))
    return canvas
