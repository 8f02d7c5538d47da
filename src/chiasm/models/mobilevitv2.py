"""MobileViTv2: MobileViT with separable self-attention, whose cost grows with the number of tokens, not its square.

    Mehta, Rastegari: "Separable Self-attention for Mobile Vision Transformers", TMLR 2023, arXiv 2206.02680. Reference
    code: apple/ml-cvnets, Apple's sample code licence.

Beside the attention, the MobileViT block here has a depthwise 3x3 convolution at its entry, no concatenation with its
input and no convolution behind; the network has no last 1x1 convolution. All widths are multiples of those of the
network 1.0.

What differs from the reference, all of it exact: maps are channels-last, so that unfold and fold are one copy each and
the sum over the tokens is a matrix product. Any input size is taken: as in the reference, a map that is not a multiple
of the patch is stretched bilinearly to one (corners on corners) at the block's entry, and stays so; the levels that
`forward_intermediates` and `features_only` give are brought back to ceil(side / stride). The numbers are timm's, and so
are the names of the weights.

Published (256 px, ImageNet-1k): 0.5 / 0.75 / 1.0 / 1.25 / 1.5 / 1.75 / 2.0 have 1.4 / 2.9 / 4.9 / 7.5 / 10.6 / 14.3 /
18.4 M parameters and top-1 70.2 / 75.6 / 78.1 / 79.6 / 80.4 / 80.8 / 81.2 %. Images are RGB in 0..1 without mean and
standard deviation.

Shapes: B batch, C map channels, H x W map, D token width, P = 4 pixels of a patch, N = H * W / P patches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from timm.layers import ConvMlp, DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from chiasm.layers.inverted import ConvBnAct
from chiasm.layers.parts import in_parts
from chiasm.layers.unfold import fold, resize_to_multiple, unfold
from chiasm.models.checkpoints import renamed_for
from chiasm.models.dialects import Dialect
from chiasm.models.mobilevit import (
    CVNETS_PARTS,
    CVNETS_STARTS,
    HUGGING_FACE_PARTS,
    HUGGING_FACE_STARTS,
    MobileViT,
    TrunkConfig,
)


@dataclass(frozen=True, kw_only=True)
class MobileViTV2Config(TrunkConfig):
    """The sizes of a MobileViTv2; the defaults are those of the network 1.0."""

    stem_chs: int = 32
    channels: tuple[int, ...] = (64, 128, 256, 384, 512)
    convs: tuple[int, ...] = (1, 2, 1, 1, 1)
    expand: float = 2.0
    dims: tuple[int, ...] = (128, 192, 256)
    final_chs: int = 0


class SeparableAttention(nn.Module):
    """Self-attention by one score per token (arXiv 2206.02680, section 3.2): tokens (B, D, P, N) -> the same.

    Softmax over the N tokens of a sequence weighs their keys into one context vector; each token's value is multiplied
    by it. Time and memory are linear in N.
    """

    def __init__(self, dim: int, *, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.qkv_proj = nn.Conv2d(dim, 1 + 2 * dim, 1)
        self.attn_drop = nn.Dropout(attn_drop)
        self.out_proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv_proj(x).split([1, self.dim, self.dim], dim=1)
        scores = self.attn_drop(query.softmax(-1))  # (B, 1, P, N)
        # One product per sequence, (1, N) @ (N, D), in place of an elementwise product and a sum.
        context = (scores.permute(0, 2, 1, 3) @ key.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, D, P, 1)
        return self.out_proj(F.relu(value) * context)


class SeparableTransformerBlock(nn.Module):
    """Norm over an image's tokens and channels, separable attention, norm, MLP with SiLU; tokens (B, D, P, N)."""

    def __init__(self, dim: int, *, mlp_ratio: float = 2.0, attn_drop: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.attn = SeparableAttention(dim, attn_drop=attn_drop)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=nn.SiLU)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MobileViTV2Block(nn.Module):
    """Local, then global: map (B, C, H, W) -> map (B, C, H', W'), H' and W' the next multiples of the patch."""

    def __init__(
        self, channels: int, dim: int, depth: int, config: MobileViTV2Config, *, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.patch = config.patch
        self.conv_kxk = ConvBnAct(channels, channels, 3, groups=channels)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(
            *(
                SeparableTransformerBlock(dim, mlp_ratio=config.mlp_ratio, attn_drop=attn_drop, drop_path=drop_path)
                for _ in range(depth)
            )
        )
        self.norm = nn.GroupNorm(1, dim)
        self.conv_proj = ConvBnAct(dim, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x) if self.training else in_parts(self, self._forward, x, 2 * self.conv_1x1.out_channels)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.conv_1x1(self.conv_kxk(resize_to_multiple(x, self.patch, align_corners=True)))
        # (B * P, N, D) -> (B, D, P, N): a channels-last map of P rows and N columns.
        tokens = unfold(x, self.patch).unflatten(0, (-1, self.patch**2)).permute(0, 3, 1, 2)
        tokens = self.norm(self.transformer(tokens))
        return self.conv_proj(fold(tokens.permute(0, 2, 3, 1).flatten(0, 1), self.patch, x.shape[-2:]))


class MobileViTV2(MobileViT):
    """Image (B, in_chans, H, W) of any size -> logits (B, num_classes); arguments as `MobileViT`."""

    def _block(self, channels: int, dim: int, depth: int, *, attn_drop: float, drop_path: float) -> nn.Module:
        assert isinstance(self.config, MobileViTV2Config)
        return MobileViTV2Block(channels, dim, depth, self.config, attn_drop=attn_drop, drop_path=drop_path)


# ------------------------------------------------------------------------------------------------------------- registry


def _sizes(width: float) -> MobileViTV2Config:
    """The network whose widths are `width` times those of the network 1.0."""
    base = MobileViTV2Config()
    return MobileViTV2Config(
        stem_chs=int(base.stem_chs * width),
        channels=tuple(int(chs * width) for chs in base.channels),
        dims=tuple(int(dim * width) for dim in base.dims),
    )


SIZES = {
    "mobilevitv2_050_256": _sizes(0.5),
    "mobilevitv2_075_256": _sizes(0.75),
    "mobilevitv2_100_256": _sizes(1.0),
    "mobilevitv2_125_256": _sizes(1.25),
    "mobilevitv2_150_256": _sizes(1.5),
    "mobilevitv2_175_256": _sizes(1.75),
    "mobilevitv2_200_256": _sizes(2.0),
}


def _cfg(name: str, size: int = 256, crop_pct: float = 0.888) -> dict[str, Any]:
    return {
        "hf_hub_id": f"timm/{name}",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "cvnets-license",
        "paper_ids": "arXiv:2206.02680",
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.cvnets_in1k": _cfg(f"{name.removesuffix('_256')}.cvnets_in1k") for name in SIZES},
        "mobilevitv2_150_256.cvnets_in22k_ft_in1k": _cfg("mobilevitv2_150.cvnets_in22k_ft_in1k"),
        "mobilevitv2_175_256.cvnets_in22k_ft_in1k": _cfg("mobilevitv2_175.cvnets_in22k_ft_in1k"),
        "mobilevitv2_200_256.cvnets_in22k_ft_in1k": _cfg("mobilevitv2_200.cvnets_in22k_ft_in1k"),
        "mobilevitv2_150_256.cvnets_in22k_ft_in1k_384": _cfg("mobilevitv2_150.cvnets_in22k_ft_in1k_384", 384, 1.0),
        "mobilevitv2_175_256.cvnets_in22k_ft_in1k_384": _cfg("mobilevitv2_175.cvnets_in22k_ft_in1k_384", 384, 1.0),
        "mobilevitv2_200_256.cvnets_in22k_ft_in1k_384": _cfg("mobilevitv2_200.cvnets_in22k_ft_in1k_384", 384, 1.0),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> MobileViTV2:
    options = asdict(SIZES[name])
    options.update({key: kwargs.pop(key) for key in list(kwargs) if key in options})
    return build_model_with_cfg(
        MobileViTV2,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
        config=MobileViTV2Config(**options),
        **kwargs,
    )


@register_model
def mobilevitv2_050_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-0.5, 1.4 M parameters."""
    return _create("mobilevitv2_050_256", pretrained, **kwargs)


@register_model
def mobilevitv2_075_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-0.75, 2.9 M parameters."""
    return _create("mobilevitv2_075_256", pretrained, **kwargs)


@register_model
def mobilevitv2_100_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-1.0, 4.9 M parameters."""
    return _create("mobilevitv2_100_256", pretrained, **kwargs)


@register_model
def mobilevitv2_125_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-1.25, 7.5 M parameters."""
    return _create("mobilevitv2_125_256", pretrained, **kwargs)


@register_model
def mobilevitv2_150_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-1.5, 10.6 M parameters."""
    return _create("mobilevitv2_150_256", pretrained, **kwargs)


@register_model
def mobilevitv2_175_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-1.75, 14.3 M parameters."""
    return _create("mobilevitv2_175_256", pretrained, **kwargs)


@register_model
def mobilevitv2_200_256(pretrained: bool = False, **kwargs: Any) -> MobileViTV2:
    """MobileViTv2-2.0, 18.4 M parameters."""
    return _create("mobilevitv2_200_256", pretrained, **kwargs)


# -------------------------------------------------------------------------------------- names in published checkpoints

# No flip of colours here: cvnets read images with OpenCV, so BGR, for the first version, and with Pillow, so RGB, from
# the release of this one on. Hugging Face's files hold the same numbers, although its image processor flips for both.
DIALECTS = (
    Dialect(
        name="cvnets' names",
        starts=(*CVNETS_STARTS, ("head.fc", "classifier.1")),
        parts=(
            ("conv_kxk", "local_rep.0"),
            ("conv_1x1", "local_rep.1.block.conv"),
            ("norm1", "pre_norm_attn.0"),
            ("attn.qkv_proj", "pre_norm_attn.1.qkv_proj.block.conv"),
            ("attn.out_proj", "pre_norm_attn.1.out_proj.block.conv"),
            ("norm2", "pre_norm_ffn.0"),
            ("mlp.fc1", "pre_norm_ffn.1.block.conv"),
            ("mlp.fc2", "pre_norm_ffn.3.block.conv"),
            *CVNETS_PARTS,
        ),
    ),
    Dialect(
        name="Hugging Face's names",
        starts=(
            *((ours, f"[mobilevitv2.]{theirs}") for ours, theirs in HUGGING_FACE_STARTS),
            ("head.fc", "classifier"),
        ),
        parts=(
            ("attn.qkv_proj", "attention.qkv_proj.convolution"),
            ("attn.out_proj", "attention.out_proj.convolution"),
            ("mlp.fc1", "ffn.conv1.convolution"),
            ("mlp.fc2", "ffn.conv2.convolution"),
            *HUGGING_FACE_PARTS,
        ),
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint under our names, for timm's own loading (`pretrained=True`)."""
    return renamed_for(model, state_dict)
