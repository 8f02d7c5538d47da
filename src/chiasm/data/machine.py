"""What this process may use of the machine, cores and memory, and what it keeps."""

from __future__ import annotations

import ctypes
import os
import platform
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


# glibc's malloc.h: from which size on a block is a mapping of its own, and how much may lie free and be kept.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LEAST_MAPPED, LARGEST_KEPT, LARGEST_ONCE = 2**17, 2**30, 2**25  # older releases refuse a threshold above 32 MB
ALL, SPARE = 2**31 - 1, 2**28  # bytes that are kept: training, which repeats its sizes; what reads images of all sizes


def can_keep_freed_memory() -> bool:
    """Whether `keep_freed_memory` has an effect here: on Linux with glibc, where nobody has set it otherwise."""
    set_by_others = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    return platform.libc_ver()[0] == "glibc" and not any(name in os.environ for name in set_by_others)


def keep_freed_memory(spare: int = ALL) -> bool:
    """Keep the memory that this process frees for what it asks for next; whether the system can (Linux's glibc).

    By itself glibc hands large blocks back at once, and the system gives them out again page by page, each filled with
    zeros: on a CPU a tenth of the time goes there, with some networks a half (benchmarks/speed). For work that asks for
    the same sizes again and again, as training does, the peak stays as it is; where sizes differ each time, it can
    grow, as what lies between blocks in use is not given back. What MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES say goes first.

    Args:
        spare: bytes that may lie free at a heap's end (each thread can have one) before they are given back, and the
            largest block that is taken from there.
    """
    if not can_keep_freed_memory():
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(
            any(library.mallopt(M_MMAP_THRESHOLD, min(size, spare)) for size in (LARGEST_KEPT, LARGEST_ONCE))
            and library.mallopt(M_TRIM_THRESHOLD, spare)
        )
    except (OSError, AttributeError, TypeError):  # glibc in name only
        return False


def hold_what_is_used() -> bool:
    """Hand large blocks back as soon as they are freed, so that this process holds what is in use; whether it can.

    What glibc takes from its heap lies between holes that come and go by chance; a mapping of its own has none.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LEAST_MAPPED))
    except (OSError, AttributeError, TypeError):  # another system, another library
        return False


def free_products_memory() -> bool:
    """Give back what the library of PyTorch's matrix products keeps for its next ones, some megabytes; whether it did.

    That is MKL on x86 processors, which has no such function in PyTorch's interface; memory in use is not touched.
    """
    import torch

    try:
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers()
    except (OSError, AttributeError):  # another system, another library
        return False
    return True
