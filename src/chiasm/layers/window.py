"""Attention within windows of a map, with a relative position bias and a cyclic shift (Swin, arXiv 2103.14030, 3.2).

Tokens are moved by one index, once: rolling, padding and cutting into windows are one gather, and since everything but
attention works on each token by itself, tokens stay in window order until a block wants other windows.

Shapes: B batch, H x W map, L = H * W tokens, C width, window h x w, N = h * w tokens in a window, G windows in a map
(its sides rounded up to whole windows), h heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

Order = Literal["pad_then_roll", "roll_then_pad"]
Pair = tuple[int, int]

MASKED = -100.0  # added to the scores of a pair that the shift brought together; a softmax leaves nothing of it


@dataclass(frozen=True, eq=False, kw_only=True)
class Windows:
    """How the tokens of a map are dealt into windows.

    Attributes:
        size: H and W of the map.
        to_windows: (G * N,) the token, row by row, in each slot of each window; 0 in empty slots.
        to_tokens: (L,) the slot of each token.
        empty: (E,) slots without a token, where windows reach over the map's edge; None when there are none.
        mask: (G, N, N) to add to the scores: 0, or -100 where the shift put tokens of opposite edges into one window;
            None without a shift. As in the published networks, empty slots are seen by all in their window.
    """

    size: Pair
    to_windows: Tensor
    to_tokens: Tensor
    empty: Tensor | None
    mask: Tensor | None


def deal_windows(x: Tensor, size: Pair, window: Pair, shift: Pair, order: Order = "pad_then_roll") -> Windows:
    """The windows of a map, on the device of `x`; kept for the sizes used last.

    Args:
        x: any tensor of the computation.
        size: H and W of the map.
        window: h and w of a window.
        shift: by how many tokens the map is rolled upwards and to the left before it is cut.
        order: whether the map is padded at the bottom and right to whole windows before it is rolled (the authors'
            detection code, torchvision, mmdetection, HF) or after (timm). The same where nothing is padded.
    """
    return _constant(x, _deal, size, window, shift, order)


def _deal(size: Pair, window: Pair, shift: Pair, order: Order, device: torch.device) -> Windows:
    rows, columns = (_Axis(n, w, s, order, device) for n, w, s in zip(size, window, shift, strict=True))
    # Slots are counted window by window, then row by row within; tokens row by row.
    token = rows.token[:, None, :, None] * size[1] + columns.token[None, :, None, :]
    present = rows.present[:, None, :, None] & columns.present[None, :, None, :]
    slot = (rows.window[:, None] * columns.windows + columns.window) * window[0] * window[1]
    slot = slot + rows.within[:, None] * window[1] + columns.within
    area = window[0] * window[1]
    present, token = present.flatten(), token.flatten()
    empty, mask = present.numel() - size[0] * size[1], None
    if any(shift):
        # Of a shifted map only the last windows hold tokens of two edges: those rolled in and those that were there.
        region = 2 * rows.rolled_in[:, None, :, None].int() + columns.rolled_in[None, :, None, :].int()
        region = region.reshape(-1, area)
        mask = MASKED * (region[:, :, None] != region[:, None, :]).float()
    return Windows(
        size=size,
        to_windows=token * present,
        to_tokens=slot.flatten(),
        empty=present.int().argsort(stable=True)[:empty] if empty else None,
        mask=mask,
    )


class _Axis:
    """One axis of n tokens in windows of w: what is in each slot, (windows, w), and where each token goes, (n,)."""

    def __init__(self, n: int, w: int, shift: int, order: Order, device: torch.device) -> None:
        self.windows = -(-n // w)
        padded = self.windows * w
        cycle = padded if order == "pad_then_roll" else n
        slots = torch.arange(padded, device=device).view(self.windows, w)
        self.rolled_in = slots >= padded - shift
        self.token = (slots + shift) % cycle
        self.present = (self.token if order == "pad_then_roll" else slots) < n
        place = (torch.arange(n, device=device) - shift) % cycle
        self.window, self.within = place // w, place % w


def _constant(x: Tensor, make: Callable[..., Any], *args: Any) -> Any:
    """What `make` gives for `args` and the device of `x`, kept for the last that were asked for."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return make(*args, x.device)  # being traced: tensors of that graph, not to be kept
    return _kept(make, *args, x.device)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], *args: Any) -> Any:
    with torch.inference_mode(False):  # what is kept must serve training too
        return make(*args)


# -------------------------------------------------------------------------------------------------------- moving tokens


class _Take(torch.autograd.Function):
    """`x[:, index]` with zeros at `empty`, for an index that has no token twice: its gradient is a gather as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, index: Tensor, empty: Tensor | None, inverse: Tensor, inverse_empty: Tensor | None
    ) -> Tensor:
        taken = x.index_select(1, index)
        return taken if empty is None else taken.index_fill_(1, empty, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.indices = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        index, empty, inverse, inverse_empty = ctx.indices
        return _Take.apply(gradient, inverse, inverse_empty, index, empty), None, None, None, None


def into_windows(x: Tensor, windows: Windows) -> Tensor:
    """Tokens (B, L, C), row by row -> (B, G * N, C), window by window, with zeros in empty slots."""
    return _Take.apply(x, windows.to_windows, windows.empty, windows.to_tokens, None)


def out_of_windows(x: Tensor, windows: Windows) -> Tensor:
    """Slots (B, G * N, C) -> tokens (B, L, C), row by row: the inverse of `into_windows`."""
    return _Take.apply(x, windows.to_tokens, None, windows.to_windows, windows.empty)


def between_windows(x: Tensor, held: Windows, wanted: Windows) -> Tensor:
    """Tokens (B, L, C) from the order of one deal to that of another of the same map, both without empty slots."""
    index, inverse = held.to_tokens[wanted.to_windows], wanted.to_tokens[held.to_windows]
    return _Take.apply(x, index, None, inverse, None)


# ------------------------------------------------------------------------------------------------------------ attention


def relative_positions(window: Pair, device: torch.device) -> Tensor:
    """(N, N): the row of the bias table for each pair (query, key) in a window of h x w.

    The table's rows are the offsets query - key, (-(h - 1) .. h - 1) x (-(w - 1) .. w - 1), row by row.
    """
    height, width = window
    y = torch.arange(height, device=device)[:, None].expand(window).flatten()
    x = torch.arange(width, device=device).expand(window).flatten()
    down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return down * (2 * width - 1) + right


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows; tokens (B, L, C) -> the same.

    Tokens come and go in the order of the windows where these cover the map exactly, row by row otherwise.
    """

    def __init__(self, dim: int, *, heads: int, window: Pair, qkv_bias: bool = True, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.attn_drop = attn_drop
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> Tensor:
        """(heads, N, N), added to the scores of each pair (query, key)."""
        table = self.relative_position_bias_table
        index = _constant(table.data, relative_positions, self.window)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    def forward(self, tokens: Tensor, windows: Windows) -> Tensor:
        if windows.empty is not None:
            tokens = into_windows(tokens, windows)
        mixed = self._attend(self.qkv(tokens), windows.mask)
        if windows.empty is not None:
            mixed = out_of_windows(mixed, windows)
        return self.proj(mixed)

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """(B, G * N, 3 * heads * d) -> (B, G * N, heads * d)."""
        batch, slots = qkv.shape[0], qkv.shape[1]
        area = self.window[0] * self.window[1]
        query, key, value = qkv.view(-1, area, 3, self.heads, qkv.shape[2] // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        bias = self.bias()[None]
        if mask is not None:
            bias = (bias + mask[:, None].to(bias.dtype)).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        dropout = self.attn_drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return mixed.transpose(1, 2).reshape(batch, slots, -1)


def resize_bias_table(table: Tensor, window: Pair) -> Tensor:
    """A bias table ((2h - 1) * (2w - 1), heads) of a square window for another window, interpolated as timm does."""
    shape = ((2 * window[0] - 1) * (2 * window[1] - 1), table.shape[1])
    return resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=shape)
