"""The objects of one image: validated, printable as JSON, drawable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.results.drawing import (
    DENSE_SIDE,
    IN_SERIES,
    colour_of,
    fit,
    paint_boxes,
    paint_labels,
    paint_masks,
    place_labels,
    with_legend,
)
from chiasm.results.masks import encode_mask

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The objects of one image, in pixels of the original image; N may be 0.

    Attributes:
        source: the file's path, or another name of the image.
        labels: the class names.
        size: height and width of the image.
        boxes: (N, 4) floats: left, top, right, bottom, within the image.
        classes: (N,) integers, each object's index in `labels`.
        scores: (N,) floats, 0..1.
        masks: (N, height, width) bool, or None for boxes alone.

    Raises:
        ValueError: for arrays of other shapes, or values out of these ranges.
    """

    source: str
    labels: tuple[str, ...]
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        count = len(self.boxes)
        shapes = {"boxes": (count, 4), "classes": (count,), "scores": (count,)}
        shapes |= {} if self.masks is None else {"masks": (count, *self.size)}
        for name, shape in shapes.items():
            if (seen := getattr(self, name).shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, saw {seen}")
        if self.masks is not None and self.masks.dtype != bool:
            raise ValueError(f"masks: expected bool, saw {self.masks.dtype}")
        if not count:
            return
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        # NaN fails the comparisons as well; a pixel's hundredth is rounding.
        if not ((low >= -0.01).all() and (high >= low).all() and (high <= np.array(self.size[::-1]) + 0.01).all()):
            raise ValueError(f"boxes: expected left, top, right, bottom within {self.size[1]} x {self.size[0]} pixels")
        if not (self.classes.min() >= 0 and self.classes.max() < len(self.labels)):
            raise ValueError(f"classes: expected indices of {len(self.labels)} classes, saw {self.classes.max()}")
        if not (self.scores.min() >= 0 and self.scores.max() <= 1):
            raise ValueError("scores: expected values from 0 to 1")

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each object."""
        return tuple(self.labels[i] for i in self.classes.tolist())

    def counts(self) -> list[tuple[str, int, float]]:
        """Of each class that occurs its name, the number of its objects and their best score; most frequent first."""
        present, numbers = np.unique(self.classes, return_counts=True)
        return [
            (self.labels[present[i]], int(numbers[i]), float(self.scores[self.classes == present[i]].max()))
            for i in np.argsort(-numbers, kind="stable")
        ]

    def above(self, score: float) -> Detections:
        """Those objects whose score is at least this."""
        kept = self.scores >= score
        masks = None if self.masks is None else self.masks[kept]
        return Detections(
            source=self.source,
            labels=self.labels,
            size=self.size,
            boxes=self.boxes[kept],
            classes=self.classes[kept],
            scores=self.scores[kept],
            masks=masks,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; masks as COCO's compressed run lengths."""
        objects: list[dict[str, Any]] = [
            {"label": name, "score": float(score), "box": [float(side) for side in box]}
            for name, score, box in zip(self.names, self.scores, self.boxes, strict=True)
        ]
        for found, mask in zip(objects, () if self.masks is None else self.masks, strict=self.masks is not None):
            found["mask"] = encode_mask(mask)
        return {"source": self.source, "height": self.size[0], "width": self.size[1], "objects": objects}

    def draw(self, image: Image.Image, *, series: bool = False) -> Image.Image:
        """A copy of `image` with the objects' masks, boxes, classes and scores on it, the best on top.

        A text that would hide its object, or a better one's text, is left out, and its box where there is a mask; a
        legend below then tells the classes. Images wider or higher than 1600 px are made smaller, small ones are
        enlarged by a whole factor.

        Args:
            image: the one that the objects are in.
            series: give pictures of all images of one size one size: those of a video.

        Raises:
            ValueError: for an image of another size.
        """
        from PIL import Image

        if image.size != self.size[::-1]:
            raise ValueError(f"image: expected {self.size[1]} x {self.size[0]} pixels, saw {image.size}")
        picture = fit(image.convert("RGB"), DENSE_SIDE)
        order = np.argsort(self.scores, kind="stable")
        colours = [colour_of(label) for label in self.classes[order].tolist()]
        boxes = self.boxes[order] * np.array([picture.width / image.width, picture.height / image.height] * 2)
        names = self.names
        texts = [f"{names[i]} {self.scores[i]:.0%}" for i in order]
        places = place_labels(picture.size, boxes, texts)
        boxed = [i for i, place in enumerate(places) if place or self.masks is None]
        if self.masks is not None:
            masks = (np.asarray(Image.fromarray(self.masks[i]).resize(picture.size)) for i in order)
            picture = paint_masks(picture, masks, colours)
        picture = paint_boxes(picture, boxes[boxed], [colours[i] for i in boxed])
        picture = paint_labels(picture, places, colours, texts)
        if not series and all(places):
            return picture
        counts = self.counts()
        if series:  # in the order of the labels, which does not change from image to image
            counts = sorted(counts[:IN_SERIES], key=lambda count: self.labels.index(count[0]))
        entries = [(colour_of(self.labels.index(name)), name, f"{number:,}") for name, number, _ in counts]
        return with_legend(picture, entries, self.labels if series else None)
