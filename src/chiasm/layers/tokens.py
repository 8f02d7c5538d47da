"""Between a map and its tokens.

Shapes: B batch, C channels, H x W map, N = H * W tokens. A channels-last map *is* its token matrix, so both functions
are free views there and one copy otherwise.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), row by row."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W) with `size` = (H, W): the inverse of `map_to_tokens`."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad a map (B, C, H, W) at the bottom and right so that H and W divide by `multiple`."""
    height, width = x.shape[-2:]
    down, right = -height % multiple, -width % multiple
    return F.pad(x, (0, right, 0, down)) if down or right else x


def resize_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) at another resolution: averaged where that is coarser, bilinear where it is finer."""
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    if height >= size[0] and width >= size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
