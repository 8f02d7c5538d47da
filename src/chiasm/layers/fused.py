"""Convolutions and linear layers for inference, each with what follows it: BN folded in, activation and addition in the
same pass over memory.

On CPUs the products are oneDNN's, which ships with PyTorch: it applies an activation, or adds another map, while the
result is still in cache, and reads weights fastest in an order of its own, kept here in their place. PyTorch has
operators for that (`torch.ops.mkldnn`, which its own compiler uses). A linear layer is there a 1x1 convolution of a map
with one row: as fast as oneDNN's own, which keeps half a megabyte more for each shape, and it can add. Where the
operators are missing, and for what they do not take (another device, autocast, a gradient, a graph being traced), the
same layers compute in the plain way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from timm.layers.activations import GELU, HardSwish, Swish
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Act = Literal["none", "relu", "relu6", "silu", "gelu", "hardswish"]


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=not torch.is_grad_enabled())


# activation: (the plain function, oneDNN's name, its numbers, its algorithm)
_ACTS: dict[str, tuple[Callable[[Tensor], Tensor], str | None, list[float], str]] = {
    "none": (nn.Identity(), "none", [], ""),
    "relu": (F.relu, "relu", [], ""),
    "relu6": (F.relu6, "hardtanh", [0.0, 6.0], ""),
    # Within oneDNN's product it is no faster, and its code takes a hundred kilobytes more for each shape.
    "silu": (_silu, None, [], ""),
    "gelu": (F.gelu, "gelu", [], "none"),  # the exact one, by the error function
    "hardswish": (F.hardswish, "hardswish", [], ""),
}


# What modules of others are called here.
ACTIVATIONS: dict[type[nn.Module], Act] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    Swish: "silu",
    nn.GELU: "gelu",
    GELU: "gelu",
    nn.Hardswish: "hardswish",
    HardSwish: "hardswish",
}


def act_of(module: nn.Module) -> Act | None:
    """The name of an activation; None where it is not known here."""
    exact = getattr(module, "approximate", "none") == "none"
    return ACTIVATIONS.get(type(module)) if exact else None


_ORDERING = threading.RLock()  # a weight changes its form while no other thread looks at it
_PLAINLY = threading.local()


@contextmanager
def plainly() -> Iterator[None]:
    """Compute in the plain way while this is entered, in this thread."""
    before, _PLAINLY.on = getattr(_PLAINLY, "on", False), True
    try:
        yield
    finally:
        _PLAINLY.on = before


@cache
def _takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are here and compute in this type; tried once, as they are no public interface."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    operators, x = torch.ops.mkldnn, torch.ones(4, 16, 1, 1, dtype=dtype)
    weight, sizes = torch.eye(16, dtype=dtype).view(16, 16, 1, 1), ([0, 0], [1, 1], [1, 1], 1)
    try:
        if dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
            return False
        weight = operators._reorder_convolution_weight(weight, *sizes, list(x.shape))
        y = operators._convolution_pointwise.default(x, weight, None, *sizes, "relu", [], "")
        added = operators._convolution_pointwise.binary(x, x, weight, None, *sizes, "add", 1.0, "relu", [], "")
        operators._convolution_pointwise_.binary(y, x, weight, None, *sizes, "add", 1.0, "relu", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return bool(added.eq(2).all() and y.eq(2).all())


def _by_onednn(x: Tensor) -> bool:
    """Whether oneDNN's operators are to be used on this input."""
    return (
        x.is_cpu
        and _takes(x.dtype)
        and x.numel() > 0
        and not getattr(_PLAINLY, "on", False)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not traced()
    )


def traced() -> bool:
    """Whether a graph is being made of what is computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _folded(layer: nn.Linear | nn.Conv2d, bn: BatchNorm | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `layer` with the BN behind it: in evaluation its statistics are constants."""
    if bn is None:
        return layer.weight, layer.bias
    assert bn.running_mean is not None
    assert bn.running_var is not None
    # It scales the weight's first dimension, so it serves linear layers too.
    return fuse_conv_bn_weights(layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)


class Fused(nn.Module):
    """A frozen weight, bias and activation. The weight is held once: as the parameter `plain`, or in oneDNN's order.

    Which order is fastest depends on the input's shape, and for each layer and shape that it has seen oneDNN keeps
    some hundred kilobytes. So the weight is ordered for the first shape, and for another one when it comes twice in a
    row; others are computed in the plain way, and from the second of them on the weight is plain again, so that inputs
    of ever other sizes cost no memory. Moving to another device or type, copying and pickling go through that form.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, act: Act) -> None:
        super().__init__()
        self.act = act
        self.plain: nn.Parameter | None = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._ordered: tuple[tuple[int, ...], Tensor] | None = None  # an input's shape, the weight ordered for it
        self._other: tuple[int, ...] | None = None  # another shape, if the last call's was one
        self._misses = 0  # calls with another shape since it was ordered

    # How oneDNN is to convolve: padding, stride, dilation, groups.
    _sizes: tuple[Any, ...] = (0, 0), (1, 1), (1, 1), 1

    @property
    def weight(self) -> Tensor:
        """The weight in its plain order, made anew on each call where oneDNN holds it."""
        with _ORDERING:
            return self._held if self._ordered is None else self._plain_order(self._ordered[1])

    @property
    def _held(self) -> Tensor:
        weight = self.plain if self._ordered is None else self._ordered[1]
        assert weight is not None
        return weight

    def _plain_order(self, ordered: Tensor) -> Tensor:
        return ordered.to_dense().contiguous(memory_format=torch.channels_last)

    def _release(self) -> None:
        """Hold the weight in its plain form."""
        if self._ordered is not None:
            self.plain, self._ordered = nn.Parameter(self.weight, requires_grad=False), None

    def _ordered_for(self, x: Tensor) -> Tensor | None:
        """The weight in oneDNN's order for the map x, where that is worth it."""
        ordered = self._ordered
        if ordered is None or ordered[0] != x.shape or ordered[1].dtype != x.dtype:
            return self._order_anew(x)
        if self._other is not None:
            self._other = None
        return ordered[1]

    def _order_anew(self, x: Tensor) -> Tensor | None:
        """Order the weight for this shape if it is the first, or was the last call's too."""
        shape = tuple(x.shape)
        with _ORDERING:
            if self._held.dtype != x.dtype:
                return None
            before, self._other = self._other, shape
            self._misses += 1
            # A weight that is made within inference mode could serve no gradient later.
            with torch.inference_mode(False), torch.no_grad():
                if before == shape or (before is None and self._ordered is None):
                    weight = self.weight.detach()
                    weight = weight.view(*weight.shape, *[1] * (4 - weight.ndim))
                    ordered = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._sizes, list(shape))
                    self._ordered, self.plain, self._other, self._misses = (shape, ordered), None, None, 0
                    return ordered
                if self._misses > 1:  # to unpack it for every other call costs more than ordering gains
                    self._release()
            return None

    def _convolve(self, x: Tensor, weight: Tensor, addend: Tensor | None, overwrite: bool) -> Tensor:
        """oneDNN's convolution of the channels-last map x with the weight ordered for it."""
        function, name, numbers, algorithm = _ACTS[self.act]
        if addend is None:
            how = weight, self.bias, *self._sizes, name or "none", numbers, algorithm
            y = torch.ops.mkldnn._convolution_pointwise.default(x, *how)
            return y if name else function(y)
        # Behind an addition the operators know no activation but ReLU.
        relu: tuple[str | None, list[float], str] = ("relu", [], "") if self.act == "relu" else (None, [], "")
        addend = addend.contiguous(memory_format=torch.channels_last)
        how = weight, self.bias, *self._sizes, "add", 1.0, *relu
        if overwrite:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *how)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, addend, *how)
        return y if self.act == "relu" else function(y)

    def _finish(self, y: Tensor, addend: Tensor | None, overwrite: bool) -> Tensor:
        """The addition and the activation behind a product in the plain way."""
        if addend is not None:
            written_over = overwrite and not torch.is_grad_enabled() and not traced()
            y = addend.add_(y) if written_over else y + addend
        return _ACTS[self.act][0](y)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with _ORDERING:
            self._release()
            return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_parameters": dict(self._parameters), "_ordered": None}
        state["_parameters"]["plain"] = nn.Parameter(self.weight, requires_grad=False)
        return state

    def extra_repr(self) -> str:
        return f"{tuple(self._held.shape)}, act={self.act}"


class FusedLinear(Fused):
    """act(bn(linear(x)) + addend): (..., in_features) -> (..., out_features); with `bn`, of dim 1, x is a matrix."""

    def __init__(self, linear: nn.Linear, act: Act = "none", bn: nn.BatchNorm1d | None = None) -> None:
        super().__init__(*_folded(linear, bn), act)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _plain_order(self, ordered: Tensor) -> Tensor:
        return ordered.to_dense().flatten(1)

    def forward(self, x: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """`addend` has the output's shape. With `overwrite` its memory may become the output's; it does where it is
        contiguous, no gradient is wanted and no activation follows."""
        if _by_onednn(x) and (weight := self._ordered_for(as_map := _as_map(x))) is not None:
            y = self._convolve(as_map, weight, None if addend is None else _as_map(addend), overwrite)
            return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)
        return self._finish(F.linear(x, self.weight, self.bias), addend, overwrite)


def _as_map(x: Tensor) -> Tensor:
    """(..., C) -> (1, C, 1, everything else), channels-last: a view where x is contiguous."""
    return x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


class FusedConv2d(Fused):
    """act(bn(conv(x)) + addend): (B, in_channels, H, W) -> (B, out_channels, H', W'), in channels-last order.

    Args:
        conv: with zero padding given in numbers; another kind is refused with ValueError (see `can_fuse`).
        bn: with statistics of its own, as is usual.
        act: applied last.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None, act: Act = "none") -> None:
        if not self.can_fuse(conv):
            raise ValueError(f"cannot fuse {conv}: expected zero padding given in numbers")
        weight, bias = _folded(conv, bn)
        super().__init__(weight.contiguous(memory_format=torch.channels_last), bias, act)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self._sizes = self.padding, self.stride, self.dilation, self.groups

    @staticmethod
    def can_fuse(conv: nn.Module) -> bool:
        """Whether this is an ordinary convolution, whose padding is zeros and does not depend on the image."""
        return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    def forward(self, x: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """`addend` has the output's shape. With `overwrite` its memory may become the output's; it does where it is
        channels-last, no gradient is wanted and no activation follows."""
        x = x.contiguous(memory_format=torch.channels_last)
        if _by_onednn(x) and (weight := self._ordered_for(x)) is not None:
            return self._convolve(x, weight, addend, overwrite)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self._finish(y, addend, overwrite)
