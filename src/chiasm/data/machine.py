"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """The memory of the machine or, where that is less, of the container; an equal part of it when several training
    processes run side by side."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = 8 << 30  # not told (Windows): what most machines have at least
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit here, or 'max'
            continue
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return total // max(int(processes), 1) if processes.isdecimal() else total


def default_workers() -> int:
    """Processes that read images where a person has not said how many.

    With a GPU, reading is what training waits for: one per core, at most 8. On a CPU, readers take their cores from
    training, so there are few of them, and none below four cores.
    """
    import torch

    if torch.cuda.is_available():
        return min(cores(), 8)
    return min(cores() // 4, 4)
