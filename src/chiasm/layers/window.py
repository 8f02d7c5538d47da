"""Attention within windows of a map, with a relative position bias and a cyclic shift (Swin, arXiv 2103.14030, 3.2).

Tokens are moved by one index, once: rolling, padding and cutting into windows are one gather, and since everything but
attention works on each token by itself, tokens stay in window order until a block wants other windows.

Shapes: B batch, H x W map, L = H * W tokens, C width, window h x w, N = h * w tokens in a window, G windows in a map
(its sides rounded up to whole windows), h heads of width d.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from chiasm.layers.by_hand import PART, Linear, by_autograd, by_hand, eager
from chiasm.layers.fused import FusedLinear

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
    if type(x) is not Tensor or not eager():
        return make(*args, x.device)  # being traced: tensors of that graph, not to be kept
    return _kept(make, *args, x.device)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], *args: Any) -> Any:
    with torch.inference_mode(False):  # what is kept must serve training too
        return make(*args)


# -------------------------------------------------------------------------------------------------------- moving tokens


def _take(x: Tensor, index: Tensor, empty: Tensor | None, inverse: Tensor, inverse_empty: Tensor | None) -> Tensor:
    """`x[:, index]` with zeros at `empty`, for an index that has no token twice; `inverse` leads back."""
    if torch.is_grad_enabled() and x.requires_grad and eager():
        return _Take.apply(x, index, empty, inverse, inverse_empty)
    taken = x.index_select(1, index)
    return taken if empty is None else taken.index_fill_(1, empty, 0)


class _Take(torch.autograd.Function):
    """The gradient is a gather as well, where autograd, which does not know that the index has no token twice, adds."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, empty: Tensor | None, inverse: Tensor, inverse_empty: Tensor | None
    ) -> Tensor:
        ctx.indices = index, empty, inverse, inverse_empty
        return _take(x, index, empty, inverse, inverse_empty)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        index, empty, inverse, inverse_empty = ctx.indices
        return _take(gradient, inverse, inverse_empty, index, empty), None, None, None, None


def into_windows(x: Tensor, windows: Windows) -> Tensor:
    """Tokens (B, L, C), row by row -> (B, G * N, C), window by window, with zeros in empty slots."""
    return _take(x, windows.to_windows, windows.empty, windows.to_tokens, None)


def out_of_windows(x: Tensor, windows: Windows) -> Tensor:
    """Slots (B, G * N, C) -> tokens (B, L, C), row by row: the inverse of `into_windows`."""
    return _take(x, windows.to_tokens, None, windows.to_windows, windows.empty)


def between_windows(x: Tensor, held: Windows, wanted: Windows) -> Tensor:
    """Tokens (B, L, C) from the order of one deal to that of another of the same map, both without empty slots."""
    index, inverse = held.to_tokens[wanted.to_windows], wanted.to_tokens[held.to_windows]
    return _take(x, index, None, inverse, None)


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
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

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
        # Of no images PyTorch's kernel, which is asked where there is dropout, has no gradient for the bias.
        bias, dropout = self.bias().to(qkv.dtype), self.attn_drop if self.training and len(qkv) else 0.0
        if not dropout and by_hand(qkv, bias, half=True):
            return _Attention.apply(qkv, bias, mask)
        return _fused_attention(qkv, _added(bias, mask), dropout)

    def optimized(self) -> FusedWindowAttention:
        """The same for inference."""
        return FusedWindowAttention(self)


class FusedWindowAttention(nn.Module):
    """A `WindowAttention` for inference: the bias is looked up once, and added to the mask once for a size."""

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.qkv, self.proj = FusedLinear(attention.qkv), FusedLinear(attention.proj)
        self.bias: Tensor
        self.register_buffer("bias", attention.bias().detach().contiguous())
        self._last: tuple[Tensor | None, Tensor] | None = None  # the mask last seen, and what came of it

    def forward(
        self, tokens: Tensor, windows: Windows, addend: Tensor | None = None, *, overwrite: bool = False
    ) -> Tensor:
        """`addend`, of the tokens' shape, is added; see `FusedLinear`."""
        if windows.empty is not None:
            tokens = into_windows(tokens, windows)
        mixed = _fused_attention(self.qkv(tokens), self._added(windows.mask))
        if windows.empty is not None:
            mixed = out_of_windows(mixed, windows)
        return self.proj(mixed, addend, overwrite=overwrite)

    def _added(self, mask: Tensor | None) -> Tensor:
        last = self._last
        if last is not None and last[0] is mask and last[1].dtype == self.bias.dtype:
            return last[1]
        added = _added(self.bias, mask)
        if type(added) is Tensor and eager():
            self._last = mask, added
        return added

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the scores of each window: (1 or G, heads, N, N)."""
    return bias[None] if mask is None else bias + mask[:, None].to(bias.dtype)


def _fused_attention(qkv: Tensor, added: Tensor, dropout: float = 0.0) -> Tensor:
    """Queries, keys and values (B, G * N, 3 * heads * d), added (1 or G, heads, N, N) -> (B, G * N, heads * d)."""
    one = len(added) == 1 or len(qkv) == 1
    if not one and len(qkv) and qkv.is_cpu and not torch.is_grad_enabled() and eager():
        # The kernel takes what is added for the whole batch: image by image it need not be repeated.
        return torch.cat([_fused_attention(image, added, dropout) for image in qkv.split(1)])
    query, key, value = _per_head(qkv, *added.shape[1:3])
    repeated = added if one else added.expand(len(qkv), -1, -1, -1, -1).flatten(0, 1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=repeated, dropout_p=dropout)
    return mixed.transpose(1, 2).reshape(*qkv.shape[:2], qkv.shape[2] // 3)


def _per_head(qkv: Tensor, heads: int, area: int) -> Tensor:
    """(..., 3 * heads * d), the `area` tokens of a window after each other -> view (3, windows, heads, N, d)."""
    return qkv.view(-1, area, 3, heads, qkv.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4)


def _plain_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    return _fused_attention(qkv, _added(bias, mask))


class _Attention(torch.autograd.Function):
    """As `_plain_attention`, whose kernel for CPUs has no gradient for the bias; a few images at a time."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        heads, area, _ = bias.shape
        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        added = _added(bias, mask).to(_wide(qkv))
        weights, images = [], _images_of_part(qkv, bias)
        for part, target in zip(qkv.split(images), out.split(images), strict=True):
            query, key, value = _per_head(part, heads, area).flatten(1, 2).unbind(0)
            scores = added.repeat(len(query) // heads // len(added), 1, 1, 1).flatten(0, 1)
            scale = query.shape[-1] ** -0.5
            if scores.dtype == query.dtype:
                scores.baddbmm_(query, key.transpose(1, 2), alpha=scale)
            else:
                scores.add_(torch.bmm(query, key.transpose(1, 2)), alpha=scale)
            weights.append(scores.softmax(-1).to(query.dtype))
            mixed = torch.bmm(weights[-1], value).unflatten(0, (-1, heads)).transpose(1, 2)
            target.view(-1, area, heads, value.shape[-1]).copy_(mixed)
        ctx.save_for_backward(qkv, bias, mask, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        qkv, bias, mask, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_autograd(_plain_attention, (qkv, bias, mask), gradient)
        heads, area, _ = bias.shape
        to_qkv, to_bias = torch.empty_like(qkv), torch.zeros_like(bias, dtype=_wide(qkv))
        images = _images_of_part(qkv, bias)
        parts = zip(qkv.split(images), weights, gradient.split(images), to_qkv.split(images), strict=True)
        for part, weight, up, target in parts:
            query, key, value = _per_head(part, heads, area).flatten(1, 2).unbind(0)
            up = up.reshape(-1, area, heads, value.shape[-1]).transpose(1, 2).flatten(0, 1)
            to_part = part.new_empty(3, *query.shape)
            torch.bmm(weight.transpose(1, 2), up, out=to_part[2])
            to_scores = torch.bmm(up, value.transpose(1, 2)).to(to_bias.dtype)
            weight = weight.to(to_bias.dtype)
            torch.ops.aten._softmax_backward_data.out(to_scores, weight, -1, to_scores.dtype, grad_input=to_scores)
            to_bias += to_scores.unflatten(0, (-1, heads)).sum(0)
            to_scores = to_scores.to(query.dtype)
            scaled = {"beta": 0, "alpha": query.shape[-1] ** -0.5}
            torch.baddbmm(to_part[0], to_scores, key, **scaled, out=to_part[0])
            torch.baddbmm(to_part[1], to_scores.transpose(1, 2), query, **scaled, out=to_part[1])
            _per_head(target, heads, area).copy_(to_part.unflatten(1, (-1, heads)))
        return to_qkv, to_bias.to(bias.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    """The type for scores and sums: at least 32 bits."""
    return torch.promote_types(x.dtype, torch.float32)


def _images_of_part(qkv: Tensor, bias: Tensor) -> int:
    """How many images make a part: their queries, keys, values and scores together are to stay in cache."""
    return max(PART // (2 * bias.numel() * (qkv.shape[1] // bias.shape[1])), 1)


def resize_bias_table(table: Tensor, window: Pair) -> Tensor:
    """A bias table ((2h - 1) * (2w - 1), heads) of a square window for another window, interpolated as timm does."""
    shape = ((2 * window[0] - 1) * (2 * window[1] - 1), table.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of timm's about its own indexing
        return resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=shape)
