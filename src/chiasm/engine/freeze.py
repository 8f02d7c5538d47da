"""Freezing: parameters that stay as they are, by the prefix of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from chiasm.errors import ChiasmError, UnknownNameError

BACKBONE = "backbone"


def freeze(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Freeze every parameter under one of `parts` (dotted module or parameter names; 'backbone': all but the heads).

    Returns:
        The names of the frozen parameters.

    Raises:
        UnknownNameError: for a prefix that no parameter has.
        ChiasmError: when nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    known = prefixes(names)
    heads = _head_parameters(model)
    for prefix in parts:
        if prefix != BACKBONE and prefix not in known:
            raise UnknownNameError("prefix to freeze", prefix, [*known, BACKBONE], "See 'chiasm describe MODEL'.")
    frozen = []
    for name, parameter in model.named_parameters():
        by_name = any(name == prefix or name.startswith(f"{prefix}.") for prefix in parts)
        if by_name or (BACKBONE in parts and id(parameter) not in heads):
            parameter.requires_grad_(False)
            frozen.append(name)
    if len(frozen) == len(names):
        raise ChiasmError(f"--freeze {' '.join(parts)} freezes all {len(names)} parameters; leave some to train.")
    return frozen


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """The layers with running statistics whose every parameter is frozen: they must stay in eval mode to be frozen."""
    return [
        module
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None
        and (own := list(module.parameters(recurse=False)))
        and not any(parameter.requires_grad for parameter in own)
    ]


def prefixes(names: Iterable[str]) -> list[str]:
    """The names of all parts that these parameters are in, and theirs."""
    parts = (name.split(".") for name in names)
    return list(dict.fromkeys(".".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)))


def _head_parameters(model: Any) -> set[int]:
    heads = model.get_classifier()
    heads = list(heads.values()) if isinstance(heads, dict) else heads
    heads = heads if isinstance(heads, (list, tuple)) else [heads]
    return {id(parameter) for head in heads for parameter in head.parameters()}
