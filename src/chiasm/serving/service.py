"""What a server does between a request and its answer: takes images in, has them decoded and answered in batches, waits
for as long as somebody waits, and stops without losing what it accepted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from chiasm.data.machine import cores, memory_bytes
from chiasm.serving.batching import Batcher, Job, Lane, Order, Outcome, Room
from chiasm.serving.decoding import BYTES, Turns, decode
from chiasm.serving.metrics import Metrics
from chiasm.serving.refusals import Refusal
from chiasm.serving.served import Models, Served
from chiasm.serving.uploads import Held, Limits, Upload, read_uploads

if TYPE_CHECKING:
    from starlette.requests import Request

    from chiasm.config import ServeConfig
    from chiasm.predictor import Seen
    from chiasm.serving.watch import Entry

T = TypeVar("T")

MOST_IMAGES = 64  # of one request
EXPLANATIONS = 8  # that may wait


class _Ready(NamedTuple):
    """A decoded image on its way to a predictor."""

    name: str
    size: tuple[int, int]
    seen: Seen


class Answered(NamedTuple):
    """What the model says of an image of that height and width."""

    result: Any
    size: tuple[int, int]


class Service:
    """The models of a server with all that lies between them and its routes.

    Args:
        models: what answers.
        config: how many images may wait, how large they may be, and so on.

    Attributes:
        state: 'starting', 'ready', then 'stopping'.
        active: requests that were accepted and are not answered.
        failure: why it could not start, or go on.
    """

    def __init__(self, models: Models, config: ServeConfig) -> None:
        self.models = models
        self.threshold = config.threshold
        self.limits = Limits(
            bytes=round(config.max_mb * 1e6),
            pixels=round(config.max_megapixels * 1e6),
            images=min(MOST_IMAGES, config.queue),
            seconds=config.timeout,
            held=max(memory_bytes() // 8, round(8 * config.max_mb * 1e6)),
        )
        self.state = "starting"
        self.active = 0
        self.failure: Exception | None = None
        self._timeout = config.timeout
        self._held = Held(self.limits.held)
        self._turns = Turns(memory_bytes() // 4 // BYTES)
        self._rooms = {
            "predict": Room(config.queue, "the queue"),
            "explain": Room(min(EXPLANATIONS, config.queue), "the queue of explanations"),
        }
        self.metrics = Metrics(lambda: sum(room.taken for room in self._rooms.values()))
        self._batcher = Batcher(
            {
                "predict": Lane(_predict, config.batch, min(map(self._pixels, models))),
                "explain": Lane(lambda jobs: [job.ready() for job in jobs], 1, 0),
            },
            wait=config.wait_ms / 1000,
            decoders=max(1, cores()),
            watch=self.metrics.batch,
            failed=self._fail,
        )

    def start(self) -> None:
        """Start the threads; `state` is 'ready' once every model has answered for the first time, or 'stopping' with a
        `failure`."""

        def warm_up() -> None:
            try:
                for served in self.models:
                    served.warm_up()
            except Exception as error:
                self._fail(error)
            if self.state == "starting":
                self.state = "ready"

        self._batcher.start(warm_up)

    def _fail(self, error: Exception) -> None:
        """A server without its model's thread ends: one that seems well would answer nothing."""
        self.failure, self.state = error, "stopping"

    def stop(self) -> None:
        """End the threads, after what they are at."""
        self.state = "stopping"
        self._batcher.stop()

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """A request that is taken in: a server that stops waits for it.

        Raises:
            Refusal: 503 where none are, any more or yet.
        """
        if self.state != "ready":
            raise Refusal(503, self.state, f"the server is {self.state}.", retry_after=2)
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    @contextmanager
    def _holding(self) -> Iterator[Held]:
        """What one request holds of the memory for uploads; given back at its end."""
        held = _Share(self._held)
        try:
            yield held
        finally:
            held.give_back()

    async def predict(
        self, request: Request, served: Served, entry: Entry, render: Callable[..., T], *, light: bool, alone: bool
    ) -> list[tuple[str, T | Refusal]]:
        """The images of a request by name, answered.

        Args:
            request: its body is read here.
            served: the model.
            entry: is told how many images there are, and of their batches.
            render: what becomes of an image's `Answered` and `Upload`.
            light: whether that is quickly done; otherwise another thread does it.
            alone: whether there may be one image only.

        Raises:
            Refusal: as `read_uploads`; 422 for several where one may be, 429 where the queue is full, 504 after the
                timeout.
        """
        room = self._rooms["predict"]
        room.check(1)  # before anything is read
        with self._holding() as held:
            uploads = await read_uploads(request, self.limits, held)
            if alone and len(uploads) > 1:
                raise Refusal(422, "one_image", f"{len(uploads)} images: one is drawn at a time.")
            end = time.monotonic() + self._timeout
            looks = [partial(self._look, served, upload) for upload in uploads]
            async with self._answer(request, "predict", served, entry, looks, end) as outcomes:
                answers: list[tuple[str, T | Refusal]] = []
                for outcome, upload in zip(outcomes, uploads, strict=True):
                    if isinstance(outcome, Answered):
                        outcome = render(outcome, upload) if light else await self._aside(end, render, outcome, upload)
                    answers.append((upload.name, outcome))
                self.metrics.answered(served.name, sum(not isinstance(answer, Refusal) for _, answer in answers))
                return answers

    async def explain(
        self, request: Request, served: Served, entry: Entry, label: str | None, top: int, render: Callable[..., T]
    ) -> T:
        """The image of a request, explained: `render` gets its explanations, its height and width, and its `Upload`.

        Raises:
            Refusal: as `predict`; 422 for several images, one that cannot be read, or an answer without explanation.
        """
        self._rooms["explain"].check(1)
        with self._holding() as held:
            upload, *others = await read_uploads(request, self.limits, held)
            if others:
                raise Refusal(422, "one_image", f"{1 + len(others)} images: one is explained at a time.")
            end = time.monotonic() + self._timeout

            def prepare(job: Job) -> Callable[[], Any]:
                pixels = decode(upload.data, upload.name, self._pixels(served), self._turns)
                size = (pixels.shape[1], pixels.shape[2])
                return lambda: (served.explain(pixels, upload.name, label, top), size)

            async with self._answer(request, "explain", served, entry, [prepare], end) as (outcome,):
                if isinstance(outcome, Refusal):
                    raise outcome
                explanations, size = outcome
                return await self._aside(end, render, explanations, size, upload)

    async def _aside(self, end: float, work: Callable[..., T], *args: Any) -> T:
        """Done in another thread, while the event loop goes on."""
        done = asyncio.get_running_loop().run_in_executor(self._batcher.drawing, work, *args)
        await asyncio.wait((done,), timeout=max(0.0, end - time.monotonic()))
        if done.done():
            return done.result()
        done.cancel()
        raise self._late()

    def _late(self) -> Refusal:
        return Refusal(504, "timeout", f"no answer within {self._timeout:g} seconds.")

    def _look(self, served: Served, upload: Upload, job: Job) -> _Ready:
        pixels = decode(upload.data, upload.name, self._pixels(served), self._turns)
        height, width = pixels.shape[1:]
        if served.info.task != "classify":
            job.weight = height * width
        return _Ready(upload.name, (height, width), served.predictor.look(pixels))

    def _pixels(self, served: Served) -> int:
        """How many an image may have: where results hold many masks, what fits into a quarter of the memory."""
        if served.info.task != "instances":
            return self.limits.pixels
        objects = int(served.info.head.get("detections", 100))
        return min(self.limits.pixels, memory_bytes() // 4 // max(objects, 1))

    @asynccontextmanager
    async def _answer(
        self,
        request: Request,
        lane: str,
        served: Served,
        entry: Entry,
        prepares: Sequence[Callable[[Job], Any]],
        end: float,
    ) -> AsyncIterator[list[Outcome]]:
        """The outcome of every image, once all are there; they are in memory until this is left."""
        room, count = self._rooms[lane], len(prepares)
        room.take(count)
        order = Order.of(count)
        entry.images = count
        jobs = [Job(served, order, index, prepare) for index, prepare in enumerate(prepares)]
        try:
            for job in jobs:
                self._batcher.submit(lane, job)
            await self._wait(request, order, end)
            room.learn(count)
            entry.batches = order.batches
            yield order.outcomes
        finally:
            order.dropped = True
            for job in jobs:
                job.prepare = None  # with it goes what was sent, also where the job still stands in a queue
            self._batcher.release(lane, order)
            room.give_back(count)

    async def _wait(self, request: Request, order: Order, end: float) -> None:
        """For the order's outcomes, as long as the client waits and the time is not up."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            left = max(0.0, end - time.monotonic())
            await asyncio.wait((order.done, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if order.done.done():
                return
            if gone.done():
                raise Refusal(499, "gone", "the client went away.")
            raise self._late()
        finally:
            gone.cancel()


class _Share(Held):
    """What one request adds to a common `Held`."""

    def __init__(self, common: Held) -> None:
        super().__init__(0)
        self._common = common

    def add(self, count: int) -> None:
        self._common.add(count)
        self.bytes += count

    def give_back(self) -> None:
        self._common.bytes -= self.bytes
        self.bytes = 0


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _predict(jobs: Sequence[Job]) -> list[Outcome]:
    """In the model's thread: images of one model in one batch."""
    ready: list[_Ready] = [job.ready for job in jobs]
    results = jobs[0].group.predictor.answer_seen([one.seen for one in ready], [one.name for one in ready])
    return [Answered(result, one.size) for result, one in zip(results, ready, strict=True)]
