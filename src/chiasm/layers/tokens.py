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
