"""Where the features, the attention and the exchanges of a network can be read while it runs, whatever network it is.

    network                       branches          features                           attention
    Conformer                     conv, tokens      each block's map and tokens        each block
    coupled                       conv, tokens      levels of the one, blocks of the   each block
                                                    other
    ViT, DeiT, DINO, EVA, BEiT    model             each block's tokens                each block
    Swin (ours and timm's)        model             each stage's map                   windows of each block
    MobileViT (ours and timm's)   model             each stage's map                   each Transformer block
    MobileViT v2 (the same)       model             each stage's map                   context scores of each block
    any other of timm's           model             the last map of each resolution

Taps hold names of modules, not modules, so that copies of a network are read alike. Features are given as maps
(1, C, h, w) of one image, without class and register tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import timm.models.mobilevit as timm_mobilevit
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from chiasm.layers.tokens import tokens_to_map
from chiasm.layers.window import WindowAttention, Windows, deal_windows
from chiasm.models.conformer import Conformer, CoupledBlock
from chiasm.models.coupled import Coupled, Mid
from chiasm.models.mobilevit import MobileViTBlock
from chiasm.models.mobilevitv2 import MobileViTV2Block
from chiasm.models.steps import TRANSFORMERS

Size = tuple[int, int]
Reads = Literal["class", "mean"]


@dataclass(frozen=True, kw_only=True)
class FeatureTap:
    """A branch's features behind a module.

    Attributes:
        branch, name: for readers: 'conv', 'block 3'.
        module: whose output it is.
        pick: the tensor within the output.
        lay: that tensor, or its gradient, as a map (1, C, h, w), for a canvas (H, W); None where it is none.
    """

    branch: str
    name: str
    module: str
    pick: Callable[[Any], Any]
    lay: Callable[[Tensor, Size], Tensor | None]


@dataclass(frozen=True)
class Places:
    """Where the tokens of an attention lie; see `chiasm.explaining.record.Attention`."""

    index: Tensor
    prefix: int
    grid: Size
    stride: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class AttentionTap:
    """The attention that a module computes somewhere inside.

    Attributes:
        branch, name: for readers.
        module: within which it happens.
        seen_by: the module whose arguments tell the places.
        places: from those arguments and the canvas (H, W).
    """

    branch: str
    name: str
    module: str
    seen_by: str
    places: Callable[[tuple[Any, ...], Size], Places]


class Crossed(NamedTuple):
    """What an exchange was given and gave: map and tokens, with class and register tokens, before and after."""

    conv: Tensor
    tokens: Tensor
    conv_after: Tensor
    tokens_after: Tensor
    prefix: int


@dataclass(frozen=True, kw_only=True)
class ExchangeTap:
    """A module in which features cross; its method `silent` gives what it would without them.

    Attributes:
        name: for readers: 'block 3 down'.
        module: its name.
        read: its arguments and output, put in order.
    """

    name: str
    module: str
    read: Callable[[tuple[Any, ...], Any], Crossed]


@dataclass(frozen=True, kw_only=True)
class Taps:
    """All that can be read of a network.

    Attributes:
        branches: 'conv' and 'tokens', or 'model'.
        features: in the order of the computation; () of a network whose maps are found by watching all its modules.
        attentions, exchanges: in order; () where there are none.
        reads: what the head makes of the tokens: their class token, or their mean.
        token_grid: h and w of the tokens for a canvas (H, W), where there are tokens beside a map.
    """

    branches: tuple[str, ...]
    features: tuple[FeatureTap, ...] = ()
    attentions: tuple[AttentionTap, ...] = ()
    exchanges: tuple[ExchangeTap, ...] = ()
    reads: Reads = "mean"
    token_grid: Callable[[Size], Size] | None = None


def taps_of(net: nn.Module) -> Taps:
    """Where to read a network, by what it is."""
    if isinstance(net, Conformer):
        return _conformer(net)
    if isinstance(net, Coupled):
        return _coupled(net)
    if isinstance(net, tuple(TRANSFORMERS)):
        return _plain(net)
    return Taps(branches=("model",), attentions=(*_windows(net), *_patches(net)))


# --------------------------------------------------------------------------------------------------- plain Transformers


def _plain(net: Any) -> Taps:
    patch, prefix = tuple(net.patch_embed.patch_size), int(net.num_prefix_tokens)
    features, attentions = _blocks(len(net.blocks), "model", "blocks", prefix, partial(_grid, patch), lambda x: x)
    reads: Reads = "class" if getattr(net, "global_pool", "") == "token" and prefix else "mean"
    return Taps(branches=("model",), features=features, attentions=attentions, reads=reads)


def _blocks(
    depth: int, branch: str, where: str, prefix: int, grid: Callable[[Size], Size], pick: Callable[[Any], Any],
    inside: str = "",
) -> tuple[tuple[FeatureTap, ...], tuple[AttentionTap, ...]]:  # fmt: skip
    """The taps of blocks that give all tokens; `inside`: the part of a block that attends."""
    features = tuple(
        FeatureTap(
            branch=branch, name=f"block {i + 1}", module=f"{where}.{i}", pick=pick, lay=partial(_as_map, prefix, grid)
        )
        for i in range(depth)
    )
    attentions = tuple(
        AttentionTap(
            branch=branch, name=f"block {i + 1}", module=f"{where}.{i}{inside}", seen_by=f"{where}.{i}{inside}",
            places=partial(_all_tokens, prefix, grid),
        )
        for i in range(depth)
    )  # fmt: skip
    return features, attentions


def _grid(patch: Size, canvas: Size) -> Size:
    return canvas[0] // patch[0], canvas[1] // patch[1]


def _as_map(prefix: int, grid: Callable[[Size], Size], tokens: Tensor, canvas: Size) -> Tensor:
    return tokens_to_map(tokens[:, prefix:], grid(canvas))


def _all_tokens(prefix: int, grid: Callable[[Size], Size], args: tuple[Any, ...], canvas: Size) -> Places:
    height, width = grid(canvas)
    return Places(
        torch.arange(prefix + height * width)[None], prefix, (height, width), (canvas[0] / height, canvas[1] / width)
    )


# ---------------------------------------------------------------------------------------------------- two branches


def _conformer(net: Conformer) -> Taps:
    config = net.config

    def grid(canvas: Size) -> Size:
        return -(-canvas[0] // config.patch), -(-canvas[1] // config.patch)

    both = config.branches == "both"
    tokens, attentions = _blocks(
        config.depth, "tokens" if both else "model", "blocks", 1, grid, (lambda out: out[1]) if both else (lambda x: x),
        inside=".transformer" if both else "",
    )  # fmt: skip
    if config.branches == "tokens":
        return Taps(branches=("model",), features=tokens, attentions=attentions, reads="class")
    maps = tuple(
        FeatureTap(
            branch="conv" if both else "model", name=f"block {i + 1}", module=f"blocks.{i}",
            pick=(lambda out: out[0]) if both else (lambda x: x), lay=_cropped,
        )
        for i in range(config.depth)
    )  # fmt: skip
    if not both:
        return Taps(branches=("model",), features=maps)
    exchanges = []
    for i, block in enumerate(net.blocks):
        assert isinstance(block, CoupledBlock)
        if block.down is not None:
            exchanges.append(ExchangeTap(name=f"block {i + 1} down", module=f"blocks.{i}.down", read=_down))
        if block.up is not None:
            exchanges.append(ExchangeTap(name=f"block {i + 1} up", module=f"blocks.{i}.up", read=_up))
    return Taps(
        branches=("conv", "tokens"), features=tuple(tap for pair in zip(maps, tokens, strict=True) for tap in pair),
        attentions=attentions, exchanges=tuple(exchanges), reads="class", token_grid=grid,
    )  # fmt: skip


def _cropped(x: Tensor, canvas: Size) -> Tensor:
    """Without the padding that made the map whole patches: its stride is a power of two."""
    stride = 2 ** round(math.log2(canvas[0] / x.shape[-2]))
    return x[..., : -(-canvas[0] // stride), : -(-canvas[1] // stride)]


def _down(args: tuple[Any, ...], output: Any) -> Crossed:
    x, tokens = args
    return Crossed(x, tokens, x, output, 1)


def _up(args: tuple[Any, ...], output: Any) -> Crossed:
    tokens, x = args
    return Crossed(x, tokens, output, tokens, 1)


def _coupled(net: Coupled) -> Taps:
    steps, blocks = net.conv_steps, net.token_steps

    def grid(canvas: Size) -> Size:
        side = blocks.side or tuple(max(1, round(s / p)) * p for s, p in zip(canvas, blocks.patch, strict=True))
        return side[0] // blocks.patch[0], side[1] // blocks.patch[1]

    points = net.points if isinstance(net, Mid) else []
    behind = {point.steps - 1: f"exchanges.{i}" for i, point in enumerate(points)}
    levels = sorted({*steps.levels, *behind})
    last = getattr(net, "stop", len(steps))  # of an early or sandwiched network the steps before the Transformer
    if net.config.fusion == "early":
        levels = [step for step in levels if step < last]
    maps = tuple(
        FeatureTap(
            branch="conv", name=f"stride {steps.sizes[step].reduction}, step {step + 1}",
            module=behind.get(step, f"conv.{steps.names[step]}"), pick=_first, lay=lambda x, canvas: x,
        )
        for step in levels
    )  # fmt: skip
    tokens, attentions = _blocks(len(blocks), "tokens", "tokens.blocks", blocks.prefix, grid, lambda x: x)
    exchanges = tuple(
        ExchangeTap(name=f"exchange {i + 1}", module=f"exchanges.{i}", read=_both) for i in range(len(points))
    )
    pooled = getattr(net.tokens, "global_pool", "") == "token" and blocks.prefix and net.config.fusion != "sandwich"
    return Taps(
        branches=("conv", "tokens"), features=(*maps, *tokens), attentions=attentions, exchanges=exchanges,
        reads="class" if pooled else "mean", token_grid=grid,
    )  # fmt: skip


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _both(args: tuple[Any, ...], output: Any) -> Crossed:
    return Crossed(args[0], args[1], output[0], output[1], 0)


# -------------------------------------------------------------------------------------------------- windows and patches


def _windows(net: nn.Module) -> list[AttentionTap]:
    """Swin's, ours and timm's."""
    found: list[tuple[str, str, Any]] = []
    for name, module in net.named_modules():
        if isinstance(module, WindowAttention):
            found.append((name, name, partial(_dealt, module.window)))
        elif isinstance(module, SwinTransformerBlock):
            of_timm = partial(_dealt_by_timm, module.window_size, module.shift_size)
            found.append((f"{name}.attn", name, of_timm))
    return _numbered(found)


def _numbered(found: list[tuple[str, str, Any]]) -> list[AttentionTap]:
    return [
        AttentionTap(branch="model", name=f"block {i + 1}", module=module, seen_by=by, places=places)
        for i, (module, by, places) in enumerate(found)
    ]


def _dealt(window: Size, args: tuple[Any, ...], canvas: Size) -> Places:
    return _slots(args[1], window, canvas)


def _dealt_by_timm(window: Size, shift: Size, args: tuple[Any, ...], canvas: Size) -> Places:
    x = args[0]
    windows = deal_windows(x, (x.shape[1], x.shape[2]), window, shift, "roll_then_pad")
    return _slots(windows, window, canvas)


def _slots(windows: Windows, window: Size, canvas: Size) -> Places:
    index = windows.to_windows.clone()
    if windows.empty is not None:
        index[windows.empty] = -1
    return Places(index.view(-1, window[0] * window[1]), 0, windows.size, _strides(canvas, windows.size))


def _patches(net: nn.Module) -> list[AttentionTap]:
    """MobileViT's, of both versions, ours and timm's."""
    found: list[tuple[str, str, Any]] = []
    for name, module in net.named_modules():
        if isinstance(module, (MobileViTBlock, MobileViTV2Block)):
            patch = (module.patch, module.patch)
        elif isinstance(module, (timm_mobilevit.MobileVitBlock, timm_mobilevit.MobileVitV2Block)):
            patch = tuple(module.patch_size)
        else:
            continue
        found += [
            (f"{name}.transformer.{i}", name, partial(_pixels_of_patches, patch))
            for i in range(len(module.transformer))
        ]
    return _numbered(found)


def _pixels_of_patches(patch: Size, args: tuple[Any, ...], canvas: Size) -> Places:
    """Each sequence holds one pixel of every patch; a map that is no whole number of patches was stretched."""
    height, width = (side + -side % p for side, p in zip(args[0].shape[-2:], patch, strict=True))
    token = torch.arange(height * width).view(height // patch[0], patch[0], width // patch[1], patch[1])
    index = token.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
    return Places(index, 0, (height, width), (canvas[0] / height, canvas[1] / width))


def _strides(canvas: Size, grid: Size) -> tuple[float, float]:
    """Pixels from token to token: Swin's maps run at powers of two, and may reach over the canvas."""
    down, across = (2.0 ** round(math.log2(a / b)) for a, b in zip(canvas, grid, strict=True))
    return down, across
