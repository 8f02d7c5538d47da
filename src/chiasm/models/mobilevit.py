"""MobileViT: inverted residuals, and at the last three strides a Transformer between two convolutions.

    Mehta, Rastegari: "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer", ICLR 2022,
    arXiv 2110.02178. Reference code: apple/ml-cvnets, Apple's sample code licence.

    image -> stem -> inverted residuals (strides 2, 4) -> 3 x [inverted residual, MobileViT block] -> 1x1 conv -> head

    MobileViT block:   map -+-> 3x3 conv, 1x1 conv -> unfold -> Transformer -> fold -> 1x1 conv -+-> 3x3 conv -> map
                            |                                                                    |
                            +--------------------------------------------------------------------+  (concatenated)

Unfolding cuts the map into 2x2 patches and lets each of the 4 pixels of a patch attend to the pixels at the same place
in all other patches; the 3x3 convolutions mix within a patch, so that every pixel sees every other.

What differs from the reference, all of it exact: maps are channels-last, so that unfold and fold are one copy each and
attention is PyTorch's fused kernel over B * 4 sequences. Any input size is taken, square or not: as in the reference,
a map that is not a multiple of the patch is resized bilinearly to one in front of the Transformer, and back behind it.
Inference takes a batch in parts that stay in cache, training does not keep the widest maps (see the layers' files). The
numbers are timm's, and so are the names of the weights.

Published (256 px, ImageNet-1k): parameters 1.3 / 2.3 / 5.6 M, top-1 69.0 / 74.7 / 78.3 % for XXS / XS / S. Images are
RGB in 0..1 without mean and standard deviation; the authors' own files expect BGR.

Shapes: B batch, C map channels, H x W map, D token width, P = 4 pixels of a patch, N = H * W / P patches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from chiasm.errors import ChiasmError
from chiasm.layers.attention import TransformerBlock
from chiasm.layers.inverted import ConvBnAct, InvertedResidual
from chiasm.layers.parts import in_parts
from chiasm.layers.unfold import fold, resize, resize_to_multiple, unfold
from chiasm.models.checkpoints import renamed_for
from chiasm.models.dialects import BGR_TO_RGB, Dialect


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """The sizes that both versions of MobileViT have.

    Attributes:
        stem_chs: channels of the stem.
        channels: of the map at strides 2, 4, 8, 16 and 32.
        convs: inverted residuals at each of these strides.
        expand: channels within an inverted residual over its input's.
        dims: token width D at the strides 8, 16 and 32.
        depths: Transformer blocks at these strides.
        mlp_ratio: width within the MLP over D.
        patch: side P of a patch in pixels of the map.
        final_chs: channels of the last 1x1 convolution, and features of the head; 0 for none.
    """

    stem_chs: int = 16
    channels: tuple[int, ...] = (32, 64, 96, 128, 160)
    convs: tuple[int, ...] = (1, 3, 1, 1, 1)
    expand: float = 4.0
    dims: tuple[int, ...] = (144, 192, 240)
    depths: tuple[int, ...] = (2, 4, 3)
    mlp_ratio: float = 2.0
    patch: int = 2
    final_chs: int = 640

    def __post_init__(self) -> None:
        for option, count in {"channels": 5, "convs": 5, "dims": 3, "depths": 3}.items():
            values = tuple(getattr(self, option))
            if len(values) != count or min(values) < 1:
                strides = "2, 4, 8, 16 and 32" if count == 5 else "8, 16 and 32"
                raise ChiasmError(f"{option} {values}: expected {count} numbers from 1 up, for the strides {strides}.")
        if self.patch < 1:
            raise ChiasmError(f"patch {self.patch}: expected its side in pixels of the map, such as 2.")


@dataclass(frozen=True, kw_only=True)
class MobileViTConfig(TrunkConfig):
    """The sizes of a MobileViT.

    Attributes:
        heads: attention heads.
    """

    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(dim % self.heads for dim in self.dims):
            raise ChiasmError(f"dims {tuple(self.dims)} with heads {self.heads}: expected multiples of the heads.")


class MobileViTBlock(nn.Module):
    """Local, then global, then both together: map (B, C, H, W) -> map (B, C, H, W)."""

    def __init__(
        self, channels: int, dim: int, depth: int, config: MobileViTConfig, *, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.patch = config.patch
        self.conv_kxk = ConvBnAct(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(
            *(
                TransformerBlock(
                    dim,
                    heads=config.heads,
                    mlp_ratio=config.mlp_ratio,
                    attn_drop=attn_drop,
                    drop_path=drop_path,
                    eps=1e-5,
                    act=nn.SiLU,
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvBnAct(dim, channels)
        self.conv_fusion = ConvBnAct(2 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x) if self.training else in_parts(self, self._forward, x, 3 * self.conv_1x1.out_channels)

    def _forward(self, x: Tensor) -> Tensor:
        local = self.conv_1x1(self.conv_kxk(x))
        even = resize_to_multiple(local, self.patch, align_corners=False)
        tokens = self.norm(self.transformer(unfold(even, self.patch)))
        mixed = resize(fold(tokens, self.patch, even.shape[-2:]), x.shape[-2:], align_corners=False)
        return self.conv_fusion(torch.cat([x, self.conv_proj(mixed)], dim=1))


class MobileViT(nn.Module):
    """Image (B, in_chans, H, W) of any size -> logits (B, num_classes).

    Args:
        config: sizes.
        num_classes: 0 gives the pooled features (B, head_hidden_size) in place of logits.
        in_chans: input channels.
        global_pool: 'avg', or '' for the map (B, C, H', W') as it is, classified pixel by pixel.
        drop_rate: dropout in front of the classifier.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 over the blocks that add to their
            input: inverted residuals that keep their shape, and Transformer blocks.
    """

    def __init__(
        self,
        config: TrunkConfig,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False

        transformers = dict(zip((2, 3, 4), zip(config.dims, config.depths, strict=True), strict=True))
        total = sum(config.convs) + len(transformers)
        rates = iter(torch.linspace(0, drop_path_rate, total, device="cpu").tolist())
        self.stem = ConvBnAct(in_chans, config.stem_chs, 3, stride=2)
        stages, in_chs = [], config.stem_chs
        for i, chs in enumerate(config.channels):
            blocks: list[nn.Module] = []
            for j in range(config.convs[i]):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(InvertedResidual(in_chs, chs, stride=stride, expand=config.expand, drop_path=next(rates)))
                in_chs = chs
            if i in transformers:
                blocks.append(self._block(chs, *transformers[i], attn_drop=attn_drop_rate, drop_path=next(rates)))
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final_conv = ConvBnAct(in_chs, config.final_chs) if config.final_chs else nn.Identity()
        self.num_features = self.head_hidden_size = config.final_chs or in_chs
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

        widths = (*config.channels[:-1], self.num_features)
        modules = (*(f"stages.{i}" for i in range(4)), "final_conv")
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": chs, "reduction": 2 ** (i + 1), "module": module}
            for i, (chs, module) in enumerate(zip(widths, modules, strict=True))
        ]
        named_apply(_init_module, self)

    def _block(self, channels: int, dim: int, depth: int, *, attn_drop: float, drop_path: float) -> nn.Module:
        assert isinstance(self.config, MobileViTConfig)
        return MobileViTBlock(channels, dim, depth, self.config, attn_drop=attn_drop, drop_path=drop_path)

    # ------------------------------------------------------------------------------------------------------- forward

    def forward_features(self, x: Tensor) -> Tensor:
        """Image -> map (B, num_features, ceil(H / 32), ceil(W / 32))."""
        x = self._enter(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return self.final_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map's logits (B, num_classes), or with `pre_logits` its mean."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _enter(self, x: Tensor) -> Tensor:
        # Channels-last from here on: tokens are then views of maps or one copy away, and 1x1 convolutions are products.
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        recompute = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        return checkpoint_seq(stage, x) if recompute else stage(x)

    # ---------------------------------------------------------------------------------------------- timm's contract

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the levels that `feature_info` lists.

        Args:
            x: image (B, in_chans, H, W).
            indices: levels to take; an int n means the last n, None all.
            norm: accepted for timm; the maps have no norm of their own.
            stop_early: do not run the blocks behind the last level taken.
            output_fmt: 'NCHW'; the levels are maps.
            intermediates_only: only the list of maps, without the final features.

        Returns:
            List of maps (B, C, ceil(H / stride), ceil(W / stride)), or (final features, that list). Where the network
            itself goes on with a map stretched to a multiple of the patch (version 2), the level is resized back.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}': the levels are maps, expected 'NCHW'.")
        sizes = [[-(-side // level["reduction"]) for side in x.shape[-2:]] for level in self.feature_info]
        taken, last_level = feature_take_indices(len(self.feature_info), indices)
        x = self._enter(x)
        maps = []
        for i, stage in enumerate(self.stages[: last_level + 1] if stop_early else self.stages):
            x = self._run(stage, x)
            if i == len(self.feature_info) - 1:
                x = self.final_conv(x)
            if i in taken:
                maps.append(resize(x, sizes[i], align_corners=True))
        if intermediates_only:
            return maps
        return x, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the levels `indices` do not need; returns them as a list."""
        taken, last_level = feature_take_indices(len(self.feature_info), indices)
        cut = last_level < len(self.feature_info) - 1
        self.stages = self.stages[: last_level + 1]
        if cut:
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last_level]["num_chs"]
        if cut or prune_head:  # a head of the whole network does not fit what is left
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes`; 0 removes it. `global_pool`: 'avg' or '', None keeps it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        reference = next(self.parameters())
        self.head.to(device=reference.device, dtype=reference.dtype)
        named_apply(_init_module, self.head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input up, for layer-wise learning-rate decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final_conv", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable


def _init_module(module: nn.Module, name: str = "") -> None:
    """Linear truncated normal of std 0.02, convolutions He (fan out, per group), norms 1 and 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1] // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- registry


def _sizes(channels: tuple[int, ...], expand: float, dims: tuple[int, ...], final_chs: int) -> MobileViTConfig:
    return MobileViTConfig(channels=channels, expand=expand, dims=dims, final_chs=final_chs)


SIZES = {
    #                            channels at strides 2..32  expand  D at strides 8, 16, 32  final chs
    "mobilevit_xxs_256": _sizes((16, 24, 48, 64, 80),       2,      (64, 80, 96),           320),
    "mobilevit_xs_256":  _sizes((32, 48, 64, 80, 96),       4,      (96, 120, 144),         384),
    "mobilevit_s_256":   _sizes((32, 64, 96, 128, 160),     4,      (144, 192, 240),        640),
}  # fmt: skip


def _cfg(name: str) -> dict[str, Any]:
    return {
        "hf_hub_id": f"timm/{name}",
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "cvnets-license",
        "paper_ids": "arXiv:2110.02178",
    }


default_cfgs = generate_default_cfgs(
    {
        "mobilevit_xxs_256.cvnets_in1k": _cfg("mobilevit_xxs.cvnets_in1k"),
        "mobilevit_xs_256.cvnets_in1k": _cfg("mobilevit_xs.cvnets_in1k"),
        "mobilevit_s_256.cvnets_in1k": _cfg("mobilevit_s.cvnets_in1k"),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> MobileViT:
    options = asdict(SIZES[name])
    options.update({key: kwargs.pop(key) for key in list(kwargs) if key in options})
    return build_model_with_cfg(
        MobileViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"},
        config=MobileViTConfig(**options),
        **kwargs,
    )


@register_model
def mobilevit_xxs_256(pretrained: bool = False, **kwargs: Any) -> MobileViT:
    """MobileViT-XXS, 1.3 M parameters."""
    return _create("mobilevit_xxs_256", pretrained, **kwargs)


@register_model
def mobilevit_xs_256(pretrained: bool = False, **kwargs: Any) -> MobileViT:
    """MobileViT-XS, 2.3 M parameters."""
    return _create("mobilevit_xs_256", pretrained, **kwargs)


@register_model
def mobilevit_s_256(pretrained: bool = False, **kwargs: Any) -> MobileViT:
    """MobileViT-S, 5.6 M parameters."""
    return _create("mobilevit_s_256", pretrained, **kwargs)


# -------------------------------------------------------------------------------------- names in published checkpoints

# What the tables of both versions share.
CVNETS_STARTS = (
    # ours                          cvnets'
    ("stem",                        "conv_1"),
    ("stages.2.1.norm",             "layer_3.1.global_rep.2"),  # behind as many Transformer blocks
    ("stages.3.1.norm",             "layer_4.1.global_rep.4"),
    ("stages.4.1.norm",             "layer_5.1.global_rep.3"),
    ("stages.{i}.1.transformer.{j}", "layer_{i+1}.1.global_rep.{j}"),
    ("stages.{i}.{j}",              "layer_{i+1}.{j}"),
)  # fmt: skip
CVNETS_PARTS = (
    ("conv1_1x1", "block.exp_1x1"),
    ("conv2_kxk", "block.conv_3x3"),
    ("conv3_1x1", "block.red_1x1"),
    ("conv", "block.conv"),
    ("bn", "block.norm"),
)
HUGGING_FACE_STARTS = (
    # ours                          theirs, behind 'mobilevit.' or 'mobilevitv2.'
    ("stem",                        "conv_stem"),
    ("stages.0",                    "encoder.layer.0.layer"),
    ("stages.1",                    "encoder.layer.1.layer"),
    ("stages.{i}.0",                "encoder.layer.{i}.downsampling_layer"),
    ("stages.{i}.1.norm",           "encoder.layer.{i}.layernorm"),
    ("stages.{i}.1.transformer",    "encoder.layer.{i}.transformer.layer"),
    ("stages.{i}.1",                "encoder.layer.{i}"),
)  # fmt: skip
HUGGING_FACE_PARTS = (
    ("conv1_1x1", "expand_1x1"),
    ("conv2_kxk", "conv_3x3"),
    ("conv3_1x1", "reduce_1x1"),
    ("conv_1x1", "conv_1x1.convolution"),
    ("conv_proj", "conv_projection"),
    ("conv", "convolution"),
    ("bn", "normalization"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
)
# The authors' networks read BGR, and so do those made from them at Hugging Face and OpenMMLab; timm's and ours RGB.
_READS_BGR = (("stem.conv.weight", BGR_TO_RGB),)

DIALECTS = (
    Dialect(
        name="cvnets' names",
        starts=(*CVNETS_STARTS, ("final_conv", "conv_1x1_exp"), ("head.fc", "classifier.fc")),
        parts=(
            ("conv_kxk", "local_rep.conv_3x3"),
            ("conv_1x1", "local_rep.conv_1x1.block.conv"),
            ("conv_fusion", "fusion"),
            *CVNETS_PARTS,
            ("norm1", "pre_norm_mha.0"),
            ("attn.qkv", "pre_norm_mha.1.qkv_proj"),
            ("attn.proj", "pre_norm_mha.1.out_proj"),
            ("norm2", "pre_norm_ffn.0"),
            ("mlp.fc1", "pre_norm_ffn.1"),
            ("mlp.fc2", "pre_norm_ffn.4"),
        ),
        layouts=_READS_BGR,
    ),
    Dialect(
        name="Hugging Face's names",
        starts=(
            *((ours, f"[mobilevit.]{theirs}") for ours, theirs in HUGGING_FACE_STARTS),
            ("final_conv", "[mobilevit.]conv_1x1_exp"),
            ("head.fc", "classifier"),
        ),
        parts=(
            ("conv_fusion", "fusion"),
            *HUGGING_FACE_PARTS,
            ("attn.qkv", ("attention.attention.query", "attention.attention.key", "attention.attention.value")),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ),
        layouts=_READS_BGR,
    ),
    Dialect(
        name="OpenMMLab's names",
        starts=(
            ("stem", "[backbone.]stem"),
            ("stages.2.1.norm", "[backbone.]layers.2.1.global_rep.2"),
            ("stages.3.1.norm", "[backbone.]layers.3.1.global_rep.4"),
            ("stages.4.1.norm", "[backbone.]layers.4.1.global_rep.3"),
            ("stages.{i}.1.transformer", "[backbone.]layers.{i}.1.global_rep"),
            ("stages", "[backbone.]layers"),
            ("final_conv", "[backbone.]conv_1x1_exp"),
            ("head.fc", "head.fc"),
        ),
        parts=(
            ("conv1_1x1", "conv.0"),
            ("conv2_kxk", "conv.1"),
            ("conv3_1x1", "conv.2"),
            ("conv_kxk", "local_rep.0"),
            ("conv_1x1", "local_rep.1.conv"),
            ("norm1", "ln1"),
            ("norm2", "ln2"),
            ("mlp.fc1", "ffn.layers.0.0"),
            ("mlp.fc2", "ffn.layers.1"),
        ),
        layouts=_READS_BGR,
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint under our names, for timm's own loading (`pretrained=True`)."""
    return renamed_for(model, state_dict)
