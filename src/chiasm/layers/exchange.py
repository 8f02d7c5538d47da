"""Exchange units: how a convolutional map and the tokens of a Transformer add to each other, whatever their sizes.

    unit        map to tokens                  tokens to map                   after
    fcu         pool, 1x1, LayerNorm, GELU     1x1, BN, ReLU, nearest          Conformer, arXiv 2105.03889, section 3.2
    gated       pool, two narrow 1x1           two narrow 1x1, bilinear        addition by learned shares; the cheapest
    attention   tokens attend to the map       the map attends to the tokens  Mobile-Former, arXiv 2108.05895, section 3

Every unit adds nothing when new: what it adds is multiplied by a learned scale per channel that begins at zero. So two
trained networks joined by it begin exactly where they were, and training opens the exchange.

Shapes: map (B, C, H, W), tokens (B, N, D) of a grid h x w with N = h * w, without class or register tokens. The two
grids need not divide each other.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import UnknownNameError
from chiasm.layers.tokens import map_to_tokens, resize_map, tokens_to_map

Unit = Literal["fcu", "gated", "attention"]
Direction = Literal["both", "map_to_tokens", "tokens_to_map"]
Grid = tuple[int, int]

KEYS_AT_MOST = 28 * 28  # of a map that tokens attend to: a larger one is pooled first, or the cost would be quadratic


class Exchange(nn.Module):
    """One exchange: (map, tokens, grid) -> (map, tokens), each with what the other branch had to say.

    Args:
        channels: C of the map.
        dim: D of the tokens.
        unit: see the top of this file.
        direction: which way features cross.
    """

    def __init__(self, channels: int, dim: int, *, unit: Unit = "fcu", direction: Direction = "both") -> None:
        super().__init__()
        for what, value, allowed in (("exchange", unit, Unit), ("direction", direction, Direction)):
            if value not in get_args(allowed):
                raise UnknownNameError(what, str(value), get_args(allowed), f"One of {', '.join(get_args(allowed))}.")
        down, up = {"fcu": (Couple, Feed), "gated": (Squeeze, Spread), "attention": (AskMap, AskTokens)}[unit]
        self.down = down(channels, dim) if direction != "tokens_to_map" else None
        self.up = up(dim, channels) if direction != "map_to_tokens" else None
        self.to_tokens = nn.Parameter(torch.zeros(dim)) if self.down is not None else None
        self.to_map = nn.Parameter(torch.zeros(channels)) if self.up is not None else None

    def forward(self, x: Tensor, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        # Both sides see what the other was before the exchange.
        heard, said = tokens, x
        if self.down is not None:
            heard = tokens + self.to_tokens * self.down(x, tokens, grid)
        if self.up is not None:
            assert self.to_map is not None
            said = x + self.to_map[:, None, None] * self.up(tokens, x, grid)
        return said, heard

    def silent(self, x: Tensor, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """What it would give if neither branch heard the other."""
        return x, tokens


# ----------------------------------------------------------------------------------------- feature coupling unit


class Couple(nn.Module):
    """Map (B, C, H, W) -> tokens' addend (B, N, D). Pooled first: both are linear."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, tokens: Tensor, grid: Grid) -> Tensor:
        return F.gelu(self.norm(map_to_tokens(self.project(resize_map(x, grid)))))


class Feed(nn.Module):
    """Tokens (B, N, D) -> map's addend (B, C, H, W)."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(dim, channels, 1)
        self.bn = nn.BatchNorm2d(channels, eps=1e-6)

    def forward(self, tokens: Tensor, x: Tensor, grid: Grid) -> Tensor:
        coarse = F.relu(self.bn(self.project(tokens_to_map(tokens, grid))))
        return F.interpolate(coarse, size=x.shape[-2:], mode="nearest")


# ------------------------------------------------------------------------------------------------- gated addition


class Squeeze(nn.Module):
    """Map (B, C, H, W) -> tokens' addend (B, N, D), through a quarter of the narrower side's channels."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, _narrow(channels, dim), 1)
        self.widen = nn.Conv2d(_narrow(channels, dim), dim, 1)

    def forward(self, x: Tensor, tokens: Tensor, grid: Grid) -> Tensor:
        return map_to_tokens(self.widen(F.gelu(self.narrow(resize_map(x, grid)))))


class Spread(nn.Module):
    """Tokens (B, N, D) -> map's addend (B, C, H, W), through as narrow a middle."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(dim, _narrow(channels, dim), 1)
        self.widen = nn.Conv2d(_narrow(channels, dim), channels, 1)

    def forward(self, tokens: Tensor, x: Tensor, grid: Grid) -> Tensor:
        coarse = self.widen(F.gelu(self.narrow(tokens_to_map(tokens, grid))))
        return F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)


def _narrow(channels: int, dim: int) -> int:
    return max(8, min(channels, dim) // 4)


# ------------------------------------------------------------------------------------------------ cross-attention


class CrossAttention(nn.Module):
    """Queries (B, N, Q) attend to keys (B, M, K) in the width of the tokens -> (B, N, Q)."""

    def __init__(self, width: int, query_dim: int, key_dim: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
        self.norm_query, self.norm_key = nn.LayerNorm(query_dim), nn.LayerNorm(key_dim)
        self.query, self.key_value = nn.Linear(query_dim, width), nn.Linear(key_dim, 2 * width)
        self.proj = nn.Linear(width, query_dim)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        query = self.query(self.norm_query(queries)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(self.norm_key(keys)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class AskMap(nn.Module):
    """Each token attends to the map's positions: tokens' addend (B, N, D)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, dim, channels)

    def forward(self, x: Tensor, tokens: Tensor, grid: Grid) -> Tensor:
        while x.shape[-2] * x.shape[-1] > KEYS_AT_MOST:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return self.attn(tokens, map_to_tokens(x))


class AskTokens(nn.Module):
    """Each position of the map attends to the tokens: map's addend (B, C, H, W)."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, channels, dim)

    def forward(self, tokens: Tensor, x: Tensor, grid: Grid) -> Tensor:
        return tokens_to_map(self.attn(map_to_tokens(x), tokens), (x.shape[-2], x.shape[-1]))
