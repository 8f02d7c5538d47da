"""Images with objects or class maps: what `open_data` returns where an image has more than one class.

    task 'detect'      boxes
    task 'instances'   boxes, and a mask of each object
    task 'segment'     a class for every pixel

Coordinates are pixels of the original image, x to the right and y down from the outer corner of the first pixel, so a
box (left, top, right, bottom) is right - left pixels wide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from chiasm.data.images import read_image
from chiasm.data.source import TRAIN, ImageData, Split
from chiasm.errors import DataError, ImageError
from chiasm.results.masks import check_mask, decode_mask

IGNORE = 255
"""In a class map: a pixel that no class is known of; losses and metrics pass over it."""

# Annotation tools round: a box this far outside, in pixels, is clipped without a word.
_OVERHANG = 1.0


class SizeError(ImageError):
    """An image and its annotation that are of different sizes, so nothing in one can be found in the other."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with an annotation, and what was done about it.

    Attributes:
        kind: such as 'empty or inverted box'; findings of one kind are told together.
        source: the file it is in.
        what: where in the file, and what was seen.
        done: 'clipped', 'dropped' (the object), 'left out' (the image or the file) or 'ignored' (pixels).
    """

    kind: str
    source: str
    what: str
    done: str


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of one image; N may be 0.

    Attributes:
        image_id: the image's id in its COCO file, or its number in its split from 1.
        height, width: of the original image in pixels.
        boxes: (N, 4) float32: left, top, right, bottom in pixels, within the image and not empty.
        labels: (N,) int64, indices of classes.
        crowd: (N,) bool: not one object but many, or one too difficult to count (COCO's crowds, VOC's difficult).
        areas: (N,) float32, pixels: of the mask where the file tells it, else of the box.
        outlines: N masks as COCO writes them (polygons, run lengths), decoded by `masks()`; () where there are none.
    """

    image_id: int | str
    height: int
    width: int
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor
    outlines: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def masks(self, part: slice = slice(None)) -> Tensor:
        """(N, H, W) bool, or of the objects of that part alone, decoded now.

        Raises:
            DataError: when there are boxes only.
        """
        if len(self.outlines) != len(self):
            raise DataError(f"image {self.image_id} has boxes without masks; it is for the task 'detect'.")
        masks = [decode_mask(outline, self.height, self.width) for outline in self.outlines[part]]
        return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, self.height, self.width, dtype=torch.bool)


class ObjectSplit(Split):
    """Images with their objects.

    `labels`, by which images are divided into train and val, is per image the class in it that the fewest images have,
    and one more than the last class where there is none.

    Attributes:
        categories: the ids that its COCO file has for classes, by label; empty for other formats.
    """

    categories: Mapping[int, int | str] = {}

    def __init__(
        self, sources: Sequence[str], objects: Sequence[Objects], categories: Mapping[int, int | str] | None = None
    ) -> None:
        self.sources = list(sources)
        self.categories = dict(categories or {})
        self._objects = list(objects)
        present = [set(found.labels.tolist()) for found in self._objects]
        images = Counter(label for labels in present for label in labels)
        nothing = max(images, default=-1) + 1
        self.labels = [min(labels, key=lambda label: (images[label], label), default=nothing) for labels in present]

    def objects(self, index: int) -> Objects:
        """What is known of image `index`; the image itself is not read."""
        return self._objects[index]

    def read(self, index: int) -> Tensor:
        """Image `index` as (3, H, W) uint8 RGB.

        Raises:
            ImageError: when it cannot be read; `SizeError` when it is of another size than its annotation says.
        """
        image, objects = read_image(self.sources[index]), self._objects[index]
        height, width = image.shape[-2:]
        if (height, width) != (objects.height, objects.width):
            turned = " (the image's EXIF turns it)" if (width, height) == (objects.height, objects.width) else ""
            raise SizeError(
                self.sources[index],
                f"{width} x {height} pixels, its annotation is for {objects.width} x {objects.height}{turned}; "
                "annotate it again or mend the sizes.",
            )
        return image

    def subset(self, indices: Sequence[int]) -> ObjectSplit:
        chosen = [self.sources[i] for i in indices], [self._objects[i] for i in indices]
        return ObjectSplit(*chosen, self.categories)


class MapReader(Protocol):
    """How mask files become class maps."""

    def read(self, path: str) -> tuple[np.ndarray, dict[str, int]]:
        """The mask as classes (H, W) uint8 with `IGNORE`, and the pixels of each value that means no class.

        Raises:
            ImageError: when the file cannot be read.
        """


class MapSplit(Split):
    """Images with a class for every pixel. `labels` is 0 throughout: maps are not read to divide them.

    Attributes:
        masks: per image the path of its mask.
        reader: what their values mean.
    """

    def __init__(self, sources: Sequence[str], masks: Sequence[str], reader: MapReader) -> None:
        self.sources = list(sources)
        self.masks = list(masks)
        self.reader = reader
        self.labels = [0] * len(self.sources)

    def read(self, index: int) -> Tensor:
        return read_image(self.sources[index])

    def sample(self, index: int) -> tuple[Tensor, Tensor]:
        """Image `index` as (3, H, W) uint8 RGB, and its class map (H, W) uint8: classes from 0, or `IGNORE`.

        Raises:
            ImageError: when one of the two cannot be read; `SizeError` when they differ in size.
        """
        classes = self.reader.read(self.masks[index])[0]
        return self.check(index, self.read(index), classes), torch.from_numpy(classes)

    def check(self, index: int, image: Tensor, classes: np.ndarray) -> Tensor:
        """The image, if its class map is of its size; `SizeError` if not."""
        if image.shape[-2:] != classes.shape:
            sizes = [f"{width} x {height}" for height, width in (classes.shape, image.shape[-2:])]
            raise SizeError(
                self.masks[index], f"a mask of {sizes[0]} pixels for an image of {sizes[1]}; export it again."
            )
        return image

    def subset(self, indices: Sequence[int]) -> MapSplit:
        return MapSplit([self.sources[i] for i in indices], [self.masks[i] for i in indices], self.reader)


@dataclass(frozen=True, kw_only=True)
class AnnotatedData(ImageData):
    """A data set of objects or class maps.

    Attributes:
        findings: what is wrong with annotations, and what was done about each.
    """

    findings: tuple[Finding, ...] = ()

    def objects(self, split: str) -> ObjectSplit:
        """The split of that name, with boxes.

        Raises:
            DataError: when there is no such split, or the data is class maps.
        """
        found = self.split(split)
        if not isinstance(found, ObjectSplit):
            raise DataError(f"{self.name}: class maps without objects; it is for the task 'segment'.")
        return found

    def maps(self, split: str) -> MapSplit:
        """The split of that name, with class maps.

        Raises:
            DataError: when there is no such split, or the data is objects.
        """
        found = self.split(split)
        if not isinstance(found, MapSplit):
            raise DataError(f"{self.name}: objects without class maps; it is for the task '{self.task}'.")
        return found


def annotated_problems(data: AnnotatedData) -> Iterator[str]:
    """What keeps `data` from being trained on, one line each."""
    if not any(len(split) for split in data.splits.values()):
        yield f"{data.name}: no image with a sound annotation{_first(data.findings)}."
    elif data.task != "segment" and TRAIN in data.splits and not has_objects(data.objects(TRAIN)):
        yield f"{data.name}: no training image has an object{_first(data.findings)}; annotate some."


def has_objects(split: ObjectSplit) -> bool:
    """Whether any of its images has an object that is not a crowd."""
    return any(bool((~split.objects(index).crowd).any()) for index in range(len(split)))


def _first(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    first = findings[0]
    return f" ({len(findings)} findings, the first: {first.source}: {first.what}, {first.done})"


class Gatherer:
    """Puts the sound objects of one image together, and says of the others why not.

    Args:
        source: the file that findings name.
        height, width: of the image in pixels.
        masks: whether objects need one.
        findings: where findings go.
    """

    def __init__(self, source: str, height: int, width: int, *, masks: bool, findings: list[Finding]) -> None:
        self.source, self.height, self.width = source, height, width
        self._masks, self._findings = masks, findings
        self._rows: list[tuple[tuple[float, ...], int, bool, float]] = []
        self._outlines: list[Any] = []

    def add(
        self, where: str, box: Sequence[Any], label: int, *, crowd: bool = False, area: Any = None, outline: Any = None
    ) -> None:
        """One object; `box` is left, top, right, bottom, and `where` is its place in the file."""
        sound = self._box(where, box)
        if sound is None:
            return
        if self._masks:
            try:
                check_mask(outline, self.height, self.width)
            except ValueError as error:
                self.find("no mask" if outline in (None, [], {}) else "broken mask", f"{where}: {error}", "dropped")
                return
            self._outlines.append(outline)
        if not is_number(area) or area <= 0:
            area = (sound[2] - sound[0]) * (sound[3] - sound[1])
        self._rows.append((sound, label, crowd, float(area)))

    def find(self, kind: str, what: str, done: str) -> None:
        """Note a finding of this image's annotation."""
        self._findings.append(Finding(kind=kind, source=self.source, what=what, done=done))

    def objects(self, image_id: int | str) -> Objects:
        """All that was added and is sound."""
        return Objects(
            image_id=image_id,
            height=self.height,
            width=self.width,
            boxes=torch.tensor([row[0] for row in self._rows], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([row[1] for row in self._rows], dtype=torch.int64),
            crowd=torch.tensor([row[2] for row in self._rows], dtype=torch.bool),
            areas=torch.tensor([row[3] for row in self._rows], dtype=torch.float32),
            outlines=tuple(self._outlines),
        )

    def _box(self, where: str, box: Sequence[Any]) -> tuple[float, ...] | None:
        if len(box) != 4 or not all(map(is_number, box)):
            self.find("box that is not four numbers", f"{where}: {str(list(box))[:60]}", "dropped")
            return None
        left, top, right, bottom = map(float, box)
        told = f"{where}: {left:g}, {top:g} to {right:g}, {bottom:g}"
        if right <= left or bottom <= top:
            self.find("empty or inverted box", told, "dropped")
            return None
        clipped = (max(left, 0.0), max(top, 0.0), min(right, float(self.width)), min(bottom, float(self.height)))
        told += f" in {self.width} x {self.height}"
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.find("box outside the image", told, "dropped")
            return None
        if max(abs(a - b) for a, b in zip((left, top, right, bottom), clipped, strict=True)) > _OVERHANG:
            self.find("box partly outside the image", told, "clipped")
        return clipped


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
