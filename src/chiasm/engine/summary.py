"""The facts of a finished run, for summary.json."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

import chiasm
from chiasm.config import TrainConfig
from chiasm.data import ImageData
from chiasm.engine.state import RunState


def summarize(config: TrainConfig, state: RunState, parameters: int, data: ImageData) -> dict[str, Any]:
    """What came out, of what, by which command, on which machine; plain values for JSON."""
    best = state.best_row
    return {
        "model": config.model,
        "parameters": parameters,
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "train_images": len(data.splits["train"]),
            "val_images": len(data.splits["val"]),
        },
        "best": best,
        "epochs": state.epoch,
        "updates": state.updates,
        "images": state.images * state.world_size,
        "minutes": round(state.seconds / 60, 2),
        "images_per_second": round(state.images * state.world_size / max(1e-9, state.train_seconds), 1),
        "command": " ".join(["chiasm", *sys.argv[1:]]) if _is_command() else None,
        "machine": _machine(state.world_size),
        "versions": {
            "chiasm": chiasm.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "timm", "pytorch-lightning")},
        },
    }


def _is_command() -> bool:
    return os.path.basename(sys.argv[0]) in ("chiasm", "chiasm.exe", "__main__.py")


def _machine(world_size: int) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.platform(terse=True),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
