"""Where the features, the attention and the exchanges of a network can be read while it runs, whatever network it is.

    network                       branches          features                           attention
    Conformer                     conv, tokens      each block's map and tokens        each block
    coupled                       conv, tokens      levels of the one, blocks of the   each block
                                                    other
    ViT, DeiT, DINO, EVA, BEiT    model             each block's tokens                each block
    Swin (ours and timm's)        model             each stage's map                   windows of each block
    MobileViT (ours and timm's)   model             each stage's map                   each Transformer block
    MobileViT v2 (the same)       model             each stage's map                   context scores of each block
    any other of timm's           model             the maps that its `feature_info` names

Taps hold names of modules, not modules, so that copies of a network are read alike. Features are given as maps
(1, C, h, w) of one image, without class and register tokens; place (i, j) stands for stride x stride pixels of the
canvas, from (i * stride, j * stride) on. What `feature_info` names is believed where the network's own
`forward_intermediates` gives the same: some keep their tokens in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import timm.models.mobilevit as timm_mobilevit
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from chiasm.layers.tokens import tokens_to_map
from chiasm.layers.window import WindowAttention, Windows, deal_windows
from chiasm.models.checkpoints import input_channels
from chiasm.models.conformer import Conformer, CoupledBlock
from chiasm.models.coupled import Coupled, Early, Mid, Sandwich
from chiasm.models.mobilevit import MobileViTBlock
from chiasm.models.mobilevitv2 import MobileViTV2Block
from chiasm.models.steps import TRANSFORMERS, ConvSteps, HRNetSteps, feature_info

Size = tuple[int, int]
Reads = tuple[int, ...]  # the tokens that a head reads; () for the mean of the others, or a pooling of them


@dataclass(frozen=True, kw_only=True)
class FeatureTap:
    """A branch's features behind a module.

    Attributes:
        branch, name: for readers: 'conv', 'block 3'.
        module: whose output it is.
        pick: the tensor within the module's arguments and output.
        lay: that tensor, or its gradient, as a map (1, C, h, w), for a canvas (H, W); None where it is none.
        stride: pixels of the canvas from place to place; None where the map spans the canvas, whatever its size.
    """

    branch: str
    name: str
    module: str
    pick: Callable[[tuple[Any, ...], Any], Any]
    lay: Callable[[Tensor, Size], Tensor | None]
    stride: Size | None


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
        features: in the order of the computation; () of a network that does not name them rightly: then its modules
            are watched for maps.
        attentions, exchanges: in order; () where there are none.
        reads: the tokens that the head reads.
        token_grid: h and w of the tokens for a canvas (H, W), where there are tokens beside a map.
    """

    branches: tuple[str, ...]
    features: tuple[FeatureTap, ...] = ()
    attentions: tuple[AttentionTap, ...] = ()
    exchanges: tuple[ExchangeTap, ...] = ()
    reads: Reads = ()
    token_grid: Callable[[Size], Size] | None = None


def taps_of(net: nn.Module) -> Taps:
    """Where to read a network, by what it is."""
    if isinstance(net, Conformer):
        return _conformer(net)
    if isinstance(net, Coupled):
        return _coupled(net)
    if isinstance(net, tuple(TRANSFORMERS)):
        return _plain(net)
    return Taps(branches=("model",), features=_stages(net), attentions=(*_windows(net), *_patches(net)))


# --------------------------------------------------------------------------------------------------- plain Transformers


def _plain(net: Any) -> Taps:
    stride, prefix = tuple(net.patch_embed.feat_ratio(as_scalar=False)), int(net.num_prefix_tokens)
    features, attentions = _blocks(
        len(net.blocks), "model", "blocks", prefix, net.patch_embed.dynamic_feat_size, _output, stride=stride
    )
    return Taps(branches=("model",), features=features, attentions=attentions, reads=_read_by(net))


def _read_by(net: Any) -> Reads:
    if isinstance(net, VisionTransformerDistilled):
        return (0, 1)
    return (0,) if getattr(net, "global_pool", "") == "token" and net.num_prefix_tokens else ()


def _blocks(
    depth: int, branch: str, where: str, prefix: int, grid: Callable[[Size], Size], pick: Callable[..., Any], *,
    stride: Any, inside: str = "",
) -> tuple[tuple[FeatureTap, ...], tuple[AttentionTap, ...]]:  # fmt: skip
    """The taps of blocks that give all tokens; `inside`: the part of a block that attends."""
    features = tuple(
        FeatureTap(
            branch=branch, name=f"block {i + 1}", module=f"{where}.{i}", pick=pick, lay=partial(_as_map, prefix, grid),
            stride=stride,
        )
        for i in range(depth)
    )  # fmt: skip
    attentions = tuple(
        AttentionTap(
            branch=branch, name=f"block {i + 1}", module=f"{where}.{i}{inside}", seen_by=f"{where}.{i}{inside}",
            places=partial(_all_tokens, prefix, grid, stride),
        )
        for i in range(depth)
    )  # fmt: skip
    return features, attentions


def _as_map(prefix: int, grid: Callable[[Size], Size], tokens: Tensor, canvas: Size) -> Tensor:
    return tokens_to_map(tokens[:, prefix:], grid(canvas))


def _all_tokens(
    prefix: int, grid: Callable[[Size], Size], stride: Size | None, args: tuple[Any, ...], canvas: Size
) -> Places:
    height, width = grid(canvas)
    index = torch.arange(prefix + height * width)[None]
    return Places(index, prefix, (height, width), stride or (canvas[0] / height, canvas[1] / width))


def _output(args: tuple[Any, ...], output: Any) -> Any:
    return output


def _first(args: tuple[Any, ...], output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _second(args: tuple[Any, ...], output: Any) -> Any:
    return output[1]


def _argument(args: tuple[Any, ...], output: Any) -> Any:
    return args[0]


# ---------------------------------------------------------------------------------------------------- two branches


def _conformer(net: Conformer) -> Taps:
    config = net.config

    def grid(canvas: Size) -> Size:
        return -(-canvas[0] // config.patch), -(-canvas[1] // config.patch)

    both = config.branches == "both"
    tokens, attentions = _blocks(
        config.depth, "tokens" if both else "model", "blocks", 1, grid, _second if both else _output,
        stride=(config.patch, config.patch), inside=".transformer" if both else "",
    )  # fmt: skip
    if config.branches == "tokens":
        return Taps(branches=("model",), features=tokens, attentions=attentions, reads=(0,))
    strides = [*(config.stride(i) for i in range(config.depth - 1)), int(net.feature_info[-1]["reduction"])]
    maps = tuple(
        FeatureTap(
            branch="conv" if both else "model", name=f"block {i + 1}", module=f"blocks.{i}", pick=_first,
            lay=partial(_cropped, strides[i]), stride=(strides[i], strides[i]),
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
        attentions=attentions, exchanges=tuple(exchanges), reads=(0,), token_grid=grid,
    )  # fmt: skip


def _cropped(stride: int, x: Tensor, canvas: Size) -> Tensor:
    """Without the padding that made the map whole patches."""
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
    behind = {point.steps - 1: (f"exchanges.{i}", _first) for i, point in enumerate(points)}
    last = net.stop if isinstance(net, Early) else len(steps)
    maps = []
    for step in sorted(step for step in {*steps.levels, *behind} if step < last):
        stride = steps.sizes[step].reduction
        module, pick = behind.get(step, _behind(steps, step))
        maps.append(
            FeatureTap(
                branch="conv", name=f"stride {stride}, step {step + 1}", module=module, pick=pick,
                lay=partial(_cropped, stride), stride=(stride, stride),
            )
        )  # fmt: skip
    tokens, attentions = _blocks(len(blocks), "tokens", "tokens.blocks", blocks.prefix, grid, _output, stride=None)
    exchanges = tuple(
        ExchangeTap(name=f"exchange {i + 1}", module=f"exchanges.{i}", read=_both) for i in range(len(points))
    )
    return Taps(
        branches=("conv", "tokens"), features=(*maps, *tokens), attentions=attentions, exchanges=exchanges,
        reads=() if isinstance(net, Sandwich) else _read_by(net.tokens), token_grid=grid,
    )  # fmt: skip


def _behind(steps: ConvSteps, step: int) -> tuple[str, Callable[..., Any]]:
    """Where the map behind a step is: an HRNet adds two, and gives the sum to what follows."""
    if not isinstance(steps, HRNetSteps):
        return f"conv.{steps.names[step]}", _first
    return ("conv.final_layer" if step == len(steps) - 1 else f"conv.downsamp_modules.{step}"), _argument


def _both(args: tuple[Any, ...], output: Any) -> Crossed:
    return Crossed(args[0], args[1], output[0], output[1], 0)


# -------------------------------------------------------------------------------------------------- windows and patches


def _windows(net: nn.Module) -> list[AttentionTap]:
    """Swin's, ours and timm's."""
    found: list[tuple[str, str, Any]] = []
    strides = {str(info["module"]): int(info["reduction"]) for info in feature_info(net)}
    for name, module in net.named_modules():
        stride = next((stride for stage, stride in strides.items() if name.startswith(f"{stage}.")), 0)
        if isinstance(module, WindowAttention):
            found.append((name, name, partial(_dealt, module.window, stride)))
        elif isinstance(module, SwinTransformerBlock):
            of_timm = partial(_dealt_by_timm, module.window_size, module.shift_size, stride)
            found.append((f"{name}.attn", name, of_timm))
    return _numbered(found)


def _numbered(found: list[tuple[str, str, Any]]) -> list[AttentionTap]:
    return [
        AttentionTap(branch="model", name=f"block {i + 1}", module=module, seen_by=by, places=places)
        for i, (module, by, places) in enumerate(found)
    ]


def _dealt(window: Size, stride: int, args: tuple[Any, ...], canvas: Size) -> Places:
    return _slots(args[1], window, stride)


def _dealt_by_timm(window: Size, shift: Size, stride: int, args: tuple[Any, ...], canvas: Size) -> Places:
    x = args[0]
    return _slots(deal_windows(x, (x.shape[1], x.shape[2]), window, shift, "roll_then_pad"), window, stride)


def _slots(windows: Windows, window: Size, stride: int) -> Places:
    index = windows.to_windows.clone()
    if windows.empty is not None:
        index[windows.empty] = -1
    return Places(index.view(-1, window[0] * window[1]), 0, windows.size, (stride, stride))


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


# ------------------------------------------------------------------------------------------------- what a network names


def _stages(net: nn.Module) -> tuple[FeatureTap, ...]:
    """The maps that `feature_info` names, as far as they are what the network's `forward_intermediates` gives."""
    prefix, modules = int(getattr(net, "num_prefix_tokens", 0) or 0), dict(net.named_modules())
    taps = []
    for info in feature_info(net):
        channels, stride = int(info["num_chs"]), int(info["reduction"])
        if info["module"] in modules:
            lay = partial(_by_channels, channels, stride, prefix)
            name = str(info["module"])
            tap = FeatureTap(branch="model", name=name, module=name, pick=_first, lay=lay, stride=(stride, stride))
            taps.append(tap)
    return tuple(_proved(net, taps))


def _by_channels(channels: int, stride: int, prefix: int, x: Any, canvas: Size) -> Tensor | None:
    """An output as a map, if its sides are the canvas's at this stride: padded ones may reach over it."""
    if not isinstance(x, Tensor) or x.ndim not in (3, 4):
        return None
    if x.ndim == 4 and x.shape[1] == channels and _spans(x.shape[2:], stride, canvas):
        return x
    if x.ndim == 4 and x.shape[3] == channels and _spans(x.shape[1:3], stride, canvas):
        return x.permute(0, 3, 1, 2)
    if x.ndim == 3 and x.shape[2] == channels:
        grid = canvas[0] // stride, canvas[1] // stride
        for front in (prefix, 0, 1):  # some join the class token late
            if x.shape[1] - front == grid[0] * grid[1]:
                return tokens_to_map(x[:, front:], grid)
    return None


def _spans(sides: Sequence[int], stride: int, canvas: Size) -> bool:
    return all(abs(side - size / stride) < 2 for side, size in zip(sides, canvas, strict=True))


def _proved(net: Any, taps: list[FeatureTap]) -> list[FeatureTap]:
    stated = getattr(net, "pretrained_cfg", None) or {}
    size = tuple(stated.get("input_size", (3, 224, 224))[-2:])
    first = next(net.parameters())
    image = torch.randn(1, input_channels(net), *size, generator=torch.Generator().manual_seed(0)).to(first)
    seen: dict[str, Any] = {}
    hooks = [
        net.get_submodule(tap.module).register_forward_hook(
            lambda module, args, output, tap=tap: seen.update({tap.module: tap.pick(args, output)})
        )
        for tap in taps
    ]
    try:
        with torch.no_grad():
            maps = net.forward_intermediates(image, intermediates_only=True)
    except (AttributeError, AssertionError, RuntimeError, TypeError, ValueError):  # it offers none, or not of this size
        return []
    finally:
        for hook in hooks:
            hook.remove()
    laid = [tap.lay(seen[tap.module], size) if tap.module in seen else None for tap in taps]
    given = [candidate for candidate in maps if isinstance(candidate, Tensor)]
    return [
        tap
        for tap, own in zip(taps, laid, strict=True)
        if own is not None and any(own.shape == other.shape and torch.equal(own, other) for other in given)
    ]
