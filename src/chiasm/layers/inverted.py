"""The inverted residual of MobileNetV2 (arXiv 1801.04381, section 3.3) with SiLU, and the convolution it is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn


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


class InvertedResidual(nn.Module):
    """1x1 convolution to `expand` times the channels, 3x3 depthwise, 1x1 back without activation.

    Map (B, in_chs, H, W) -> map (B, out_chs, ceil(H / stride), ceil(W / stride)); the input is added where the shapes
    allow it.
    """

    def __init__(
        self, in_chs: int, out_chs: int, *, stride: int = 1, expand: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        mid_chs = int(in_chs * expand)
        self.conv1_1x1 = ConvBnAct(in_chs, mid_chs)
        self.conv2_kxk = ConvBnAct(mid_chs, mid_chs, 3, stride=stride, groups=mid_chs)
        self.conv3_1x1 = ConvBnAct(mid_chs, out_chs, act=False)
        self.residual = in_chs == out_chs and stride == 1
        self.drop_path = DropPath(drop_path) if drop_path and self.residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        return x + self.drop_path(inner) if self.residual else inner
