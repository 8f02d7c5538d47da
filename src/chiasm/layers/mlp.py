"""The MLP of a Transformer: linear, GELU, linear, for each token by itself.

Its inner width is a multiple of the tokens', so that for many tokens what stands between the two products is the
largest thing in the network, and on a CPU most of the MLP's time beside the products is spent moving it. Tokens are
therefore taken some thousands at a time: the inner values of one part stay in cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.by_hand import Linear, by_autograd, by_hand, product
from chiasm.layers.fused import FusedLinear

PART = 3136  # tokens of one part: an image's of 56 x 56, the largest map of the usual networks


class Mlp(nn.Module):
    """Tokens (..., D) -> (..., D) through `hidden` values a token and the exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.hidden = hidden

    def forward(self, tokens: Tensor) -> Tensor:
        if _ordinary(self.fc1) and _ordinary(self.fc2) and by_hand(tokens, *self.parameters()):
            weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            return _Mlp.apply(tokens, *weights)
        return _in_parts(self._through, tokens, self.hidden)

    def _through(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))

    def optimized(self) -> nn.Module:
        """The same for inference."""
        return FusedMlp(self)


class FusedMlp(nn.Module):
    """An `Mlp` for inference: GELU within the first product."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.hidden = mlp.hidden
        self.fc1, self.fc2 = FusedLinear(mlp.fc1, act="gelu"), FusedLinear(mlp.fc2)

    def forward(self, tokens: Tensor) -> Tensor:
        return _in_parts(self._through, tokens, self.hidden)

    def _through(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.fc1(tokens))


def _ordinary(layer: nn.Module) -> bool:
    """Whether the layer is its weight and bias and nothing else: no subclass, no hook that wants to see it called."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) is Linear and not any(hooks)


def _in_parts(through: Any, tokens: Tensor, hidden: int) -> Tensor:
    if (
        tokens.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    ):
        return through(tokens)
    flat = tokens.flatten(0, -2)
    parts = [through(part) for part in flat.split(PART)]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(tokens.shape)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        flat, inner = x.flatten(0, -2), []
        out = torch.empty_like(flat)
        for part, target in zip(flat.split(PART), out.split(PART), strict=True):
            before = product(part, w1, b1)
            behind = F.gelu(before)
            target.copy_(product(behind, w2, b2))
            inner += [before, behind]
        ctx.save_for_backward(x, w1, b1, w2, b2, *inner)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w1, b1, w2, b2, *inner = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_autograd(_plain, (x, w1, b1, w2, b2), gradient)
        to_x, to_w1, to_b1, to_w2, to_b2 = (
            torch.zeros_like(t) if wanted else None
            for t, wanted in zip((x, w1, b1, w2, b2), ctx.needs_input_grad, strict=True)
        )
        flat, down = x.flatten(0, -2), gradient.flatten(0, -2)
        for i, (part, given) in enumerate(zip(flat.split(PART), down.split(PART), strict=True)):
            before, behind = inner[2 * i], inner[2 * i + 1]
            if to_w2 is not None:
                to_w2.addmm_(given.t(), behind)
            middle = torch.ops.aten.gelu_backward(product(given, w2.t()), before)
            if to_w1 is not None:
                to_w1.addmm_(middle.t(), part)
            if to_b1 is not None:
                to_b1 += middle.sum(0)
            if to_x is not None:
                to_x.view(flat.shape)[i * PART : i * PART + len(part)] = product(middle, w1.t())
        if to_b2 is not None:
            to_b2 += down.sum(0)
        return to_x, to_w1, to_b1, to_w2, to_b2


def _plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
