"""The architectures: importing this registers ours with timm. Adding one is a file here and a line below."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
from torch import nn

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.models import conformer, mobilevit, mobilevitv2, swin
from chiasm.models.coupled import couple, split_name
from chiasm.models.published import published_weights

ARCHITECTURES = (conformer, mobilevit, mobilevitv2, swin)  # one line per architecture


def list_models(pattern: str = "", all: bool = False) -> list[str]:
    """Names of our architectures, or with `all` timm's too, that match a glob or contain `pattern`."""
    ours = sorted(name for module in ARCHITECTURES for name in module.SIZES)
    names = [*ours, *(name for name in timm.list_models() if name not in ours)] if all else ours
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatchcase(name, glob)]


def is_model(name: str) -> bool:
    """Whether `create_model` knows the name; of a coupled model, both its parts."""
    if coupled := split_name(name):
        return all(timm.is_model(part) for part in coupled[:2])
    return bool(timm.is_model(name))


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    **kwargs: Any,
) -> nn.Module:
    """Build an architecture by name: ours where we have it, timm's otherwise, or two of them coupled.

    Args:
        name: see `list_models`; or 'CONV+TRANSFORMER:FUSION', such as 'resnet18+vit_tiny_patch16_224:mid'.
        pretrained: load the published weights (needs a network the first time).
        num_classes: None keeps the architecture's own, usually 1000.
        in_chans: input channels.
        kwargs: the architecture's own arguments.

    Raises:
        UnknownNameError: for a name that neither we nor timm have, with the nearest.
        CheckpointError: when the published weights cannot be had, or do not fit the arguments.
    """
    if coupled := split_name(name):
        return couple(*coupled, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained, **kwargs)
    if not timm.is_model(name):
        raise UnknownNameError("model", name, list_models(all=True), "See 'chiasm models --all'.")
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    with published_weights(name, kwargs) if pretrained else nullcontext():
        return timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **kwargs)


def create_model_with(
    name: str, optional: dict[str, Any], *, seed: int = 0, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """`create_model` with those of the optional arguments that the architecture takes.

    Args:
        name: see `create_model`; so are `kwargs`.
        optional: arguments that not every architecture has, such as 'drop_path_rate'.
        seed: of the weights.

    Returns:
        The model, and the optional arguments that it took.

    Raises:
        TypeError: for an argument of `kwargs` that it does not take; and what `create_model` raises.
    """
    taken = dict(optional)
    while True:
        torch.manual_seed(seed)
        try:
            return create_model(name, **taken, **kwargs), taken
        except TypeError as error:
            unwanted = next((option for option in taken if f"'{option}'" in str(error)), None)
            if unwanted is None:
                raise
            del taken[unwanted]


def set_input_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Prepare a model for images of `size`, (height, width) in pixels; most take any, timm's ViT and Swin must be told.

    Raises:
        ChiasmError: for a size that the model cannot take.
    """
    set_size = getattr(model, "set_input_size", None)
    if set_size is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of timm about its own interpolation
            set_size(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ChiasmError(f"{type(model).__name__} cannot take images of {size[0]}x{size[1]} px: {reason}.") from error
