"""Images with boxes, masks or class maps as the network takes them: resized, flipped and cut together.

A view knows its `placement`, so whatever is found in it can be told in original pixels.

    train   random scale, place and flip on the canvas (large-scale jitter); objects that leave it are dropped
    eval    the whole image in the middle of the canvas (letterbox)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors

from chiasm.config import Preprocess
from chiasm.data.annotated import IGNORE, Objects
from chiasm.data.placement import Placement, jitter, letterbox, windows
from chiasm.data.transforms import eval_transform
from chiasm.errors import ChiasmError

# Objects of which less than this is left, in pixels of either side, cannot be seen and are dropped.
_LEAST = 1.0


@dataclass(frozen=True, kw_only=True)
class ObjectView:
    """An image with its objects, in pixels of the canvas (h, w).

    Attributes:
        image: (C, h, w) float32, normalised; the channels' means where there is no image.
        boxes: (N, 4) float32, left, top, right, bottom, within the canvas and not empty.
        labels: (N,) int64.
        crowd: (N,) bool.
        masks: (N, h, w) bool, or None.
        placement: the way back.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None
    placement: Placement


@dataclass(frozen=True, kw_only=True)
class MapView:
    """An image with its class map.

    Attributes:
        image: (C, h, w) float32, normalised.
        classes: (h, w) uint8, `IGNORE` where there is no image.
        placement: the way back.
    """

    image: Tensor
    classes: Tensor
    placement: Placement


class Viewer:
    """Makes views.

    Args:
        preprocess: size of the canvas, means and standard deviations.
        scale: least and most random scale, over the size that just fits; None is evaluation's letterbox.
        flip: probability of mirroring, where there is a scale.

    Raises:
        ChiasmError: for a scale or a share out of range.
    """

    def __init__(self, preprocess: Preprocess, *, scale: tuple[float, float] | None = None, flip: float = 0.5) -> None:
        if scale is not None and not 0 < scale[0] <= scale[1]:
            raise ChiasmError(f"scale is {scale[0]} to {scale[1]}; expected two numbers above 0, the smaller first.")
        if not 0 <= flip <= 1:
            raise ChiasmError(f"flip is {flip}; expected a share from 0 to 1.")
        self._canvas = preprocess.size
        self._scale, self._flip = scale, flip
        self._normalise = eval_transform(preprocess).normalise
        self._fill = [round(255 * mean) for mean in (*preprocess.mean, *preprocess.mean[:1] * 2)[:3]]

    def objects(self, image: Tensor, objects: Objects, *, masks: bool) -> ObjectView:
        """A view of `image`, (3, H, W) uint8, with its objects, and their masks if asked for."""
        placement = self._place(image)
        boxes = placement.place(
            tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        ).as_subclass(Tensor)
        seen = ((boxes[:, 2:] - boxes[:, :2]) >= _LEAST).all(dim=1)
        cut = None
        if masks:
            cut = placement.place(tv_tensors.Mask(objects.masks())).as_subclass(Tensor)
            seen &= cut.flatten(1).any(dim=1)
        return ObjectView(
            image=self._normalise(placement.place(image, self._fill)),
            boxes=boxes[seen],
            labels=objects.labels[seen],
            crowd=objects.crowd[seen],
            masks=None if cut is None else cut[seen],
            placement=placement,
        )

    def map(self, image: Tensor, classes: Tensor) -> MapView:
        """A view of `image`, (3, H, W) uint8, with its class map (H, W) uint8."""
        placement = self._place(image)
        return MapView(
            image=self._normalise(placement.place(image, self._fill)),
            classes=placement.place(tv_tensors.Mask(classes[None]), IGNORE).as_subclass(Tensor)[0],
            placement=placement,
        )

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
