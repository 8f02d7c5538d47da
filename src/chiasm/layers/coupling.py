"""Feature coupling units: how a map and a token matrix add to each other (Conformer, arXiv 2105.03889, section 3.2).

Shapes: map (B, C, H, W), tokens (B, 1 + N, D) with the class token first and N = (H / stride) * (W / stride).
The defaults (average pooling, nearest up-sampling, GELU downwards, ReLU upwards) are what published weights need.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.tokens import map_to_tokens, tokens_to_map

Pool = Literal["avg", "max"]
Upsample = Literal["nearest", "bilinear"]


class MapToTokens(nn.Module):
    """Coupling down: map (B, C, H, W) onto tokens (B, 1 + N, D), giving the tokens that the Transformer block takes.

    1x1 convolution, pooling by `stride`, LayerNorm, GELU, added to the tokens. Average pooling comes *before* the
    convolution here: both are linear, so the result is the same and the (B, D, H, W) map is never made.
    """

    def __init__(self, channels: int, dim: int, *, stride: int, pool: Pool = "avg", eps: float = 1e-6) -> None:
        super().__init__()
        self.stride = stride
        self.pool = pool
        self.project = nn.Conv2d(channels, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.pool == "avg":
            x = self.project(F.avg_pool2d(x, self.stride) if self.stride > 1 else x)
        else:
            x = F.max_pool2d(self.project(x), self.stride)
        class_token, patch_tokens = tokens[:, :1], tokens[:, 1:]
        # The reference adds the class token to itself here, at every coupled block; published weights rely on it.
        return torch.cat([2 * class_token, patch_tokens + F.gelu(self.norm(map_to_tokens(x)))], dim=1)

    def silent(self, x: Tensor, tokens: Tensor) -> Tensor:
        """What it would give if nothing came from the map."""
        return torch.cat([2 * tokens[:, :1], tokens[:, 1:]], dim=1)


class TokensToMap(nn.Module):
    """Coupling up: tokens (B, 1 + N, D) onto a map (B, C, H, W), giving the input of the 3x3 convolution.

    The class token is dropped; 1x1 convolution, BN, ReLU, up-sampling by `stride`, added to the map. Nearest
    up-sampling is a broadcast over each stride x stride cell, so the large token map is never made.
    """

    def __init__(
        self, dim: int, channels: int, *, stride: int, upsample: Upsample = "nearest", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.stride = stride
        self.upsample = upsample
        self.project = nn.Conv2d(dim, channels, 1)
        self.bn = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        size = x.shape[-2] // self.stride, x.shape[-1] // self.stride
        coarse = F.relu(self.bn(self.project(tokens_to_map(tokens[:, 1:], size))), inplace=True)
        if self.stride == 1:
            return x + coarse
        if self.upsample == "bilinear":
            return x + F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
        cells = x.permute(0, 2, 3, 1).unflatten(2, (size[1], -1)).unflatten(1, (size[0], -1))  # (B, h, s, w, s, C)
        added = cells + coarse.permute(0, 2, 3, 1)[:, :, None, :, None]
        return added.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def silent(self, tokens: Tensor, x: Tensor) -> Tensor:
        """What it would give if nothing came from the tokens."""
        return x
