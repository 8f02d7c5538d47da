r"""Any convolutional network coupled with any plain Transformer: early, mid, late, or one inside the other.

              early                mid                    late                 sandwich

              image               image                  image                  image
                |                /     \                /     \                   |
              conv            conv     tokens        conv     tokens            conv
                |               |<-----> |             |         |                |
             tokens            conv    tokens         conv    tokens           tokens --+
                |               |<-----> |             |         |                |     |
             tokens            head     head            \       /              conv <---+
                |                \     /               one head, or               |
              head                mean                two and their mean        head

A name of such a model is its recipe: `resnet50+deit_small_patch16_224:mid`. Its parts are timm's (or our) networks as
they are, under `conv` and `tokens`, with their published weights; what joins them begins by adding nothing, so that a
mid, late or sandwiched model starts where its parts are. Early is different by nature: what the
Transformer's blocks see is new to them.

Each part sees the image as it was trained to: in its own normalisation, and at a size that its patches divide.

Sources: early as the hybrid of ViT (arXiv 2010.11929, section 3.1); mid as the Conformer (arXiv 2105.03889), with any
exchange unit; sandwich as in BoTNet and MobileViT, attention between convolutions.

Shapes: B batch, map (B, C, H, W), tokens (B, P + N, D), P class and register tokens, N = h * w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.layers.exchange import Direction, Exchange, Grid, Unit
from chiasm.layers.tokens import map_to_tokens, resize_map, tokens_to_map
from chiasm.models.checkpoints import input_channels
from chiasm.models.steps import TRIAL_SIDE, ConvSteps, State, TokenSteps, conv_steps, token_steps

Fusion = Literal["early", "mid", "late", "sandwich"]
Join = Literal["logits", "concat", "gated"]
Branches = Literal["both", "conv", "tokens"]
EVERY_STAGE, EVERY_BLOCK = "every stage", "every block"


class Point(NamedTuple):
    """Where features are exchanged: behind that many steps of the one part and blocks of the other."""

    steps: int
    blocks: int


@dataclass(frozen=True, kw_only=True)
class CoupledConfig:
    """How two networks are joined.

    Attributes:
        fusion: see the top of this file.
        exchange: mid: the exchange unit (layers/exchange.py).
        direction: mid: which way features cross.
        points: mid: 'every stage', 'every block', or pairs (level of the convolutional part from 0, blocks of the
            Transformer before it), such as [[1, 3], [2, 9]].
        join: late: 'logits' averages those of two heads, 'concat' puts one head on both pooled features, 'gated' on
            their mixture, whose shares the features decide.
        level: early and sandwich: the level of the convolutional part that becomes tokens; None: the last with at least
            the Transformer's resolution.
        keep_patches: early: add the map to the Transformer's own patch embedding, beginning with nothing, rather than
            put it in its place.
        branches: mid and late with logits: which branches answer. One alone runs without the other, for speed.
        token_level: `features_only` also gives the tokens, as a map, behind the level of their stride.
    """

    fusion: Fusion = "mid"
    exchange: Unit = "fcu"
    direction: Direction = "both"
    points: Any = EVERY_STAGE
    join: Join = "logits"
    level: int | None = None
    keep_patches: bool = False
    branches: Branches = "both"
    token_level: bool = False

    def __post_init__(self) -> None:
        options = {"fusion": Fusion, "exchange": Unit, "direction": Direction, "join": Join, "branches": Branches}
        for option, allowed in options.items():
            if getattr(self, option) not in get_args(allowed):
                words = get_args(allowed)
                raise UnknownNameError(option, str(getattr(self, option)), words, f"One of {', '.join(words)}.")
        if self.branches != "both" and (self.fusion in ("early", "sandwich") or self.join != "logits"):
            raise ChiasmError(
                f"branches={self.branches!r}: only fusion='mid', or 'late' with join='logits', has branches that can "
                "answer alone."
            )
        if isinstance(self.points, str) and self.points not in (EVERY_STAGE, EVERY_BLOCK):
            raise UnknownNameError(
                "points", self.points, (EVERY_STAGE, EVERY_BLOCK), "Or pairs [[level, blocks], ...]."
            )


class Parts(NamedTuple):
    """Two networks with the steps they are run in, and what the second makes of an image."""

    conv: nn.Module
    conv_steps: ConvSteps
    tokens: nn.Module
    token_steps: TokenSteps


class Coupled(nn.Module):
    """What all fusions share: the two parts, their inputs, and timm's contract.

    Image (B, in_chans, H, W), normalised as the convolutional part's -> logits (B, num_classes).
    """

    # Modules of one part that the fusion does not read are taken out by `couple`, so that every weight is trained.
    head_names: tuple[str, ...] = ()

    def __init__(self, parts: Parts, config: CoupledConfig, *, num_classes: int, name: str) -> None:
        super().__init__()
        self.config, self.num_classes, self.name = config, num_classes, name
        self.conv, self.conv_steps, self.tokens, self.token_steps = parts
        self.grad_checkpointing = False
        scale, shift = _renormalisation(self.conv, self.tokens)
        self.register_buffer("token_scale", scale, persistent=False)
        self.register_buffer("token_shift", shift, persistent=False)
        self.num_features = self.conv_steps.sizes[-1].channels
        self._set_levels(self.conv_steps.levels)
        self.pretrained_cfg = _pretrained_cfg(self, name)

    def _set_levels(self, steps: Sequence[int]) -> None:
        """State the maps behind these steps, and where asked for the tokens, as the levels of `features_only`."""
        levels: list[tuple[int, dict[str, Any]]] = []
        for step in steps:
            size, module = self.conv_steps.sizes[step], f"conv.{self.conv_steps.names[step]}"
            levels.append((step, {"num_chs": size.channels, "reduction": size.reduction, "module": module}))
        if self.config.token_level:
            tokens = {
                "num_chs": self.token_steps.dim,
                "reduction": self.token_steps.patch[0],
                "module": "tokens.blocks",
            }
            levels.append((-1, tokens))
        levels.sort(key=lambda level: level[1]["reduction"])  # timm wants them from fine to coarse
        self.level_steps = [step for step, _ in levels]
        self.feature_info: list[dict[str, Any]] = [info for _, info in levels]

    # ---------------------------------------------------------------------------------------------------- running parts

    token_scale: Tensor | None
    token_shift: Tensor | None

    def token_image(self, image: Tensor) -> Tensor:
        """The image as the Transformer takes it: in its normalisation, at a size that its patches divide."""
        if self.token_scale is not None and self.token_shift is not None:
            image = image * self.token_scale + self.token_shift
        size = self.token_steps.side or tuple(
            max(1, round(side / patch)) * patch
            for side, patch in zip(image.shape[-2:], self.token_steps.patch, strict=True)
        )
        if tuple(image.shape[-2:]) == size:
            return image
        return F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)

    def grid(self, image: Tensor) -> Grid:
        """h x w of the tokens of an image as `token_image` gives it."""
        height, width = (side // patch for side, patch in zip(image.shape[-2:], self.token_steps.patch, strict=True))
        return height, width

    def _advance(
        self, net: nn.Module, steps: ConvSteps | TokenSteps, state: State, start: int, stop: int,
        seen: dict[int, Tensor] | None = None,
    ) -> State:  # fmt: skip
        """Run steps `start` to `stop`; what each leaves is put into `seen`."""
        for i in range(start, stop):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                state = checkpoint(steps.step, net, i, state, use_reentrant=False)
            else:
                state = steps.step(net, i, state)
            if seen is not None:
                seen[i] = state.x
        return state

    def _run(self, image: Tensor, seen: dict[int, Tensor] | None = None) -> tuple[Any, ...]:
        """Image -> what `forward_head` takes. The map behind each step goes into `seen`, the tokens' at -1."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------- timm's contract

    def forward_features(self, x: Tensor) -> tuple[Any, ...]:
        """Image -> the final features of each part that a head reads."""
        return self._run(x)

    def forward_head(self, features: tuple[Any, ...], pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes), or with `pre_logits` what the heads read, side by side."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the levels that `feature_info` lists, after what was exchanged there.

        Args:
            x: image (B, in_chans, H, W).
            indices: levels to take; an int n means the last n, None all.
            norm: accepted for timm; maps have no norm of their own.
            stop_early: accepted for timm; both parts run to their ends, since they need each other.
            output_fmt: 'NCHW'.
            intermediates_only: only the list of maps, without the final features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt '{output_fmt}': the levels are maps, expected 'NCHW'.")
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        seen: dict[int, Tensor] = {}
        features = self._run(x, seen)
        maps = [seen[self.level_steps[i]] for i in taken]
        return maps if intermediates_only else (features, maps)

    def branch_info(self) -> dict[str, list[dict[str, Any]]]:
        """Channels ('num_chs') and stride ('reduction') of the maps that `forward_branch_maps` gives, by branch."""
        levels = zip(self.level_steps, self.feature_info, strict=True)
        tokens = {"num_chs": self.token_steps.dim, "reduction": self.token_steps.patch[0]}
        return {"conv": [info for step, info in levels if step >= 0], "tokens": [tokens]}

    def forward_branch_maps(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Image -> the maps of each branch, from fine to coarse: the convolutional levels, and the last tokens."""
        seen: dict[int, Tensor] = {}
        self._run(x, seen)
        return {"conv": [seen[step] for step in self.level_steps if step >= 0], "tokens": [seen[-1]]}

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the heads where only levels are wanted; returns the levels as a list."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> list[nn.Module]:
        """The heads."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for `num_classes`; 0 removes them. Each part pools as it was made to: `global_pool` stays None."""
        if global_pool not in (None, "avg"):
            raise ChiasmError(f"global_pool='{global_pool}': each part of a coupled model pools in its own way.")
        self.num_classes = num_classes
        self._reset(num_classes)

    def _reset(self, num_classes: int) -> None:
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The place of each parameter between input and output, for layer-wise learning-rate decay.

        Both parts have their first layers at the same end, however many each has; what joins them stands last.
        """
        places: dict[str, float] = {}
        for part in ("conv", "tokens"):
            net: Any = getattr(self, part)
            groups = group_parameters(net, net.group_matcher(coarse=coarse))
            last = max(groups) or 1
            places |= {f"{part}.{name}": place / last for place, names in groups.items() for name in names}
        layers = len(set(places.values()))
        return lambda name: round(places.get(name, 1.0) * layers)

    def no_weight_decay(self) -> set[str]:
        """Of each part what it says itself."""
        return {name for name, _ in self.named_parameters()} & {
            f"{part}.{name}"
            for part in ("conv", "tokens")
            for name in getattr(getattr(self, part), "no_weight_decay", set)()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each step in the backward pass: less memory, more time."""
        self.grad_checkpointing = enable


class TwoHeads(Coupled):
    """Both parts run to their own heads; the model's logits are the mean of theirs."""

    def use_branches(self, branches: Branches) -> None:
        """Let 'both' answer, or one alone: then the other is not run, and nothing of it is added."""
        self.active = ("conv", "tokens") if branches == "both" else (branches,)

    def __init__(self, parts: Parts, config: CoupledConfig, *, num_classes: int, name: str) -> None:
        super().__init__(parts, config, num_classes=num_classes, name=name)
        self.head_hidden_size = _head_width(self.conv) + _head_width(self.tokens)
        self.use_branches(config.branches)

    def forward_head(self, features: tuple[Any, ...], pre_logits: bool = False) -> Tensor:
        parts = zip(self.active, features, strict=True)
        if pre_logits or self.num_classes == 0:
            return torch.cat([getattr(self, part).forward_head(feature, pre_logits=True) for part, feature in parts], 1)
        return torch.stack([getattr(self, part).forward_head(feature) for part, feature in parts]).mean(0)

    def forward_branches(self, x: Tensor) -> dict[str, Tensor]:
        """Image -> logits (B, num_classes) of each branch that answers, by name."""
        features = self.forward_features(x)
        return {
            part: getattr(self, part).forward_head(feature) for part, feature in zip(self.active, features, strict=True)
        }

    def get_classifier(self) -> list[nn.Module]:
        return [*_classifiers(self.conv), *_classifiers(self.tokens)]

    def _reset(self, num_classes: int) -> None:
        for net in (self.conv, self.tokens):
            net.reset_classifier(num_classes)  # type: ignore[operator]


class Mid(TwoHeads):
    """Both parts side by side, exchanging features at matched depths."""

    def __init__(self, parts: Parts, config: CoupledConfig, *, num_classes: int, name: str) -> None:
        super().__init__(parts, config, num_classes=num_classes, name=name)
        self.points = exchange_points(self.conv_steps, self.token_steps, config.points)
        self.exchanges = nn.ModuleList(
            Exchange(
                self.conv_steps.sizes[point.steps - 1].channels,
                self.token_steps.dim,
                unit=config.exchange,
                direction=config.direction,
            )
            for point in self.points
        )

    def _run(self, image: Tensor, seen: dict[int, Tensor] | None = None) -> tuple[Any, ...]:
        if len(self.active) == 1 and seen is None:
            return self._alone(image)
        conv = self.conv_steps.enter(self.conv, image)
        token_image = self.token_image(image)
        tokens, grid = self.token_steps.enter(self.tokens, token_image), self.grid(token_image)
        at = Point(0, 0)
        for point, exchange in zip(self.points, self.exchanges, strict=True):
            conv = self._advance(self.conv, self.conv_steps, conv, at.steps, point.steps, seen)
            tokens = self._advance(self.tokens, self.token_steps, tokens, at.blocks, point.blocks)
            prefix, patches = tokens.x[:, : self.token_steps.prefix], tokens.x[:, self.token_steps.prefix :]
            x, patches = exchange(conv.x, patches, grid)
            conv, tokens, at = conv._replace(x=x), tokens._replace(x=torch.cat([prefix, patches], 1)), point
            if seen is not None:
                seen[point.steps - 1] = x
        conv = self._advance(self.conv, self.conv_steps, conv, at.steps, len(self.conv_steps), seen)
        tokens = self._advance(self.tokens, self.token_steps, tokens, at.blocks, len(self.token_steps))
        if seen is not None:
            seen[-1] = tokens_to_map(tokens.x[:, self.token_steps.prefix :], grid)
        features = {
            "conv": self.conv_steps.leave(self.conv, conv),
            "tokens": self.token_steps.leave(self.tokens, tokens),
        }
        return tuple(features[part] for part in self.active)

    def _alone(self, image: Tensor) -> tuple[Any, ...]:
        if self.active == ("conv",):
            return (self.conv.forward_features(image),)  # type: ignore[operator]
        return (self.tokens.forward_features(self.token_image(image)),)  # type: ignore[operator]


class Late(TwoHeads):
    """Both parts run alone; the logits of their heads are averaged."""

    def _run(self, image: Tensor, seen: dict[int, Tensor] | None = None) -> tuple[Any, ...]:
        features: dict[str, Any] = {}
        if "conv" in self.active or seen is not None:
            conv = self.conv_steps.enter(self.conv, image)
            conv = self._advance(self.conv, self.conv_steps, conv, 0, len(self.conv_steps), seen)
            features["conv"] = self.conv_steps.leave(self.conv, conv)
        if "tokens" in self.active or seen is not None:
            token_image = self.token_image(image)
            tokens = self.token_steps.enter(self.tokens, token_image)
            tokens = self._advance(self.tokens, self.token_steps, tokens, 0, len(self.token_steps))
            features["tokens"] = self.token_steps.leave(self.tokens, tokens)
            if seen is not None:
                seen[-1] = tokens_to_map(tokens.x[:, self.token_steps.prefix :], self.grid(token_image))
        return tuple(features[part] for part in self.active)


class LateJoined(Late):
    """Both parts run alone; one head reads the pooled features of both."""

    def __init__(self, parts: Parts, config: CoupledConfig, *, num_classes: int, name: str) -> None:
        super().__init__(parts, config, num_classes=num_classes, name=name)
        for net in (self.conv, self.tokens):
            net.reset_classifier(0)  # type: ignore[operator]
        widths = _head_width(self.conv), _head_width(self.tokens)
        self.gate: nn.Module | None = None
        self.head_hidden_size = sum(widths)
        if config.join == "gated":
            self.head_hidden_size = width = max(widths)
            self.gate = nn.Linear(sum(widths), width)
            self.widen = nn.ModuleList(nn.Linear(own, width) for own in widths)
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_head(self, features: tuple[Any, ...], pre_logits: bool = False) -> Tensor:
        pooled = [
            net.forward_head(feature, pre_logits=True)  # type: ignore[operator]
            for net, feature in zip((self.conv, self.tokens), features, strict=True)
        ]
        joined = torch.cat(pooled, 1)
        if self.gate is not None:
            share = self.gate(joined).sigmoid()
            local, wide = (widen(values) for widen, values in zip(self.widen, pooled, strict=True))
            joined = share * local + (1 - share) * wide
        return joined if pre_logits else self.head(joined)

    def use_branches(self, branches: Branches) -> None:
        """'both' alone: the one head reads both."""
        if branches != "both":
            raise ChiasmError(
                f"{self.name}: join='{self.config.join}' has one head for both branches, none answers alone."
            )
        super().use_branches(branches)

    def forward_branches(self, x: Tensor) -> dict[str, Tensor]:
        """Image -> the logits (B, num_classes) of the one head."""
        return {"fused": self(x)}

    def get_classifier(self) -> list[nn.Module]:
        return [self.head]

    def _reset(self, num_classes: int) -> None:
        self.head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()


class Early(Coupled):
    """The map of one level becomes the Transformer's tokens; the Transformer answers."""

    def __init__(self, parts: Parts, config: CoupledConfig, *, num_classes: int, name: str) -> None:
        super().__init__(parts, config, num_classes=num_classes, name=name)
        self.stop = self.conv_steps.levels[_level(self.conv_steps, self.token_steps, config.level)] + 1
        self.project = nn.Conv2d(self.conv_steps.sizes[self.stop - 1].channels, self.token_steps.dim, 1)
        self.scale = nn.Parameter(torch.zeros(self.token_steps.dim)) if config.keep_patches else None
        self._set_levels([step for step in self.conv_steps.levels if step < self.stop])
        self.num_features = self.token_steps.dim
        self.head_hidden_size = _head_width(self.tokens)

    def _run(self, image: Tensor, seen: dict[int, Tensor] | None = None) -> tuple[Any, ...]:
        conv = self._advance(self.conv, self.conv_steps, self.conv_steps.enter(self.conv, image), 0, self.stop, seen)
        token_image = self.token_image(image)
        grid = self.grid(token_image)
        patches = map_to_tokens(self.project(resize_map(conv.x, grid)))
        if self.token_steps.side is None:
            patches = patches.unflatten(1, grid)
        if self.scale is not None:
            patches = self.tokens.patch_embed(token_image) + self.scale * patches  # type: ignore[operator]
        tokens = self.token_steps.embed(self.tokens, patches)
        tokens = self._advance(self.tokens, self.token_steps, tokens, 0, len(self.token_steps))
        if seen is not None:
            seen[-1] = tokens_to_map(tokens.x[:, self.token_steps.prefix :], grid)
        return (self.token_steps.leave(self.tokens, tokens),)

    def forward_head(self, features: tuple[Any, ...], pre_logits: bool = False) -> Tensor:
        return self.tokens.forward_head(features[0], pre_logits=pre_logits)  # type: ignore[operator]

    def get_classifier(self) -> list[nn.Module]:
        return _classifiers(self.tokens)

    def _reset(self, num_classes: int) -> None:
        self.tokens.reset_classifier(num_classes)  # type: ignore[operator]


class Sandwich(Coupled):
    """Between two stages of the convolutional part its map goes through the Transformer's blocks and is added back."""

    def __init__(self, parts: Parts, config: CoupledConfig, *, num_classes: int, name: str) -> None:
        super().__init__(parts, config, num_classes=num_classes, name=name)
        self.stop = self.conv_steps.levels[_level(self.conv_steps, self.token_steps, config.level)] + 1
        channels, dim = self.conv_steps.sizes[self.stop - 1].channels, self.token_steps.dim
        self.down = nn.Conv2d(channels, dim, 1)
        self.up = nn.Conv2d(dim, channels, 1)
        self.scale = nn.Parameter(torch.zeros(channels))
        self.head_hidden_size = _head_width(self.conv)

    def _run(self, image: Tensor, seen: dict[int, Tensor] | None = None) -> tuple[Any, ...]:
        conv = self._advance(self.conv, self.conv_steps, self.conv_steps.enter(self.conv, image), 0, self.stop, seen)
        grid = self.grid(self.token_image(image[:1]))
        patches = map_to_tokens(self.down(resize_map(conv.x, grid)))
        if self.token_steps.side is None:
            patches = patches.unflatten(1, grid)
        tokens = self.token_steps.embed(self.tokens, patches)
        tokens = self._advance(self.tokens, self.token_steps, tokens, 0, len(self.token_steps))
        seen_by_all = self.token_steps.leave(self.tokens, tokens)[:, self.token_steps.prefix :]
        back = self.up(tokens_to_map(seen_by_all, grid))
        back = F.interpolate(back, size=conv.x.shape[-2:], mode="bilinear", align_corners=False)
        conv = conv._replace(x=conv.x + self.scale[:, None, None] * back)
        if seen is not None:
            seen[self.stop - 1], seen[-1] = conv.x, tokens_to_map(seen_by_all, grid)
        conv = self._advance(self.conv, self.conv_steps, conv, self.stop, len(self.conv_steps), seen)
        return (self.conv_steps.leave(self.conv, conv),)

    def forward_head(self, features: tuple[Any, ...], pre_logits: bool = False) -> Tensor:
        return self.conv.forward_head(features[0], pre_logits=pre_logits)  # type: ignore[operator]

    def get_classifier(self) -> list[nn.Module]:
        return _classifiers(self.conv)

    def _reset(self, num_classes: int) -> None:
        self.conv.reset_classifier(num_classes)  # type: ignore[operator]


KINDS: dict[str, type[Coupled]] = {"early": Early, "mid": Mid, "late": Late, "sandwich": Sandwich}


# ----------------------------------------------------------------------------------------------------- putting together


def couple(
    conv: str,
    tokens: str,
    fusion: str = "mid",
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    pretrained: bool | Literal["conv", "tokens"] = False,
    drop_path_rate: float | None = None,
    img_size: int | tuple[int, int] | None = None,
    conv_args: dict[str, Any] | None = None,
    tokens_args: dict[str, Any] | None = None,
    features_only: bool = False,
    out_indices: int | list[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Couple a convolutional network with a plain Transformer.

    In: image (B, in_chans, H, W), float, normalised as `conv` wants it (`model.pretrained_cfg`). Out: logits
    (B, num_classes). `forward_branches` gives each branch's own: 'conv' and 'tokens' for mid and late, 'fused' for late
    with one head; early and sandwich have one answer only.

    Args:
        conv: name of a network with feature levels (`chiasm models --all`).
        tokens: name of a plain Transformer: ViT, DeiT, DINOv2, DINOv3, EVA, BEiT, CLIP, SigLIP ...
        fusion: 'early', 'mid', 'late' or 'sandwich'.
        num_classes: None keeps the 1000 of ImageNet; 0 gives pooled features in place of logits.
        in_chans: input channels of both.
        pretrained: load the published weights of both, or of 'conv' or 'tokens' alone.
        drop_path_rate: stochastic depth of the Transformer; of `conv` by `conv_args`.
        img_size: the size that the Transformer's position embedding is made for; others are interpolated.
        conv_args, tokens_args: further arguments of each network's own.
        features_only: the levels of `conv` as maps, timm's way, at `out_indices`.
        options: the fields of `CoupledConfig`.

    Raises:
        UnknownNameError: for a name or a choice that does not exist, with the nearest.
        ChiasmError: for a network that cannot be stepped, exchange points that are not there, options that contradict
            each other.
    """
    config = CoupledConfig(fusion=fusion, **options)  # type: ignore[arg-type]  # checked there
    from chiasm.models import create_model  # which imports this file

    common: dict[str, Any] = {"num_classes": 1000 if num_classes is None else num_classes, "in_chans": in_chans}
    conv_net = create_model(conv, pretrained=pretrained in (True, "conv"), **common, **(conv_args or {}))
    for_tokens: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    if img_size is not None:
        for_tokens["img_size"] = img_size
    for_tokens |= {"pretrained": pretrained in (True, "tokens"), **common, **(tokens_args or {})}
    try:
        token_net = create_model(tokens, **{"dynamic_img_size": True, **for_tokens})
    except TypeError as error:  # one of those that take one size only
        if "dynamic_img_size" not in str(error):
            raise
        token_net = create_model(tokens, **for_tokens)
    parts = Parts(conv_net, conv_steps(conv_net, conv), token_net, token_steps(token_net, tokens))
    kind: type[Coupled] = KINDS[fusion]
    if fusion == "late" and config.join != "logits":
        kind = LateJoined
    name = f"{conv}+{tokens}:{fusion}"
    model = kind(parts, config, num_classes=common["num_classes"], name=name)
    _drop_unread(model)
    if not features_only:
        return model
    levels = len(model.feature_info) if out_indices is None else out_indices
    return FeatureGetterNet(model, out_indices=levels if isinstance(levels, int) else tuple(levels))


def split_name(name: str) -> tuple[str, str, str] | None:
    """'resnet50+deit_small_patch16_224:mid' as (conv, tokens, fusion); None for a name without '+'.

    Raises:
        ChiasmError: for another number of parts.
    """
    if "+" not in name:
        return None
    nets, _, fusion = name.partition(":")
    parts = nets.split("+")
    if len(parts) != 2 or not all(parts):
        raise ChiasmError(f"{name}: expected CONV+TRANSFORMER:FUSION, such as resnet18+vit_tiny_patch16_224:mid.")
    return parts[0], parts[1], fusion or "mid"


def exchange_points(conv: ConvSteps, tokens: TokenSteps, points: Any) -> list[Point]:
    """Where to exchange, from what `CoupledConfig.points` says.

    'every stage' is behind each level of stride 4 and more, with the Transformer's blocks shared out evenly; 'every
    block' before each of the blocks, or behind each step from stride 4 on where those are fewer. At least one block
    always follows: a head that reads the class token would not see what is added to the others behind the last.

    Raises:
        ChiasmError: for pairs that are none, out of range or not in order, or more of them than blocks.
    """
    depth = len(tokens)
    if points == EVERY_STAGE:
        ends = [i + 1 for i in conv.levels if conv.sizes[i].reduction >= 4]
        count = min(len(ends), depth)
        return [Point(end, round(depth * (i + 1) / count) - 1) for i, end in enumerate(ends[-count:])]
    if points == EVERY_BLOCK:
        ends = [i + 1 for i, size in enumerate(conv.sizes) if size.reduction >= 4]
        count = min(len(ends), depth)
        shares = [(i + 1) / count for i in range(count)]
        return [Point(ends[round(len(ends) * share) - 1], round(depth * share) - 1) for share in shares]
    try:
        pairs = [(int(level), int(blocks)) for level, blocks in points]
    except (TypeError, ValueError) as error:
        raise ChiasmError(
            f"points {points}: expected pairs [[level, blocks], ...], such as [[1, 3], [2, 9]]."
        ) from error
    if not pairs or len(pairs) > depth:
        raise ChiasmError(f"points: {len(pairs)} exchange points for a Transformer of {depth} blocks.")
    for level, blocks in pairs:
        if not (0 <= level < len(conv.levels) and 0 <= blocks < depth):
            raise ChiasmError(
                f"points: [{level}, {blocks}] is not there; expected a level 0 to {len(conv.levels) - 1} and "
                f"0 to {depth - 1} blocks."
            )
    if any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(pairs)):
        raise ChiasmError(f"points {pairs}: expected in order, one exchange at a level.")
    return [Point(conv.levels[level] + 1, blocks) for level, blocks in pairs]


def _level(conv: ConvSteps, tokens: TokenSteps, level: int | None) -> int:
    """The level that becomes tokens."""
    if level is None:
        fine = [i for i, step in enumerate(conv.levels) if conv.sizes[step].reduction <= tokens.patch[0]]
        return fine[-1] if fine else 0
    if not 0 <= level < len(conv.levels):
        raise ChiasmError(f"level {level}: this network has levels 0 to {len(conv.levels) - 1}.")
    return level


def _renormalisation(conv: nn.Module, tokens: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift (C, 1, 1) from an image normalised for the one to one for the other; None for no change."""
    ours, theirs = _statistics(conv), _statistics(tokens)
    if ours == theirs:
        return None, None
    (mean, std), (new_mean, new_std) = (torch.tensor(values)[:, :, None, None] for values in (ours, theirs))
    return std / new_std, (mean - new_mean) / new_std


def _statistics(net: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that a network states, averaged over the channels where it takes other than three."""
    stated = getattr(net, "pretrained_cfg", None) or {}
    mean, std = tuple(stated.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(stated.get("std", IMAGENET_DEFAULT_STD))
    channels = input_channels(net)
    if channels != len(mean):
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    return mean, std


def _head_width(net: Any) -> int:
    return int(getattr(net, "head_hidden_size", None) or net.num_features)


def _classifiers(net: Any) -> list[nn.Module]:
    heads = net.get_classifier()
    heads = list(heads.values()) if isinstance(heads, (dict, nn.ModuleDict)) else heads
    return list(heads) if isinstance(heads, (list, tuple)) else [heads]


def _pretrained_cfg(model: Coupled, name: str) -> dict[str, Any]:
    """timm's account of the model: the input is the convolutional part's."""
    stated: dict[str, Any] = {}
    for key in ("first_conv", "classifier"):
        names: list[str] = []
        for part in ("conv", "tokens"):
            own = (getattr(getattr(model, part), "pretrained_cfg", None) or {}).get(key) or ()
            names += [f"{part}.{n}" for n in ((own,) if isinstance(own, str) else own)]
        stated[key] = tuple(names)
    base = getattr(model.conv, "pretrained_cfg", None) or {}
    kept = ("input_size", "mean", "std", "crop_pct", "interpolation")
    return {**{key: base[key] for key in kept if key in base}, **stated, "architecture": name}


def _drop_unread(model: Coupled) -> None:
    """Take out the layers that no answer depends on, such as the head of a part whose map goes on as tokens.

    A weight without a gradient would stop training on several devices. What is computed although nobody reads it, as
    the coarser maps of an HRNet that is left early, cannot be taken out: its weights are frozen.
    """
    image = torch.zeros(2, input_channels(model.conv), TRIAL_SIDE, TRIAL_SIDE)
    was_training = model.training
    model.eval()
    answer = model(image)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(_all_answers(model, image).sum(), [p for _, p in named], allow_unused=True)
    unread = {name for (name, _), grad in zip(named, grads, strict=True) if grad is None}
    taken: list[tuple[str, nn.Module]] = []
    for path in sorted({name.rpartition(".")[0] for name in unread}):
        if any(path.startswith(f"{other}.") for other, *_ in taken):
            continue
        layer = model.get_submodule(path)
        if {f"{path}.{name}" for name, _ in layer.named_parameters()} <= unread:
            taken.append((path, layer))
            _replace(model, path, nn.Identity())
    try:
        same = torch.equal(model(image), answer)
    except RuntimeError:
        same = False
    if not same:
        for path, layer in taken:
            _replace(model, path, layer)
    for name, parameter in model.named_parameters():
        if name in unread:
            parameter.requires_grad_(False)
    model.train(was_training)


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _all_answers(model: Coupled, image: Tensor) -> Tensor:
    """Of both parts, also where one alone was asked to answer."""
    if not isinstance(model, TwoHeads):
        return model(image)
    active, model.active = model.active, ("conv", "tokens")
    try:
        return model(image)
    finally:
        model.active = active
