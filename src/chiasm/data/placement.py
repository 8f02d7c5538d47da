"""Where an image lies in the network's input, and the way back: what is found there, told in original pixels.

An image is resized, perhaps mirrored, and laid on a canvas; where it is larger than the canvas it is cut off:

    original (H, W)  ->  resized (h, w)  ->  mirrored or not  ->  moved by offset (top, left) on canvas (height, width)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

_STEP = 0.75  # from one window to the next at most, over its side


@dataclass(frozen=True, kw_only=True)
class Placement:
    """See the top of this file; all in pixels.

    Attributes:
        original: height and width of the image.
        resized: height and width it is given.
        offset: top and left of the resized image on the canvas; negative where it is cut off.
        canvas: height and width of the network's input.
        mirrored: left and right exchanged, after resizing.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    canvas: tuple[int, int]
    mirrored: bool = False

    def to_canvas(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4), left, top, right, bottom in original pixels, as they lie on the canvas; not cut off."""
        x, y = boxes[:, 0::2] * self._scale[1], boxes[:, 1::2] * self._scale[0]
        if self.mirrored:
            x = (self.resized[1] - x).flip(1)
        x, y = x + self.offset[1], y + self.offset[0]
        return torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=1)

    def to_original(self, boxes: Tensor, *, clip: bool = True) -> Tensor:
        """Boxes (N, 4) on the canvas in original pixels, clipped to the image if asked for."""
        x, y = boxes[:, 0::2] - self.offset[1], boxes[:, 1::2] - self.offset[0]
        if self.mirrored:
            x = (self.resized[1] - x).flip(1)
        x, y = x / self._scale[1], y / self._scale[0]
        if clip:
            x, y = x.clamp(0, self.original[1]), y.clamp(0, self.original[0])
        return torch.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), dim=1)

    @property
    def region(self) -> tuple[float, float, float, float]:
        """The canvas, left, top, right, bottom in original pixels; it can reach over the image."""
        canvas = torch.tensor([[0.0, 0.0, float(self.canvas[1]), float(self.canvas[0])]])
        left, top, right, bottom = self.to_original(canvas, clip=False)[0].tolist()
        return left, top, right, bottom

    @property
    def covered(self) -> Tensor:
        """(height, width) bool: where on the canvas the image lies."""
        whole = torch.zeros(self.canvas, dtype=torch.bool)
        (top, left), (height, width) = self.offset, self.resized
        whole[max(0, top) : top + height, max(0, left) : left + width] = True
        return whole

    def map_to_original(self, maps: Tensor) -> Tensor:
        """Maps (N, height, width) of the canvas at the image's size, (N, H, W); 0 where the image was cut off.

        Floats are interpolated; masks and classes take the nearest pixel.
        """
        maps = F.crop(maps, *self.offset, *self.resized)
        if self.mirrored:
            maps = maps.flip(-1)
        way = InterpolationMode.BILINEAR if maps.is_floating_point() else InterpolationMode.NEAREST_EXACT
        return F.resize(maps, list(self.original), interpolation=way, antialias=maps.is_floating_point())

    @property
    def _scale(self) -> tuple[float, float]:
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    def place(self, image: Tensor, fill: Sequence[float] | float = 0) -> Tensor:
        """An image or one of torchvision's tv_tensors (boxes, masks) of the original, laid on the canvas.

        Boxes are cut off at its edges, and may be empty then; masks and class maps keep their values.

        Args:
            image: (C, H, W), or BoundingBoxes, or Mask.
            fill: the value, one or per channel, where there is no image.
        """
        (top, left), (height, width) = self.offset, self.canvas
        image = _resized(image, self.resized)
        if self.mirrored:
            image = F.horizontal_flip(image)
        right, bottom = width - left - self.resized[1], height - top - self.resized[0]
        image = F.pad(image, [max(side, 0) for side in (left, top, right, bottom)], fill=fill)
        return F.crop(image, max(-top, 0), max(-left, 0), height, width)


def letterbox(original: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """The whole image, as large as fits the canvas, in its middle."""
    scale = min(canvas[0] / original[0], canvas[1] / original[1])
    resized = _scaled(original, scale, at_most=canvas)
    offset = ((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2)
    return Placement(original=original, resized=resized, offset=offset, canvas=canvas)


def cover(original: tuple[int, int], canvas: tuple[int, int], crop: float) -> Placement:
    """The image's middle, filling the canvas: resized to cover (canvas / crop), as classifiers see it."""
    box = [side / crop for side in canvas]
    factor = max(box[0] / original[0], box[1] / original[1])
    # Never below the canvas, whatever the rounding.
    height, width = (max(round(side * factor), least) for side, least in zip(original, canvas, strict=True))
    offset = -round((height - canvas[0]) / 2), -round((width - canvas[1]) / 2)
    return Placement(original=original, resized=(height, width), offset=offset, canvas=canvas)


def windows(original: tuple[int, int], canvas: tuple[int, int], *, zoom: float = 1.0) -> list[Placement]:
    """The image `zoom` times as large as fits the canvas, seen through windows of its size.

    Neighbouring windows share a quarter of their side or more, and all are evenly spaced. A zoom of 1 is `letterbox`.

    Args:
        original, canvas: height and width in pixels.
        zoom: 1 or more.
    """
    whole = letterbox(original, canvas)
    resized = _scaled(original, zoom * whole.resized[0] / original[0]) if zoom > 1 else whole.resized
    starts = []
    for side, room in zip(resized, canvas, strict=True):
        count = 1 if side <= room else 1 + math.ceil((side - room) / (_STEP * room))
        starts.append(
            [(room - side) // 2] if count == 1 else [-round(i * (side - room) / (count - 1)) for i in range(count)]
        )
    return [
        Placement(original=original, resized=resized, offset=(top, left), canvas=canvas)
        for top in starts[0]
        for left in starts[1]
    ]


def jitter(original: tuple[int, int], canvas: tuple[int, int], *, scale: tuple[float, float], flip: float) -> Placement:
    """The image at a random size and place, mirrored or not; random numbers come from torch's global generator.

    Args:
        original, canvas: height and width.
        scale: least and most, over the size that just fits the canvas.
        flip: probability of mirroring.
    """
    factor = scale[0] + (scale[1] - scale[0]) * float(torch.rand(()))
    resized = _scaled(original, factor * min(canvas[0] / original[0], canvas[1] / original[1]))
    spare = [canvas[i] - resized[i] for i in (0, 1)]
    top, left = (min(s, 0) + int(torch.randint(abs(s) + 1, ())) for s in spare)
    mirrored = bool(torch.rand(()) < flip)
    return Placement(original=original, resized=resized, offset=(top, left), canvas=canvas, mirrored=mirrored)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Images are averaged. Of masks each pixel takes the value at its own centre: torchvision's resizing takes that at
    its upper left corner, which moves masks against their boxes by up to half a pixel."""
    if not isinstance(image, tv_tensors.Mask):
        return F.resize(image, list(size), antialias=True)
    nearest = F.resize_image(image.as_subclass(Tensor), list(size), InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(nearest, like=image)


def _scaled(size: tuple[int, int], factor: float, at_most: tuple[int, int] = (2**31, 2**31)) -> tuple[int, int]:
    """No side below one pixel."""
    height, width = (min(max(1, round(side * factor)), most) for side, most in zip(size, at_most, strict=True))
    return height, width
