"""A real server in a thread, over small real model files; what the tests of serving share."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

import chiasm
from chiasm.config import Preprocess, ServeConfig
from chiasm.model_file import ModelInfo, preprocess_of, save_model
from chiasm.models.heads import with_head
from chiasm.serving.served import Models, Served
from chiasm.serving.server import Server, listen, serve_until_stopped
from chiasm.serving.service import Service

NANO = "conformer_nano_patch4_32"
HEADS = {"instances": "mask_rcnn", "segment": "fpn"}
LABELS = ("apple", "pear", "plum, <b>dried</b>", "quince")


@dataclass
class Running:
    """A server that runs: a client of it, and its inside."""

    url: str
    client: httpx.Client
    service: Service
    server: Server
    thread: threading.Thread


def classifier(folder: Path) -> str:
    """A model file of a coupled classifier with random weights."""
    torch.manual_seed(0)
    model = chiasm.create_model(NANO, num_classes=len(LABELS))
    info = ModelInfo(architecture=NANO, labels=LABELS, preprocess=preprocess_of(model, 32))
    save_model(folder / "fruit.safetensors", model, info)
    return str(folder / "fruit.safetensors")


def finder(folder: Path, task: str) -> str:
    """A model file of a small detector or segmenter with random weights."""
    torch.manual_seed(0)
    head = {"name": HEADS[task], "channels": 64, "maps": "auto"}
    model = with_head(
        chiasm.create_model("test_resnet", num_classes=0), 4, task=task, architecture="test_resnet", **head
    )
    info = ModelInfo(
        architecture="test_resnet",
        task=task,
        head=head,
        labels=LABELS,
        preprocess=Preprocess(size=(64, 64), crop=1.0),
    )
    save_model(folder / f"{task}.safetensors", model, info)
    return str(folder / f"{task}.safetensors")


@contextmanager
def running(
    *models: Served, key: str | None = None, cors: tuple[str, ...] = (), **settings: object
) -> Iterator[Running]:
    """Serve `models`; stopped at the end as by SIGTERM."""
    service = Service(Models(models), ServeConfig.from_flags(models=[], **settings))
    opened = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{opened.getsockname()[1]}"
    made: list[Server] = []
    ready = threading.Event()

    def serve() -> None:
        quiet = bool(settings.get("quiet", True))
        serve_until_stopped(service, opened, key=key, cors=list(cors), quiet=quiet, tell=ready.set, made=made.append)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with httpx.Client(base_url=url, timeout=20) as client:
        assert ready.wait(20)
        try:
            yield Running(url, client, service, made[0], thread)
        finally:
            made[0].handle_exit(signal.SIGTERM, None)
            thread.join(20)
            assert not thread.is_alive()


def picture(seed: int = 0, size: tuple[int, int] = (36, 40), kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image of noise, `size` wide and high."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def until(condition: object, seconds: float = 10) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)
