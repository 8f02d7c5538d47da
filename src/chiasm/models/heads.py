"""Heads for boxes, masks and maps by name. Adding one is a class and a line below."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.models.detectors import OneStage, TwoStage
from chiasm.models.maps import Maps
from chiasm.models.segmenters import DECODERS, Segmenter

HEADS: dict[str, dict[str, Callable[..., nn.Module]]] = {  # by task; the first is the default
    "detect": {"faster_rcnn": partial(TwoStage, masks=False), "fcos": OneStage},
    "instances": {"mask_rcnn": partial(TwoStage, masks=True)},
    "segment": {decoder: partial(Segmenter, decoder=decoder) for decoder in DECODERS},
}
ANCHORED = ("faster_rcnn", "mask_rcnn")


def with_head(
    backbone: nn.Module, num_classes: int, *, task: str, architecture: str, name: str, maps: str = "auto", **own: Any
) -> nn.Module:
    """A network for `task` on a backbone.

    Args:
        backbone: a timm model, without or with its own classifier, which is not used.
        num_classes: classes, without a background.
        task: 'detect', 'instances' or 'segment'.
        architecture: the backbone's name, for messages.
        name: of the head; 'auto' is the task's first in `HEADS`.
        maps: of a backbone of two branches, which maps the head reads (`chiasm.models.maps`).
        own: the head's own arguments, such as channels=128.

    Raises:
        UnknownNameError: for a head or an argument that does not exist.
        ChiasmError: for an argument that cannot be, or a backbone that no head can be built on.
    """
    known = HEADS[task]
    name = next(iter(known)) if name == "auto" else name
    others = [other for other, heads in HEADS.items() if name in heads]
    if name not in known and others:
        raise ChiasmError(f"{name} is a head for --task {others[0]}; for '{task}' there is {', '.join(known)}.")
    if name not in known:
        raise UnknownNameError(f"head for '{task}'", name, known, f"It is one of {', '.join(known)}.")
    build = known[name]
    given = {"backbone", "maps", "num_classes", *(build.keywords if isinstance(build, partial) else ())}
    options = [option for option in inspect.signature(build).parameters if option not in given]
    for option in own:
        if option not in options:
            raise UnknownNameError(f"argument of {name}", option, options, f"It takes {', '.join(options)}.")
    for option, value in own.items():
        _check(name, option, value)
    try:
        return build(backbone, Maps(backbone, maps, name=architecture), num_classes, **own)
    except (TypeError, ValueError) as error:
        raise ChiasmError(f"{name} cannot be built with {own}: {error}.") from error


_SHARES, _LISTS = ("threshold", "nms"), ("anchors", "ratios")


def _check(head: str, option: str, value: Any) -> None:
    """Arguments of heads are whole numbers from 1, shares, or lists of sizes."""
    if option in _SHARES:
        sound, expected = _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"
    elif option in _LISTS:
        sound = isinstance(value, (list, tuple)) and bool(value) and all(_is_number(v) and v > 0 for v in value)
        expected = "a list of numbers above 0"
    else:
        sound, expected = value is None or (type(value) is int and value >= 1), "a whole number from 1"
    if not sound:
        raise ChiasmError(f"{option} of {head} is {value!r}: expected {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
