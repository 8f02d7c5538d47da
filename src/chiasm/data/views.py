"""Images with boxes, masks or class maps as the network takes them: resized, flipped and cut together.

A view knows its `placement`, so whatever is found in it can be told in original pixels.

    train   random scale, place and flip on the canvas (large-scale jitter), and random colours; objects that leave
            the canvas are dropped
    eval    the whole image in the middle of the canvas (letterbox)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from chiasm.config import Preprocess
from chiasm.data.annotated import IGNORE, Objects
from chiasm.data.placement import Placement, jitter, letterbox, windows
from chiasm.data.transforms import eval_transform, from_pillow, to_pillow
from chiasm.errors import ChiasmError

# Objects of which less than this is left, in pixels of either side, cannot be seen and are dropped.
_LEAST = 1.0
_AT_ONCE = 1 << 26  # pixels of masks at their images' size, one byte each


@dataclass(frozen=True, kw_only=True)
class ObjectTarget:
    """The objects of an image, in pixels of the canvas (h, w).

    Attributes:
        boxes: (N, 4) float32, left, top, right, bottom, within the canvas and not empty.
        labels: (N,) int64.
        crowd: (N,) bool.
        masks: (N, h, w) bool, or None.
        placement: the way back.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None
    placement: Placement

    def to(self, device: torch.device | str) -> ObjectTarget:
        """The same with its tensors on `device`."""
        return replace(
            self,
            boxes=self.boxes.to(device),
            labels=self.labels.to(device),
            crowd=self.crowd.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A tensor that a worker sends takes a file descriptor, and a batch has hundreds of these: arrays take none.
        masks = None if self.masks is None else np.packbits(self.masks.numpy(), axis=-1)
        arrays = (self.boxes.numpy(), self.labels.numpy(), self.crowd.numpy(), masks)
        return _object_target, (*arrays, self.placement)


def _object_target(
    boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, packed: np.ndarray | None, placement: Placement
) -> ObjectTarget:
    masks = None
    if packed is not None:
        masks = torch.from_numpy(np.unpackbits(packed, axis=-1, count=placement.canvas[1]).view(bool))
    return ObjectTarget(
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        crowd=torch.from_numpy(crowd),
        masks=masks,
        placement=placement,
    )


@dataclass(frozen=True, kw_only=True)
class MapTarget:
    """The class map of an image.

    Attributes:
        classes: (h, w) uint8, `IGNORE` where there is no image.
        placement: the way back.
    """

    classes: Tensor
    placement: Placement


class Viewer:
    """Makes views: an image (C, h, w) float32, normalised, and its target; the channels' means where there is no image.

    Args:
        preprocess: size of the canvas, means and standard deviations.
        scale: least and most random scale, over the size that just fits; None is evaluation's letterbox.
        flip: probability of mirroring, where there is a scale.
        color_jitter: where there is a scale, brightness, contrast and saturation are multiplied by 1 - this to
            1 + this, and hues turned by up to a tenth of it of the circle.

    Raises:
        ChiasmError: for a scale or a share out of range.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        *,
        scale: tuple[float, float] | None = None,
        flip: float = 0.5,
        color_jitter: float = 0.0,
    ) -> None:
        if scale is not None and not 0 < scale[0] <= scale[1]:
            raise ChiasmError(f"scale is {scale[0]} to {scale[1]}; expected two numbers above 0, the smaller first.")
        for name, share in (("flip", flip), ("color_jitter", color_jitter)):
            if not 0 <= share <= 1:
                raise ChiasmError(f"{name} is {share}; expected a share from 0 to 1.")
        self._canvas = preprocess.size
        self._scale, self._flip = scale, flip
        self._colours: v2.Transform | None = None
        if scale is not None and color_jitter:
            self._colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 10)
        self._normalise = eval_transform(preprocess).normalise
        self._fill = [round(255 * mean) for mean in (*preprocess.mean, *preprocess.mean[:1] * 2)[:3]]

    def objects(self, image: Tensor, objects: Objects, *, masks: bool) -> tuple[Tensor, ObjectTarget]:
        """A view of `image`, (3, H, W) uint8, with its objects, and their masks if asked for."""
        placement = self._place(image)
        boxes = placement.place(
            tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        ).as_subclass(Tensor)
        seen = ((boxes[:, 2:] - boxes[:, :2]) >= _LEAST).all(dim=1)
        cut = None
        if masks:
            cut = self._masks(objects, placement)
            seen &= cut.flatten(1).any(dim=1)
        target = ObjectTarget(
            boxes=boxes[seen],
            labels=objects.labels[seen],
            crowd=objects.crowd[seen],
            masks=None if cut is None else cut[seen],
            placement=placement,
        )
        return self._image(image, placement), target

    def _masks(self, objects: Objects, placement: Placement) -> Tensor:
        """(N, h, w) bool on the canvas; of a large image a few at a time, since at its size they fill the memory."""
        step = max(1, _AT_ONCE // (objects.height * objects.width))
        parts = [
            placement.place(tv_tensors.Mask(objects.masks(slice(start, start + step)))).as_subclass(Tensor)
            for start in range(0, max(1, len(objects)), step)
        ]
        return torch.cat(parts)

    def map(self, image: Tensor, classes: Tensor) -> tuple[Tensor, MapTarget]:
        """A view of `image`, (3, H, W) uint8, with its class map (H, W) uint8."""
        placement = self._place(image)
        placed = placement.place(tv_tensors.Mask(classes[None]), IGNORE).as_subclass(Tensor)[0]
        return self._image(image, placement), MapTarget(classes=placed, placement=placement)

    def _image(self, image: Tensor, placement: Placement) -> Tensor:
        placed = placement.place(image, self._fill)
        if self._colours is not None:
            placed = from_pillow(self._colours(to_pillow(placed)))
        return self._normalise(placed)

    def windows(self, image: Tensor, *, zoom: float = 1.0) -> tuple[Tensor, list[Placement]]:
        """An image (3, H, W) uint8 without annotations: its canvases (K, C, h, w) float32, and how each lies on it.

        K is 1 at a zoom of 1; see `chiasm.data.placement.windows`.
        """
        placements = windows((image.shape[-2], image.shape[-1]), self._canvas, zoom=zoom)
        canvases = [self._normalise(placement.place(image, self._fill)) for placement in placements]
        return torch.stack(canvases), placements

    def _place(self, image: Tensor) -> Placement:
        size = (image.shape[-2], image.shape[-1])
        if self._scale is None:
            return letterbox(size, self._canvas)
        return jitter(size, self._canvas, scale=self._scale, flip=self._flip)
