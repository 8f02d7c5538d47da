"""The MLP of a Transformer: linear, GELU, linear, for each token by itself.

Its inner width is a multiple of the tokens', so that for many tokens what stands between the two products is the
largest thing in the network, and on a CPU most of the MLP's time beside the products is spent moving it. Tokens are
therefore taken some thousands at a time: the inner values of one part stay in cache. For the backward pass those before
the GELU are kept; those behind it are made again, a part at a time, in about the time that fetching them takes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.by_hand import Linear, by_autograd, by_hand, eager, linear, weight_gradient
from chiasm.layers.fused import FusedLinear

PART = 3136  # tokens of one part: an image's of 56 x 56, the largest map of the usual networks


class Mlp(nn.Module):
    """Tokens (..., D) -> (..., D) through `hidden` values a token and the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        if _ordinary(self.fc1) and _ordinary(self.fc2) and by_hand(tokens, *self.parameters()):
            weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            return _Mlp.apply(tokens, *weights)
        if not tokens.is_cpu or torch.is_grad_enabled() or not eager():
            return self._through(tokens)
        return _joined([self._through(part) for part in tokens.flatten(0, -2).split(PART)]).view(tokens.shape)

    def _through(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))

    def optimized(self) -> nn.Module:
        """The same for inference."""
        return FusedMlp(self)


class FusedMlp(nn.Module):
    """An `Mlp` for inference: GELU within the first product, and an addition within the second."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = FusedLinear(mlp.fc1, act="gelu"), FusedLinear(mlp.fc2)

    def forward(self, tokens: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """`addend`, of the tokens' shape, is added; see `FusedLinear`."""
        if addend is None or not (overwrite and addend.is_contiguous()):
            return self.fc2(self.fc1(tokens), addend)
        tokens, whole = tokens.flatten(0, -2), addend.flatten(0, -2)
        count = -(-len(tokens) // PART)  # of one size, if they can be: weights are ordered for a size
        for part, target in zip(tokens.chunk(count), whole.chunk(count), strict=True):
            self.fc2(self.fc1(part), target, overwrite=True)
        return addend


def _ordinary(layer: nn.Module) -> bool:
    """Whether the layer is its weight and bias and nothing else: no subclass, no hook that wants to see it called."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) is Linear and not any(hooks)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        out, inner, tokens = [], [], x.flatten(0, -2)
        for part in tokens.split(PART):
            inner.append(linear(part, w1, b1, rows=len(tokens)))
            out.append(linear(F.gelu(inner[-1]), w2, b2, rows=len(tokens)))
        ctx.save_for_backward(x, w1, b1, w2, b2, *inner)
        return _joined(out).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w1, b1, w2, b2, *inner = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_autograd(_plain, (x, w1, b1, w2, b2), gradient)
        of_x, of_w1, of_b1, of_w2, of_b2 = ctx.needs_input_grad
        to_x: list[Tensor] = []
        to_w1 = to_b1 = to_w2 = to_b2 = None
        tokens = x.flatten(0, -2)
        parts = tokens.split(PART), gradient.flatten(0, -2).split(PART), inner
        for part, to_out, before in zip(*parts, strict=True):
            if of_w2:
                to_w2 = _plus(to_w2, weight_gradient(to_out, F.gelu(before)))
            if of_b2:
                to_b2 = _plus(to_b2, to_out.sum(0))
            if not (of_x or of_w1 or of_b1):
                continue
            to_before = torch.ops.aten.gelu_backward(linear(to_out, w2.t(), rows=len(tokens)), before)
            if of_w1:
                to_w1 = _plus(to_w1, weight_gradient(to_before, part))
            if of_b1:
                to_b1 = _plus(to_b1, to_before.sum(0))
            if of_x:
                to_x.append(linear(to_before, w1.t(), rows=len(tokens)))
        return _joined(to_x).view(x.shape) if of_x else None, to_w1, to_b1, to_w2, to_b2


def _plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
