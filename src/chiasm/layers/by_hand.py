"""Gradients written by hand, for training on CPUs: what autograd gives, in fewer passes over memory.

Autograd keeps every intermediate and goes through each as a whole. Where the steps of a layer work on each token or
window by itself, both directions can be done a part at a time, so that what stands between two steps stays in cache;
and the products of linear layers can be oneDNN's, which ships with PyTorch, adds the bias within the product, and on
many CPUs is faster than the library that PyTorch asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.fused import FusedLinear, traced

# oneDNN keeps 0.65 MB of code for each shape of a product: little beside a weight of so many numbers, or a map.
LARGE, LARGE_MAP = 2**18, 2**21
PART = 2**20  # numbers in the largest intermediate of one part: 4 MB, which the outer cache holds


_watched: ContextVar[bool] = ContextVar("watched", default=False)


@contextmanager
def watched() -> Iterator[None]:
    """While this lasts nothing is done by hand: somebody watches PyTorch's functions, which would be left out."""
    token = _watched.set(True)
    try:
        yield
    finally:
        _watched.reset(token)


def eager() -> bool:
    """Whether operators are just computed: not traced, compiled or transformed."""
    return not (traced() or torch._C._are_functorch_transforms_active())


def by_hand(*tensors: Tensor | None, half: bool = False) -> bool:
    """Whether the way written by hand may be taken: a gradient is wanted, on a CPU, and nobody looks into the layer.

    All of one type, 32 or 64 bits wide, or with `half` bfloat16 as well.
    """
    if not torch.is_grad_enabled():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    if dtype == torch.bfloat16:
        suits = half
    else:
        suits = dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return (
        suits
        and any(tensor.requires_grad for tensor in given)
        and all(t.dtype == dtype and t.is_cpu and type(t) in (Tensor, nn.Parameter) for t in given)
        and eager()
        and not _watched.get()
    )


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias without a gradient: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if x.dtype == torch.float32 and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rows: int = 0) -> Tensor:
    """`product`, by oneDNN only where that pays for the code that it keeps.

    Args:
        rows: of the whole that x is a part of; 0 for x itself.
    """
    rows = rows or x.numel() // x.shape[-1]
    large = weight.numel() >= LARGE or rows * max(weight.shape) >= LARGE_MAP
    return product(x, weight, bias) if large else F.linear(x, weight, bias)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient (out, in) of a weight, from that of its product (M, out) and its input (M, in)."""
    # Both factors lie transposed. PyTorch's library is the slower where the result has fewer rows than columns; oneDNN
    # has no product over nothing, which an image's is that stochastic depth leaves out.
    if 2 * gradient.shape[1] > x.shape[1] or not len(x):
        return gradient.t() @ x
    if gradient.shape[1] * x.shape[1] < LARGE:
        return (x.t() @ gradient).t().contiguous()
    return product(gradient.t(), x.t())


def by_autograd(plain: Callable[..., Tensor], inputs: tuple[Any, ...], gradient: Tensor) -> tuple[Any, ...]:
    """The gradients of `plain(*inputs)` by autograd: for a backward pass that is itself to be differentiated."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    found = iter(torch.autograd.grad(plain(*inputs), wanted, gradient, create_graph=True))
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)


class Linear(nn.Linear):
    """A linear layer (..., in_features) -> (..., out_features) that trains on oneDNN's products."""

    def forward(self, x: Tensor) -> Tensor:
        if by_hand(x, self.weight, self.bias):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)

    def optimized(self) -> nn.Module:
        """The same for inference."""
        return FusedLinear(self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return by_autograd(F.linear, (x, weight, bias), gradient)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            linear(gradient, weight.t()) if of_x else None,
            weight_gradient(flat, x.flatten(0, -2)) if of_weight else None,
            flat.sum(0) if of_bias else None,
        )
