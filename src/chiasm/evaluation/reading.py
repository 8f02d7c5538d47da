"""Images with what is known of them, read by threads while the model works, in order; at most two batches are held."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from chiasm.data.machine import cores
from chiasm.errors import ChiasmError, DataError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from chiasm.evaluation.measured import Manner
    from chiasm.predictor import Predictor

T = TypeVar("T")
_log = logging.getLogger("chiasm.data")


class ReadAhead(Generic[T]):
    """The images 0 .. `count` - 1; iterate for batches of (index, what was read), without those that cannot be read.

    Args:
        read: reads one; it raises `ImageError`.
        count: how many there are.
        batch_size: images at a time.
        workers: threads; None for one per core.

    Attributes:
        failures: the images that could not be read so far; each was named in a warning.
    """

    def __init__(self, read: Callable[[int], T], count: int, *, batch_size: int, workers: int | None) -> None:
        if batch_size < 1:
            raise ChiasmError(f"batch_size is {batch_size}: expected 1 or more.")
        if workers is not None and workers < 0:
            raise ChiasmError(f"workers is {workers}: expected 0 or more.")
        self._read, self._count = read, count
        self._batch_size = batch_size
        self._threads = max(1, cores() if workers is None else workers)
        self.failures: list[ImageError] = []

    def __iter__(self) -> Iterator[list[tuple[int, T]]]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="chiasm-read")
        begun: deque[list[tuple[int, Future[T]]]] = deque()
        try:
            for start in range(0, self._count + self._batch_size, self._batch_size):
                indices = range(start, min(start + self._batch_size, self._count))
                begun.append([(index, pool.submit(self._read, index)) for index in indices])
                if len(begun) > 1:
                    yield list(self._finished(begun.popleft()))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _finished(self, batch: list[tuple[int, Future[T]]]) -> Iterator[tuple[int, T]]:
        for index, future in batch:
            try:
                yield index, future.result()
            except ImageError as error:
                _log.warning("%s It is left out.", error)
                # A fresh one: the caught one holds on to the frames it was raised in.
                self.failures.append(ImageError(error.path, error.reason))


def compare(
    predictor: Predictor, read: Callable[[int], tuple[Tensor, Any]], count: int, manner: Manner
) -> tuple[Any, list[int], tuple[ImageError, ...]]:
    """The results of the images 0 .. `count` - 1 beside what is true of them.

    Args:
        predictor: gives the results, and the metrics that take both.
        read: reads an image, uint8 (3, H, W), and what is true of it; it raises `ImageError`.
        count: how many there are.
        manner: how.

    Returns:
        The metrics, the images measured in the order they were, and those that cannot be read.

    Raises:
        DataError: when none of the images can be read.
    """
    reader = ReadAhead(read, count, batch_size=manner.batch_size, workers=manner.workers)
    metrics = predictor.task.metrics()
    measured: list[int] = []
    for batch in manner.watched(reader, -(-count // manner.batch_size)):
        if batch:
            metrics.update(predictor([image for _, (image, _) in batch]), [truth for _, (_, truth) in batch])
            measured += [index for index, _ in batch]
    if not measured:
        raise DataError(f"none of the {count} images can be read; the first: {reader.failures[0]}")
    return metrics, measured, tuple(reader.failures)
