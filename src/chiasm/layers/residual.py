"""The residual with stochastic depth (arXiv 1603.09382): training leaves a branch out for some images, at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from chiasm.layers.by_hand import eager


class Residual(nn.Module):
    """x + branch(x), where `branch` computes each image of the batch by itself.

    In training the branch counts for an image with probability 1 - rate, and then 1 / (1 - rate) times. On a CPU the
    images that do without it are not computed: where all do, the branch is given a batch of none, by which its weights
    have a gradient all the same, of zeros.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.training or not self.rate:
            return x + branch(x)
        kept = torch.rand(len(x), device=x.device) >= self.rate
        weight = 1 / (1 - self.rate) if self.rate < 1 else 0.0
        if x.is_cpu and eager():
            if kept.all():
                return torch.add(x, branch(x), alpha=weight)
            chosen = kept.nonzero()[:, 0]
            branched = branch(x.index_select(0, chosen))
            return x.index_add(0, chosen, branched.to(x.dtype), alpha=weight)
        factor = (kept * weight).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return torch.addcmul(x, branch(x), factor)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
