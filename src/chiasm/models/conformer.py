"""The visual Conformer: a ResNet-like branch and a Transformer branch, run side by side and coupled at every block.

    Peng, Huang, Gu, Xie, Wang, Jiao, Ye: "Conformer: Local Features Coupling Global Representations for Visual
    Recognition", ICCV 2021, arXiv 2105.03889. Reference code: Apache-2.0.

                    image
                      |
                     stem ------------------ patch embedding, class token
                      |                              |
          block 1   conv                        Transformer          (not yet coupled)
                      |                              |
    blocks 2..12    conv --- local details --->  +  down
                      |                         Transformer
                    conv <-- global context --- up   |
                      |                              |
                 mean, linear                class token, linear     logits of each branch; the model's are their mean

What differs from the reference, all of it exact: average pooling stands before the 1x1 projection, nearest up-sampling
is a broadcast, channels-last maps are read as tokens without a copy, attention is PyTorch's fused kernel. And one
extension: the stem's map is zero-padded at the bottom and right to a multiple of patch / stem stride, so that any input
of at least one patch is taken, square or not (the reference fails; OpenMMLab pads the same way).

Published (224 px, ImageNet-1k): parameters 23.5 / 37.7 / 38.9 / 83.3 M, top-1 81.3 / 83.4 / 82.0 / 84.1 %
for tiny / small / small patch 32 / base. Its lasting value is the structure; newer networks reach the accuracy of
Conformer-S for fewer MACs.

Shapes: B batch, C map channels, H x W map, D token width, N = H * W tokens at the patch's stride.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.layers.attention import TransformerBlock
from chiasm.layers.conv import Bottleneck, FusedBottleneck, Stem
from chiasm.layers.coupling import MapToTokens, Pool, TokensToMap, Upsample
from chiasm.layers.tokens import map_to_tokens, pad_to_multiple, tokens_to_map
from chiasm.models.checkpoints import renamed_for
from chiasm.models.dialects import Dialect

Coupling = Literal["both", "map_to_tokens", "tokens_to_map", "none"]
Branches = Literal["both", "conv", "tokens"]
Supervision = Literal["both", "conv", "tokens"]
HeadFusion = Literal["logits", "features"]
Bottlenecks = Bottleneck | FusedBottleneck
GlobalPool = Literal["avg", ""]


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """The sizes of a Conformer, and its options, whose defaults are the published behaviour.

    Attributes:
        patch: stride of the tokens in pixels; a multiple of 4 * stem_stride.
        stem_stride: 4 (published), 2 or 1; the map's stages run at 1, 2 and 4 times this stride.
        stem_chs: channels of the stem.
        channel_ratio: channels of the first stage over `stem_chs`; the second has twice, the third four times as many.
        dim: token width D.
        heads: attention heads.
        depth: blocks, a multiple of 3.
        coupling: which way features cross at blocks 2..depth.
        pool: pooling of the coupling down.
        upsample: up-sampling of the coupling up.
        branches: which branches exist at all; one alone is the plain network it would be.
        supervision: which branch has a head.
        head_fusion: 'logits' averages the heads' logits; 'features' puts one linear head on both pooled features.
    """

    patch: int = 16
    stem_stride: int = 4
    stem_chs: int = 64
    channel_ratio: float = 1
    dim: int = 384
    heads: int = 6
    depth: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    coupling: Coupling = "both"
    pool: Pool = "avg"
    upsample: Upsample = "nearest"
    branches: Branches = "both"
    supervision: Supervision = "both"
    head_fusion: HeadFusion = "logits"

    def __post_init__(self) -> None:
        options = {
            "coupling": ("both", "map_to_tokens", "tokens_to_map", "none"),
            "pool": ("avg", "max"),
            "upsample": ("nearest", "bilinear"),
            "branches": ("both", "conv", "tokens"),
            "supervision": ("both", "conv", "tokens"),
            "head_fusion": ("logits", "features"),
        }
        for option, allowed in options.items():
            value = getattr(self, option)
            if value not in allowed:
                raise UnknownNameError(option, str(value), allowed, f"One of {', '.join(allowed)}.")
        if self.depth % 3:
            raise ChiasmError(f"depth {self.depth}: expected a multiple of 3, as each stage has a third of the blocks.")
        if self.stem_stride not in (1, 2, 4) or self.patch % (4 * self.stem_stride):
            raise ChiasmError(
                f"patch {self.patch} with stem_stride {self.stem_stride}: expected a stem stride of 1, 2 or 4 and a "
                f"patch that is a multiple of 4 * stem_stride, such as {4 * self.stem_stride}."
            )
        if self.branches != "both" and (self.supervision != "both" or self.head_fusion != "logits"):
            raise ChiasmError(
                f"branches={self.branches!r} has one head: leave supervision and head_fusion as they are."
            )
        if self.supervision != "both" and self.head_fusion == "features":
            raise ChiasmError("head_fusion='features' reads both branches: leave supervision='both'.")
        fed_by = {"conv": "tokens_to_map", "tokens": "map_to_tokens"}.get(self.supervision)
        if fed_by and self.coupling not in ("both", fed_by):
            raise ChiasmError(
                f"supervision={self.supervision!r} with coupling={self.coupling!r} leaves the other branch without a "
                f"gradient: use coupling='both', or build it alone with branches={self.supervision!r}."
            )

    @property
    def stage_depth(self) -> int:
        return self.depth // 3

    def stage(self, block: int) -> int:
        """The stage 0..2 of a block 0..depth-1."""
        return block // self.stage_depth

    def channels(self, block: int) -> int:
        """The map's channels after a block."""
        return int(self.stem_chs * self.channel_ratio) * 2 ** self.stage(block)

    def stride(self, block: int) -> int:
        """The stride in pixels at which a block's coupled maps run (the last block ends at twice this)."""
        return self.stem_stride * 2 ** self.stage(block)


class ConvBlock(nn.Module):
    """Two bottlenecks without a Transformer beside them: a block of the conv branch alone. The first block has one."""

    def __init__(self, enter: Bottlenecks, leave: Bottlenecks | None) -> None:
        super().__init__()
        self.conv_in, self.conv_out = enter, leave

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.conv_in(x)
        return x if self.conv_out is None else self.conv_out(x)[0]

    def optimized(self) -> ConvBlock:
        """The same for inference."""
        return ConvBlock(*_optimized(self.conv_in, self.conv_out))


class CoupledBlock(nn.Module):
    """One block of both branches: map (B, C, H, W), tokens (B, 1 + N, D) -> the same of the next depth.

    `down` and `up` are None where features do not cross that way, and `conv_out` where no head reads the map behind it.
    """

    def __init__(
        self,
        conv_in: Bottlenecks,
        down: MapToTokens | None,
        transformer: TransformerBlock,
        up: TokensToMap | None,
        conv_out: Bottlenecks | None,
    ) -> None:
        super().__init__()
        self.conv_in, self.down, self.transformer, self.up, self.conv_out = conv_in, down, transformer, up, conv_out

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, local = self.conv_in(x)
        if self.down is not None:
            tokens = self.down(local, tokens)
        tokens = self.transformer(tokens)
        if self.conv_out is not None:
            inner = self.conv_out.enter(x)
            if self.up is not None:
                inner = self.up(tokens, inner)
            x, _ = self.conv_out.leave(inner, x)
        return x, tokens

    def optimized(self) -> CoupledBlock:
        """The same for inference."""
        conv_in, conv_out = _optimized(self.conv_in, self.conv_out)
        return CoupledBlock(conv_in, self.down, self.transformer, self.up, conv_out)


def _optimized(conv_in: Bottlenecks, conv_out: Bottlenecks | None) -> tuple[FusedBottleneck, FusedBottleneck | None]:
    """Nothing but `conv_out` reads what `conv_in` gives, so it may write over it."""
    assert isinstance(conv_in, Bottleneck)
    return conv_in.optimized(), conv_out.optimized(overwrite=True) if isinstance(conv_out, Bottleneck) else None


class Conformer(nn.Module):
    """Image (B, in_chans, H, W), H and W at least one patch -> logits (B, num_classes): the mean of the two heads'.

    Args:
        config: sizes and options.
        num_classes: 0 gives the concatenated pooled features (B, head_hidden_size) in place of logits.
        in_chans: input channels.
        global_pool: 'avg' pools the features for the heads; '' leaves them as they are, which takes num_classes=0.
        drop_rate: dropout in front of the heads.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth of the last Transformer block, rising linearly from 0; none in the conv branch.
    """

    def __init__(
        self,
        config: ConformerConfig,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: GlobalPool = "avg",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.branches = ("conv", "tokens") if config.branches == "both" else (config.branches,)
        self.grad_checkpointing = False
        last = config.depth - 1
        map_chs, map_stride = config.channels(last), 2 * config.stride(last)

        self.stem = Stem(in_chans, config.stem_chs, stride=config.stem_stride)
        if "tokens" in self.branches:
            cell = config.patch // config.stem_stride
            self.patch_embed = nn.Conv2d(config.stem_chs, config.dim, cell, cell)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        rates = torch.linspace(0, drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(self._block(i, rates[i], attn_drop_rate) for i in range(config.depth))
        if config.supervision == "tokens":
            _freeze_unread(self.blocks[-1])
        # Without a head of its own (or one it shares) the tokens' last norm would have no gradient.
        reads_tokens = "tokens" in self.branches and config.supervision != "conv"
        self.norm = nn.LayerNorm(config.dim) if reads_tokens else nn.Identity()  # eps 1e-5, as published

        widths = {"conv": map_chs, "tokens": config.dim}
        self.head_names = tuple(b for b in self.branches if config.supervision in ("both", b))
        self.head_widths = {name: widths[name] for name in self.head_names}
        if config.head_fusion == "features":
            self.head_widths = {"fused": sum(widths.values())}
        self.num_features = widths[self.branches[0]]
        self.head_hidden_size = sum(self.head_widths.values())
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = _check_pool(global_pool, num_classes)
        self.heads = self._heads(num_classes)

        # The authors' pyramid: the maps behind the last block of each stage and behind the last but one block.
        levels = [config.stage_depth - 1, 2 * config.stage_depth - 1, last - 1, last]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": config.channels(i), "reduction": config.stride(i), "module": f"blocks.{i}"} for i in levels
        ]
        if "conv" not in self.branches:
            self.feature_info = [
                {**level, "num_chs": config.dim, "reduction": config.patch} for level in self.feature_info
            ]
        elif config.supervision != "tokens":
            self.feature_info[-1]["reduction"] = map_stride
        self.init_weights()

    def _block(self, i: int, drop_path: float, attn_drop: float) -> nn.Module:
        config, last = self.config, self.config.depth - 1
        transformer = partial(
            TransformerBlock,
            config.dim,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            attn_drop=attn_drop,
            drop_path=drop_path,
        )
        if "conv" not in self.branches:
            return transformer()
        in_chs, chs = (config.channels(i - 1) if i else config.stem_chs), config.channels(i)
        new_stage = i > 0 and config.stage(i) != config.stage(i - 1)
        conv_in = Bottleneck(in_chs, chs, stride=2 if new_stage else 1, project=new_stage or i == 0)
        unread = i == last and config.supervision == "tokens"  # nothing would read the map behind it
        conv_out = None if i == 0 or unread else Bottleneck(chs, chs, stride=2 if i == last else 1, project=i == last)
        if "tokens" not in self.branches:
            return ConvBlock(conv_in, conv_out)
        mid_chs, stride = conv_in.mid_chs, config.patch // config.stride(i)
        down = up = None
        if i > 0 and config.coupling in ("both", "map_to_tokens"):
            down = MapToTokens(mid_chs, config.dim, stride=stride, pool=config.pool)
        if conv_out is not None and config.coupling in ("both", "tokens_to_map"):
            up = TokensToMap(config.dim, mid_chs, stride=stride, upsample=config.upsample)
        return CoupledBlock(conv_in, down, transformer(), up, conv_out)

    def _heads(self, num_classes: int) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                name: nn.Linear(width, num_classes) if num_classes else nn.Identity()
                for name, width in self.head_widths.items()
            }
        )

    # ------------------------------------------------------------------------------------------------------- forward

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image -> (map (B, C, H', W'), tokens (B, 1 + N, D)); of one branch alone, only that one."""
        x, tokens = self._enter(x)
        for block in self.blocks:
            x, tokens = self._step(block, x, tokens)
        return self._leave(x, tokens)

    def forward_head(self, features: tuple[Tensor, ...], pre_logits: bool = False) -> Tensor:
        """The mean of the heads' logits (B, num_classes), or with `pre_logits` their inputs side by side.

        With global_pool='' the map (B, C, H', W') itself, of the tokens branch alone the tokens (B, 1 + N, D).
        """
        if not self.global_pool:
            return features[0]
        pooled = self._pool(features)
        if pre_logits or self.num_classes == 0:
            return torch.cat(list(pooled.values()), dim=1)
        return torch.stack([self.heads[name](value) for name, value in pooled.items()]).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_branches(self, x: Tensor) -> dict[str, Tensor]:
        """Image -> each head's logits (B, num_classes) by name: 'conv' and 'tokens', or 'fused'."""
        return {name: self.heads[name](value) for name, value in self._pool(self.forward_features(x)).items()}

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stem and patch embedding: the padded map, and class token and tokens (empty without that branch)."""
        if min(x.shape[-2:]) < self.config.patch:
            raise ChiasmError(
                f"image of {x.shape[-2]}x{x.shape[-1]} px: this model needs at least {self.config.patch} px a side; "
                "enlarge the image or choose a model with a smaller patch (chiasm models)."
            )
        x = pad_to_multiple(self.stem(x), self.config.patch // self.config.stem_stride)
        if "tokens" not in self.branches:
            return x, x.new_empty(0)
        tokens = map_to_tokens(self.patch_embed(x))
        return x, torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1)

    def _step(self, block: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        run: Any = block
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            run = partial(checkpoint, block, use_reentrant=False)
        if self.branches == ("conv",):
            return run(x), tokens
        if self.branches == ("tokens",):
            return x, run(tokens)
        return run(x, tokens)

    def _leave(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        features = {"conv": x, "tokens": tokens}
        if "tokens" in self.branches:
            features["tokens"] = self.norm(tokens)
        return tuple(features[name] for name in self.branches)

    def _pool(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The input of each head, by the head's name: the map's mean, the class token, or both side by side."""
        pooled = {
            name: self.head_drop(feature.mean((2, 3)) if name == "conv" else feature[:, 0])
            for name, feature in zip(self.branches, features, strict=True)
        }
        if self.config.head_fusion == "features":
            return {"fused": torch.cat(list(pooled.values()), dim=1)}
        return {name: pooled[name] for name in self.head_names}

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
            norm: accepted for timm; maps have no norm of their own, tokens (of the tokens branch alone) have.
            stop_early: do not run the blocks behind the last level taken.
            output_fmt: 'NCHW'; the levels are maps.
            intermediates_only: only the list of maps, without the final features.

        Returns:
            List of maps (B, C, ceil(H / stride), ceil(W / stride)), padding cropped away, or (features, that list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}': the levels are maps, expected 'NCHW'.")
        height, width = x.shape[-2:]
        taken, last_level = feature_take_indices(len(self.feature_info), indices)
        wanted = {int(self.feature_info[i]["module"].split(".")[1]): self.feature_info[i]["reduction"] for i in taken}
        last_block = int(self.feature_info[last_level]["module"].split(".")[1])

        x, tokens = self._enter(x)
        grid = x.shape[-2] * self.config.stem_stride // self.config.patch, -1
        maps = []
        for i, block in enumerate(self.blocks[: last_block + 1] if stop_early else self.blocks):
            x, tokens = self._step(block, x, tokens)
            if i in wanted:
                level = x
                if "conv" not in self.branches:
                    level = tokens_to_map((self.norm(tokens) if norm else tokens)[:, 1:], grid)
                maps.append(level[..., : -(-height // wanted[i]), : -(-width // wanted[i])])
        if intermediates_only:
            return maps
        return self._leave(x, tokens), maps

    def branch_info(self) -> dict[str, list[dict[str, Any]]]:
        """Channels ('num_chs') and stride ('reduction') of the maps that `forward_branch_maps` gives, by branch."""
        tokens = [{"num_chs": self.config.dim, "reduction": self.config.patch}]
        info = {"conv": self.feature_info, "tokens": tokens}
        return {name: info[name] for name in self.branches}

    def forward_branch_maps(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Image -> the maps of each branch, from fine to coarse: the levels of `feature_info`, and the last tokens.

        Sizes are ceil(H / stride) x ceil(W / stride), padding cropped away.
        """
        size = x.shape[-2:]
        if self.branches == ("tokens",):
            tokens, grid = self.forward_features(x)[-1], (-(-size[0] // self.config.patch), -1)
            return {"tokens": [tokens_to_map(tokens[:, 1:], grid)]}
        features, maps = self.forward_intermediates(x)
        if self.branches == ("conv",):
            return {"conv": maps}
        grid = -(-size[0] // self.config.patch), -(-size[1] // self.config.patch)
        return {"conv": maps, "tokens": [tokens_to_map(features[-1][:, 1:], grid)]}

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the levels `indices` do not need; returns them as a list."""
        taken, last_level = feature_take_indices(len(self.feature_info), indices)
        self.blocks = self.blocks[: int(self.feature_info[last_level]["module"].split(".")[1]) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        return self.heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes`; 0 removes them. `global_pool` as at creation, None keeps it."""
        self.global_pool = _check_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.heads = self._heads(num_classes).to(device=reference.device, dtype=reference.dtype)
        named_apply(_init_module, self.heads)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input up, for layer-wise learning-rate decay."""
        return {"stem": r"^stem|^patch_embed|^cls_token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"} & {name for name, _ in self.named_parameters()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable

    def init_weights(self) -> None:
        """Linear and class token truncated normal of std 0.02, convolutions He (fan out), norms 1 and 0."""
        if "tokens" in self.branches:
            trunc_normal_(self.cls_token, std=0.02)
        named_apply(_init_module, self)


def _check_pool(global_pool: str, num_classes: int) -> str:
    if global_pool not in ("avg", ""):
        raise ChiasmError(f"global_pool='{global_pool}': expected 'avg' (the map's mean and the class token) or ''.")
    if not global_pool and num_classes:
        raise ChiasmError(f"global_pool='' gives no input for a head: take num_classes=0, not {num_classes}, with it.")
    return global_pool


def _freeze_unread(block: nn.Module) -> None:
    """With a head on the tokens alone nothing reads the last block's map: what makes it has no gradient to wait for."""
    assert isinstance(block, CoupledBlock)
    unread = [block.conv_in.conv3, block.conv_in.bn3, block.conv_in.shortcut_conv, block.conv_in.shortcut_bn]
    for module in unread:
        if module is not None:
            module.requires_grad_(False)


def _init_module(module: nn.Module, name: str = "") -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------------- registry


def _sizes(
    patch: int, stem_stride: int, stem_chs: int, ratio: float, dim: int, heads: int, depth: int
) -> ConformerConfig:
    return ConformerConfig(
        patch=patch, stem_stride=stem_stride, stem_chs=stem_chs, channel_ratio=ratio, dim=dim, heads=heads, depth=depth
    )


# The last three are for small images, where the published net's tokens would be 2x2: smaller stem stride, patch, width.
SIZES = {
    #                                     patch  stem stride  stem chs  ratio  dim  heads  depth
    "conformer_tiny_patch16_224":  _sizes(16,    4,           64,       1,     384, 6,     12),
    "conformer_small_patch16_224": _sizes(16,    4,           64,       4,     384, 6,     12),
    "conformer_small_patch32_224": _sizes(32,    4,           64,       4,     384, 6,     12),
    "conformer_base_patch16_224":  _sizes(16,    4,           64,       6,     576, 9,     12),
    "conformer_nano_patch16_128":  _sizes(16,    4,           32,       4,     128, 4,     6),
    "conformer_nano_patch8_64":    _sizes(8,     2,           16,       4,     128, 4,     6),
    "conformer_nano_patch4_32":    _sizes(4,     1,           16,       4,     128, 4,     6),
}  # fmt: skip


def _cfg(url: str = "", size: int = 224, crop_pct: float = 0.875) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": ("heads.conv", "heads.tokens"),
        "license": "apache-2.0",
        "paper_ids": "arXiv:2105.03889",
    }


_OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0/conformer/"

# The published files are OpenMMLab's; the suffix of each name is the first 8 hex digits of its sha256.
default_cfgs = generate_default_cfgs(
    {
        "conformer_tiny_patch16_224.in1k": _cfg(
            _OPENMMLAB + "conformer-tiny-p16_3rdparty_8xb128_in1k_20211206-f6860372.pth"
        ),
        "conformer_small_patch16_224.in1k": _cfg(
            _OPENMMLAB + "conformer-small-p16_3rdparty_8xb128_in1k_20211206-3065dcf5.pth"
        ),
        "conformer_small_patch32_224.in1k": _cfg(_OPENMMLAB + "conformer-small-p32_8xb128_in1k_20211206-947a0816.pth"),
        "conformer_base_patch16_224.in1k": _cfg(
            _OPENMMLAB + "conformer-base-p16_3rdparty_8xb128_in1k_20211206-bfdf8637.pth"
        ),
        "conformer_nano_patch16_128.untrained": _cfg(size=128, crop_pct=1.0),
        "conformer_nano_patch8_64.untrained": _cfg(size=64, crop_pct=1.0),
        "conformer_nano_patch4_32.untrained": _cfg(size=32, crop_pct=1.0),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Conformer:
    options = asdict(SIZES[name])
    options.update({key: kwargs.pop(key) for key in list(kwargs) if key in options})
    return build_model_with_cfg(
        Conformer,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        config=ConformerConfig(**options),
        **kwargs,
    )


@register_model
def conformer_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """Conformer-Ti/16, 23.5 M parameters."""
    return _create("conformer_tiny_patch16_224", pretrained, **kwargs)


@register_model
def conformer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """Conformer-S/16, 37.7 M parameters."""
    return _create("conformer_small_patch16_224", pretrained, **kwargs)


@register_model
def conformer_small_patch32_224(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """Conformer-S/32, 38.9 M parameters."""
    return _create("conformer_small_patch32_224", pretrained, **kwargs)


@register_model
def conformer_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """Conformer-B/16, 83.3 M parameters."""
    return _create("conformer_base_patch16_224", pretrained, **kwargs)


@register_model
def conformer_nano_patch16_128(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """For images of about 128 px, sized to train on a laptop's processor."""
    return _create("conformer_nano_patch16_128", pretrained, **kwargs)


@register_model
def conformer_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """For images of about 64 px, sized to train on a laptop's processor."""
    return _create("conformer_nano_patch8_64", pretrained, **kwargs)


@register_model
def conformer_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> Conformer:
    """For images of about 32 px, sized to train on a laptop's processor."""
    return _create("conformer_nano_patch4_32", pretrained, **kwargs)


# -------------------------------------------------------------------------------------- names in published checkpoints

_BLOCK = "conv_trans_{i+1}"  # the authors count blocks from 1

_AUTHORS = (
    # ours                     the authors'
    ("stem.conv",              "conv1"),
    ("stem.bn",                "bn1"),
    ("patch_embed",            "trans_patch_conv"),
    ("cls_token",              "cls_token"),
    ("blocks.0.conv_in",       "conv_1"),
    ("blocks.0.transformer",   "trans_1"),
    ("blocks.{i}.conv_in",     f"{_BLOCK}.cnn_block"),
    ("blocks.{i}.down.project", f"{_BLOCK}.squeeze_block.conv_project"),
    ("blocks.{i}.down.norm",   f"{_BLOCK}.squeeze_block.ln"),
    ("blocks.{i}.transformer", f"{_BLOCK}.trans_block"),
    ("blocks.{i}.up.project",  f"{_BLOCK}.expand_block.conv_project"),
    ("blocks.{i}.up.bn",       f"{_BLOCK}.expand_block.bn"),
    ("blocks.{i}.conv_out",    f"{_BLOCK}.fusion_block"),
    ("norm",                   "trans_norm"),
    ("heads.conv",             "conv_cls_head"),
    ("heads.tokens",           "trans_cls_head"),
)  # fmt: skip
_AUTHORS_PARTS = (("shortcut_conv", "residual_conv"), ("shortcut_bn", "residual_bn"))

# Detectors built on the authors' code use these names behind 'backbone.', without the heads.
DIALECTS = (
    Dialect(name="the authors' names", starts=_AUTHORS, parts=_AUTHORS_PARTS),
    Dialect(
        name="OpenMMLab's names",
        starts=tuple(
            (ours, f"head.{theirs}" if ours.startswith("heads.") else f"backbone.{theirs}") for ours, theirs in _AUTHORS
        ),
        parts=(
            *_AUTHORS_PARTS,
            ("norm1", "ln1"),
            ("norm2", "ln2"),
            ("mlp.fc1", "ffn.layers.0.0"),
            ("mlp.fc2", "ffn.layers.1"),
        ),
    ),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint under our names, for timm's own loading (`pretrained=True`)."""
    return renamed_for(model, state_dict)
