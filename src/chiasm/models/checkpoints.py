"""Weights from elsewhere into a model."""

from __future__ import annotations

from typing import Any

from torch import nn


def first_convs(model: nn.Module) -> list[str]:
    """Names of the layers that read the image, as the model's `pretrained_cfg` states them; [] when it does not."""
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = (stated,) if isinstance(stated, str) else tuple(stated)
    modules = dict(model.named_modules())
    return [name for name in names if getattr(modules.get(name), "weight", None) is not None]


def input_channels(model: nn.Module) -> int:
    """The channels of the images that the model reads."""
    names = first_convs(model)
    if not names:
        return int(getattr(model, "in_chans", 3))
    layer: Any = model.get_submodule(names[0])
    return int(layer.weight.shape[1]) * getattr(layer, "groups", 1)
