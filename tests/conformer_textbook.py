"""The Conformer, slow and literal: written from the paper's description, module by module, under the authors' names.

It is the oracle of `chiasm.models.conformer`: nothing here is rearranged for speed. The map is projected before it is
pooled, the class token is concatenated and added to itself, up-sampled maps are made, attention is spelled out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    def __init__(self, inplanes: int, outplanes: int, stride: int = 1, res_conv: bool = False) -> None:
        super().__init__()
        mid = outplanes // 4
        self.conv1 = nn.Conv2d(inplanes, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid, eps=1e-6)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid, eps=1e-6)
        self.conv3 = nn.Conv2d(mid, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes, eps=1e-6)
        self.res_conv = res_conv
        if res_conv:
            self.residual_conv = nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False)
            self.residual_bn = nn.BatchNorm2d(outplanes, eps=1e-6)

    def forward(self, x: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = self.residual_bn(self.residual_conv(x)) if self.res_conv else x
        y = F.relu(self.bn1(self.conv1(x)))
        if addend is not None:
            y = y + addend
        inner = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(inner)) + residual), inner


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        d = x.shape[2]
        width = d // self.heads
        qkv = self.qkv(x)
        outs = []
        for h in range(self.heads):
            q = qkv[:, :, h * width : (h + 1) * width]
            k = qkv[:, :, d + h * width : d + (h + 1) * width]
            v = qkv[:, :, 2 * d + h * width : 2 * d + (h + 1) * width]
            weights = torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1)
            outs.append(weights @ v)
        return self.proj(torch.cat(outs, dim=2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SqueezeBlock(nn.Module):
    """Map to tokens: project, pool, norm, GELU."""

    def __init__(self, inplanes: int, dim: int, stride: int, pool: str) -> None:
        super().__init__()
        self.stride, self.pool = stride, pool
        self.conv_project = nn.Conv2d(inplanes, dim, 1)
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        x = self.conv_project(x)
        pool = F.avg_pool2d if self.pool == "avg" else F.max_pool2d
        x = pool(x, self.stride, self.stride)
        x = F.gelu(self.ln(x.flatten(2).transpose(1, 2)))
        return torch.cat([tokens[:, 0:1], x], dim=1)


class ExpandBlock(nn.Module):
    """Tokens to map: drop the class token, project, norm, ReLU, up-sample."""

    def __init__(self, dim: int, outplanes: int, stride: int, upsample: str) -> None:
        super().__init__()
        self.stride, self.upsample = stride, upsample
        self.conv_project = nn.Conv2d(dim, outplanes, 1)
        self.bn = nn.BatchNorm2d(outplanes, eps=1e-6)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        b, _, d = tokens.shape
        x = tokens[:, 1:].transpose(1, 2).reshape(b, d, height, width)
        x = F.relu(self.bn(self.conv_project(x)))
        size = (height * self.stride, width * self.stride)
        if self.upsample == "bilinear":
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return F.interpolate(x, size=size, mode="nearest")


class ConvTransBlock(nn.Module):
    def __init__(
        self, inplanes: int, outplanes: int, res_conv: bool, stride: int, down: int, dim: int, heads: int,
        last: bool, pool: str, upsample: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.down = down
        self.cnn_block = ConvBlock(inplanes, outplanes, stride, res_conv)
        self.fusion_block = ConvBlock(outplanes, outplanes, 2 if last else 1, last)
        self.squeeze_block = SqueezeBlock(outplanes // 4, dim, down, pool)
        self.expand_block = ExpandBlock(dim, outplanes // 4, down, upsample)
        self.trans_block = TransBlock(dim, heads)

    def forward(self, x: Tensor, tokens: Tensor, coupling: str) -> tuple[Tensor, Tensor]:
        x, inner = self.cnn_block(x)
        height, width = inner.shape[2] // self.down, inner.shape[3] // self.down
        if coupling in ("both", "map_to_tokens"):
            tokens = self.squeeze_block(inner, tokens) + tokens
        tokens = self.trans_block(tokens)
        up = self.expand_block(tokens, height, width) if coupling in ("both", "tokens_to_map") else None
        x, _ = self.fusion_block(x, up)
        return x, tokens


class TextbookConformer(nn.Module):
    def __init__(
        self, *, patch: int, ratio: int, dim: int, heads: int, depth: int = 12, base: int = 64, classes: int = 1000,
        pool: str = "avg", upsample: str = "nearest", coupling: str = "both",
    ) -> None:  # fmt: skip
        super().__init__()
        self.depth, self.coupling, self.cell = depth, coupling, patch // 4
        stage = depth // 3
        self.conv1 = nn.Conv2d(3, base, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.conv_1 = ConvBlock(base, base * ratio, 1, True)
        self.trans_patch_conv = nn.Conv2d(base, dim, self.cell, stride=self.cell)
        self.trans_1 = TransBlock(dim, heads)
        for i in range(2, depth + 1):
            number = (i - 1) // stage
            out = base * ratio * 2**number
            starts = number > 0 and (i - 1) % stage == 0
            block = ConvTransBlock(
                out // 2 if starts else out, out, starts, 2 if starts else 1, self.cell // 2**number, dim, heads,
                i == depth, pool, upsample,
            )  # fmt: skip
            self.add_module(f"conv_trans_{i}", block)
        self.trans_norm = nn.LayerNorm(dim)
        self.conv_cls_head = nn.Linear(out, classes)
        self.trans_cls_head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), 3, stride=2, padding=1)
        x = F.pad(x, (0, -x.shape[3] % self.cell, 0, -x.shape[2] % self.cell))
        tokens = self.trans_patch_conv(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(image), -1, -1), tokens], dim=1)
        x, _ = self.conv_1(x)
        tokens = self.trans_1(tokens)
        for i in range(2, self.depth + 1):
            x, tokens = self.get_submodule(f"conv_trans_{i}")(x, tokens, self.coupling)
        return {
            "conv": self.conv_cls_head(x.mean(dim=(2, 3))),
            "tokens": self.trans_cls_head(self.trans_norm(tokens)[:, 0]),
        }
