"""Convolutions and linear layers for inference, each with what follows it: BN folded in, activation and addition in the
same pass over memory.

On CPUs the products are oneDNN's, which ships with PyTorch: it applies an activation, or adds another map, while the
result is still in cache, and reads weights fastest in an order of its own, kept here in their place. PyTorch has
operators for that (`torch.ops.mkldnn`, which its own compiler uses). Where they are missing, and for what they do not
take (another device, autocast, a gradient, a graph being traced), the same layers compute in the plain way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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


@cache
def _has_operators() -> bool:
    wanted = ("_linear_pointwise", "_convolution_pointwise", "_convolution_pointwise_", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in (*wanted, "_reorder_convolution_weight")
    )


def _takes(weight: Tensor) -> bool:
    """Whether oneDNN's operators work on this weight."""
    types = [torch.float32]
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        types.append(torch.bfloat16)
    return weight.device.type == "cpu" and weight.dtype in types and _has_operators()


class _Fused(nn.Module):
    """A frozen weight, bias and activation. The weight is held once: as the parameter `plain`, or reordered by oneDNN.

    Moving to another device or type, copying and pickling go through the plain form; reordering follows again.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, act: Act) -> None:
        super().__init__()
        self.act = act
        self.plain: nn.Parameter | None = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._reordered: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as the layer had it, made anew on each call where oneDNN holds it."""
        return self._held if self._reordered is None else self._reordered.to_dense()

    @property
    def _held(self) -> Tensor:
        weight = self.plain if self._reordered is None else self._reordered
        assert weight is not None
        return weight

    def _reorder(self, weight: Tensor) -> Tensor | None:
        """The weight in oneDNN's order; None keeps it plain."""
        raise NotImplementedError

    def _hold(self) -> None:
        if self.plain is not None and _takes(self.plain):
            self._reordered = self._reorder(self.plain.data)
            if self._reordered is not None:
                self.plain = None

    def _release(self) -> None:
        if self._reordered is not None:
            self.plain, self._reordered = nn.Parameter(self.weight, requires_grad=False), None

    def _fast(self, x: Tensor) -> bool:
        """Whether oneDNN's operator may be used for this input."""
        weight = self._held
        return (
            x.dtype == weight.dtype
            and x.device.type == "cpu"
            and _takes(weight)
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._release()
        super()._apply(fn, recurse)
        self._hold()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_parameters": dict(self._parameters), "_reordered": None}
        if self._reordered is not None:
            state["_parameters"]["plain"] = nn.Parameter(self.weight, requires_grad=False)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold()

    def extra_repr(self) -> str:
        return f"{tuple(self._held.shape)}, act={self.act}, reordered={self.plain is None}"


class FusedLinear(_Fused):
    """act(linear(x)): (..., in_features) -> (..., out_features)."""

    def __init__(self, linear: nn.Linear, act: Act = "none") -> None:
        super().__init__(linear.weight, linear.bias, act)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._hold()

    def _reorder(self, weight: Tensor) -> Tensor | None:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        function, name, numbers, algorithm = _ACTS[self.act]
        if self._fast(x):
            return torch.ops.mkldnn._linear_pointwise(x, self._held, self.bias, name, numbers, algorithm)
        return function(F.linear(x, self.weight, self.bias))


class FusedConv2d(_Fused):
    """act(bn(conv(x)) + addend): (B, in_channels, H, W) -> (B, out_channels, H', W'), in channels-last order.

    Args:
        conv: with zero padding given in numbers; another kind is refused with ValueError (see `can_fuse`).
        bn: in evaluation its statistics are constants, so it is folded into the convolution.
        act: applied last.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None = None, act: Act = "none") -> None:
        if not self.can_fuse(conv):
            raise ValueError(f"cannot fuse {conv}: expected zero padding given in numbers")
        weight, bias = conv.weight, conv.bias
        if bn is not None:
            assert bn.running_mean is not None
            assert bn.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
        super().__init__(weight.contiguous(memory_format=torch.channels_last), bias, act)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups
        self._hold()

    @staticmethod
    def can_fuse(conv: nn.Module) -> bool:
        """Whether this is an ordinary convolution, whose padding is zeros and does not depend on the image."""
        return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)

    @property
    def _sizes(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups

    def _reorder(self, weight: Tensor) -> Tensor | None:
        # With a stride, which order is best depends on the image's size, and the wrong one costs many times the work.
        if max(self.stride) > 1:
            return None
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self._sizes, None)

    def forward(self, x: Tensor, addend: Tensor | None = None, *, overwrite: bool = False) -> Tensor:
        """`addend` has the output's shape; with `overwrite` its memory may become the output's."""
        function, name, numbers, algorithm = _ACTS[self.act]
        x = x.contiguous(memory_format=torch.channels_last)
        if not self._fast(x):
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            return function(y if addend is None else y + addend)
        weight = self._held
        if addend is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self._sizes, name, numbers, algorithm)
        # Behind an addition the operators know no activation but ReLU.
        relu: tuple[str | None, list[float], str] = ("relu", [], "") if self.act == "relu" else (None, [], "")
        addend = addend.contiguous(memory_format=torch.channels_last)
        if overwrite:
            y = torch.ops.mkldnn._convolution_pointwise_(addend, x, weight, self.bias, *self._sizes, "add", 1.0, *relu)
        else:
            y = torch.ops.mkldnn._convolution_pointwise(x, addend, weight, self.bias, *self._sizes, "add", 1.0, *relu)
        return y if self.act == "relu" else function(y)
