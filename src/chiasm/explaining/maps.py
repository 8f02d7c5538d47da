"""Heat maps of a recorded pass: where in the image the features and the attention that spoke for an answer lie.

    gradcam            features weighed by the gradient of the answer, averaged over the map; what is positive
                       (Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2)
    rollout            attention, half of it the identity, followed from the head back to the first block; of no class
                       (Abnar and Zuidema 2020, arXiv 2005.00928, equation 1)
    gradient_rollout   attention weighed by the gradient of the answer, what is positive, added up along the same way
                       (Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6)

Both rollouts follow one vector, what each token is worth, from the last block to the first: v <- (I + A')v is a row of
the matrices' product. So they hold for windows and for stages too: within a group a token gives to those it attends to,
and where the next grid is finer, each token's worth is shared by the places it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from chiasm.explaining.record import Attention, Feature
from chiasm.models.taps import Reads, Size

LEAST = 7  # places a side that a map for Grad-CAM has where the network offers one


def gradcam(features: Tensor, gradient: Tensor, *, local: bool = False) -> Tensor:
    """(1, C, h, w) and the gradient of an answer with respect to it -> (h, w), from 0.

    `local`: each place is weighed by its own gradient, in place of the mean over the map: for answers about a part of
    the image, such as an object (Draelos and Carin 2020, arXiv 2011.08891).
    """
    weights = gradient if local else gradient.mean((2, 3), keepdim=True)
    return (weights * features).sum(1)[0].relu()


def choose(features: Sequence[Feature], level: int | None = None) -> Feature:
    """The features that Grad-CAM is made of: the deepest with at least 7 places a side, else the finest of all;
    or number `level`, from -1 for the deepest."""
    if level is not None:
        return features[level]
    large = [feature for feature in features if min(feature.map.shape[-2:]) >= LEAST]
    return large[-1] if large else max(reversed(features), key=lambda feature: feature.map[0, 0].numel())


def rollout(attentions: Sequence[Attention], reads: Reads) -> Tensor:
    """(h, w) of the first block's grid, sums to 1: whence the tokens that the head reads come, for any class."""
    worth, of = _start(attentions[-1], reads), attentions[-1]
    for attention in reversed(attentions):
        worth, of = _on_grid(worth, of, attention), attention
        worth = (worth + _given(worth, attention.weights.mean(1), attention)) / 2
    return _patches(worth, attentions[0])


def gradient_rollout(
    attentions: Sequence[Attention], gradients: Sequence[Tensor], reads: Reads, start: Tensor | None = None
) -> Tensor:
    """(h, w), from 0: where the attention that spoke for an answer led.

    Args:
        attentions: of one branch, in order.
        gradients: of the answer with respect to the `raw` of each.
        reads: the tokens that the head reads.
        start: (h, w) from 0, what each token is worth to the answer, where that is known; where it is not, or nothing
            is, what `reads` says.
    """
    of = attentions[-1]
    worth = alone = _start(of, reads, start)  # `alone`: what there would be without any attention
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        worth, alone, of = _on_grid(worth, of, attention), _on_grid(alone, of, attention), attention
        spoke = (attention.weights * gradient).relu().mean(1)
        worth = worth + _given(worth, spoke, attention)
    return _patches(worth - alone, attentions[0])


def on_canvas(values: Tensor, stride: tuple[float, float], canvas: Size) -> Tensor:
    """A map (h, w) whose places lie `stride` pixels apart, on the canvas alone: cut where it reaches over.

    As it is where it spans the canvas; else a pixel of it is a pixel of the canvas.
    """
    reach = round(values.shape[0] * stride[0]), round(values.shape[1] * stride[1])
    if reach == canvas or reach[0] < canvas[0] or reach[1] < canvas[1]:
        return values
    whole = F.interpolate(values[None, None], size=reach, mode="bilinear", align_corners=False)[0, 0]
    return whole[: canvas[0], : canvas[1]]


def _start(last: Attention, reads: Reads, start: Tensor | None = None) -> Tensor:
    """(P + h * w,), sums to 1: what each token of the last block is worth to the head."""
    worth = last.weights.new_zeros(last.prefix + last.grid[0] * last.grid[1])
    if start is not None and start.sum() > 0:
        worth[last.prefix :] = _resized(start, last.grid).flatten() / start.sum()
    elif reads and last.prefix:
        worth[list(reads)] = 1 / len(reads)
    else:
        worth[last.prefix :] = 1 / (last.grid[0] * last.grid[1])
    return worth


def _given(worth: Tensor, weights: Tensor, attention: Attention) -> Tensor:
    """A' v: what each token gets from those that attend to it; weights (G, N, N), worth (T,) -> (T,)."""
    there = attention.index >= 0
    slots = attention.index.clamp(min=0)
    asked = torch.where(there, worth[slots], 0)
    gives = torch.einsum("gq,gqk->gk", asked, weights)
    return torch.zeros_like(worth).index_add_(0, slots[there], gives[there])


def _on_grid(worth: Tensor, of: Attention, wanted: Attention) -> Tensor:
    """What tokens are worth, from the grid of one block to that of another: shared by what each was made of."""
    if of.grid == wanted.grid:
        return worth
    grid = worth[of.prefix :].view(of.grid)
    reach = [round(n * own / new) for n, own, new in zip(of.grid, of.stride, wanted.stride, strict=True)]
    # A coarser grid reaches further over the canvas's edge than a finer one.
    shared = _resized(grid, (max(reach[0], wanted.grid[0]), max(reach[1], wanted.grid[1])))
    shared = _summing_to(shared[: wanted.grid[0], : wanted.grid[1]], grid.sum())
    return torch.cat([worth[: of.prefix], shared.flatten()])


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) at another resolution, its sum kept."""
    if tuple(values.shape) == tuple(size):
        return values
    resized = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return _summing_to(resized, values.sum())


def _summing_to(values: Tensor, total: Tensor) -> Tensor:
    """The values scaled to that sum; as they are where there is nothing."""
    own = values.sum()
    return values * (total / own) if own > 0 else values


def _patches(worth: Tensor, attention: Attention) -> Tensor:
    return worth[attention.prefix :].view(attention.grid).clamp(min=0)
