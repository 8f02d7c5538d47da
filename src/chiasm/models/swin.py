"""Swin: a Transformer over maps, whose attention stays within windows that shift from block to block.

    Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    ICCV 2021, arXiv 2103.14030. Reference code: MIT.

    image -> 4x4 patches -> stage 1 -> merge 2x2 -> stage 2 -> merge 2x2 -> stage 3 -> merge 2x2 -> stage 4 -> head

    stage: blocks by turns   tokens -> [LayerNorm, attention within windows] + -> [LayerNorm, MLP] + -> tokens
                             tokens -> [LayerNorm, attention within shifted windows] + -> [LayerNorm, MLP] + -> tokens

What differs from the reference, all of it exact: tokens are moved by one gather from windows to shifted windows, in
place of rolling, cutting, joining and rolling back; bias and shift mask are one addend in PyTorch's fused attention;
the patch embedding is a matrix product. Any input is taken, square or not: the image and the maps are zero-padded at
the bottom and right to whole patches, windows and pairs of tokens. The names of the weights are timm's.

Published (ImageNet-1k): parameters 28.3 / 49.6 / 87.8 M, top-1 81.2 / 83.2 / 83.5 % for tiny / small / base at 224 px.

Shapes: B batch, H x W map, C channels, L = H * W tokens; maps are (B, H, W, C) inside and (B, C, H, W) as levels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.layers.by_hand import Linear, eager
from chiasm.layers.fused import FusedLinear
from chiasm.layers.mlp import PART, Mlp
from chiasm.layers.residual import Residual
from chiasm.layers.window import (
    Order,
    Pair,
    WindowAttention,
    Windows,
    between_windows,
    deal_windows,
    into_windows,
    out_of_windows,
    resize_bias_table,
)
from chiasm.models.checkpoints import renamed_for
from chiasm.models.dialects import Conversion, Dialect

PATCH = 4
WINDOWS = range(2, 33)  # sides of a window that make sense: attention grows with the fourth power


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """The sizes of a Swin, and its options, whose defaults are the published behaviour.

    Attributes:
        embed_dim: channels C of the first stage; each further stage has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side of a window in tokens.
        img_size: side, or height and width, of the images that the network is made for, in pixels; it takes any size.
        order: what comes first where a map is not a whole number of windows. 'pad_then_roll' is the authors' detection
            code, torchvision, mmdetection and HF; an axis no longer than the window is not shifted, whatever the image.
            'roll_then_pad' is timm: stages whose map, for images of `img_size`, is no larger than the window have that
            map as their window and no shift, and these stay as they are for images of other sizes.
        out_norms: a LayerNorm on every level, as detectors have it.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    img_size: int | tuple[int, int] = 224
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    order: Order = "pad_then_roll"
    out_norms: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.window_size, int) or self.window_size not in WINDOWS:
            raise ChiasmError(
                f"window_size {self.window_size}: expected a side in tokens from {WINDOWS[0]} to {WINDOWS[-1]}, such "
                "as 7; the window is square."
            )
        if self.order not in get_args(Order):
            raise UnknownNameError("order", str(self.order), get_args(Order), f"One of {', '.join(get_args(Order))}.")
        if len(self.depths) != len(self.num_heads) or min((*self.depths, *self.num_heads), default=0) < 1:
            raise ChiasmError(
                f"depths {tuple(self.depths)} and num_heads {tuple(self.num_heads)}: expected one of each per stage, "
                "1 or more."
            )
        for stage, heads in enumerate(self.num_heads):
            if self.dim(stage) % heads:
                raise ChiasmError(
                    f"num_heads {tuple(self.num_heads)}: stage {stage + 1} has {self.dim(stage)} channels, which "
                    f"do not divide by {heads}."
                )
        if min(self.image) < 1:
            raise ChiasmError(f"img_size {self.img_size}: expected a side in pixels of 1 or more.")

    @property
    def image(self) -> Pair:
        """H and W of the images that the network is made for."""
        height, width = (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size
        return height, width

    def dim(self, stage: int) -> int:
        return self.embed_dim * 2**stage

    def stride(self, stage: int) -> int:
        return PATCH * 2**stage

    def window(self, stage: int) -> Pair:
        """h and w of a stage's windows."""
        height, width = self._map(stage) if self.order == "roll_then_pad" else (self.window_size,) * 2
        return min(height, self.window_size), min(width, self.window_size)

    def shift(self, stage: int) -> Pair:
        """By how much a stage's second, fourth ... blocks shift their windows."""
        height, width = self._map(stage) if self.order == "roll_then_pad" else (self.window_size + 1,) * 2
        half = self.window_size // 2
        return half * (height > self.window_size), half * (width > self.window_size)

    def _map(self, stage: int) -> Pair:
        """H and W of a stage's map for images of `img_size`."""
        height, width = self.image
        return -(-height // self.stride(stage)), -(-width // self.stride(stage))


class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> map (B, ceil(H / 4), ceil(W / 4), C): 4x4 patches, linear, LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.linear(_patches(x), self.proj.weight.flatten(1), self.proj.bias))

    def optimized(self) -> nn.Module:
        """The same for inference."""
        return FusedPatchEmbed(self)


class FusedPatchEmbed(nn.Module):
    """A `PatchEmbed` for inference."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        conv = embed.proj
        linear = nn.Linear(conv.weight[0].numel(), conv.out_channels, device="meta")
        linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias}, assign=True)
        self.proj, self.norm = FusedLinear(linear), embed.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(_patches(x)))


def _patches(x: Tensor) -> Tensor:
    """Image (B, in_chans, H, W), zero-padded to whole patches -> (B, ceil(H / 4), ceil(W / 4), in_chans * 16)."""
    height, width = x.shape[-2:]
    if height % PATCH or width % PATCH:
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))
    return x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5).flatten(3)


class PatchMerging(nn.Module):
    """Map (B, H, W, C) -> map (B, ceil(H / 2), ceil(W / 2), 2C): each 2x2 tokens side by side, LayerNorm, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Of the four tokens, the lower left is the second, as published: column by column.
        fours = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(fours))


class SwinBlock(nn.Module):
    """LayerNorm, attention in windows, LayerNorm, MLP with GELU, residuals; tokens (B, L, C) -> the same.

    Tokens are in the order of the windows where these cover the map exactly, row by row otherwise.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window: Pair,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads=heads, window=window, qkv_bias=qkv_bias, attn_drop=attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.residual = Residual(drop_path)

    def forward(self, tokens: Tensor, windows: Windows) -> Tensor:
        tokens = self.residual(tokens, lambda part: self.attn(self.norm1(part), windows))
        return self.residual(tokens, lambda part: self.mlp(self.norm2(part)))

    def optimized(self) -> nn.Module:
        """The same for inference; its input's memory becomes its output's."""
        return FusedSwinBlock(self)


class FusedSwinBlock(nn.Module):
    """A `SwinBlock` for inference: some images at a time, so that they stay in cache, and in place."""

    def __init__(self, block: SwinBlock) -> None:
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn.optimized()
        self.norm2, self.mlp = block.norm2, block.mlp.optimized()

    def forward(self, tokens: Tensor, windows: Windows) -> Tensor:
        if not (tokens.is_cpu and tokens.is_contiguous()) or torch.is_grad_enabled() or not eager():
            tokens = self.attn(self.norm1(tokens), windows, tokens, overwrite=False)
            return self.mlp(self.norm2(tokens), tokens, overwrite=False)
        for images in tokens.split(max(PART // tokens.shape[1], 1)):
            self.attn(self.norm1(images), windows, images, overwrite=True)
            self.mlp(self.norm2(images), images, overwrite=True)
        return tokens


class SwinStage(nn.Module):
    """Map (B, H, W, C) -> map, merged to (B, ceil(H / 2), ceil(W / 2), 2C) at the start of all stages but the first."""

    def __init__(
        self, downsample: nn.Module, blocks: list[SwinBlock], *, window: Pair, shift: Pair, order: Order
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.window, self.shift, self.order = window, shift, order
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = x.shape[1], x.shape[2]
        tokens = x.flatten(1, 2)
        by_turns = self.deals(x, size)
        held: Windows | None = None  # the windows in whose order the tokens are; None: row by row
        for i, block in enumerate(self.blocks):
            windows = by_turns[i % 2]
            if windows.empty is None and windows is not held:
                tokens = into_windows(tokens, windows) if held is None else between_windows(tokens, held, windows)
                held = windows
            run: Any = block
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                run = partial(checkpoint, block, use_reentrant=False)
            tokens = run(tokens, windows)
        if held is not None:
            tokens = out_of_windows(tokens, held)
        return tokens.unflatten(1, size)

    def deals(self, x: Tensor, size: Pair) -> tuple[Windows, Windows]:
        """The windows of even and of odd blocks for a map of H and W."""
        shift = self.shift
        if self.order == "pad_then_roll":  # a window that spans the map sees all of it as it is
            height, width = (s * (n > w) for s, n, w in zip(shift, size, self.window, strict=True))
            shift = height, width
        plain = deal_windows(x, size, self.window, (0, 0), self.order)
        return plain, deal_windows(x, size, self.window, shift, self.order) if any(shift) else plain


class Swin(nn.Module):
    """Image (B, in_chans, H, W) of any size -> logits (B, num_classes).

    Args:
        config: sizes and options.
        num_classes: 0 gives the pooled features (B, num_features) in place of logits.
        in_chans: input channels.
        global_pool: 'avg', or '' for the map (B, H', W', C) as it is, classified token by token.
        drop_rate: dropout in front of the classifier.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    """

    output_fmt = "NHWC"  # for timm: how forward_features lays out its map

    def __init__(
        self,
        config: SwinConfig,
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
        self.global_pool = _check_pool(global_pool)
        stages = len(config.depths)
        self.num_features = config.dim(stages - 1)

        self.patch_embed = PatchEmbed(in_chans, config.embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(config.depths), device="cpu").tolist())
        self.layers = nn.ModuleList(
            SwinStage(
                PatchMerging(config.dim(i - 1)) if i else nn.Identity(),
                [
                    SwinBlock(
                        config.dim(i),
                        heads=config.num_heads[i],
                        window=config.window(i),
                        mlp_ratio=config.mlp_ratio,
                        qkv_bias=config.qkv_bias,
                        attn_drop=attn_drop_rate,
                        drop_path=next(rates),
                    )
                    for _ in range(depth)
                ],
                window=config.window(i),
                shift=config.shift(i),
                order=config.order,
            )
            for i, depth in enumerate(config.depths)
        )
        self.norm: nn.Module = nn.LayerNorm(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt=self.output_fmt
        )
        self.head_hidden_size = self.head.num_features
        self.out_norms = nn.ModuleList(nn.LayerNorm(config.dim(i)) for i in range(stages)) if config.out_norms else None
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": config.dim(i), "reduction": config.stride(i), "module": f"layers.{i}"} for i in range(stages)
        ]
        self.init_weights()

    # ------------------------------------------------------------------------------------------------------- forward

    def forward_features(self, x: Tensor) -> Tensor:
        """Image -> map (B, ceil(H / 32), ceil(W / 32), num_features)."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes), or with `pre_logits` the classifier's input (B, num_features)."""
        return self.head(features, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

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
        """The maps behind the stages, at strides 4, 8, 16 and 32.

        Args:
            x: image (B, in_chans, H, W).
            indices: stages to take; an int n means the last n, None all.
            norm: apply the classifier's norm to the last stage's map. The levels' own (`out_norms`) always apply.
            stop_early: do not run the stages behind the last one taken.
            output_fmt: 'NCHW'; the levels are maps.
            intermediates_only: only the list of maps, without the final features.

        Returns:
            List of maps (B, C, ceil(H / stride), ceil(W / stride)) in channels-last memory, or (features, that list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}': the levels are maps, expected 'NCHW'.")
        taken, last = feature_take_indices(len(self.layers), indices)
        maps = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage(x)
            if i in taken:
                level = self.norm(x) if norm and i == len(self.config.depths) - 1 else x
                level = self.out_norms[i](x) if self.out_norms is not None else level
                maps.append(level.permute(0, 3, 1, 2))
        if intermediates_only:
            return maps
        return self.norm(x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the levels `indices` do not need; returns them as a list."""
        taken, last = feature_take_indices(len(self.layers), indices)
        cut = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        if self.out_norms is not None:
            norms = (norm if i in taken else nn.Identity() for i, norm in enumerate(self.out_norms))
            self.out_norms = nn.ModuleList(norms)
        if prune_norm or cut:
            self.norm = nn.Identity()  # it belongs to the last stage's map
        if prune_head or cut:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes`; 0 removes it. `global_pool`: 'avg' or '', None keeps it."""
        self.global_pool = _check_pool(self.global_pool if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        reference = next(self.parameters())
        self.head.to(device=reference.device, dtype=reference.dtype)
        named_apply(_init_module, self.head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input up, for layer-wise learning-rate decay."""
        blocks = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.\w+\.(\d+)", None),
            (r"^(?:out_)?norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), blocks[-1]] if coarse else blocks}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, more time."""
        stage: Any
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def init_weights(self) -> None:
        """Linear and bias tables truncated normal of std 0.02, norms 1 and 0, the patch embedding as PyTorch has it."""
        named_apply(_init_module, self)


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ChiasmError(f"global_pool='{global_pool}': expected 'avg' (the map's mean) or '' (the map as it is).")
    return global_pool


def _init_module(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, WindowAttention):
        trunc_normal_(module.relative_position_bias_table, std=0.02)


# ------------------------------------------------------------------------------------------------------------- registry


def _sizes(dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int, side: int) -> SwinConfig:
    return SwinConfig(embed_dim=dim, depths=depths, num_heads=heads, window_size=window, img_size=side)


# The paper's section 3.3; heads have 32 channels everywhere. The last is for small images.
SIZES = {
    #                                 C    layer numbers   heads            window  image
    "swin_tiny_window7_224":   _sizes(96,  (2, 2, 6, 2),   (3, 6, 12, 24),  7,      224),
    "swin_small_window7_224":  _sizes(96,  (2, 2, 18, 2),  (3, 6, 12, 24),  7,      224),
    "swin_base_window7_224":   _sizes(128, (2, 2, 18, 2),  (4, 8, 16, 32),  7,      224),
    "swin_base_window12_384":  _sizes(128, (2, 2, 18, 2),  (4, 8, 16, 32),  12,     384),
    "swin_large_window7_224":  _sizes(192, (2, 2, 18, 2),  (6, 12, 24, 48), 7,      224),
    "swin_large_window12_384": _sizes(192, (2, 2, 18, 2),  (6, 12, 24, 48), 12,     384),
    "swin_nano_window4_128":   _sizes(32,  (2, 2, 6, 2),   (1, 2, 4, 8),    4,      128),
}  # fmt: skip


def _cfg(hub_id: str = "", size: int = 224, crop_pct: float = 0.9) -> dict[str, Any]:
    return {
        "url": "",
        "hf_hub_id": hub_id or None,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2103.14030",
    }


# The authors' weights as timm publishes them; the large ones were trained on ImageNet-22k first.
default_cfgs = generate_default_cfgs(
    {
        "swin_tiny_window7_224.ms_in1k": _cfg("timm/swin_tiny_patch4_window7_224.ms_in1k"),
        "swin_small_window7_224.ms_in1k": _cfg("timm/swin_small_patch4_window7_224.ms_in1k"),
        "swin_base_window7_224.ms_in1k": _cfg("timm/swin_base_patch4_window7_224.ms_in1k"),
        "swin_base_window12_384.ms_in1k": _cfg("timm/swin_base_patch4_window12_384.ms_in1k", 384, 1.0),
        "swin_large_window7_224.ms_in22k_ft_in1k": _cfg("timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"),
        "swin_large_window12_384.ms_in22k_ft_in1k": _cfg(
            "timm/swin_large_patch4_window12_384.ms_in22k_ft_in1k", 384, 1.0
        ),
        "swin_nano_window4_128.untrained": _cfg(size=128, crop_pct=1.0),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Swin:
    options = asdict(SIZES[name])
    options.update({key: kwargs.pop(key) for key in list(kwargs) if key in options})
    stages = range(len(options["depths"]))
    return build_model_with_cfg(
        Swin,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(stages), "feature_cls": "getter"},
        config=SwinConfig(**options),
        **kwargs,
    )


@register_model
def swin_tiny_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-T, 28.3 M parameters."""
    return _create("swin_tiny_window7_224", pretrained, **kwargs)


@register_model
def swin_small_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-S, 49.6 M parameters."""
    return _create("swin_small_window7_224", pretrained, **kwargs)


@register_model
def swin_base_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-B, 87.8 M parameters."""
    return _create("swin_base_window7_224", pretrained, **kwargs)


@register_model
def swin_base_window12_384(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-B for 384 px, 87.9 M parameters."""
    return _create("swin_base_window12_384", pretrained, **kwargs)


@register_model
def swin_large_window7_224(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-L, 196.5 M parameters."""
    return _create("swin_large_window7_224", pretrained, **kwargs)


@register_model
def swin_large_window12_384(pretrained: bool = False, **kwargs: Any) -> Swin:
    """Swin-L for 384 px, 196.7 M parameters."""
    return _create("swin_large_window12_384", pretrained, **kwargs)


@register_model
def swin_nano_window4_128(pretrained: bool = False, **kwargs: Any) -> Swin:
    """For images of about 128 px, sized to train on a laptop's processor."""
    return _create("swin_nano_window4_128", pretrained, **kwargs)


# -------------------------------------------------------------------------------------- names in published checkpoints


def adapt_weight(model: nn.Module, key: str, value: Tensor, wanted: Tensor) -> tuple[Tensor, str] | None:
    """A bias table of another square window, interpolated to the model's window, and words for what was done."""
    if not key.endswith("relative_position_bias_table") or value.ndim != 2 or value.shape[1:] != wanted.shape[1:]:
        return None
    side = round(value.shape[0] ** 0.5)
    if side**2 != value.shape[0] or side % 2 == 0:
        return None
    attention = model.get_submodule(key.rpartition(".")[0])
    assert isinstance(attention, WindowAttention)
    height, width = attention.window
    what = f"bias table of a {(side + 1) // 2}x{(side + 1) // 2} window interpolated to {height}x{width}"
    return resize_bias_table(value, attention.window), what


def _from_unfold(weight: Tensor) -> Tensor:
    """The last axis from (C, row, column), nn.Unfold's order of four tokens that are merged, to (column, row, C)."""
    return weight.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


def _to_unfold(weight: Tensor) -> Tensor:
    """The inverse."""
    return weight.unflatten(-1, (2, 2, -1)).transpose(-3, -2).movedim(-1, -3).flatten(-3)


_UNFOLD = Conversion("patch merging from the order of nn.Unfold", _from_unfold, _to_unfold)


_AUTHORS = Dialect(
    name="the authors' names",
    starts=(
        ("layers.{i+1}.downsample", "layers.{i}.downsample"),  # at the end of a stage, ours at the start of the next
        ("layers.{i}.blocks", "layers.{i}.blocks"),
        ("patch_embed", "patch_embed"),
        ("norm", "norm"),
        ("out_norms.{i}", "norm{i}"),
        ("head.fc", "head"),
    ),
)
_TORCHVISION = Dialect(
    name="torchvision's names",
    starts=(
        ("patch_embed.proj", "features.0.0"),
        ("patch_embed.norm", "features.0.2"),
        ("layers.{i}.downsample", "features.{2i}"),
        ("layers.{i}.blocks", "features.{2i+1}"),
        ("norm", "norm"),
        ("head.fc", "head"),
    ),
    parts=(("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3")),
)
_OPENMMLAB = Dialect(
    name="OpenMMLab's names",
    starts=(
        ("patch_embed.proj", "[backbone.]patch_embed.projection"),
        ("patch_embed.norm", "[backbone.]patch_embed.norm"),
        ("layers.{i+1}.downsample", "[backbone.]stages.{i}.downsample"),
        ("layers.{i}.blocks", "[backbone.]stages.{i}.blocks"),
        ("norm", "[backbone.]norm3"),
        ("head.fc", "head.fc"),
    ),
    parts=(("attn", "attn.w_msa"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1")),
    layouts=(
        ("layers.{i}.downsample.reduction.weight", _UNFOLD),
        ("layers.{i}.downsample.norm.weight", _UNFOLD),
        ("layers.{i}.downsample.norm.bias", _UNFOLD),
    ),
)
_OPENMMLAB_DETECTORS = replace(
    _OPENMMLAB,
    name="OpenMMLab's names in detectors",
    starts=(("out_norms.{i}", "[backbone.]norm{i}"), *(row for row in _OPENMMLAB.starts if row[0] != "norm")),
)
_HUGGING_FACE = Dialect(
    name="Hugging Face's names",
    starts=(
        ("patch_embed.proj", "[swin.]embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "[swin.]embeddings.norm"),
        ("layers.{i+1}.downsample", "[swin.]encoder.layers.{i}.downsample"),
        ("layers.{i}.blocks", "[swin.]encoder.layers.{i}.blocks"),
        ("norm", "[swin.]layernorm"),
        ("out_norms.{i}", "hidden_states_norms.stage{i+1}"),
        ("head.fc", "classifier"),
    ),
    parts=(
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.qkv", ("attention.self.query", "attention.self.key", "attention.self.value")),
        ("attn.proj", "attention.output.dense"),
        ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ),
)
_HUGGING_FACE_NEWER = replace(
    _HUGGING_FACE,
    name="Hugging Face's newer names",
    parts=(
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
        ("attn.proj", "attention.o_proj"),
        ("attn.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    ),
)
DIALECTS = (_AUTHORS, _TORCHVISION, _OPENMMLAB, _OPENMMLAB_DETECTORS, _HUGGING_FACE, _HUGGING_FACE_NEWER)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint under our names, for timm's own loading (`pretrained=True`)."""
    return renamed_for(model, state_dict)
