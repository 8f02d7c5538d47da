"""Batches, turns and bounds: with plain functions where the order of things is the matter, by a real server else."""

from __future__ import annotations

import asyncio
import functools
import gc
import operator
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from chiasm.config import ServeConfig
from chiasm.serving import batching, service
from chiasm.serving.batching import Batcher, Job, Lane, Order, Room
from chiasm.serving.decoding import Turns
from chiasm.serving.refusals import Refusal
from chiasm.serving.served import Models, Served
from chiasm.serving.uploads import Upload
from running_server import Running, classifier, finder, picture, running, until


class _Model:
    """Stands where models do: notes the batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Event()
        self.go.set()
        self.busy = threading.Event()

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        self.batches.append([job.ready for job in jobs])
        self.busy.set()
        assert self.go.wait(10)
        if "bad" in self.batches[-1]:
            raise ValueError("one is bad")
        return [(job.ready, len(jobs)) for job in jobs]


class _Bench:
    """A batcher with two lanes over one `_Model`, and an event loop in the test's own hands."""

    def __init__(self, wait: float = 0.0, most: int = 4, weight: int = 100) -> None:
        self.model = _Model()
        lanes = {"predict": Lane(self.model, most, weight), "explain": Lane(self.model, 1, 0)}
        self.batcher = Batcher(lanes, wait=wait, decoders=2, watch=lambda *_: None, failed=lambda _: None)
        self.loop = asyncio.new_event_loop()
        self.batcher.start(lambda: None)

    def order(self, *what: Any, lane: str = "predict", group: Any = "a", weight: int = 0) -> Order:
        """An order of images that are decoded to `what`, or by it."""

        def prepare(job: Job, one: Any) -> Any:
            job.weight = weight
            return one() if callable(one) else one

        async def submit() -> Order:
            order = Order.of(len(what))
            for index, one in enumerate(what):
                self.batcher.submit(lane, Job(group, order, index, lambda job, one=one: prepare(job, one)))
            return order

        return self.loop.run_until_complete(submit())

    def waiting(self, count: int, lane: str = "predict") -> None:
        """Wait until so many are decoded and wait for the model."""
        until(lambda: len(self.batcher.lanes[lane].waiting) == count)

    def hold(self) -> Order:
        """Let the model begin a batch and not end it."""
        self.model.go.clear()
        self.model.busy.clear()
        order = self.order("held")
        assert self.model.busy.wait(10)
        return order

    def outcomes(self, order: Order) -> list[Any]:
        self.loop.run_until_complete(asyncio.wait_for(order.done, 10))
        return order.outcomes


@pytest.fixture
def bench() -> Iterator[_Bench]:
    made = _Bench()
    yield made
    made.model.go.set()
    made.batcher.stop()
    made.loop.close()


def test_a_batch_collects_while_the_model_works(bench: _Bench) -> None:
    bench.hold()
    orders = [bench.order(1, 2), bench.order(3), bench.order(4, 5)]
    bench.waiting(5)
    bench.model.go.set()
    assert [[value for value, _ in bench.outcomes(order)] for order in orders] == [[1, 2], [3], [4, 5]]
    assert [len(batch) for batch in bench.model.batches] == [1, 4, 1]
    assert sorted(bench.model.batches[1] + bench.model.batches[2]) == [1, 2, 3, 4, 5]
    assert orders[0].batches == [4, 4]


def test_an_idle_model_waits_for_what_is_being_decoded_alone() -> None:
    bench = _Bench(wait=5.0)
    try:
        start = time.monotonic()
        assert bench.outcomes(bench.order("alone")) == [("alone", 1)]
        assert time.monotonic() - start < 2
        decoded = threading.Event()
        order = bench.order("first", lambda: decoded.wait(10) and "second")
        bench.waiting(1)
        assert not order.done.done()
        decoded.set()
        assert bench.outcomes(order) == [("first", 2), ("second", 2)]
        slow = threading.Event()
        held = bench.order(lambda: slow.wait(10) and "slow")
        full = bench.order(1, 2, 3, 4)  # a full batch does not wait either
        assert bench.outcomes(full)[0][1] == 4
        slow.set()
        bench.outcomes(held)
        assert time.monotonic() - start < 4
    finally:
        bench.batcher.stop()
        bench.loop.close()


def test_the_wait_ends() -> None:
    bench = _Bench(wait=0.05)
    try:
        decoded = threading.Event()
        slow = bench.order(lambda: decoded.wait(10) and "slow")
        assert bench.outcomes(bench.order("quick")) == [("quick", 1)]
        decoded.set()
        assert bench.outcomes(slow) == [("slow", 1)]
    finally:
        bench.batcher.stop()
        bench.loop.close()


def test_one_batch_is_of_one_model(bench: _Bench) -> None:
    held = bench.hold()
    orders = [bench.order("a1")]
    bench.waiting(1)
    orders += [bench.order("b1", group="b"), bench.order("a2"), bench.order("b2", group="b")]
    bench.waiting(4)
    bench.model.go.set()
    for order in [held, *orders]:
        bench.outcomes(order)
    assert sorted(map(sorted, bench.model.batches[1:])) == [["a1", "a2"], ["b1", "b2"]]


def test_results_in_memory_are_of_so_many_pixels(bench: _Bench) -> None:
    """What was answered counts until it is given out; what is too large for all is let through alone."""
    bench.hold()
    orders = [bench.order(i, weight=weight) for i, weight in enumerate((60, 30, 20))]
    bench.waiting(3)
    huge = bench.order("huge", weight=1000)
    bench.waiting(4)
    bench.model.go.set()
    first = [order for order in orders if order.done.done() or bench.loop.run_until_complete(_soon(order))]
    batch = bench.model.batches[1]
    assert sum((60, 30, 20)[i] for i in batch) <= 100
    assert len(first) == len(batch) < 3
    for order in first:
        bench.batcher.release("predict", order)
    for order in orders:
        bench.outcomes(order)
        if order not in first:
            bench.batcher.release("predict", order)
    assert bench.outcomes(huge) == [("huge", 1)]
    dropped = bench.order("dropped", weight=50)
    bench.waiting(1)  # not even one goes beside the huge one
    dropped.dropped = True
    bench.batcher.release("predict", dropped)
    bench.batcher.release("predict", huge)
    assert bench.outcomes(bench.order("last", weight=100)) == [("last", 1)]


async def _soon(order: Order) -> bool:
    await asyncio.wait([order.done], timeout=0.3)
    return order.done.done()


def test_explanations_and_predictions_take_turns(bench: _Bench) -> None:
    held = bench.hold()
    told = [bench.order(f"why {i}", lane="explain") for i in range(4)]
    bench.waiting(4, "explain")
    answers = [bench.order(i) for i in range(6)]
    bench.waiting(6)
    bench.model.go.set()
    for order in [held, *told, *answers]:
        bench.outcomes(order)
    lanes = ["explain" if "why" in str(batch[0]) else "predict" for batch in bench.model.batches]
    assert lanes == ["predict", "explain", "predict", "explain", "predict", "explain", "explain"]


def test_what_nobody_waits_for_is_passed_over(bench: _Bench) -> None:
    bench.hold()
    dropped, kept = bench.order("dropped"), bench.order("kept")
    bench.waiting(2)
    dropped.dropped = True
    bench.model.go.set()
    assert bench.outcomes(kept) == [("kept", 1)]
    go, decoded = threading.Event(), []
    held = bench.order(lambda: go.wait(10), lambda: go.wait(10))  # both threads that decode
    late = bench.order(lambda: decoded.append("for nobody"))
    late.dropped = True
    go.set()
    assert bench.outcomes(bench.order("next"))[0][0] == "next"
    bench.outcomes(held)
    assert not decoded
    assert "dropped" not in functools.reduce(operator.iadd, bench.model.batches, [])


def test_one_bad_image_does_not_spoil_its_batch(bench: _Bench, caplog: pytest.LogCaptureFixture) -> None:
    def refused() -> None:
        raise Refusal(422, "image_unreadable", "no image")

    bench.hold()
    good, bad, broken = bench.order("good"), bench.order("bad", refused), bench.order(lambda: 1 / 0)
    bench.waiting(2)
    bench.model.go.set()
    assert bench.outcomes(good) == [("good", 1)]
    assert [(one.status, one.code) for one in bench.outcomes(bad)] == [(500, "internal"), (422, "image_unreadable")]
    assert bench.outcomes(broken)[0].status == 500
    assert "division by zero" in caplog.text


def test_decoding_keeps_to_one_thread_each() -> None:
    """The threads that decode share the cores already; the model's keeps its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    bench = _Bench()
    try:
        inside = [one for one, _ in bench.outcomes(bench.order(*[torch.get_num_threads] * 8))]
        assert inside == [1] * 8
        found: list[int] = []
        again = Batcher({}, wait=0, decoders=1, watch=lambda *_: None, failed=lambda _: None)
        again.start(lambda: found.append(torch.get_num_threads()))
        again.stop()
        assert found == [2]
    finally:
        bench.batcher.stop()
        bench.loop.close()
        torch.set_num_threads(before)


def test_pixels_that_are_decoded_at_a_time_are_bounded() -> None:
    """In their order, so that a large image is not passed over for ever; what is larger than all goes alone."""
    turns, log, go = Turns(100), [], {pixels: threading.Event() for pixels in (60, 1000, 40)}

    def decode(pixels: int) -> None:
        with turns.of(pixels):
            log.append(pixels)
            assert go[pixels].wait(10)

    with ThreadPoolExecutor(3) as pool:
        for pixels in go:
            pool.submit(decode, pixels)
            time.sleep(0.05)
        for count, pixels in enumerate(list(go), 1):
            until(lambda count=count: len(log) == count)
            time.sleep(0.05)
            assert log == list(go)[:count]
            go[pixels].set()


def test_masks_in_memory_are_of_as_many_pixels_as_one_image_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "memory_bytes", lambda: 4 << 30)
    served = Served("cells", finder(tmp_path, "instances"), device="cpu")
    made = service.Service(Models([served]), ServeConfig.from_flags(models=[]))
    most = made._pixels(served)
    assert most * int(served.info.head.get("detections", 100)) <= 1 << 30
    lane = made._batcher.lanes["predict"]

    async def wait() -> None:
        lane.waiting.extend(Job(served, Order.of(1), 0, None, weight=most) for _ in range(3))

    asyncio.run(wait())
    assert len(lane.batch()) == 1


def test_room_is_bounded_and_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """From how many are answered in a second, not from how long a lonely one takes."""
    now = 100.0
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: now))
    room = Room(256, "the queue")
    for _ in range(50):
        room.take(1)
        now += 3  # alone, and slow
        room.learn(1)
        room.give_back(1)
    assert room.seconds_each == 0.1
    for _ in range(4):
        room.take(64)
    with pytest.raises(Refusal) as refused:
        room.take(1)
    assert (refused.value.status, refused.value.retry_after) == (429, 26)
    for _ in range(3):
        now += 0.64
        room.learn(64)
        room.give_back(64)
    assert room.seconds_each == pytest.approx(0.01, rel=0.05)
    room.take(192)
    with pytest.raises(Refusal) as refused:
        room.check(1)
    assert refused.value.retry_after == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_model_thread_died_says_so_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Served("fruit", classifier(tmp_path), device="cpu"), timeout=1.0) as server:
        monkeypatch.setattr(server.service._batcher, "_watch", None)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(_post, server)
            until(lambda: server.client.get("/ready").status_code == 503)
            assert lost.result().status_code == 504
        server.thread.join(10)
        assert isinstance(server.service.failure, TypeError)


# ----------------------------------------------------------------------------------------------------- by a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    served = Served("fruit", classifier(tmp_path_factory.mktemp("model")), device="cpu")
    with running(served, queue=4, timeout=2.0, batch=2) as made:
        yield made


@pytest.fixture
def held(server: Running) -> Iterator[Callable[[], None]]:
    """The model's thread is at something long until this is called."""
    go, busy = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        go.wait(20)

    loop = asyncio.new_event_loop()

    async def submit() -> None:
        server.service._batcher.submit("explain", Job(None, Order.of(1), 0, lambda job: work))

    loop.run_until_complete(submit())
    assert busy.wait(10)
    yield go.set
    go.set()
    loop.close()


def _post(server: Running, **more: Any) -> httpx.Response:
    return server.client.post("/v1/predict", content=picture(), **more)


def test_a_full_queue_says_come_again(server: Running, held: Callable[[], None]) -> None:
    files = [("images", (f"{i}.png", picture(i))) for i in range(5)]
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(_post, server) for _ in range(4)]
        until(lambda: server.service._rooms["predict"].taken == 4)
        start = time.monotonic()
        refused = _post(server)
        assert time.monotonic() - start < 1
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "busy"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert server.client.get("/health").status_code == 200  # nothing else waits
        assert "chiasm_waiting_images 4.0" in server.client.get("/metrics").text
        held()
        assert [one.result().status_code for one in waiting] == [200] * 4
    # More at once than ever fit are told so without an end of trying.
    assert server.client.post("/v1/predict", files=files).status_code == 422
    assert _post(server).status_code == 200


def test_what_takes_too_long_is_given_up(server: Running, held: Callable[[], None]) -> None:
    late = _post(server)
    assert late.status_code == 504
    assert late.json()["error"] == {"code": "timeout", "message": "no answer within 2 seconds."}
    assert server.service._rooms["predict"].taken == 0
    before = _images(server)
    held()
    assert _post(server).status_code == 200
    assert _images(server) == before + 1  # the one that was given up never reached the model


def test_a_client_that_went_away_frees_its_place(server: Running, held: Callable[[], None]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/predict", content=picture(), timeout=0.2)
    until(lambda: server.service._rooms["predict"].taken == 0, 1.5)  # before its time is up
    before = _images(server)
    held()
    assert _post(server).status_code == 200
    assert _images(server) == before + 1


def test_a_slow_body_is_not_waited_for(server: Running) -> None:
    def slow() -> Iterator[bytes]:
        yield picture()[:50]
        time.sleep(2.5)
        yield picture()[50:]

    answer = _post_stream(server, slow())
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "slow_upload"


def test_a_body_in_drops_is_not_waited_for(server: Running) -> None:
    def drops() -> Iterator[bytes]:
        for byte in picture()[:20]:
            yield bytes([byte])
            time.sleep(0.1)

    assert _post_stream(server, drops()).status_code == 408


def test_drawing_has_its_own_threads_and_the_same_deadline(server: Running) -> None:
    go = threading.Event()
    picture_please = {"Accept": "image/png"}
    for _ in range(2):
        server.service._batcher.drawing.submit(go.wait, 20)
    try:
        start = time.monotonic()
        assert _post(server, headers=picture_please).status_code == 504
        assert 1.9 < time.monotonic() - start < 4
        assert _post(server).status_code == 200
    finally:
        go.set()
    assert _post(server, headers=picture_please).status_code == 200


def test_what_was_sent_goes_with_who_sent_it(server: Running) -> None:
    """Also where it still stands in the queue of the threads that decode."""
    go, threads = threading.Event(), server.service._batcher._decoding._max_workers
    for _ in range(threads):
        server.service._batcher._decoding.submit(go.wait, 20)
    try:
        sent = {"images": ("mine.png", picture())}
        assert server.client.post("/v1/predict", files=sent).status_code == 504
        until(lambda: gc.collect() >= 0 and not _uploads("mine.png"), 5)
    finally:
        go.set()


def _uploads(name: str) -> list[Upload]:
    return [one for one in gc.get_objects() if type(one) is Upload and one.name == name]


def test_predictions_go_on_beside_explanations(server: Running) -> None:
    """Five explain without pause, and fill their own queue; nobody who asks for a prediction is refused."""
    stop = threading.Event()
    seen: set[int] = set()

    def explain() -> None:
        while not stop.is_set():
            seen.add(server.client.post("/v1/explain", content=picture()).status_code)

    until(lambda: server.client.post("/v1/explain", content=picture()).status_code == 200)  # the first loads libraries
    threads = [threading.Thread(target=explain) for _ in range(5)]
    for thread in threads:
        thread.start()
    try:
        assert [_post(server).status_code for _ in range(4)] == [200] * 4
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen <= {200, 429, 504}
    assert 200 in seen


def _post_stream(server: Running, body: Iterator[bytes]) -> httpx.Response:
    return server.client.post("/v1/predict", content=body, headers={"Content-Type": "image/png"})


def _images(server: Running) -> float:
    text = server.client.get("/metrics").text
    return float(text.split('chiasm_batch_images_sum{lane="predict"} ')[1].split()[0])


def test_memory_for_uploads_is_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as during:
        during.setattr(server.service._held, "_most", 3000)
        assert _post(server).status_code == 429
        assert server.service._held.bytes == 0
    assert _post(server).status_code == 200
