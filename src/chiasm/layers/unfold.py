"""A map as sequences of patches and back, as MobileViT's attention reads it (arXiv 2110.02178, section 3.1).

Shapes: B batch, C channels, H x W map, p x p patch, P = p * p pixels of a patch, N = H * W / P patches. Sequence i of
an image holds pixel i of every patch, so each pixel meets the pixels at the same place in all other patches. Both
functions are one copy on channels-last maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def unfold(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B * P, N, C); H and W are multiples of `patch`."""
    cells = x.permute(0, 2, 3, 1).unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # (B, h, p, w, p, C)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 2)


def fold(tokens: Tensor, patch: int, size: Sequence[int]) -> Tensor:
    """(B * P, N, C) -> (B, C, H, W), channels-last, with `size` = (H, W): the inverse of `unfold`."""
    cells = tokens.unflatten(1, (size[0] // patch, size[1] // patch)).unflatten(0, (-1, patch, patch))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def resize_to_multiple(x: Tensor, multiple: int, *, align_corners: bool) -> Tensor:
    """Stretch a map (B, C, H, W) bilinearly so that H and W divide by `multiple`; as it is where they do."""
    return resize(x, [side + -side % multiple for side in x.shape[-2:]], align_corners=align_corners)


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Bilinear resizing of a map (B, C, H, W) to `size` = (H, W); as it is where that is its size."""
    if list(x.shape[-2:]) == list(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)
