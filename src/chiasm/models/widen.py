"""A network made wider until it costs what another does, so that a comparison is not won by size alone.

Depth stays, as do heads: what grows is the number of channels. Adding a family is one line in `WIDTHS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import beit, convnext, densenet, eva, resnet, vision_transformer
from torch import nn

from chiasm.errors import ChiasmError

Cost = Callable[[nn.Module], float]
CLOSE = 0.01  # of the target: near enough
FINE = 1.01  # widths that differ by less than this factor are the same width


def _resnet(model: Any, scale: float) -> dict[str, Any]:
    expansion = model.layer1[-1].expansion
    return {"channels": [_rounded(info["num_chs"] / expansion * scale, 8) for info in model.feature_info[1:]]}


def _convnext(model: Any, scale: float) -> dict[str, Any]:
    return {"dims": [_rounded(info["num_chs"] * scale, 8) for info in model.feature_info]}


def _densenet(model: Any, scale: float) -> dict[str, Any]:
    growth = model.features.denseblock1.denselayer1.conv2.out_channels
    return {"growth_rate": _rounded(growth * scale, 2)}


def _transformer(model: Any, scale: float) -> dict[str, Any]:
    heads = model.blocks[0].attn.num_heads
    return {"embed_dim": _rounded(model.embed_dim * scale, 4 * heads), "num_heads": heads}  # rotary: fours of a head


def _rounded(width: float, step: int) -> int:
    return max(step, round(width / step) * step)


# class: the arguments that build the network `scale` times as wide as a given one
WIDTHS: dict[type, Callable[[Any, float], dict[str, Any]]] = {
    resnet.ResNet: _resnet,
    convnext.ConvNeXt: _convnext,
    densenet.DenseNet: _densenet,
    vision_transformer.VisionTransformer: _transformer,
    eva.Eva: _transformer,
    beit.Beit: _transformer,
}


def widened(name: str, build: Callable[[dict[str, Any]], nn.Module], cost: Cost, target: float) -> dict[str, Any]:
    """The arguments with which `build` makes the network cost nearest to `target`.

    Args:
        name: of the network, for messages.
        build: makes it from further arguments; the 'meta' device will do. Without any it is the network itself.
        cost: what it costs, growing with the width: parameters or multiply-accumulates.
        target: what it shall cost.

    Raises:
        ChiasmError: for a network of a family whose width cannot be set.
    """
    own = build({})
    kind = next((kind for kind in WIDTHS if isinstance(own, kind)), None)
    if kind is None:
        families = ", ".join(sorted(kind.__name__ for kind in WIDTHS))
        raise ChiasmError(
            f"{name}: networks of its family ({type(own).__name__}) have no width to set; those of {families} have. "
            "Name a larger network of that family yourself in place of --match."
        )
    low, high = 0.05, 20.0
    tried: dict[str, tuple[float, dict[str, Any]]] = {}
    while high / low > FINE:
        scale = (low * high) ** 0.5
        arguments = WIDTHS[kind](own, scale)
        if str(arguments) not in tried:
            tried[str(arguments)] = cost(build(arguments)), arguments
        found = tried[str(arguments)][0]
        if abs(found - target) <= CLOSE * target:
            break
        low, high = (scale, high) if found < target else (low, scale)
    return min(tried.values(), key=lambda entry: abs(entry[0] - target))[1]
