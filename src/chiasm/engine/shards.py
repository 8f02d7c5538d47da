"""One process's part of a split, for training with several processes."""

from __future__ import annotations

from torch import Tensor

from chiasm.data import Split


class Shard:
    """Every `world_size`-th image from `rank` on; behaves as a split.

    All processes have equally many: for training (`pad` off) a remainder is left out, for validation the own last image
    is repeated, and `real` says how many count.
    """

    def __init__(self, split: Split, rank: int, world_size: int, *, pad: bool) -> None:
        own = list(range(rank, len(split), world_size))
        self.real = len(own)
        if pad:
            own += [own[-1] if own else 0] * (-(-len(split) // world_size) - len(own))
        else:
            own = own[: len(split) // world_size]
        self._split = split
        self._own = own
        self.labels = [split.labels[i] for i in own]
        self.sources = [split.sources[i] for i in own]

    def __len__(self) -> int:
        return len(self._own)

    def read(self, i: int) -> Tensor:
        """Image `i` of this part, uint8 (3, H, W); raises `ImageError`."""
        return self._split.read(self._own[i])
