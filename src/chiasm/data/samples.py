"""How a split becomes batches, for each kind of annotation: one image's sample, and samples put together.

LabelledSamples   images and labels        (B, C, h, w) float32, (B,) int64
ObjectSamples     images and objects       (B, C, h, w) float32, a list of B ObjectTarget
MapSamples        images and class maps    (B, C, h, w) float32, (B, h, w) int64, IGNORE where no class is known
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chiasm.config import Preprocess, TrainConfig
from chiasm.data.annotated import MapSplit, ObjectSplit
from chiasm.data.source import Split
from chiasm.data.transforms import Transform, eval_transform, train_transform
from chiasm.data.views import MapTarget, ObjectTarget, Viewer
from chiasm.errors import DataError


class Samples(Protocol):
    """What the loaders ask of a split; it lives in their workers."""

    @property
    def split(self) -> Split:
        """Where the samples come from."""

    def prepare(self, index: int) -> Tensor:
        """The deterministic half of sample `index`: uint8, of any shape; it may be kept in memory.

        Raises:
            ImageError: when the image or its annotation cannot be read.
        """

    def finish(self, index: int, kept: Tensor) -> Any:
        """The other half. Random numbers come from torch's global generator alone; `kept` must not be changed."""

    def batch(self, samples: Sequence[Any]) -> tuple[Tensor, Any]:
        """One or more samples as images (B, C, h, w) float32 and their targets."""


class LabelledSamples:
    """An image and its class.

    Args:
        split: images with one label each.
        transform: from `train_transform` or `eval_transform`.
    """

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split = split
        self.transform = transform

    def prepare(self, index: int) -> Tensor:
        return self.transform.prepare(self.split.read(index))

    def finish(self, index: int, kept: Tensor) -> tuple[Tensor, int]:
        return self.transform.finish(kept), self.split.labels[index]

    def batch(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


class ObjectSamples:
    """An image and its objects.

    Args:
        split: images with objects.
        viewer: how they are laid on the canvas.
        masks: whether targets have the objects' masks.
    """

    def __init__(self, split: ObjectSplit, viewer: Viewer, *, masks: bool) -> None:
        self.split = split
        self.viewer = viewer
        self.masks = masks

    def prepare(self, index: int) -> Tensor:
        return self.split.read(index)

    def finish(self, index: int, kept: Tensor) -> tuple[Tensor, ObjectTarget]:
        return self.viewer.objects(kept, self.split.objects(index), masks=self.masks)

    def batch(self, samples: Sequence[tuple[Tensor, ObjectTarget]]) -> tuple[Tensor, list[ObjectTarget]]:
        return torch.stack([image for image, _ in samples]), [target for _, target in samples]


class MapSamples:
    """An image and its class map, kept together as (4, H, W) so that both are read once.

    Args:
        split: images with class maps.
        viewer: how they are laid on the canvas.
    """

    def __init__(self, split: MapSplit, viewer: Viewer) -> None:
        self.split = split
        self.viewer = viewer

    def prepare(self, index: int) -> Tensor:
        image, classes = self.split.sample(index)
        return torch.cat((image, classes[None]))

    def finish(self, index: int, kept: Tensor) -> tuple[Tensor, MapTarget]:
        return self.viewer.map(kept[:3], kept[3])

    def batch(self, samples: Sequence[tuple[Tensor, MapTarget]]) -> tuple[Tensor, Tensor]:
        classes = torch.stack([target.classes for _, target in samples])
        return torch.stack([image for image, _ in samples]), classes.long()


def train_samples(split: Split, config: TrainConfig, preprocess: Preprocess) -> Samples:
    """The samples of `config.task`, augmented as `config` says.

    Raises:
        DataError: for a split of another task.
        ChiasmError: for a setting out of its range.
    """
    if config.task == "classify":
        return LabelledSamples(split, train_transform(config, preprocess))
    least, most = config.scale_jitter
    viewer = Viewer(preprocess, scale=(least, most), flip=config.flip, color_jitter=config.color_jitter)
    return _annotated(split, config.task, viewer)


def eval_samples(split: Split, task: str, preprocess: Preprocess) -> Samples:
    """The samples of `task` as validation and evaluation take them: the whole image, nothing by chance.

    Raises:
        DataError: for a split of another task.
    """
    if task == "classify":
        return LabelledSamples(split, eval_transform(preprocess))
    return _annotated(split, task, Viewer(preprocess))


def _annotated(split: Split, task: str, viewer: Viewer) -> Samples:
    if task == "segment" and isinstance(split, MapSplit):
        return MapSamples(split, viewer)
    if task in ("detect", "instances") and isinstance(split, ObjectSplit):
        return ObjectSamples(split, viewer, masks=task == "instances")
    raise DataError(f"images of {type(split).__name__} are not annotated for '{task}'.")
