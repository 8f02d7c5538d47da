"""Measuring what models cost, side by side: time in interleaved rounds, the machine's own speed between them,
multiply-accumulates, peak memory.

A shared machine is never still. So nothing is timed alone: every round runs each work once, in another order, and a
matrix product beside them; what slowed the machine slowed all, and ratios of medians hold where milliseconds do not.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from chiasm.apart import WARM, Apart
from chiasm.data.machine import cores, memory_bytes
from chiasm.errors import ChiasmError, first_line
from chiasm.layers.fused import FusedLinear

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]

UNSTEADY = 0.15  # of the median matrix product: the spread from which a run is called noisy
BUSY = 0.5  # load average beside us from which a machine is called busy
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices multiplied


# ----------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Times:
    """Seconds of each round of one work, at least one."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10 % and the 90 % point."""
        low, high = np.quantile(self.seconds, (0.1, 0.9))
        return float(low), float(high)


def timed(work: Callable[[], object], *, clock: Clock = time.perf_counter) -> Callable[[], float]:
    """A function that runs the work and gives the seconds that it took."""

    def run() -> float:
        start = clock()
        work()
        return clock() - start

    return run


def interleaved(works: Mapping[Key, Callable[[], float]], *, seed: int = 0) -> Iterator[dict[Key, float | Exception]]:
    """Endless rounds: each gives the seconds that every work took, run once in an order drawn anew.

    Args:
        works: functions that run a work and give its seconds: `timed` ones, or `Apart`.

    A work that fails gives its error in that round and is left out of those that follow.
    """
    order, rng = list(works), random.Random(seed)
    while order:
        rng.shuffle(order)
        found: dict[Key, float | Exception] = {}
        for key in order:
            try:
                found[key] = works[key]()
            except Exception as error:  # one model's failure is a row of the table, not the end of the others
                found[key] = error
        yield found
        order = [key for key in order if isinstance(found[key], float)]


def ratio(slow: Times, fast: Times, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """How many times as fast `fast` is: median over median, with the 95 % interval of a bootstrap over rounds.

    Rounds are drawn in pairs where both works have the same number of them, so what slowed a whole round cancels.
    """
    rng = np.random.default_rng(seed)
    above, below = np.array(slow.seconds), np.array(fast.seconds)
    drawn = rng.integers(len(above), size=(resamples, len(above)))
    also = drawn if len(above) == len(below) else rng.integers(len(below), size=(resamples, len(below)))
    low, high = np.quantile(np.median(above[drawn], axis=1) / np.median(below[also], axis=1), (0.025, 0.975))
    return slow.median / fast.median, float(low), float(high)


def filling_batch(speed_of: Callable[[int], float], *, first: int = 16, gain: float = 1.05) -> int:
    """The batch from which a larger one brings no more: doubled until images per second grow by less than `gain`, or
    memory ends.

    Args:
        speed_of: images per second at a batch; raises RuntimeError, as PyTorch does, where memory ends.
    """
    batch, best = first, 0.0
    while True:
        try:
            speed = speed_of(batch)
        except RuntimeError:
            if batch == first:
                raise
            return batch // 2
        if speed < gain * best:
            return batch // 2
        batch, best = 2 * batch, speed


# -------------------------------------------------------------------------------------------------------------- machine


class MatrixProduct:
    """The machine's own speed: calling it gives the GFLOP/s of one product of square matrices, in the faster of
    PyTorch's ways."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, *, clock: Clock = time.perf_counter):
        self.side = SIDE.get(device.type, SIDE["cpu"])
        self._device, self._clock = device, clock
        self._left = torch.ones(self.side, self.side, device=device, dtype=dtype)
        layer = nn.Linear(self.side, self.side, bias=False, device=device, dtype=dtype)
        self._ways: list[Callable[[Tensor], Tensor]] = [layer.requires_grad_(False)]
        if device.type == "cpu":
            self._ways.append(FusedLinear(layer))

    @torch.inference_mode()
    def __call__(self) -> float:
        seconds = []
        for multiply in self._ways:
            start = self._clock()
            multiply(self._left)
            synchronize(self._device)
            seconds.append(self._clock() - start)
        return 2 * self.side**3 / max(min(seconds), 1e-9) / 1e9


def noise(rates: Sequence[float], load: float | None) -> list[str]:
    """What made the machine too noisy to judge, a sentence each; empty for a quiet machine.

    Args:
        rates: the matrix products' GFLOP/s, one between each two rounds.
        load: processes that ran beside us before the measurement; None where the system does not tell.
    """
    said = []
    if load is not None and load > BUSY:
        said.append(
            f"Other programs were running: a load of {load:.1f} before the measurement began, on {cores()} cores "
            f"(quiet is below {BUSY})."
        )
    if len(rates) > 1:
        low, high = np.quantile(rates, (0.1, 0.9))
        spread = (high - low) / statistics.median(rates)
        if spread > UNSTEADY:
            said.append(
                f"The machine's own speed varied by {spread:.0%} between the rounds ({low:.0f} to {high:.0f} GFLOP/s; "
                f"steady is up to {UNSTEADY:.0%})."
            )
    return said


def load_average() -> float | None:
    """Processes that wanted to run during the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on: plain values for a report."""
    import timm
    import torchvision

    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------- multiply-accumulates


# A training step does three products where a forward pass does one: for the output, the input's gradient, the weight's.
TRAINING_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs: weights, and multiply-accumulates of one image."""

    parameters: int
    macs: int

    def training_tflop(self, images: int) -> float:
        """TFLOP of training on so many images, counted as three forward passes."""
        return TRAINING_PASSES * 2 * self.macs * images / 1e12


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> tuple[Any, dict[str, int]]:
    """One forward pass: its output, and the multiply-accumulates of convolutions, matrix products and attention by the
    name of the module that did them, '' for the whole model."""
    counter = FlopCounterMode(display=False)
    with counter:
        output = model(images)
    own = type(model).__name__
    macs = {
        "" if name == "Global" else name.removeprefix(f"{own}."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name == "Global" or name.startswith(f"{own}.")
    }
    return output, {"": 0, **macs}


# --------------------------------------------------------------------------------------------------------------- memory


def peak_memory(
    build: Callable[[], Callable[[], object]], device: torch.device, *, threads: int, timeout: float = 600
) -> int:
    """Bytes that a work needs at its peak: weights, activations, gradients, all but the libraries themselves.

    Args:
        build: makes the work. For the CPU it is called in a process of its own, so it must be a function of a module or
            a `functools.partial` of one. What only building and the first runs needed does not count, where the system
            can forget it (Linux), nor what the allocator keeps besides (with glibc).
        device: where the work runs; on a GPU what PyTorch allocates there is counted, here.
        threads: that the process uses.
        timeout: seconds after which the process is given up.

    Raises:
        ChiasmError: where the work failed, or ran out of memory or time, in one line.
    """
    if device.type == "cuda":
        return _peak_on_gpu(build, device)
    with Apart(build, threads=threads, exact=True, timeout=timeout) as work:
        return work.peak()


def _peak_on_gpu(build: Callable[[], Callable[[], object]], device: torch.device) -> int:
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    try:
        work = build()
        for _ in range(WARM):
            work()
        torch.cuda.reset_peak_memory_stats(device)
        work()
    except Exception as error:
        raise ChiasmError(first_line(error)) from error
    return torch.cuda.max_memory_allocated(device) - before
