"""A network as shapes alone: built without memory, and without the numbers that it would begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chiasm.models import create_model

# What `torch.nn.init` is made of.
FILLING = frozenset(
    getattr(Tensor, name) for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
)


class _Unfilled(TorchFunctionMode):
    """Nothing is filled that has no numbers. PyTorch would work out the shape of every step of it, in Python, which
    takes most of the time that building a network there takes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FILLING and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """What is built within is on the meta device: it has shapes and types, and no numbers.

    Raises, within:
        RuntimeError, NotImplementedError: for a network that looks at numbers while it is built.
    """
    with torch.device("meta"), _Unfilled():
        yield


def sketch(name: str, **model_args: Any) -> nn.Module:
    """The architecture as `shapes_only`; with numbers and on the CPU where it looks at them."""
    try:
        with shapes_only():
            return create_model(name, **model_args)
    except (RuntimeError, NotImplementedError):
        return create_model(name, **model_args)
