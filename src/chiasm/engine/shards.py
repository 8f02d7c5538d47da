"""One process's part of a split, for training with several processes: every `world_size`-th image from `rank` on.

All processes must take equally many steps, so their parts are equally large.
"""

from __future__ import annotations

from chiasm.data import Split


def own_share(split: Split, rank: int, world_size: int) -> Split:
    """For training: the few images that do not divide evenly are left out."""
    return split.subset(list(range(rank, len(split), world_size))[: len(split) // world_size])


def own_padded_share(split: Split, rank: int, world_size: int) -> tuple[Split, int]:
    """For validation: the last image is repeated where the part is short. Also how many images count."""
    own = list(range(rank, len(split), world_size))
    missing = -(-len(split) // world_size) - len(own)
    return split.subset(own + [own[-1] if own else 0] * missing), len(own)
