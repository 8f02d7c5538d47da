"""The architectures: importing this registers ours with timm. Adding one is a file here and a line below."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import timm
from torch import nn

from chiasm.errors import UnknownNameError
from chiasm.models import conformer, mobilevit, mobilevitv2, swin

ARCHITECTURES = (conformer, mobilevit, mobilevitv2, swin)  # one line per architecture


def list_models(pattern: str = "", all: bool = False) -> list[str]:
    """Names of our architectures, or with `all` timm's too, that match a glob or contain `pattern`."""
    ours = sorted(name for module in ARCHITECTURES for name in module.SIZES)
    names = [*ours, *(name for name in timm.list_models() if name not in ours)] if all else ours
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatchcase(name, glob)]


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    **kwargs: Any,
) -> nn.Module:
    """Build an architecture by name: ours where we have it, timm's otherwise.

    Args:
        name: see `list_models`.
        pretrained: load the published weights (needs a network the first time).
        num_classes: None keeps the architecture's own, usually 1000.
        in_chans: input channels.
        kwargs: the architecture's own arguments.

    Raises:
        UnknownNameError: for a name that neither we nor timm have, with the nearest.
    """
    if not timm.is_model(name):
        raise UnknownNameError("model", name, list_models(all=True), "See 'chiasm models --all'.")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **kwargs)
