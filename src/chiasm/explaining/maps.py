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
from chiasm.models.taps import Reads

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
    """(h, w) of the first block's grid, sums to 1: where the head's tokens come from, whatever the class."""
    worth = _start(attentions[-1], reads)
    for attention in reversed(attentions):
        worth = _on_grid(worth, attention)
        worth = (worth + _given(worth, attention.weights.mean(1), attention)) / 2
    return _patches(worth, attentions[0])


def gradient_rollout(
    attentions: Sequence[Attention], gradients: Sequence[Tensor], reads: Reads, start: Tensor | None = None
) -> Tensor:
    """(h, w), from 0: where the attention that spoke for an answer led.

    Args:
        attentions: of one branch, in order.
        gradients: of the answer with respect to the `raw` of each.
        reads: what the head makes of the tokens.
        start: (h, w) what each token is worth to the answer, where that is known; default: what `reads` says.
    """
    first = _start(attentions[-1], reads, start)
    worth, alone = first, first  # `alone`: what there would be without any attention
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        worth, alone = _on_grid(worth, attention), _on_grid(alone, attention)
        spoke = (attention.weights * gradient).relu().mean(1)
        worth = worth + _given(worth, spoke, attention)
    return _patches(worth if start is not None else worth - alone, attentions[0])


def _start(last: Attention, reads: Reads, start: Tensor | None = None) -> Tensor:
    """(P + h * w,): what each token of the last block is worth to the head."""
    worth = last.weights.new_zeros(last.prefix + last.grid[0] * last.grid[1])
    if start is not None and start.sum() > 0:
        worth[last.prefix :] = _resized(start, last.grid).flatten() / start.sum()
    elif reads == "class" and last.prefix:
        worth[0] = 1
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


def _on_grid(worth: Tensor, attention: Attention) -> Tensor:
    """The same worth on the grid of another block: shared by the places that a token was made of."""
    tokens = attention.prefix + attention.grid[0] * attention.grid[1]
    if len(worth) == tokens:
        return worth
    places = len(worth) - attention.prefix  # prefixes stay: grids alone differ within a network
    height = next(h for h in _heights(places, attention.grid))
    grid = worth[attention.prefix :].view(height, places // height)
    return torch.cat([worth[: attention.prefix], _resized(grid, attention.grid).flatten()])


def _heights(places: int, like: tuple[int, int]) -> list[int]:
    """Heights that a grid of so many places can have, the one with proportions most like `like` first."""
    wanted = like[0] / like[1]
    divisors = [h for h in range(1, places + 1) if places % h == 0]
    return sorted(divisors, key=lambda h: abs(torch.tensor(h * h / places / wanted).log().item()))


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) at another resolution, its sum kept."""
    if tuple(values.shape) == tuple(size):
        return values
    resized = F.interpolate(values[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    total = resized.sum()
    return resized * (values.sum() / total) if total > 0 else resized


def _patches(worth: Tensor, attention: Attention) -> Tensor:
    return worth[attention.prefix :].view(attention.grid).clamp(min=0)
