"""From a decoded image, uint8 RGB (3, H, W), to the network's input, float32 (C, h, w).

A transform has two halves. `prepare` is deterministic and stays uint8, so its result can be kept in memory between
epochs; `finish` does the rest. Calling the transform does both:

    train   prepare: shrink, if larger, until the shorter side is twice what the network takes
            finish:  random-resized crop, flip, RandAugment, normalise, random erasing; each costs nothing when off
    eval    prepare: resize until the (size / crop) box is covered, centre crop
            finish:  normalise

Randomness comes from torch's global generator alone (the loader seeds it per image). The number of means decides the
channels: three for RGB, one for grey.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from chiasm.config import Preprocess, TrainConfig
from chiasm.data.placement import cover
from chiasm.errors import ChiasmError

# How many times as long as wide an image may be for all of its length to be enlarged before its middle is taken: of a
# line of pixels, enlarged until it is as wide as the network's input, more is thrown away than memory holds.
_LONGEST = 64

# A training image is kept at most this many times as large as the network's input (shorter side): then crops down to a
# quarter of its area lose no detail, and memory for the decoded images is bounded.
_KEEP = 2


class Transform(ABC):
    """uint8 RGB (3, H, W) -> float32 (C, h, w), in two halves; see the top of this file."""

    def __init__(self, preprocess: Preprocess) -> None:
        channels = len(preprocess.mean)
        if channels not in (1, 3) or len(preprocess.std) != channels:
            raise ChiasmError(
                f"preprocessing has {channels} means and {len(preprocess.std)} standard deviations; "
                "expected 3 of each (RGB) or 1 (grey)."
            )
        self.size = preprocess.size
        self.crop = preprocess.crop
        self.interpolation = InterpolationMode(preprocess.interpolation)
        self._mean = torch.tensor(preprocess.mean).view(-1, 1, 1) * 255
        self._scale = 1 / (torch.tensor(preprocess.std).view(-1, 1, 1) * 255)

    def __call__(self, image: Tensor) -> Tensor:
        return self.finish(self.prepare(image))

    @abstractmethod
    def prepare(self, image: Tensor) -> Tensor:
        """The deterministic half: uint8 (3, H, W) -> uint8 (3, H', W')."""

    @abstractmethod
    def finish(self, image: Tensor) -> Tensor:
        """The other half: the result of `prepare` -> float32 (C, h, w)."""

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 (3, h, w) -> float32 (C, h, w), each channel's mean subtracted and divided by its deviation."""
        if len(self._mean) == 1:
            image = F.rgb_to_grayscale(image, num_output_channels=1)
        return torch.sub(image, self._mean).mul_(self._scale)

    def _resize(self, image: Tensor, height: int, width: int) -> Tensor:
        if image.shape[-2:] == (height, width):
            return image
        return F.resize(image, [height, width], interpolation=self.interpolation, antialias=True)


class EvalTransform(Transform):
    """Resize to cover the (size / crop) box, centre crop, normalise."""

    def prepare(self, image: Tensor) -> Tensor:
        image = _middle(image)
        placement = cover((image.shape[-2], image.shape[-1]), self.size, self.crop)
        return F.crop(self._resize(image, *placement.resized), *(-side for side in placement.offset), *self.size)

    def finish(self, image: Tensor) -> Tensor:
        return self.normalise(image)


class TrainTransform(Transform):
    """Random-resized crop, flip, RandAugment, normalise, random erasing."""

    def __init__(self, config: TrainConfig, preprocess: Preprocess) -> None:
        super().__init__(preprocess)
        for name in ("crop_scale", "flip", "random_erasing"):
            if not 0 <= getattr(config, name) <= 1:
                raise ChiasmError(f"{name} is {getattr(config, name)}; expected a share from 0 to 1.")
        if not 0 <= config.rand_augment <= 30:
            raise ChiasmError(f"rand_augment is {config.rand_augment}; expected a magnitude from 0 (off) to 30.")
        self.flip = config.flip
        self.random_crop = self.rand_augment = self.erase = None
        if config.crop_scale < 1:
            # A scale of 0 would allow crops of no pixel.
            self.random_crop = v2.RandomResizedCrop(list(self.size), scale=(max(config.crop_scale, 1e-3), 1.0))
        if config.rand_augment:
            fill = [round(255 * mean) for mean in (*preprocess.mean, *preprocess.mean[:1] * 2)[:3]]
            self.rand_augment = v2.RandAugment(num_ops=2, magnitude=config.rand_augment, fill=fill)
        if config.random_erasing:
            self.erase = v2.RandomErasing(p=config.random_erasing, value="random", inplace=True)
        self._centre = EvalTransform(preprocess)

    def prepare(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        factor = _KEEP * max(self.size[0] / height, self.size[1] / width)
        if factor >= 1:
            return image
        return self._resize(image, math.ceil(height * factor), math.ceil(width * factor))

    def finish(self, image: Tensor) -> Tensor:
        if self.random_crop is not None:
            box = self.random_crop.make_params([image])
            image = self._resize(F.crop(image, **box), *self.size)
        else:
            image = self._centre.prepare(image)
        if self.flip and torch.rand(()) < self.flip:
            image = image.flip(-1)
        if self.rand_augment is not None:
            image = from_pillow(self.rand_augment(to_pillow(image)))
        image = self.normalise(image)
        return image if self.erase is None else self.erase(image)


def train_transform(config: TrainConfig, preprocess: Preprocess) -> TrainTransform:
    """The augmentation that `config` asks for, for the input that `preprocess` describes.

    Raises:
        ChiasmError: for a share outside 0..1, a magnitude outside 0..30, or a number of channels that images lack.
    """
    return TrainTransform(config, preprocess)


def eval_transform(preprocess: Preprocess) -> EvalTransform:
    """The preprocessing that validation and prediction share.

    Raises:
        ChiasmError: for a number of channels that images lack.
    """
    return EvalTransform(preprocess)


def _middle(image: Tensor) -> Tensor:
    """The middle of an image that is more than `_LONGEST` times as long as wide, else the image."""
    height, width = image.shape[-2:]
    most = _LONGEST * min(height, width)
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    return image[..., top : height - top, left : width - left] if top or left else image


# Augmentation runs on Pillow images: RandAugment at 128 px and colour jitter at 512 px take half the time of tensors,
# both conversions included.
def to_pillow(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) as a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image: Image.Image) -> Tensor:
    """A Pillow RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
