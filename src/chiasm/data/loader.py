"""Batches of a split, for training and for evaluation.

    samples = LabelledSamples(split, transform)              # or of objects, or of class maps: samples.py
    loader = train_loader(samples, batch_size=64, seed=0)    # reads the images into memory where they fit
    for epoch in range(100):
        loader.set_epoch(epoch)                              # which order and which augmentation
        for images, targets in loader:                       # float32 (B, C, h, w), and what the samples say of them
            ...
    state = loader.state_dict()                              # {'epoch': 7, 'batch': 31}: what comes next
    loader.load_state_dict(state)                            # the next pass goes on from there; so does
    loader.set_epoch(7, start=31)                            # this

The order of an epoch is a function of (seed, epoch), and the augmentation of an image of (seed, epoch, index) alone. So
batches depend neither on the number of workers, nor on what is kept in memory, nor on where an earlier run stopped; and
torch's global generator is left as it was, so what the model draws does not depend on the data.

An image that cannot be read, or whose annotation cannot, is named once, in a warning, and kept in `loader.failures`. In
training the next readable one of the split takes its place; in evaluation it is left out.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chiasm.data.cache import ImageCache, fill_cache
from chiasm.data.machine import default_workers, memory_bytes
from chiasm.data.samples import Samples
from chiasm.errors import DataError, ImageError

_log = logging.getLogger("chiasm.data")

# Of the memory, for decoded images: together a quarter.
_TRAIN_SHARE, _EVAL_SHARE = 0.20, 0.05

_Failures = list[tuple[str, str]]


def train_loader(
    samples: Samples,
    *,
    batch_size: int,
    seed: int = 0,
    workers: int | None = None,
    cache: bool = True,
    drop_last: bool = True,
) -> TrainLoader:
    """Shuffled, augmented batches; see the top of this file.

    Args:
        samples: augmented, from `train_samples`.
        batch_size: images per batch.
        seed: of order and augmentation.
        workers: processes that read; 0 reads in this one, None decides by the machine.
        cache: keep decoded images in memory, as many as fit into a fifth of it; they are read now.
        drop_last: leave out the last batch of an epoch when it is not full, unless it is the only one.

    Raises:
        DataError: when there is no image at all; while iterating, when none can be read.
    """
    return TrainLoader(
        _TrainImages(samples, seed, _keep(samples, cache, _TRAIN_SHARE)),
        batch_size=batch_size,
        workers=workers,
        drop_last=drop_last,
    )


def eval_loader(samples: Samples, *, batch_size: int, workers: int | None = None, cache: bool = False) -> EvalLoader:
    """Every readable image of a split once, in order.

    Args:
        samples: from `eval_samples`.
        batch_size: images per batch.
        workers: as for `train_loader`.
        cache: keep prepared images in memory, as many as fit into a twentieth of it; they are read now. Worth it when
            the split is gone through again and again.
    """
    images = _EvalImages(samples, _keep(samples, cache, _EVAL_SHARE))
    return EvalLoader(images, batch_size=batch_size, workers=workers)


class _Loader:
    """What both loaders share: reading batches of keys, here or in workers, and naming the images that fail."""

    def __init__(self, images: _Images, *, batch_size: int, workers: int | None) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected 1 or more.")
        if not len(images.samples.split):
            raise DataError("there are no images to load.")
        self.split = images.samples.split
        self.batch_size = batch_size
        self.failures: list[ImageError] = []
        self._note([(error.path, error.reason) for error in images.cache.failures.values()])
        self._keys: list[list[Any]] = []
        workers = default_workers() if workers is None else workers
        self._reader: DataLoader = DataLoader(
            images,
            batch_sampler=_Keys(self),
            collate_fn=_as_is,
            num_workers=workers,
            # Workers that outlive an epoch take seconds to end; only spawned ones, which import torch anew, are kept.
            persistent_workers=workers > 0 and multiprocessing.get_start_method() != "fork",
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def _read(self, batches: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
        self._keys = batches
        # An explicit generator: without one, DataLoader draws a seed from torch's global generator.
        self._reader.generator = torch.Generator()
        for *batch, failures in self._reader:
            self._note(failures)
            yield tuple(batch)

    def _note(self, failures: _Failures) -> None:
        known = {error.path for error in self.failures}
        for path, reason in failures:
            if path not in known:
                known.add(path)
                self.failures.append(ImageError(path, reason))
                _log.warning("%s: %s It is left out.", path, reason)


class TrainLoader(_Loader):
    """Shuffled, augmented batches (images float32 (B, C, h, w), targets); see the top of this file."""

    def __init__(self, images: _TrainImages, *, batch_size: int, workers: int | None, drop_last: bool) -> None:
        super().__init__(images, batch_size=batch_size, workers=workers)
        self.seed = images.seed
        self.epoch = 0
        self.batch = 0
        full, rest = divmod(len(self.split), batch_size)
        self._length = full + (rest > 0 and (not drop_last or full == 0))

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._length

    def set_epoch(self, epoch: int, *, start: int = 0) -> None:
        """Choose the epoch of the next pass, and the batch it starts from."""
        if not 0 <= start <= self._length:
            raise DataError(f"batch {start} of an epoch of {self._length}: the data has changed since this was saved.")
        self.epoch, self.batch = epoch, start

    def state_dict(self) -> dict[str, int]:
        """What comes next: the epoch, and how many of its batches have been given."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass go on from `state`."""
        self.set_epoch(state["epoch"], start=state["batch"])

    def order(self, epoch: int) -> list[int]:
        """The indices of the images in the order of an epoch."""
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, -1))
        return torch.randperm(len(self.split), generator=generator).tolist()

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        epoch, start, size = self.epoch, self.batch, self.batch_size
        order = self.order(epoch)
        batches = [[(epoch, i) for i in order[b * size : (b + 1) * size]] for b in range(start, self._length)]
        for given, batch in enumerate(self._read(batches), start=start + 1):
            if not len(batch[0]):
                first = self.failures[0]
                raise DataError(f"none of the {len(order)} training images can be read; the first: {first}")
            self.batch = given
            yield batch
        self.batch = 0


class EvalLoader(_Loader):
    """Batches (images float32 (B, C, h, w), targets, indices int64 (B,)) of the readable images, in order."""

    def __len__(self) -> int:
        """Batches; one less is given for each that has no readable image."""
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any, Tensor]]:
        count, size = len(self.split), self.batch_size
        for batch in self._read([list(range(start, min(start + size, count))) for start in range(0, count, size)]):
            if len(batch[0]):
                yield batch


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed for one image in one epoch; neighbouring arguments give unrelated seeds."""
    digest = hashlib.blake2b(f"{seed},{epoch},{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Images(Dataset):
    """Reads the images of a batch in one call; lives in the workers."""

    def __init__(self, samples: Samples, cache: ImageCache) -> None:
        self.samples = samples
        self.cache = cache

    def prepared(self, index: int) -> Tensor:
        if index in self.cache.failures:
            raise self.cache.failures[index]
        kept = self.cache.get(index)
        return self.samples.prepare(index) if kept is None else kept


class _TrainImages(_Images):
    def __init__(self, samples: Samples, seed: int, cache: ImageCache) -> None:
        super().__init__(samples, cache)
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, Any, _Failures]:
        samples: list[Any] = []
        failures: _Failures = []
        before = torch.default_generator.get_state()
        try:
            for epoch, index in keys:
                readable = self._readable(index, failures)
                if readable is None:  # the loader's own process says so: a worker's error comes with its traceback
                    return torch.empty(0), None, failures
                chosen, kept = readable
                # The generator itself, for `torch.manual_seed` also seeds every accelerator: 100 times the cost.
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
                samples.append(self.samples.finish(chosen, kept))
        finally:
            torch.default_generator.set_state(before)
        return *self.samples.batch(samples), failures

    def _readable(self, index: int, failures: _Failures) -> tuple[int, Tensor] | None:
        """The image `index`, or the next that can be read, with its index; None when there is none."""
        count = len(self.samples.split)
        for chosen in (*range(index, count), *range(index)):
            try:
                return chosen, self.prepared(chosen)
            except ImageError as error:
                failures.append((error.path, error.reason))
        return None


class _EvalImages(_Images):
    def __getitems__(self, keys: list[int]) -> tuple[Tensor, Any, Tensor, _Failures]:
        samples: list[Any] = []
        indices: list[int] = []
        failures: _Failures = []
        for index in keys:
            try:
                samples.append(self.samples.finish(index, self.prepared(index)))
                indices.append(index)
            except ImageError as error:
                failures.append((error.path, error.reason))
        images, targets = self.samples.batch(samples) if samples else (torch.empty(0), None)
        return images, targets, torch.tensor(indices, dtype=torch.int64), failures


class _Keys:
    """The batches of keys of the pass that is about to start."""

    def __init__(self, loader: _Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self._loader._keys)

    def __len__(self) -> int:
        return len(self._loader._keys)


def _keep(samples: Samples, cache: bool, share: float) -> ImageCache:
    if not cache:
        return ImageCache()
    count = len(samples.split)
    kept = fill_cache(count, samples.prepare, limit=int(share * memory_bytes()))
    if missing := count - len(kept) - len(kept.failures):
        _log.warning(
            "%d of %d images fit into memory (%.1f GB); the other %d are read in every epoch.",
            *(len(kept), count, kept.bytes / 2**30, missing),
        )
    return kept


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole group of processes: the main one decides, and needs its workers until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
