"""Decoded images kept in memory between epochs, shared with the worker processes.

Images lie one after another in a few large tensors. So forked workers share their pages for good (thousands of small
objects would be copied page by page as their reference counts change), and spawned ones get a handful of handles.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor

from chiasm.data.machine import cores
from chiasm.errors import ImageError

_BLOCK = 1 << 26  # bytes per tensor; torch takes the memory only as it is written


class ImageCache:
    """Prepared images by their index in a split.

    Attributes:
        bytes: memory taken by the images.
        failures: by index, the images that were found unreadable.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.failures: dict[int, ImageError] = {}
        self._blocks: list[Tensor] = []
        self._used = _BLOCK
        self._places: dict[int, tuple[int, int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def put(self, index: int, image: Tensor) -> None:
        """Keep a copy of a uint8 image."""
        size = image.numel()
        if not self._blocks or self._used + size > len(self._blocks[-1]):
            self._blocks.append(torch.empty(max(size, _BLOCK), dtype=torch.uint8))
            self._used = 0
        self._blocks[-1][self._used : self._used + size].copy_(image.reshape(-1))
        self._places[index] = (len(self._blocks) - 1, self._used, tuple(image.shape))
        self._used += size
        self.bytes += size

    def get(self, index: int) -> Tensor | None:
        """The image, a view that must not be changed; None when it is not kept."""
        if index not in self._places:
            return None
        block, start, shape = self._places[index]
        return self._blocks[block][start : start + prod(shape)].view(shape)


def fill_cache(count: int, prepare: Callable[[int], Tensor], *, limit: int) -> ImageCache:
    """Prepare the images 0 to `count`, in order, until the next would not fit into `limit` bytes.

    Several are read at a time, by threads. On a terminal, a progress bar with the time left stands on stderr meanwhile.

    Args:
        count: how many there are.
        prepare: reads one by its index as uint8, or raises `ImageError`; called from threads.
        limit: bytes.
    """
    from rich.console import Console
    from rich.progress import track

    def load(index: int) -> Tensor | ImageError:
        try:
            return prepare(index)
        except ImageError as error:
            return error

    cache, chunk, console = ImageCache(), 8 * cores(), Console(stderr=True)
    chunks = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    bar = track(chunks, "reading images", console=console, transient=True, disable=not console.is_terminal)
    with ThreadPoolExecutor(cores()) as pool:
        for indices in bar:
            for index, image in zip(indices, pool.map(load, indices), strict=True):
                if isinstance(image, ImageError):
                    cache.failures[index] = image
                elif cache.bytes + image.numel() > limit:
                    return cache
                else:
                    cache.put(index, image)
    return cache
