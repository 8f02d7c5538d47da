"""A network as steps, so that something can happen between them: what coupling two networks stands on.

A convolutional network is opened along the modules that its `feature_info` names, and its stages into their blocks. A
Transformer is opened at its blocks. Nothing is assumed of either: the steps are tried on an image when they are made,
and must give bit for bit what the network's own `forward_features` gives. A network for which they do not is refused by
name. Steps hold names of modules, not modules, so copying, loading and replacing parts of a network leaves them true.

Shapes: map (B, C, H, W); tokens (B, P + N, D) with P class and register tokens first and N = h * w of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.hrnet import HighResolutionNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from chiasm.errors import ChiasmError
from chiasm.models.checkpoints import input_channels
from chiasm.models.conformer import Conformer

TRIAL_SIDE = 64  # px, of the image on which steps are tried


class MapSize(NamedTuple):
    """What a map is behind a step."""

    channels: int
    reduction: int  # of the image's side


class State(NamedTuple):
    """What goes from step to step: what other branches may see and change, and what only the network itself reads."""

    x: Tensor
    own: Any = None


# ------------------------------------------------------------------------------------------------ convolutional branch


@dataclass(frozen=True)
class ConvSteps:
    """A network whose steps are modules run one after the other.

    Attributes:
        names: the modules.
        sizes: of the map behind each.
        levels: per level of the network's `feature_info`, the step it is behind.
    """

    names: tuple[str, ...]
    sizes: tuple[MapSize, ...]
    levels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def enter(self, net: nn.Module, image: Tensor) -> State:
        return State(image)

    def step(self, net: nn.Module, i: int, state: State) -> State:
        return State(net.get_submodule(self.names[i])(state.x))

    def leave(self, net: nn.Module, state: State) -> Tensor:
        """What the network's `forward_head` takes."""
        return state.x


@dataclass(frozen=True)
class HRNetSteps(ConvSteps):
    """HRNet keeps several maps at once; those that its classification head adds up, fine to coarse, are its levels."""

    def enter(self, net: Any, image: Tensor) -> State:
        for module in (net.conv1, net.bn1, net.act1, net.conv2, net.bn2, net.act2):
            image = module(image)
        return State(image)

    def step(self, net: Any, i: int, state: State) -> State:
        if i == 0:
            maps = net.stages(state.x)
            return State(net.incre_modules[0](maps[0]), maps)
        return State(net.incre_modules[i](state.own[i]) + net.downsamp_modules[i - 1](state.x), state.own)

    def leave(self, net: Any, state: State) -> Tensor:
        return net.final_layer(state.x)


@dataclass(frozen=True)
class ConformerSteps(ConvSteps):
    """A Conformer brings tokens of its own along; its map is what others see."""

    def enter(self, net: Any, image: Tensor) -> State:
        return State(*net._enter(image))

    def step(self, net: Any, i: int, state: State) -> State:
        return State(*net._step(net.blocks[i], state.x, state.own))

    def leave(self, net: Any, state: State) -> Any:
        return net._leave(state.x, state.own)


def conv_steps(net: nn.Module, name: str) -> ConvSteps:
    """The steps of a convolutional network with feature levels, tried.

    Raises:
        ChiasmError: for a network that cannot be stepped, with the reason.
    """
    infos = _levels_of(net, name)
    kind: type[ConvSteps]
    if isinstance(net, HighResolutionNet):
        kind, names = HRNetSteps, tuple(f"incre_modules.{i}" for i in range(len(net.incre_modules or ())))
    elif isinstance(net, Conformer):
        kind, names = ConformerSteps, tuple(f"blocks.{i}" for i in range(len(net.blocks)))
    else:
        kind, names = ConvSteps, tuple(_in_order(net, "", {info["module"] for info in infos}))
    image = _trial_image(net)
    with _evaluating(net), torch.no_grad():
        try:
            whole = net.forward_features(image)  # type: ignore[operator]
        except (AssertionError, RuntimeError, ValueError) as error:
            why = f"it does not take images of any size ({str(error).splitlines()[0].rstrip('.')})"
            raise _not_steppable(name, why) from error
        if kind is ConvSteps:
            names = tuple(_opened(net, names, {info["module"] for info in infos}, image, whole, name))
        steps = kind(names, (), ())
        state, sizes = steps.enter(net, image), []
        for i in range(len(steps)):
            state = steps.step(net, i, state)
            sizes.append(MapSize(state.x.shape[1], round(image.shape[-1] / state.x.shape[-1])))
        if not _same(steps.leave(net, state), whole):
            raise _not_steppable(name, "its steps, one after the other, do not give what it gives")
    return kind(names, tuple(sizes), _levels(names, infos, sizes))


def _levels(names: tuple[str, ...], infos: list[dict[str, Any]], sizes: list[MapSize]) -> tuple[int, ...]:
    """The last step of each level: of its module, or where that is no step, of its resolution."""
    levels = []
    for info in infos:
        inside = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{info['module']}.")]
        inside = inside or [i for i, size in enumerate(sizes) if size == (info["num_chs"], info["reduction"])]
        if inside:
            levels.append(inside[-1])
    return tuple(sorted(set(levels)))


def _in_order(module: nn.Module, prefix: str, wanted: set[str]) -> list[str]:
    """Children in order of definition; those that have a wanted module inside are opened."""
    names: list[str] = []
    for child_name, child in module.named_children():
        path = prefix + child_name
        inside = path not in wanted and any(other.startswith(f"{path}.") for other in wanted)
        names += _in_order(child, f"{path}.", wanted) if inside else [path]
    return names


def _opened(
    net: nn.Module, names: tuple[str, ...], levels: set[str], image: Tensor, whole: Any, name: str
) -> list[str]:
    """The steps that lead to the final features, with each stage opened into its blocks where that changes nothing."""
    opened: list[str] = []
    x: Any = image
    reached = set()
    for path in names:
        module = net.get_submodule(path)
        before = x
        try:
            x = module(before.clone())  # some activations work in place
        except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
            raise _not_steppable(
                name, f"'{path}' does not take what '{(opened or ['the image'])[-1]}' gives"
            ) from error
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise _not_steppable(name, f"'{path}' does not give one map")
        opened += _blocks(module, path, before, x) if path in levels or path.rpartition(".")[0] in levels else [path]
        reached |= {path} & levels
        if reached == levels & set(names) and _same(x, whole):
            return opened
    raise _not_steppable(name, "its modules, one after the other, do not give what it gives")


def _blocks(module: nn.Module, path: str, before: Tensor, after: Tensor, depth: int = 2) -> list[str]:
    """A stage as its blocks, and theirs where they are sequences again; itself where that is something else."""
    children = list(module.named_children())
    if depth == 0 or len(children) < 2:
        return [path]
    x, names = before, []
    for child_name, child in children:
        try:
            y = child(x.clone())
        except (NotImplementedError, RuntimeError, TypeError, AttributeError):
            return [path]
        if not isinstance(y, Tensor) or y.ndim != 4:
            return [path]
        # Only what is a sequence by its class is opened further: a block's insides are its own affair.
        names += (
            _blocks(child, f"{path}.{child_name}", x, y, depth - 1)
            if type(child) is nn.Sequential
            else [f"{path}.{child_name}"]
        )
        x = y
    return names if torch.equal(x, after) else [path]


def feature_info(net: nn.Module) -> list[dict[str, Any]]:
    """The levels that a network states, timm's way; [] where it states none."""
    infos = getattr(net, "feature_info", None)
    return list(infos if isinstance(infos, list) else getattr(infos, "info", None) or [])


def _levels_of(net: nn.Module, name: str) -> list[dict[str, Any]]:
    infos = feature_info(net)
    if not infos or not hasattr(net, "forward_features"):
        raise _not_steppable(name, "it states no feature levels")
    return infos


# -------------------------------------------------------------------------------------------------- Transformer branch


@dataclass(frozen=True)
class TokenSteps:
    """A plain Transformer: its steps are its blocks.

    Attributes:
        depth: blocks.
        dim: width D of the tokens.
        prefix: class and register tokens P in front.
        patch: side of a patch in pixels.
        side: height and width in pixels that it takes, where it takes one size only.
    """

    depth: int
    dim: int
    prefix: int
    patch: tuple[int, int]
    side: tuple[int, int] | None

    def __len__(self) -> int:
        return self.depth

    def enter(self, net: Any, image: Tensor) -> State:
        return self.embed(net, net.patch_embed(image))

    def embed(self, net: Any, patches: Tensor) -> State:
        """From patches, (B, N, D) or (B, h, w, D) as the network's own embedding gives them."""
        raise NotImplementedError

    def step(self, net: Any, i: int, state: State) -> State:
        raise NotImplementedError

    def leave(self, net: Any, state: State) -> Tensor:
        """What the network's `forward_head` takes."""
        return net.norm(state.x)


class ViTSteps(TokenSteps):
    """ViT, DeiT (distilled too), DeiT-3, DINOv2, CLIP, SigLIP: timm's VisionTransformer."""

    def embed(self, net: Any, patches: Tensor) -> State:
        return State(net.norm_pre(net.patch_drop(net._pos_embed(patches))))

    def step(self, net: Any, i: int, state: State) -> State:
        return State(net.blocks[i](state.x))


class EvaSteps(TokenSteps):
    """EVA, EVA-02, DINOv3: rotary embeddings go along to every block."""

    def embed(self, net: Any, patches: Tensor) -> State:
        tokens, rope = net._pos_embed(patches)
        return State(net.norm_pre(tokens), rope)

    def step(self, net: Any, i: int, state: State) -> State:
        rope = state.own[i] if getattr(net, "rope_mixed", False) and state.own is not None else state.own
        return State(net.blocks[i](state.x, rope=rope), state.own)


class BeitSteps(TokenSteps):
    """BEiT: a relative position bias, in some sizes one for all blocks."""

    def embed(self, net: Any, patches: Tensor) -> State:
        tokens = torch.cat([net.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if net.pos_embed is not None:
            tokens = tokens + net.pos_embed
        return State(net.pos_drop(tokens), net.rel_pos_bias() if net.rel_pos_bias is not None else None)

    def step(self, net: Any, i: int, state: State) -> State:
        return State(net.blocks[i](state.x, shared_rel_pos_bias=state.own), state.own)


TRANSFORMERS: dict[type[nn.Module], type[TokenSteps]] = {
    VisionTransformer: ViTSteps,
    Eva: EvaSteps,
    Beit: BeitSteps,
}


def token_steps(net: nn.Module, name: str) -> TokenSteps:
    """The steps of a plain Transformer, tried.

    Raises:
        ChiasmError: for a network that cannot be stepped, with the reason.
    """
    kind = next((kind for model, kind in TRANSFORMERS.items() if isinstance(net, model)), None)
    if kind is None:
        raise _not_steppable(
            name, f"a {type(net).__name__} is no plain Transformer such as ViT, DeiT, DINOv2, DINOv3, EVA, BEiT or CLIP"
        )
    anything: Any = net
    embed = anything.patch_embed
    fixed = None if getattr(anything, "dynamic_img_size", False) else tuple(embed.img_size)
    steps = kind(
        depth=len(anything.blocks),
        dim=int(anything.embed_dim),
        prefix=int(anything.num_prefix_tokens),
        patch=tuple(embed.patch_size),
        side=fixed,
    )
    side = fixed or tuple(max(1, TRIAL_SIDE // size) * size for size in steps.patch)
    image = _trial_image(net, side)
    with _evaluating(net), torch.no_grad():
        state = steps.enter(net, image)
        for i in range(len(steps)):
            state = steps.step(net, i, state)
        if not _same(steps.leave(net, state), anything.forward_features(image)):
            raise _not_steppable(name, "its blocks, one after the other, do not give what it gives")
    return steps


# --------------------------------------------------------------------------------------------------------------- trial


class _evaluating:
    """A network in evaluation mode for a while, each module as it was afterwards."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.net.modules()]
        self.net.eval()

    def __exit__(self, *error: object) -> None:
        for module, mode in self.modes:
            module.training = mode


def _trial_image(net: nn.Module, side: tuple[int, ...] = (TRIAL_SIDE, TRIAL_SIDE)) -> Tensor:
    first = next(net.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, input_channels(net), *side, generator=generator).to(first.device, first.dtype)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _not_steppable(name: str, why: str) -> ChiasmError:
    return ChiasmError(f"{name} cannot be coupled: {why}.")
