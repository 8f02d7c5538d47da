"""What a server has done, in numbers that Prometheus collects."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One server's own numbers; nothing is shared between servers.

    Args:
        waiting: how many images are accepted and not answered, when asked.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter("chiasm_requests", "Requests answered", ("path", "status"), registry=self._registry)
        self._seconds = Histogram(
            "chiasm_request_seconds", "From a request's first byte to its answer", ("path",), buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._batches = Histogram(
            "chiasm_batch_images", "Images that went through a model together", ("lane",), buckets=_IMAGES,
            registry=self._registry,
        )  # fmt: skip
        self._images = Counter("chiasm_images", "Images answered", ("model",), registry=self._registry)
        self._rejected = Counter("chiasm_rejected", "Requests and images refused", ("code",), registry=self._registry)
        Gauge("chiasm_waiting_images", "Images accepted and not answered", registry=self._registry).set_function(
            waiting
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request; `path` is one of the server's own, never what a client sent."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, lane: str, images: int) -> None:
        """Count a batch."""
        self._batches.labels(lane).observe(images)

    def answered(self, model: str, images: int) -> None:
        """Count images that a model answered."""
        self._images.labels(model).inc(images)

    def rejected(self, code: str) -> None:
        """Count what was refused."""
        self._rejected.labels(code).inc()

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
