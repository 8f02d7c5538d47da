"""A model made faster for inference: `chiasm.optimize`.

Three steps on a copy of the model in evaluation mode:

1. a layer that knows a faster form of itself for inference says so with a method `optimized() -> nn.Module` and is
   replaced by what that returns (cached biases and masks, indices computed beforehand, memory written over);
2. one forward pass is watched: which module's result goes into which other, and is read by nobody else. Batch norms
   behind convolutions and linear layers are folded into them, activations are fused to them, and all of these become
   `chiasm.layers.fused`, channels-last. Nothing is concluded from names or from the order of modules;
3. the answers are compared with the original's. Should they differ, as a network may do what a watcher does not see,
   what came of the second step is dropped, and then what came of the first.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chiasm.data.machine import free_products_memory
from chiasm.layers.fused import ACTIVATIONS, Act, Fused, FusedConv2d, FusedLinear, act_of, plainly
from chiasm.models.checkpoints import input_channels

_log = logging.getLogger("chiasm.inference")

# Sizes tried first on a model that may take any: small, for speed, and one that nothing divides.
PROBES = ((64, 96), (75, 118))

_NOTHING = (nn.Identity, type(None))
NORMS = (nn.BatchNorm2d, BatchNormAct2d, nn.BatchNorm1d)


@torch.no_grad()
def optimize(model: nn.Module) -> nn.Module:
    """A copy of `model` that gives the same outputs in less time, for inference.

    Args:
        model: any network that takes images, ours or timm's or another; it stays as it is. Move it to its device and
            type first.

    Returns:
        The copy, in evaluation mode. At every size that the model takes, its outputs are the model's within 1e-4 of
        the largest (5e-2 in the half types). Its weights are constants: no gradient reaches them and folded norms are
        gone, so train and save the original. What a layer gives may be overwritten by the next one.
    """
    if any(isinstance(module, Fused) for module in model.modules()):
        return deepcopy(model)
    try:
        return _optimized(model)
    finally:
        free_products_memory()  # of the trials; the copy's own products are not made there


def _optimized(model: nn.Module) -> nn.Module:
    faster = _frozen(model)
    with plainly(), _without_onednn():
        known = list(_answers(faster))
        faster = _replace(faster, {})
        if known:
            _fuse(faster, _watch(faster, known[0][0]))
        if all(_gives(faster, images, answer) for images, answer in known):
            return faster
        _log.debug("%s: fused, it answered differently", type(model).__name__)
        faster = _replace(_frozen(model), {})
        if all(_gives(faster, images, answer) for images, answer in known):
            return faster
    _log.debug("%s: with other layers, too; it stays as it is", type(model).__name__)
    return _frozen(model)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN keeps what it compiled for each shape: sizes that are tried once would leave megabytes behind."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration")  # of PyTorch, about another flag
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def _frozen(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, channels-last, whose weights ask for no gradient."""
    return deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _answers(model: nn.Module) -> Iterator[tuple[Tensor, Any]]:
    """Images that the model takes, with its answers: of two sizes where it takes any, else of its own."""
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is None or reference.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    stated = getattr(model, "pretrained_cfg", None) or {}
    known = 0
    for size in (*PROBES, tuple(stated.get("input_size", (3, 224, 224))[-2:])):
        if known == len(PROBES):
            return
        images = torch.randn(1, input_channels(model), *size, generator=generator).to(reference)
        try:
            answer = model(images)
        except Exception as error:  # whatever a network says to images of another size than it was made for
            _log.debug("%s does not take %s: %s", type(model).__name__, size, error)
            continue
        known += 1
        yield images, answer


def _gives(model: nn.Module, images: Tensor, expected: Any) -> bool:
    """Whether the model's outputs are those expected, within what the type allows."""
    try:
        pairs = list(zip(tree_leaves(model(images)), tree_leaves(expected), strict=True))
    except Exception as error:  # a network may reach into a module that is now another
        _log.debug("%s does not run: %s", type(model).__name__, error)
        return False
    return all(
        (one - other).abs().max() <= (1e-4 if other.element_size() > 2 else 5e-2) * other.abs().max()
        for one, other in pairs
        if isinstance(other, Tensor) and other.numel()
    )


def _replace(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module with each one in it that knows a faster form replaced by that, from the top down.

    What a class says of itself does not hold for one derived from it, nor where somebody watches a layer within.
    """
    if module not in done:
        watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
        form: Any = getattr(module, "optimized", None) if "optimized" in vars(type(module)) else None
        done[module] = faster = module if form is None or watched else form()
        for name, child in list(faster._modules.items()):
            if child is not None:
                faster.add_module(name, _replace(child, done))
    return done[module]


# ------------------------------------------------------------------------------------------------- watching and fusing


@dataclass(eq=False)
class _Result:
    """What a module gave: the tensor, and which modules and how many operators read it, also within those modules."""

    giver: str
    tensor: Tensor
    readers: list[str] = field(default_factory=list)
    reads: int = 0
    reads_within: int = 0
    returned: bool = False


class _Watch(TorchDispatchMode):
    """Counts who reads the results of the watched modules while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.results: list[_Result] = []
        self._current: dict[int, _Result] = {}  # by the tensor's identity; the tensors are kept alive in `results`

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.calls[name] += 1
        if args and (read := self._current.get(id(args[0]))):
            read.readers.append(name)
            read.reads_within -= read.reads

    def after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and (read := self._current.get(id(args[0]))):
            read.reads_within += read.reads
        if isinstance(output, Tensor):  # where it is the input, changed in place, the earlier result has ended
            self._current[id(output)] = result = _Result(name, output)
            self.results.append(result)

    def ends_with(self, outputs: Any) -> None:
        """What the model itself returns must stay."""
        for output in tree_leaves(outputs):
            if result := self._current.get(id(output)):
                result.returned = True

    def next_of(self, name: str) -> str | None:
        """The one module that reads what `name` gave, which nobody else does; None where it is not so."""
        given = [result for result in self.results if result.giver == name]
        if len(given) != 1 or given[0].returned or len(given[0].readers) != 1:
            return None
        (reader,) = given[0].readers
        alone = given[0].reads == given[0].reads_within and self.calls[name] == self.calls[reader] == 1
        siblings = name.rpartition(".")[0] == reader.rpartition(".")[0]
        return reader if alone and siblings else None

    def is_matrix(self, name: str) -> bool:
        return all(result.tensor.ndim == 2 for result in self.results if result.giver == name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for item in tree_leaves((args, kwargs)):
            if read := self._current.get(id(item)):
                read.reads += 1
        return func(*args, **(kwargs or {}))


def _watch(model: nn.Module, images: Tensor) -> _Watch:
    """Watch one forward pass of `model`, as far as it concerns modules that could be fused."""
    watch, hooks = _Watch(), []
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        known = FusedConv2d.can_fuse(module) or type(module) in (nn.Linear, *NORMS, *ACTIVATIONS)
        private = names[id(module)] == 1 and not module._forward_hooks and not module._forward_pre_hooks
        if known and private and type(module) is not nn.Identity:
            hooks.append(module.register_forward_pre_hook(partial(watch.before, name)))
            hooks.append(module.register_forward_hook(partial(watch.after, name)))
    try:
        with watch:
            watch.ends_with(model(images))
    finally:
        for hook in hooks:
            hook.remove()
    return watch


def _fuse(model: nn.Module, seen: _Watch) -> None:
    """Replace the convolutions and linear layers that were called, each with the norm and activation behind it."""
    called = [(name, model.get_submodule(name)) for name in seen.calls]
    for name, layer in called:
        if not (FusedConv2d.can_fuse(layer) or type(layer) is nn.Linear):
            continue
        norm: Any = None
        act: Act | None = None
        behind = seen.next_of(name)
        if behind and _folds(model.get_submodule(behind), layer, seen.is_matrix(name)):
            norm = model.get_submodule(behind)
            inner = getattr(norm, "act", nn.Identity())
            act = act_of(inner)
            _put(model, behind, inner if act is None else nn.Identity())
            behind = seen.next_of(behind) if act == "none" else None
        if behind and (act := act_of(model.get_submodule(behind))):
            _put(model, behind, nn.Identity())
        act = act or "none"
        if isinstance(layer, nn.Conv2d):
            _put(model, name, FusedConv2d(layer, norm, act))
        elif isinstance(layer, nn.Linear):
            _put(model, name, FusedLinear(layer, act, norm))


def _folds(norm: Any, layer: nn.Module, matrix: bool) -> bool:
    """Whether `norm` is an affine map of the layer's output channels and so can be part of the layer."""
    kinds = (nn.BatchNorm2d, BatchNormAct2d) if isinstance(layer, nn.Conv2d) else (nn.BatchNorm1d,) if matrix else ()
    return type(norm) in kinds and norm.running_mean is not None and type(getattr(norm, "drop", None)) in _NOTHING


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent).add_module(last, module)
