"""What a larger image costs: time and memory of one image against its side, for a Conformer, Swin, MobileViT and DeiT.

    python benchmarks/growth.py --out FOLDER [--sides 128 192 256 384 512 768 1024] [--rounds 7] [--threads N]

Every network is in the form that `chiasm predict` uses (`chiasm.optimize`), built for the side. At each side the four
run in interleaved rounds; the peak memory is that of a process of its own. Finished sides are kept and an interrupted
study goes on: start the command again. Writes growth.json, growth.md and growth.svg into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import chiasm
from chiasm.measure import (
    MatrixProduct,
    Times,
    count_macs,
    interleaved,
    load_average,
    machine,
    noise,
    peak_memory,
    timed,
)
from chiasm.models.sketch import shapes_only

SIDES = (128, 192, 256, 384, 512, 768, 1024)
# name: why its cost grows as it does
MODELS = {
    "conformer_tiny_patch16_224": (
        "its convolutions and the layers of its tokens do the same for each pixel of any image, so they grow with the "
        "number of pixels; in its attention every 16 px patch looks at all others, so that part grows with its square "
        "and is felt once there are thousands of patches"
    ),
    "swin_tiny_window7_224": (
        "a token looks at the 49 of its window, however large the image is, so everything grows with the number of "
        "pixels; a side that windows do not divide costs more for its padding, which weighs on small images"
    ),
    "mobilevit_s_256": (
        "most of it is convolution, which grows with the number of pixels; at strides 8, 16 and 32 every pixel looks "
        "at a quarter of all others, which grows with the square, but on narrow maps"
    ),
    "deit_small_patch16_224": (
        "it is layers of tokens, which grow with the number of pixels, and attention of every 16 px patch to all "
        "others, which grows with its square and comes to outweigh them"
    ),
}
COLOURS = dict(zip(MODELS, ("#0072b2", "#d55e00", "#009e73", "#aa4499"), strict=True))
DEVICE = torch.device("cpu")


def build(name: str, side: int) -> torch.nn.Module:
    # The DeiT's position embedding belongs to a size; the others take any.
    torch.manual_seed(0)
    return chiasm.create_model(name, **({"img_size": side} if name.startswith("deit") else {})).eval()


def work(name: str, side: int) -> Callable[[], None]:
    """One image through the network."""
    model, image = chiasm.optimize(build(name, side)), torch.zeros(1, 3, side, side)

    @torch.inference_mode()
    def run() -> None:
        model(image)

    return run


def measure(side: int, rounds: int, product: MatrixProduct) -> dict[str, Any]:
    """Seconds, bytes and multiply-accumulates of each network at one side, and the machine's speed meanwhile."""
    works = {name: timed(work(name, side)) for name in MODELS}
    for run in works.values():  # the first two runs settle what is kept
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    rates = [product()]
    for found in islice(interleaved(works), rounds):
        for name, outcome in found.items():
            if isinstance(outcome, Exception):
                raise outcome
            seconds[name].append(outcome)
        rates.append(product())
    works.clear()
    models = {}
    for name in MODELS:
        with shapes_only():
            sketch = build(name, side)
            macs = count_macs(sketch, torch.zeros(1, 3, side, side))[1][""]
        parameters = sum(p.numel() for p in sketch.parameters())
        memory = peak_memory(partial(work, name, side), DEVICE, threads=torch.get_num_threads())
        models[name] = {"seconds": seconds[name], "bytes": memory, "macs": macs, "parameters": parameters}
    return {"models": models, "rates": rates}


def seconds_of(found: dict[str, Any]) -> float:
    return statistics.median(found["seconds"])


def activations_of(found: dict[str, Any]) -> float:
    return max(1.0, found["bytes"] - 4 * found["parameters"])


# title of a table: what it shows of a network at a side
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "Time of one image, ms (median)": lambda found: f"{1e3 * seconds_of(found):,.0f}",
    "Peak memory, MB, with the weights": lambda found: f"{found['bytes'] / 1e6:,.0f}",
    "Multiply-accumulates, billions": lambda found: f"{found['macs'] / 1e9:.1f}",
}
POWERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "time": seconds_of,
    "memory without the weights": activations_of,
    "multiply-accumulates": lambda found: found["macs"],
}


def ends(study: dict[str, Any]) -> tuple[int, int]:
    """The largest side, and the largest of those that are half of it at most (or the smallest)."""
    sides = sorted(map(int, study["sides"]))
    return max((side for side in sides if 2 * side <= sides[-1]), default=sides[0]), sides[-1]


def power(study: dict[str, Any], name: str, value: Callable[[dict[str, Any]], float]) -> float:
    """How a value grows between the `ends`, as a power of the number of pixels."""
    low, high = ends(study)
    ratio = value(study["sides"][str(high)]["models"][name]) / value(study["sides"][str(low)]["models"][name])
    return math.log(ratio) / math.log((high / low) ** 2)


def table(study: dict[str, Any]) -> str:
    """The study as Markdown."""
    where, sides = study["machine"], sorted(map(int, study["sides"]))
    lines = [
        "# What a larger image costs",
        "",
        f"{study['date']}, {where['processor']} ({where['instructions']}), {where['threads']} threads, torch "
        f"{where['torch']}. `{study['command']}`",
        *(f"\nToo noisy to judge. {sentence}" for sentence in study["noise"]),
    ]
    header = [f"| | {' | '.join(MODELS)} |", "|---:|" + "---:|" * len(MODELS)]
    for title, cell in TABLES.items():
        lines += ["", f"## {title}", "", *header]
        for side in sides:
            models = study["sides"][str(side)]["models"]
            lines.append(f"| {side} px | {' | '.join(cell(models[name]) for name in MODELS)} |")
    if len(sides) > 1:
        low, high = ends(study)
        lines += ["", f"## From {low} to {high} px, as a power of the number of pixels", ""]
        lines += ["1 is in proportion to the pixels, 2 with their square.", "", *header]
        for what, value in POWERS.items():
            lines.append(f"| {what} | {' | '.join(f'{power(study, name, value):.2f}' for name in MODELS)} |")
    lines += ["", "## Why", "", *(f"* **{name}**: {why}." for name, why in MODELS.items())]
    lines += [
        "",
        "Memory grows no faster than the pixels: fused attention never holds the matrix of all pairs of tokens.",
    ]
    return "\n".join([*lines, "", "![time and memory against the side](growth.svg)", ""])


def plot(study: dict[str, Any], path: Path) -> None:
    """Time and memory against the side, both axes logarithmic: a straight line is a power."""
    figure = Figure(figsize=(8.5, 3.8), layout="constrained")
    sides = sorted(map(int, study["sides"]))
    for axes, title, unit in zip(
        figure.subplots(1, 2), ("time of one image", "peak memory without weights"), ("ms", "MB"), strict=True
    ):
        least = math.inf
        for name, colour in COLOURS.items():
            found = [study["sides"][str(side)]["models"][name] for side in sides]
            if unit == "ms":
                spreads = [Times(tuple(f["seconds"])).spread for f in found]
                low, high = ([1e3 * point for point in points] for points in zip(*spreads, strict=True))
                axes.fill_between(sides, low, high, color=colour, alpha=0.2, linewidth=0)
            values = [1e3 * seconds_of(f) if unit == "ms" else activations_of(f) / 1e6 for f in found]
            axes.plot(sides, values, "o-", color=colour, markersize=3, label=name)
            least = min(least, *values)
        line = [least * (side / sides[0]) ** 2 for side in sides]
        axes.plot(sides, line, ":", color="#5b6876", linewidth=1, label="in proportion to the pixels")
        axes.set(xscale="log", yscale="log", title=title, xlabel="side, px", ylabel=unit)
        axes.set_xticks(sides, [str(side) for side in sides], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "growth.json"
    study: dict[str, Any] = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"sides": {}, "loads": []}
    )
    product = MatrixProduct(DEVICE)
    product()
    for side in sorted(options.sides):
        if str(side) in study["sides"]:
            continue
        study["loads"].append(load_average() if not study["sides"] else None)
        study["sides"][str(side)] = found = measure(side, options.rounds, product)
        study |= {
            "date": str(date.today()),
            "machine": machine(DEVICE),
            "command": "python benchmarks/growth.py --out FOLDER "
            f"--rounds {options.rounds} --threads {options.threads}",
            "noise": noise([rate for s in study["sides"].values() for rate in s["rates"]], study["loads"][0]),
        }
        file.write_text(json.dumps(study, indent=1), encoding="utf-8")
        (out / "growth.md").write_text(table(study), encoding="utf-8")
        plot(study, out / "growth.svg")
        times = ", ".join(f"{name} {1e3 * seconds_of(one):.0f} ms" for name, one in found["models"].items())
        print(f"{side} px: {times}", flush=True)
    print(table(study))


if __name__ == "__main__":
    main()
