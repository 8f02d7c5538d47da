"""Mixup and CutMix, by torchvision: some batches are mixed, and their targets become probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from chiasm.config import TrainConfig


class Mix:
    """Mixes a share `mix_probability` of the batches, by mixup or CutMix with equal chance where both are on.

    Images (B, C, H, W) and class indices (B,) -> images of the same shape and probabilities (B, classes), or the batch
    as it was. Draws from torch's global generator.
    """

    def __init__(self, config: TrainConfig, classes: int) -> None:
        self.probability = config.mix_probability
        self.kinds: list[v2.Transform] = []
        if config.mixup > 0:
            self.kinds.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix > 0:
            self.kinds.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # One image cannot be mixed with another.
        if not self.kinds or len(images) < 2 or torch.rand(()).item() >= self.probability:
            return images, labels
        return self.kinds[int(torch.randint(len(self.kinds), ()))](images, labels)
