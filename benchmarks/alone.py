"""What a person gets: timm's networks in a plain script beside ours in chiasm's commands, each in a process of its own.

    python benchmarks/alone.py --out FOLDER [--seconds 25]

`chiasm bench` measures all models in one process, where they share what its memory allocator holds. In use a network
has a process to itself, whose C library hands freed memory back to the system and asks for it anew: that costs a
network the more, the more memory it goes through. chiasm's commands tell the library to keep it (`keep_freed_memory`),
which helps timm's networks as well; so these are measured both ways. The processes take turns in rounds, in an order
drawn anew; of each turn the first run is not counted, since the others' turns have taken the caches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from chiasm.data.machine import keep_freed_memory
from chiasm.measure import WARM, Times, machine, ratio
from chiasm.works import work_of

PAIRS = {
    "Swin-T": ("swin_tiny_window7_224", "timm:swin_tiny_patch4_window7_224", 224),
    "MobileViT-S": ("mobilevit_s_256", "timm:mobilevit_s", 256),
}
PLAIN = "timm, plain script"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=25, help="of measuring for each model, mode and batch")
    args = parser.parse_args()
    rows = [
        row
        for name in PAIRS
        for mode in ("inference", "training")
        for batch in (1, 8)
        for row in measure(name, mode, batch, args.seconds)
    ]
    told = machine(torch.device("cpu"))
    lines = [
        "# Each in a process of its own",
        "",
        f"`python benchmarks/alone.py --out FOLDER --seconds {args.seconds:g}`, {date.today()}, {told['processor']} "
        f"({told['instructions']}), {told['threads']} threads, torch {told['torch']}, timm {told['timm']}",
        "",
        "'x plain timm' is how many times as fast as timm's network in a plain script, in its better memory format, "
        "with the 95 % interval.",
        "",
        "| model | mode | batch | form | ms | x plain timm |",
        "|---|---|---:|---|---:|---:|",
    ]
    for row in rows:
        speed, low, high = row["speedup"]
        cells = row["model"], row["mode"], row["batch"], row["form"], f"{row['ms']:.1f}", f"{speed:.2f}"
        lines.append(f"| {' | '.join(map(str, cells))} ({low:.2f} to {high:.2f}) |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "alone.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out / "alone.json").write_text(json.dumps({"machine": told, "rows": rows}, indent=1), encoding="utf-8")
    print("\n".join(lines))


def measure(name: str, mode: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of the forms of one model in one mode at one batch; each form in its better memory format."""
    ours, theirs, side = PAIRS[name]
    best = "optimized" if mode == "inference" else "eager"
    forms = {
        PLAIN: (theirs, "eager", False),
        "timm, memory kept": (theirs, "eager", True),
        "chiasm": (ours, best, True),
    }
    context = multiprocessing.get_context("spawn")
    works: dict[tuple[str, str], Any] = {}
    children = []
    for form, (ref, how, keep) in forms.items():
        for layout in ("contiguous", "channels_last"):
            here, there = context.Pipe()
            what = (ref, (3, side, side), mode, how, batch, layout, "fp32", "cpu")
            children.append(context.Process(target=_child, args=(there, what, keep), daemon=True))
            children[-1].start()
            works[form, layout] = here
            here.recv()  # it is ready: the next starts when this one is still
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    order, start = list(works), time.perf_counter()
    while time.perf_counter() - start < seconds or len(spent[order[0]]) < 5:
        random.shuffle(order)
        for key in order:
            works[key].send("run")
            spent[key].append(works[key].recv())
    for child in children:
        child.kill()
    times = {
        form: min((Times(tuple(spent[form, layout])) for layout in ("contiguous", "channels_last")), key=_median)
        for form in forms
    }
    return [
        {
            "model": name, "mode": mode, "batch": batch, "form": form, "ms": 1e3 * own.median,
            "speedup": ratio(times[PLAIN], own),
        }
        for form, own in times.items()
    ]  # fmt: skip


def _median(times: Times) -> float:
    return times.median


def _child(pipe: Any, what: tuple[Any, ...], keep: bool) -> None:
    if keep:
        keep_freed_memory()
    work = work_of(*what)
    for _ in range(WARM):
        work()
    pipe.send("ready")
    while pipe.recv() == "run":
        work()
        start = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - start)


if __name__ == "__main__":
    main()
