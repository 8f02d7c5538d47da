"""Dynamic batching: images of many requests, decoded by a few threads, go through the model together in one.

    request -> Order of images -> decoding threads -> lanes -> the model's thread -> Order.done

While the model works on a batch the next one collects, and goes as soon as the model is free. Only an idle model waits,
at most `wait` seconds, and only for images that are being decoded at that moment. There are two lanes, `predict` in
batches and `explain` one by one, which take turns: neither keeps the other waiting for longer than one turn. How much
may wait is bounded by `Room`, before any work is done.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from chiasm.serving.refusals import Refusal, broken

_log = logging.getLogger("chiasm.serve")

_DRAWING = 2  # threads

Outcome = Any  # what the model says of an image, or the Refusal in its place


@dataclass(eq=False)
class Job:
    """One image of a request.

    Attributes:
        group: only images of one group share a batch: the model they are for.
        order: the request.
        index: which of its images this is.
        prepare: makes of it, in a decoding thread, what the model's thread takes; raises `Refusal`. None when done.
        ready: what came of that.
        weight: pixels of the image: results have its size.
    """

    group: Any
    order: Order
    index: int
    prepare: Callable[[Job], Any] | None
    ready: Any = None
    weight: int = 0
    arrived: float = 0.0


@dataclass(eq=False)
class Order:
    """The images of one request, to be answered together. It belongs to the event loop.

    Attributes:
        outcomes: per image its outcome, complete when `done` is.
        dropped: nobody waits for it any more: what is left of it is passed over.
        batches: of each image the number of images that went through the model with it.
        weight: of its images that the model has taken.
        released: their results are given out, or nobody wants them.
    """

    loop: asyncio.AbstractEventLoop
    outcomes: list[Outcome]
    done: asyncio.Future[None]
    left: int
    dropped: bool = False
    batches: list[int] = field(default_factory=list)
    weight: int = 0
    released: bool = False

    @classmethod
    def of(cls, count: int) -> Order:
        """An order of `count` images."""
        loop = asyncio.get_running_loop()
        return cls(loop, [None] * count, loop.create_future(), count)

    def fill(self, index: int, outcome: Outcome, batch: int) -> None:
        """Put an image's outcome in its place."""
        self.outcomes[index] = outcome
        if batch:
            self.batches.append(batch)
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


class Room:
    """How many images may be accepted and not yet answered. It belongs to the event loop.

    Args:
        most: so many.
        what: how the refusal calls it.
    """

    def __init__(self, most: int, what: str) -> None:
        self.taken = 0
        self.seconds_each = 0.1  # from one answered image to the next while several wait, a running mean
        self._since = 0.0  # when the last one was answered, or the first one came
        self._most = most
        self._what = what

    def check(self, count: int) -> None:
        """Raises:
        Refusal: 429 where there is no room for `count` more, with the seconds in which some is likely.
        """
        if self.taken + count > self._most:
            after = min(60, max(1, round(self.taken * self.seconds_each)))
            raise Refusal(429, "busy", f"{self._what} is full ({self._most}): try again in {after} s.", after)

    def take(self, count: int) -> None:
        """Raises:
        Refusal: as `check`.
        """
        self.check(count)
        if not self.taken:
            self._since = time.monotonic()
        self.taken += count

    def learn(self, count: int) -> None:
        """Note that so many were answered; to be called before their room is given back."""
        now = time.monotonic()
        each = (now - self._since) / count
        self._since = now
        if self.taken > count:
            self.seconds_each += (1 - 0.95**count) * (each - self.seconds_each)
        else:  # a lonely one takes longer than each of many
            self.seconds_each = min(self.seconds_each, each)

    def give_back(self, count: int) -> None:
        """Free what was taken."""
        self.taken -= count


class Lane:
    """Images that wait for the model.

    Args:
        answer: what the model's thread does with some of one group: an outcome for each.
        most: images at a time.
        weight: pixels of images whose results may be in memory, from the model's beginning to `Batcher.release`; an
            image of more goes alone.
    """

    def __init__(self, answer: Callable[[Sequence[Job]], list[Outcome]], most: int, weight: int) -> None:
        self.answer = answer
        self.most = most
        self.waiting: deque[Job] = deque()
        self._weight = weight
        self._out = 0  # of that, now

    def forget_dropped(self) -> None:
        """Pass over what nobody waits for."""
        if any(job.order.dropped for job in self.waiting):
            self.waiting = deque(job for job in self.waiting if not job.order.dropped)

    def batch(self) -> list[Job]:
        """The next batch: those of the group of the one that came first; empty while results fill the memory."""
        batch: list[Job] = []
        weight = self._out
        for job in self.waiting:
            if job.group is not self.waiting[0].group:
                continue
            weight += job.weight
            if len(batch) == self.most or (weight > self._weight and weight > job.weight):
                break
            batch.append(job)
        return batch

    def take(self, batch: list[Job]) -> None:
        """Let a batch go."""
        taken = set(map(id, batch))
        self.waiting = deque(job for job in self.waiting if id(job) not in taken)
        for job in batch:
            if not job.order.released:
                job.order.weight += job.weight
                self._out += job.weight

    def release(self, order: Order) -> None:
        """The results of an order are in memory no more."""
        self._out -= order.weight
        order.released = True

    def is_full(self, batch: list[Job]) -> bool:
        """Whether nothing that may come would join the next batch."""
        return len(batch) == self.most or len(batch) < sum(job.group is batch[0].group for job in self.waiting)


class Batcher:
    """The decoding threads and the model's thread.

    Args:
        lanes: by name; they take turns.
        wait: seconds for which an idle model waits for images that are being decoded.
        decoders: threads that decode.
        watch: told of each batch: its lane, and how many images it had.
        failed: told why, should the model's thread end by a mistake of its own.

    Attributes:
        drawing: a pool of few threads for what becomes of outcomes; decoding does not keep it waiting.
    """

    def __init__(
        self,
        lanes: dict[str, Lane],
        *,
        wait: float,
        decoders: int,
        watch: Callable[[str, int], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.lanes = lanes
        self._wait = wait
        self._watch = watch
        self._failed = failed
        self._coming = 0  # images that are being decoded
        self._changed = threading.Condition()
        self._stopped = False
        self._decoding = ThreadPoolExecutor(decoders, thread_name_prefix="chiasm-decode")
        self.drawing = ThreadPoolExecutor(_DRAWING, thread_name_prefix="chiasm-draw")
        self._pools = ((self._decoding, decoders), (self.drawing, _DRAWING))
        self._thread = threading.Thread(target=self._run, name="chiasm-model", daemon=True)

    def start(self, first: Callable[[], None]) -> None:
        """Start the threads; `first` is done in the model's."""
        import torch

        # The pools' threads share the cores among themselves; each sharing out its own work again would only cost time.
        # The setting is a thread's own, but what a thread begins with, when it first asks, is common: so these have
        # asked before, and the model's comes last.
        threads = torch.get_num_threads()

        def alone(together: threading.Barrier) -> None:
            together.wait()
            torch.get_num_threads()
            torch.set_num_threads(1)

        for pool, count in self._pools:
            together = threading.Barrier(count)
            for begun in [pool.submit(alone, together) for _ in range(count)]:
                begun.result()
        torch.set_num_threads(threads)
        self._first = first
        self._thread.start()

    def stop(self) -> None:
        """End the threads when the batch that is under way is done."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident:
            self._thread.join()
        for pool, _ in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, lane: str, job: Job) -> None:
        """Take an image, from the event loop's thread; its order is filled in time."""
        with self._changed:
            self._coming += 1
        self._decoding.submit(self._prepare, self.lanes[lane], job)

    def release(self, lane: str, order: Order) -> None:
        """Say that what came of an order is no longer in memory; once for each order."""
        with self._changed:
            self.lanes[lane].release(order)
            self._changed.notify()

    def _prepare(self, lane: Lane, job: Job) -> None:
        failure: Refusal | None = None
        prepare, job.prepare = job.prepare, None
        try:
            if prepare is not None and not job.order.dropped:
                job.ready = prepare(job)
        except Refusal as error:
            failure = error.with_traceback(None)
        except Exception:
            _log.exception("decoding failed")
            failure = broken()
        del prepare  # and the bytes that it holds
        with self._changed:
            self._coming -= 1
            if failure is None and not job.order.dropped:
                job.arrived = time.monotonic()
                lane.waiting.append(job)
            self._changed.notify()
        if failure is not None:
            _deliver([job], [failure], 0)

    def _run(self) -> None:
        try:
            self._first()
            self._work()
        except Exception as error:
            _log.exception("the model's thread failed")
            self._failed(error)

    def _work(self) -> None:
        turn = list(self.lanes)
        while True:
            with self._changed:
                name, batch = self._next(turn)
                if not batch:
                    return
                self.lanes[name].take(batch)
            turn.remove(name)
            turn.append(name)
            self._watch(name, len(batch))
            _deliver(batch, self._answer(self.lanes[name], batch), len(batch))
            del batch

    def _next(self, turn: list[str]) -> tuple[str, list[Job]]:
        """The lane whose turn it is and its batch, once it is time; no batch when stopped. Called and left with the
        lock held."""
        while not self._stopped:
            for lane in self.lanes.values():
                lane.forget_dropped()
            name, batch = next(((name, batch) for name in turn if (batch := self.lanes[name].batch())), ("", []))
            if not batch:
                self._changed.wait()
                continue
            left = batch[0].arrived + self._wait - time.monotonic()
            if left <= 0 or not self._coming or self.lanes[name].is_full(batch):
                return name, batch
            self._changed.wait(left)
        return "", []

    def _answer(self, lane: Lane, batch: list[Job]) -> list[Outcome]:
        try:
            return lane.answer(batch)
        except Refusal as error:
            failure = error.with_traceback(None)
        except Exception:
            _log.exception("the model failed")
            failure = broken()
        # What is wrong with one image is not the others' fault.
        return [failure] if len(batch) == 1 else [self._answer(lane, [job])[0] for job in batch]


def _deliver(jobs: Sequence[Job], outcomes: Sequence[Outcome], batch: int) -> None:
    """Hand outcomes to the event loop, in one call."""
    filled = [(job.order, job.index, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]

    def fill() -> None:
        for order, index, outcome in filled:
            order.fill(index, outcome, batch)

    with suppress(RuntimeError):  # the loop has been closed: nobody waits
        jobs[0].order.loop.call_soon_threadsafe(fill)
