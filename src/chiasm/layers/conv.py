"""Convolutional blocks: the ResNet stem and bottleneck as the hybrids use them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.layers.fused import FusedConv2d


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> map (B, channels, ceil(H / stride), ceil(W / stride)).

    Stride 4 is the ResNet stem: 7x7 convolution of stride 2, BN, ReLU, 3x3 max-pooling of stride 2. Strides 2 and 1 are
    one 3x3 convolution of that stride, BN, ReLU, for small images.
    """

    def __init__(self, in_chans: int, channels: int, *, stride: int = 4) -> None:
        super().__init__()
        kernel, conv_stride, self.pool = (7, 2, True) if stride == 4 else (3, stride, False)
        self.conv = nn.Conv2d(in_chans, channels, kernel, conv_stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)  # eps 1e-5, unlike all other BNs of the Conformer

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last from here on: tokens are then views of maps, and pooling and adding run along the channels.
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return F.max_pool2d(x, 3, 2, 1) if self.pool else x

    def optimized(self) -> nn.Module:
        """The same for inference."""
        conv = FusedConv2d(self.conv, self.bn, "relu")
        return nn.Sequential(conv, nn.MaxPool2d(3, 2, 1)) if self.pool else conv


class Bottleneck(nn.Module):
    """ResNet bottleneck: 1x1, 3x3 (of the given stride), 1x1 convolution, and the residual.

    Map (B, in_chs, H, W) -> map (B, out_chs, H / stride, W / stride). Its inner map has `mid_chs` = out_chs / 4
    channels; `forward` takes an addend for the 3x3 convolution's input and returns that convolution's output beside
    the map, which are the two places where another branch couples in and out.
    """

    def __init__(self, in_chs: int, out_chs: int, *, stride: int = 1, project: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.mid_chs = mid_chs = out_chs // 4
        self.conv1 = nn.Conv2d(in_chs, mid_chs, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_chs, eps=eps)
        self.conv2 = nn.Conv2d(mid_chs, mid_chs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_chs, eps=eps)
        self.conv3 = nn.Conv2d(mid_chs, out_chs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chs, eps=eps)
        self.shortcut_conv = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False) if project else None
        self.shortcut_bn = nn.BatchNorm2d(out_chs, eps=eps) if project else None

    def shortcut(self, x: Tensor) -> Tensor:
        if self.shortcut_conv is None or self.shortcut_bn is None:
            return x
        return self.shortcut_bn(self.shortcut_conv(x))

    def enter(self, x: Tensor) -> Tensor:
        """The input (B, mid_chs, H, W) of the 3x3 convolution."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)

    def leave(self, inner: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the 3x3 convolution's input and the block's input to (map, the 3x3 convolution's output)."""
        local = F.relu(self.bn2(self.conv2(inner)), inplace=True)
        return F.relu(self.bn3(self.conv3(local)) + self.shortcut(x), inplace=True), local

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.leave(self.enter(x), x)

    def optimized(self, *, overwrite: bool = False) -> FusedBottleneck:
        """The same for inference; with `overwrite` its input's memory may become its output's."""
        return FusedBottleneck(self, overwrite=overwrite)


class FusedBottleneck(nn.Module):
    """A `Bottleneck` for inference: BNs folded in, the residual added within the last convolution."""

    def __init__(self, block: Bottleneck, *, overwrite: bool) -> None:
        super().__init__()
        self.mid_chs = block.mid_chs
        self.overwrite = overwrite or block.shortcut_conv is not None
        self.conv1 = FusedConv2d(block.conv1, block.bn1, "relu")
        self.conv2 = FusedConv2d(block.conv2, block.bn2, "relu")
        self.conv3 = FusedConv2d(block.conv3, block.bn3, "relu")
        self.shortcut = (
            nn.Identity() if block.shortcut_conv is None else FusedConv2d(block.shortcut_conv, block.shortcut_bn)
        )

    def enter(self, x: Tensor) -> Tensor:
        return self.conv1(x)

    def leave(self, inner: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        local = self.conv2(inner)
        return self.conv3(local, self.shortcut(x), overwrite=self.overwrite), local

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.leave(self.enter(x), x)
