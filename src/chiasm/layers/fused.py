"""Convolutions and linear layers for inference, each with what follows it: BN folded in, activation and addition in the
same pass over memory.

On CPUs the products are oneDNN's, which ships with PyTorch: it applies an activation, or adds another map, while the
result is still in cache, and reads weights fastest in an order of its own, kept here in their place. PyTorch has
operators for that (`torch.ops.mkldnn`, which its own compiler uses). Where they are missing, and for what they do not
take (another device, autocast, a gradient, a graph being traced), the same layers compute in the plain way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Act = Literal["none", "relu", "relu6", "silu", "gelu", "hardswish"]

# activation: (the plain function, oneDNN's name, its numbers, its algorithm)
_ACTS: dict[str, tuple[Callable[[Tensor], Tensor], str, list[float], str]] = {
    "none": (nn.Identity(), "none", [], ""),
    "relu": (F.relu, "relu", [], ""),
    "relu6": (F.relu6, "hardtanh", [0.0, 6.0], ""),
    "silu": (F.silu, "swish", [], ""),
    "gelu": (F.gelu, "gelu", [], "none"),  # the exact one, by the error function
    "hardswish": (F.hardswish, "hardswish", [], ""),
}


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
    operators, x = torch.ops.mkldnn, torch.ones(4, 16, dtype=dtype)
    weight = torch.eye(16, dtype=dtype)
    shape, sizes = [4, 16, 1, 1], ([0, 0], [1, 1], [1, 1], 1)
    try:
        if dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
            return False
        by_linear = operators._linear_pointwise.default(
            x, operators._reorder_linear_weight(weight, None), None, "relu", [], ""
        )
        x, weight = x.view(shape), weight.view(16, 16, 1, 1)
        weight = operators._reorder_convolution_weight(weight, *sizes, shape)
        by_conv = operators._convolution_pointwise.default(x, weight, None, *sizes, "relu", [], "")
        added = operators._convolution_pointwise.binary(x, x, weight, None, *sizes, "add", 1.0, "relu", [], "")
        operators._convolution_pointwise_.binary(by_conv, x, weight, None, *sizes, "add", 1.0, "relu", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    return bool(by_linear.eq(1).all() and added.eq(2).all() and by_conv.eq(2).all())


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

    Which order is fastest depends on the input's shape, and for each layer and shape that it has seen oneDNN keeps up
    to a megabyte. So the weight is ordered for a shape that comes twice in a row; others are computed in the plain way,
    and inputs of ever other sizes cost no memory. Moving to another device or type, copying and pickling go through the
    plain form.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, act: Act) -> None:
        super().__init__()
        self.act = act
        self.plain: nn.Parameter | None = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._ordered: Tensor | None = None
        self._shape: tuple[int, ...] | None = None  # for which the weight is ordered
        self._other: tuple[int, ...] | None = None  # another shape, if the last call's was one

    @property
    def weight(self) -> Tensor:
        """The weight in its plain order, made anew on each call where oneDNN holds it."""
        with _ORDERING:
            return self._held if self._ordered is None else self._ordered.to_dense()

    @property
    def _held(self) -> Tensor:
        weight = self.plain if self._ordered is None else self._ordered
        assert weight is not None
        return weight

    def _order(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weight in oneDNN's order for inputs of this shape."""
        raise NotImplementedError

    def _release(self) -> None:
        """Hold the weight in its plain form."""
        if self._ordered is not None:
            plain = self._ordered.to_dense()
            if plain.ndim == 4:
                plain = plain.contiguous(memory_format=torch.channels_last)
            self.plain, self._ordered = nn.Parameter(plain, requires_grad=False), None

    def _ordered_for(self, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """The weight in oneDNN's order, where its operators are to be used on this input."""
        if (
            x.device.type != "cpu"
            or not _takes(x.dtype)
            or getattr(_PLAINLY, "on", False)
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
        ):
            return None
        with _ORDERING:
            if self._held.dtype != x.dtype:
                return None
            if self._ordered is not None and self._shape == shape:
                self._other = None
                return self._ordered
            before, self._other = self._other, shape
            # A weight that is made within inference mode could serve no gradient later.
            with torch.inference_mode(False), torch.no_grad():
                if before == shape:
                    ordered = self._order(self.weight.detach(), shape)
                    self._ordered, self.plain, self._shape, self._other = ordered, None, shape, None
                elif before is not None:  # two others in a row, of two shapes
                    self._release()
            return self._ordered if self._shape == shape else None

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
    """act(bn(linear(x))): (..., in_features) -> (..., out_features); with `bn`, which norms dim 1, x is a matrix."""

    def __init__(self, linear: nn.Linear, act: Act = "none", bn: nn.BatchNorm1d | None = None) -> None:
        super().__init__(*_folded(linear, bn), act)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _order(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), shape[0])

    def forward(self, x: Tensor) -> Tensor:
        function, name, numbers, algorithm = _ACTS[self.act]
        weight = self._ordered_for(x, (x.shape[:-1].numel(),))
        if weight is None:
            return function(F.linear(x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, self.bias, name, numbers, algorithm)


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

    @staticmethod
    def can_fuse(conv: nn.Module) -> bool:
        """Whether this is an ordinary convolution, whose padding is zeros and does not depend on the image."""
        return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    @property
    def _sizes(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups

    def _order(self, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self._sizes, list(shape))

    def forward(self, x: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """`addend` has the output's shape; with `overwrite` its memory may become the output's."""
        function, name, numbers, algorithm = _ACTS[self.act]
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self._ordered_for(x, x.shape)
        if weight is None:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            return function(y if addend is None else y + addend)
        if addend is None:
            how = weight, self.bias, *self._sizes, name, numbers, algorithm
            return torch.ops.mkldnn._convolution_pointwise.default(x, *how)
        # Behind an addition the operators know no activation but ReLU.
        relu: tuple[str | None, list[float], str] = ("relu", [], "") if self.act == "relu" else (None, [], "")
        addend = addend.contiguous(memory_format=torch.channels_last)
        how = weight, self.bias, *self._sizes, "add", 1.0, *relu
        if overwrite:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *how)
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, addend, *how)
        return y if self.act == "relu" else function(y)
