"""Semantic segmentation over any backbone: decoders of segmentation_models_pytorch on our maps.

image -> backbone -> maps of strides 4 ... 32 -> decoder -> a logit per class and pixel
upernet         pyramid pooling and FPN      (Xiao et al. 2018, arXiv 1807.10221)
fpn             panoptic FPN                 (Kirillov et al. 2019, arXiv 1901.02446)
deeplabv3plus   atrous pyramid pooling       (Chen et al. 2018, arXiv 1802.02611); the deepest map at stride 16
unet            skips at every stride        (Ronneberger et al. 2015, arXiv 1505.04597)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.tokens import pad_to_multiple, resize_map
from chiasm.models.maps import Maps, OnMaps

DECODERS = ("upernet", "fpn", "deeplabv3plus", "unet")
_COARSEST = 32


class Segmenter(OnMaps):
    """Images (B, C, H, W) -> logits (B, num_classes, H, W).

    Args:
        backbone, maps, num_classes, channels: as for `OnMaps`.
        decoder: see the top of this file.
    """

    def __init__(
        self,
        backbone: nn.Module,
        maps: Maps,
        num_classes: int,
        *,
        decoder: str = "upernet",
        channels: int | None = None,
    ) -> None:
        super().__init__(backbone, maps, num_classes, channels)
        self.kind = decoder
        self.decoder, out = _decoder(decoder, maps.channels, self.channels)
        self.classify = nn.Conv2d(out, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = pad_to_multiple(images, _COARSEST)
        maps = self.maps(self.backbone, padded)
        if self.kind == "deeplabv3plus":
            maps[3] = resize_map(maps[3], (maps[2].shape[-2], maps[2].shape[-1]))
        # What decoders expect at strides 1 and 2, where we have no map: one without channels.
        rows, columns = padded.shape[-2:]
        none = [padded.new_empty(len(padded), 0, rows // stride, columns // stride) for stride in (1, 2)]
        logits = self.classify(self.decoder([*none, *maps]))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = F.interpolate(logits, size=(rows, columns), mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def get_classifier(self) -> list[nn.Module]:
        """All but the backbone."""
        return [self.decoder, self.classify]


def _decoder(kind: str, channels: list[int], width: int) -> tuple[nn.Module, int]:
    """The decoder and the channels of what it gives."""
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    encoder = [0, 0, *channels]
    own: Any
    if kind == "upernet":
        return UPerNetDecoder(encoder, encoder_depth=5, decoder_channels=width), width
    if kind == "fpn":
        own = FPNDecoder(encoder, encoder_depth=5, pyramid_channels=width, segmentation_channels=32 * -(-width // 64))
        return own, own.out_channels
    if kind == "deeplabv3plus":
        own = DeepLabV3PlusDecoder(
            encoder, encoder_depth=5, out_channels=width, atrous_rates=(12, 24, 36), output_stride=16,
            aspp_separable=True, aspp_dropout=0.1,
        )  # fmt: skip
        return own, width
    narrower = [width // 2**i for i in range(5)]
    return UnetDecoder(encoder, decoder_channels=narrower, n_blocks=5), narrower[-1]
