"""Swin as the paper draws it, slowly: loops over windows, regions and pairs. The oracle of test_swin.py, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def textbook_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The bias (heads, N, N) of every pair of tokens in a window, from the table of their offsets."""
    height, width = window
    places = [(y, x) for y in range(height) for x in range(width)]
    bias = torch.empty(table.shape[1], len(places), len(places), dtype=table.dtype)
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            bias[:, i, j] = table[(y - v + height - 1) * (2 * width - 1) + (x - u + width - 1)]
    return bias


def textbook_mask(padded: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(windows, N, N): -100 between tokens of different regions of the rolled map, whose last windows hold two or four.

    The regions are those of the authors' figure 4: the rows (columns) before the last window, the rest of them that was
    there before rolling, and those that were rolled in.
    """
    regions = torch.zeros(padded, dtype=torch.int64)
    for y in range(padded[0]):
        for x in range(padded[1]):
            region = [0, 0]
            for axis, place in enumerate((y, x)):
                if shift[axis] and place >= padded[axis] - shift[axis]:
                    region[axis] = 2
                elif shift[axis] and place >= padded[axis] - window[axis]:
                    region[axis] = 1
            regions[y, x] = 3 * region[0] + region[1]
    masks = []
    for top in range(0, padded[0], window[0]):
        for left in range(0, padded[1], window[1]):
            ids = regions[top : top + window[0], left : left + window[1]].flatten().tolist()
            masks.append([[0.0 if a == b else -100.0 for b in ids] for a in ids])
    return torch.tensor(masks, dtype=torch.float64)


def textbook_windows(
    x: Tensor, window: tuple[int, int], shift: tuple[int, int], order: str
) -> tuple[list[Tensor], tuple[int, int]]:
    """A map (H, W, C) rolled, padded and cut: its windows (N, C), row by row, and the padded size."""
    height, width, _ = x.shape
    padded = tuple(math.ceil(n / w) * w for n, w in zip((height, width), window, strict=True))
    steps = {
        "roll": lambda y: torch.roll(y, (-shift[0], -shift[1]), (0, 1)),
        "pad": lambda y: nn.functional.pad(y, (0, 0, 0, padded[1] - width, 0, padded[0] - height)),
    }
    for step in order.split("_then_"):
        x = steps[step](x)
    cut = [
        x[top : top + window[0], left : left + window[1]].flatten(0, 1)
        for top in range(0, padded[0], window[0])
        for left in range(0, padded[1], window[1])
    ]
    return cut, padded


def textbook_joined(
    cut: list[Tensor], size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], order: str
) -> Tensor:
    """The inverse: windows (N, C) -> map (H, W, C)."""
    padded = tuple(math.ceil(n / w) * w for n, w in zip(size, window, strict=True))
    x = torch.zeros(*padded, cut[0].shape[-1], dtype=cut[0].dtype)
    places = [(top, left) for top in range(0, padded[0], window[0]) for left in range(0, padded[1], window[1])]
    for (top, left), one in zip(places, cut, strict=True):
        x[top : top + window[0], left : left + window[1]] = one.unflatten(0, window)
    steps = {"roll": lambda y: torch.roll(y, shift, (0, 1)), "pad": lambda y: y[: size[0], : size[1]]}
    for step in reversed(order.split("_then_")):
        x = steps[step](x)
    return x


def textbook_attention(attention: nn.Module, x: Tensor, shift: tuple[int, int], order: str) -> Tensor:
    """Attention within the windows of maps (B, H, W, C), with the weights of `attention`; softmax written out."""
    heads, window = attention.heads, attention.window
    bias = textbook_bias(attention.relative_position_bias_table, window)
    maps = []
    for one in x:
        cut, padded = textbook_windows(one, window, shift, order)
        mask = textbook_mask(padded, window, shift)
        mixed = []
        for tokens, masked in zip(cut, mask, strict=True):
            query, key, value = nn.functional.linear(tokens, attention.qkv.weight, attention.qkv.bias).chunk(3, dim=1)
            outputs = []
            for head in range(heads):
                d = query.shape[1] // heads
                q, k, v = (part[:, head * d : (head + 1) * d] for part in (query, key, value))
                weights = torch.exp(q @ k.T / math.sqrt(d) + bias[head] + masked)
                outputs.append(weights / weights.sum(1, keepdim=True) @ v)
            mixed.append(torch.cat(outputs, 1) @ attention.proj.weight.T + attention.proj.bias)
        maps.append(textbook_joined(mixed, tuple(one.shape[:2]), window, shift, order))
    return torch.stack(maps)
