"""The inverted residual of MobileNetV2 (arXiv 1801.04381, section 3.3) with SiLU, and the convolution it is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from chiasm.layers.by_hand import by_hand
from chiasm.layers.fused import FusedConv2d
from chiasm.layers.inverted_by_hand import train_wide
from chiasm.layers.parts import in_parts

LARGE = 2**24  # bytes of a batch's wide map beyond which training does not keep them


class ConvBnAct(nn.Module):
    """Convolution without bias, BN, and SiLU unless `act` is False.

    Map (B, in_chs, H, W) -> map (B, out_chs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_chs: int, out_chs: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_chs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        # In place only without autograd, which would clone the input for the backward pass.
        return F.silu(x, inplace=not torch.is_grad_enabled()) if self.act else x

    def optimized(self) -> nn.Module:
        """The same for inference."""
        return FusedConv2d(self.conv, self.bn, "silu" if self.act else "none")


class InvertedResidual(nn.Module):
    """1x1 convolution to `expand` times the channels, 3x3 depthwise, 1x1 back without activation.

    Map (B, in_chs, H, W) -> map (B, out_chs, ceil(H / stride), ceil(W / stride)); the input is added where the shapes
    allow it.
    """

    def __init__(
        self, in_chs: int, out_chs: int, *, stride: int = 1, expand: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.mid_chs = mid_chs = int(in_chs * expand)
        self.stride = stride
        self.conv1_1x1 = ConvBnAct(in_chs, mid_chs)
        self.conv2_kxk = ConvBnAct(mid_chs, mid_chs, 3, stride=stride, groups=mid_chs)
        self.conv3_1x1 = ConvBnAct(mid_chs, out_chs, act=False)
        self.residual = in_chs == out_chs and stride == 1
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self._forward(x)
        return in_parts(self, self._forward, x, self.mid_chs, stride=self.stride)

    def _forward(self, x: Tensor) -> Tensor:
        if self._trains_by_hand(x):
            wide, depthwise = self.conv1_1x1, self.conv2_kxk
            inner = train_wide(x, wide.conv, wide.bn, depthwise.conv, depthwise.bn, self.conv3_1x1.conv)
            inner = self.conv3_1x1.bn(inner)
        else:
            inner = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + self.drop_path(inner) if self.residual else inner

    def optimized(self) -> nn.Module:
        """The same for inference; itself where one of its layers was exchanged for another kind."""
        convs = self.conv1_1x1, self.conv2_kxk, self.conv3_1x1
        return FusedInvertedResidual(self) if all(type(conv) is ConvBnAct for conv in convs) else self

    def _trains_by_hand(self, x: Tensor) -> bool:
        """Whether the batch's wide maps are beyond the cache, and the layers that make them are as they were built."""
        wide_bytes = x.numel() // x.shape[1] * self.mid_chs * x.element_size()
        if not self.training or wide_bytes <= LARGE or not by_hand(x, *self.parameters()):
            return False
        return all(
            _ordinary(layer) for part in (self.conv1_1x1, self.conv2_kxk, self.conv3_1x1) for layer in part.modules()
        )


class FusedInvertedResidual(nn.Module):
    """An `InvertedResidual` for inference: the input is added within the last convolution."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.mid_chs, self.stride, self.residual = block.mid_chs, block.stride, block.residual
        self.conv1_1x1, self.conv2_kxk, self.conv3_1x1 = block.conv1_1x1, block.conv2_kxk, block.conv3_1x1.optimized()

    def forward(self, x: Tensor) -> Tensor:
        return in_parts(self, self._forward, x, self.mid_chs, stride=self.stride)

    def _forward(self, x: Tensor) -> Tensor:
        return self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)), x if self.residual else None)


def _ordinary(layer: nn.Module) -> bool:
    """Whether nothing but a convolution, or a norm that takes the batch's statistics, and no hook that watches it."""
    if isinstance(layer, nn.BatchNorm2d) and not (layer.training and layer.affine and layer.momentum):
        return False
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return type(layer) in (ConvBnAct, nn.Conv2d, nn.BatchNorm2d) and not any(hooks)
