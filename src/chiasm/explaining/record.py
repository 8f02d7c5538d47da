"""One forward pass of one image, watched: the features of each branch, its attention, what crossed between branches.

Modules are watched by hooks. Attention weights never leave PyTorch's fused kernel, so while a pass is recorded its
formula is computed in plain steps in its place, softmax(q k' / sqrt(d) + mask) v, and its weights are kept. They stay
in the autograd graph: the gradient of an answer with respect to them is `torch.autograd.grad(answer, attention.raw)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chiasm.errors import ChiasmError
from chiasm.layers.by_hand import watched
from chiasm.layers.tokens import tokens_to_map
from chiasm.models.taps import AttentionTap, ExchangeTap, FeatureTap, Places, Size, Taps, taps_of

FEWEST = 2  # places a side that a map has at least


@dataclass(frozen=True)
class Attention:
    """The attention of one block, in one form whatever the network.

    Attributes:
        branch, name: 'tokens' of a network of two branches, else 'model'; 'block 3'.
        weights: (G, heads, N, N), rows sum to 1; G groups that attend among themselves: one of a plain Transformer, the
            windows of Swin, the pixels of a patch of MobileViT.
        index: (G, N) int64, the token in each slot: 0 ... P - 1 are class and register tokens, P + row * w + column the
            others; -1 is a slot without a token.
        prefix: P.
        grid: h and w.
        stride: pixels of the canvas from token to token, down and across.
        raw: the tensor in the graph, broadcast to `weights`: itself, or (G, 1, 1, N) where all queries attend alike.
    """

    branch: str
    name: str
    weights: Tensor
    index: Tensor
    prefix: int
    grid: Size
    stride: tuple[float, float]
    raw: Tensor


class Crossing(NamedTuple):
    """What an exchange changed: a map (1, C, h, w), and tokens as a map (1, D, h', w'), before it and after."""

    name: str
    conv: Tensor
    tokens: Tensor
    conv_after: Tensor
    tokens_after: Tensor


class Feature(NamedTuple):
    """What a branch holds behind a stage or block.

    Attributes:
        branch, name: 'conv', 'block 3'.
        map: (1, C, h, w).
        stride: pixels of the canvas from place to place, down and across; a map may reach over the canvas.
        raw: the tensor in the graph.
        lay: from `raw`, or its gradient, to a map.
    """

    branch: str
    name: str
    map: Tensor
    stride: tuple[float, float]
    raw: Tensor
    lay: Callable[[Tensor], Tensor | None]


@dataclass
class Recording:
    """All that was seen, each in the order of the computation; `outputs` is what the pass gave."""

    canvas: Size
    features: list[Feature] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    outputs: Any = None


def record(
    model: nn.Module, image: Tensor, *, coupled: bool = True, run: Callable[[Tensor], Any] | None = None,
    taps: Taps | None = None,
) -> Recording:  # fmt: skip
    """Run a network on one image and keep what it saw.

    Under `torch.no_grad()` nothing is kept for gradients.

    Args:
        model: a network in evaluation mode.
        image: (1, C, H, W).
        coupled: False runs it with its exchanges silent: each branch sees what it would see alone.
        run: what to call in place of the model, such as a detector that it is the backbone of.
        taps: where to read it, if known.

    Raises:
        ChiasmError: for `coupled=False` of a network without exchanges.
    """
    taps = taps_of(model) if taps is None else taps
    seen = Recording(canvas=(image.shape[-2], image.shape[-1]))
    with ExitStack() as stack:
        if not coupled:
            stack.enter_context(uncoupled(model, taps))
        stack.enter_context(_features(model, taps, seen))
        stack.enter_context(_crossings(model, taps, seen))
        if taps.attentions:
            stack.enter_context(_attentions(model, taps, seen))
        seen.outputs = (run or model)(image)
    return seen


@contextmanager
def uncoupled(model: nn.Module, taps: Taps) -> Iterator[None]:
    """The exchanges of a network are silent while this lasts."""
    if not taps.exchanges:
        raise ChiasmError("this network has no exchanges between branches that could be turned off.")
    hooks = []
    for tap in taps.exchanges:
        module: Any = model.get_submodule(tap.module)
        hooks.append(module.register_forward_hook(lambda module, args, output: module.silent(*args)))
    try:
        yield
    finally:
        _remove(hooks)


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------------------------------------------------- features


@contextmanager
def _features(model: nn.Module, taps: Taps, seen: Recording) -> Iterator[None]:
    hooks = [
        model.get_submodule(tap.module).register_forward_hook(partial(_keep_feature, seen, tap))
        for tap in taps.features
    ]
    outputs: dict[Size, tuple[str, Tensor]] = {}
    if not taps.features:
        for name, module in model.named_modules():
            if name:
                hooks.append(module.register_forward_hook(partial(_keep_output, outputs, name)))
    try:
        yield
    finally:
        _remove(hooks)
    seen.features += [
        Feature("model", name, raw, _spanning(raw, seen.canvas), raw, _as_it_is)
        for size, (name, raw) in outputs.items()
        if _is_grid(size, seen.canvas)
    ]


def _keep_feature(seen: Recording, tap: FeatureTap, module: nn.Module, args: Any, output: Any) -> None:
    raw = tap.pick(args, output)
    lay = partial(_laid, tap.lay, seen.canvas)
    laid = lay(raw)
    if laid is not None:
        stride = tap.stride or _spanning(laid, seen.canvas)
        seen.features.append(Feature(tap.branch, tap.name, laid, stride, raw, lay))


def _laid(lay: Callable[[Tensor, Size], Tensor | None], canvas: Size, x: Tensor) -> Tensor | None:
    return lay(x, canvas)


def _spanning(laid: Tensor, canvas: Size) -> tuple[float, float]:
    return canvas[0] / laid.shape[-2], canvas[1] / laid.shape[-1]


def _keep_output(outputs: dict[Size, tuple[str, Tensor]], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """Of a network that does not name its maps: the last output of each resolution, but for what attention makes."""
    if isinstance(output, Tensor) and output.ndim == 4 and len(output) == 1 and "att" not in name.lower():
        size = output.shape[-2], output.shape[-1]
        outputs.pop(size, None)  # a later one stands later
        outputs[size] = name, output


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _is_grid(size: Size, canvas: Size) -> bool:
    """Whether a map of that size can be the canvas at some stride: one for both axes, up to the rounding of sides."""
    down, across = canvas[0] / size[0], canvas[1] / size[1]
    near = abs(size[0] - canvas[0] / across) <= 1 and abs(size[1] - canvas[1] / down) <= 1
    return min(size) >= FEWEST and down >= 2 and across >= 2 and near


# --------------------------------------------------------------------------------------------------------- exchanges


@contextmanager
def _crossings(model: nn.Module, taps: Taps, seen: Recording) -> Iterator[None]:
    hooks = [
        model.get_submodule(tap.module).register_forward_hook(partial(_keep_crossing, seen, taps, tap))
        for tap in taps.exchanges
    ]
    try:
        yield
    finally:
        _remove(hooks)


def _keep_crossing(seen: Recording, taps: Taps, tap: ExchangeTap, module: nn.Module, args: Any, output: Any) -> None:
    assert taps.token_grid is not None
    crossed, grid = tap.read(args, output), taps.token_grid(seen.canvas)
    before, after = (
        tokens_to_map(tokens[:, crossed.prefix :], grid) for tokens in (crossed.tokens, crossed.tokens_after)
    )
    seen.crossings.append(Crossing(tap.name, crossed.conv, before, crossed.conv_after, after))


# --------------------------------------------------------------------------------------------------------- attention


@contextmanager
def _attentions(model: nn.Module, taps: Taps, seen: Recording) -> Iterator[None]:
    watch = _WatchAttention(seen)
    hooks = []
    for tap in taps.attentions:
        hooks.append(model.get_submodule(tap.seen_by).register_forward_pre_hook(partial(watch.given, tap)))
    for tap in taps.attentions:
        module = model.get_submodule(tap.module)
        hooks.append(module.register_forward_pre_hook(partial(watch.enter, tap)))
        hooks.append(module.register_forward_hook(watch.leave))
    try:
        with watched(), watch:
            yield
    finally:
        _remove(hooks)


class _WatchAttention(TorchFunctionMode):
    """Attention within the tapped modules in plain steps, its weights kept; everything else as it is."""

    def __init__(self, seen: Recording) -> None:
        super().__init__()
        self._seen = seen
        self._args: dict[str, tuple[Any, ...]] = {}  # by the tap's module
        self._within: list[AttentionTap] = []

    def given(self, tap: AttentionTap, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._args[tap.module] = args

    def enter(self, tap: AttentionTap, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._within.append(tap)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._within.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._within and func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self._within and func in _SOFTMAX:
            return self._kept(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if is_causal or enable_gqa:  # no vision Transformer of ours or timm's
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self._kept(scores.softmax(-1)) @ value

    def _kept(self, weights: Tensor) -> Tensor:
        """Keep the weights (G, heads, N, N), or (1, 1, G, N) of separable attention, if they are those of the tap."""
        tap = self._within[-1]
        places = tap.places(self._args[tap.module], self._seen.canvas)
        groups, slots = places.index.shape
        if weights.ndim != 4 or weights.shape[-1] != slots:
            return weights
        if weights.shape[:2] == (groups, weights.shape[1]) and weights.shape[2] == slots:
            raw = weights
            self._add(tap, raw, raw, places)
            return weights
        if weights.shape[:3] == (1, 1, groups):
            raw = weights.permute(2, 0, 1, 3)
            self._add(tap, raw, raw.expand(-1, -1, slots, -1), places)
            return raw.permute(1, 2, 0, 3)
        return weights

    def _add(self, tap: AttentionTap, raw: Tensor, weights: Tensor, places: Places) -> None:
        self._seen.attentions.append(
            Attention(
                tap.branch,
                tap.name,
                weights,
                places.index.to(weights.device),
                places.prefix,
                places.grid,
                places.stride,
                raw,
            )
        )


_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
