"""The maps of any backbone, one per stride, as pyramids and decoders take them.

CNN, Swin ...       the map of each stage
plain Transformer   its last tokens, resampled to every stride (Li et al. 2022, arXiv 2203.16527)
two branches        'conv': the convolutional maps, as the Conformer's authors do (arXiv 2105.03889, section 4.2)
                    'tokens': the last tokens, resampled to every stride
                    'both': one beside the other, so that the 1x1 convolution behind them fuses the two
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, cat, nn

from chiasm.errors import ChiasmError
from chiasm.layers.tokens import resize_map

STRIDES = (4, 8, 16, 32)


class Level(NamedTuple):
    """One map of a backbone."""

    branch: str
    place: int
    channels: int
    stride: int


class Maps:
    """Reads the maps of a backbone; it has no weights of its own.

    Args:
        backbone: a timm model with `forward_intermediates`; one of two branches offers `forward_branch_maps`.
        choice: 'conv', 'tokens' or 'both' of a backbone of two branches; 'auto' is 'conv' there, and all there is else.
        name: of the backbone, for messages.

    Attributes:
        strides: of the maps, from fine to coarse.
        channels: of each map.

    Raises:
        ChiasmError: for a backbone without maps, or a choice it does not have.
    """

    strides = STRIDES

    def __init__(self, backbone: nn.Module, choice: str = "auto", *, name: str) -> None:
        self._branched = hasattr(backbone, "branch_info")
        levels = _levels(backbone, name, branched=self._branched)
        if not self._branched or len({level.branch for level in levels}) == 1:
            if choice not in ("auto", levels[0].branch):
                raise ChiasmError(f"{name} has one branch, so --maps {choice} is not for it; leave --maps out.")
        elif choice != "both":
            levels = [level for level in levels if level.branch == ("conv" if choice == "auto" else choice)]
        branches = list(dict.fromkeys(level.branch for level in levels))
        self._plan = [[_nearest(levels, branch, stride) for branch in branches] for stride in self.strides]
        self._needed = sorted({level.place for picked in self._plan for level in picked})
        self._normalised = len({level.stride for level in levels}) == 1  # a plain Transformer's last norm
        self.channels = [sum(level.channels for level in picked) for picked in self._plan]

    def __call__(self, backbone: nn.Module, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> per stride a map (B, channels, ceil(H / stride), ceil(W / stride))."""
        net: Any = backbone
        if self._branched:
            seen = {
                (branch, i): level
                for branch, maps in net.forward_branch_maps(images).items()
                for i, level in enumerate(maps)
            }
        else:
            maps = net.forward_intermediates(
                images, indices=self._needed, norm=self._normalised, intermediates_only=True
            )
            seen = {("", i): level for i, level in zip(self._needed, maps, strict=True)}
        height, width = images.shape[-2:]
        given = []
        for stride, picked in zip(self.strides, self._plan, strict=True):
            size = (-(-height // stride), -(-width // stride))
            parts = [resize_map(seen[level.branch, level.place], size) for level in picked]
            given.append(parts[0] if len(parts) == 1 else cat(parts, dim=1))
        return given


class OnMaps(nn.Module):
    """What detectors and segmenters share: a backbone, the maps that are read of it, and the width of the head.

    Args:
        backbone: a timm model.
        maps: which of its maps are read.
        num_classes: classes, without a background.
        channels: width of the head, a multiple of 32 from 64; default: 256, and 128 for backbones whose deepest map has
            fewer than 512 channels.

    Raises:
        ChiasmError: for a number of channels that cannot be.
    """

    def __init__(self, backbone: nn.Module, maps: Maps, num_classes: int, channels: int | None) -> None:
        super().__init__()
        self.backbone, self.maps, self.num_classes = backbone, maps, num_classes
        self.channels = channels or (256 if maps.channels[-1] >= 512 else 128)
        if self.channels % 32 or self.channels < 64:
            raise ChiasmError(f"channels is {self.channels}: expected a multiple of 32 from 64, such as 128.")

    def no_weight_decay(self) -> set[str]:
        own: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}


def _levels(backbone: Any, name: str, *, branched: bool) -> list[Level]:
    if branched:
        info = backbone.branch_info()
    elif hasattr(backbone, "forward_intermediates"):
        info = {"": list(backbone.feature_info)}
    else:
        raise ChiasmError(f"{name} does not give its intermediate maps, so nothing can be built on them.")
    return [
        Level(branch, i, int(level["num_chs"]), int(level["reduction"]))
        for branch, levels in info.items()
        for i, level in enumerate(levels)
    ]


def _nearest(levels: list[Level], branch: str, stride: int) -> Level:
    """The branch's deepest map of this stride; else of the next coarser one, else of the coarsest."""
    own = [level for level in levels if level.branch == branch]
    at = min((level.stride for level in own if level.stride >= stride), default=max(level.stride for level in own))
    return [level for level in own if level.stride == at][-1]
