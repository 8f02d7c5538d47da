"""Where in an annotated image an explanation should look: the pixels of its objects.

classes alone         nowhere in particular
objects               the masks of all of them, or the boxes where there are no masks; of a box that a detector found
                      the object that it overlaps most
class maps            for a segmenter the pixels of the class that is explained, for others all but the background
scenes                the objects that the images are made of, for classifiers too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from chiasm.data import ImageData, Split, open_data
from chiasm.data.annotated import IGNORE, MapSplit, Objects, ObjectSplit
from chiasm.data.scenes import SceneSplit
from chiasm.errors import DataError
from chiasm.model_file import ModelInfo
from chiasm.results import Explanation

MATCH = 0.5  # least overlap (IoU) of a box that was found with the object that it is
BACKGROUND = "background"

# The pixels (H, W) that an explanation should look at; None where what it is about is not there.
Finder = Callable[[Explanation], "np.ndarray | None"]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A split of images with what is known of their pixels.

    Attributes:
        split: the images.
        located: whether anything is known.
        class_of: of class maps: the number of a segmenter's class in them, for those that are there; None for other
            models.
        background: of class maps: the number of the class that is no object, if any.
        notes: what a reader must know of all this.
    """

    split: Split
    located: bool
    class_of: Mapping[int, int] | None
    background: int | None
    notes: tuple[str, ...]

    def read(self, index: int) -> tuple[Tensor, Finder]:
        """Image `index`, uint8 (3, H, W), and where to look in it.

        Raises:
            ImageError: when it, or what is known of it, cannot be read.
        """
        split = self.split
        if isinstance(split, SceneSplit):
            scene = split.scene(index)
            return scene.image, lambda _: scene.masks.any(0).numpy()
        if isinstance(split, ObjectSplit):
            objects = split.objects(index)
            return split.read(index), lambda explanation: object_pixels(objects, explanation.box)
        if isinstance(split, MapSplit):
            pixels, classes = split.sample(index)
            return pixels, lambda explanation: self._of_map(classes.numpy(), explanation.label)
        return split.read(index), lambda _: None

    def _of_map(self, classes: np.ndarray, label: int) -> np.ndarray | None:
        if self.class_of is not None:
            return classes == self.class_of[label] if label in self.class_of else None
        return None if self.background is None else (classes != self.background) & (classes != IGNORE)


def open_truth(data: str | ImageData, split: str, info: ModelInfo) -> Truth:
    """The images of a split for a model, with what is known of their pixels.

    A val split that the data has not is drawn as it was for the model's training.

    Args:
        data: opened, or as `open_data` takes it; then it is opened for what the model does.
        split: its name.
        info: what the model does, and its classes.

    Raises:
        DataError: for data that is missing, of another task, without images in the split, or, for a segmenter, without
            any of its classes.
    """
    if isinstance(data, str):
        data = _open(data, info)
    images = data.split(split)
    if not len(images):
        raise DataError(data.problems[0] if data.problems else f"{data.name}: no images in its split '{split}'.")
    class_of = None
    if info.task == "segment":
        data.need("segment")
        class_of = {i: data.classes.index(name) for i, name in enumerate(info.labels) if name in data.classes}
        if not class_of:
            raise DataError(
                f"{data.name}: none of its classes ({', '.join(data.classes[:8])}) is one of the model's "
                f"({', '.join(info.labels[:8])}); rename them to match."
            )
    elif info.task != "classify" and not isinstance(images, ObjectSplit):
        raise DataError(
            f"{data.name}: without objects, and the model is for '{info.task}'; give data with boxes or masks."
        )
    background = next((i for i, name in enumerate(data.classes) if name.lower() == BACKGROUND), None)
    of_map = isinstance(images, MapSplit) and (class_of is not None or background is not None)
    located = of_map or isinstance(images, (SceneSplit, ObjectSplit))
    return Truth(
        split=images,
        located=located,
        class_of=class_of,
        background=background,
        notes=tuple(_notes(data, images, info, located)),
    )


def object_pixels(objects: Objects, box: tuple[float, float, float, float] | None = None) -> np.ndarray | None:
    """The pixels (H, W) bool of all objects of an image, or of the one that `box` overlaps most.

    Args:
        objects: with masks, or with boxes alone, whose pixels are those with their centres inside.
        box: left, top, right, bottom in pixels of the image.

    Returns:
        None without objects, or where none has an IoU of `MATCH` with the box.
    """
    chosen = list(range(len(objects)))
    if box is not None and chosen:
        overlaps = box_iou(torch.tensor([box], dtype=torch.float32), objects.boxes)[0]
        best = int(overlaps.argmax())
        chosen = [best] if overlaps[best] >= MATCH else []
    if not chosen:
        return None
    pixels = np.zeros((objects.height, objects.width), dtype=bool)
    for i in chosen:  # one at a time: the masks of a large image fill the memory
        pixels |= objects.masks(slice(i, i + 1))[0].numpy() if objects.outlines else _inside(objects, i)
    return pixels


def _inside(objects: Objects, index: int) -> np.ndarray:
    left, top, right, bottom = objects.boxes[index].tolist()
    x, y = np.arange(objects.width) + 0.5, np.arange(objects.height)[:, None] + 0.5
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def _open(spec: str, info: ModelInfo) -> ImageData:
    # A detector's boxes are found in masks too, which say more. Of scenes they must be asked for.
    scenes = spec.partition(":")[0] == "scenes"
    task = "segment" if info.task == "segment" else "instances" if scenes and info.task != "classify" else None
    stored: dict[str, Any] = {"seed": info.seed, "val_fraction": info.val_fraction}
    return open_data(spec, task=task, strict=False, **{k: v for k, v in stored.items() if v is not None})


def _notes(data: ImageData, images: Split, info: ModelInfo, located: bool) -> Iterator[str]:
    if not info.trained:
        yield "The weights are random: the maps explain chance, not knowledge."
    if not located:
        yield f"{data.name} does not say where its objects are: deletion and insertion are all that is measured."
    elif isinstance(images, ObjectSplit) and not any(images.objects(i).outlines for i in range(len(images))):
        yield "The objects have boxes without masks: a box counts as its object, with what is beside it."
    if info.task != "segment" and set(data.classes).isdisjoint(info.labels):
        yield f"{data.name} has other classes than the model: what the model says is explained all the same."
