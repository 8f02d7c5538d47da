"""What the coupling is worth: one Conformer coupled, uncoupled, and each branch alone, on the same images and budget.

    python benchmarks/coupling_study.py DATA --out FOLDER [--epochs 6 | --minutes 20] [--seeds 3 --image-size 96]

Every variant sees the same images with the same recipe, once per seed. The budget is a number of epochs, or minutes of
training: then one epoch of each variant is timed first, one after the other on a machine that should be quiet, and each
gets the epochs that fit. Epochs, not a clock, end the runs, so what else the machine does later changes no accuracy.
The accuracy is that of the last epoch, not of the best, so nothing is chosen on the validation images. Finished runs
are kept and an interrupted one goes on: start the command again. Writes coupling_study.json, .md and .svg into FOLDER.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import chiasm

MODEL = "conformer_nano_patch16_128"
VARIANTS: dict[str, dict[str, Any]] = {
    "coupled": {},
    "coupling off": {"coupling": "none"},
    "conv branch alone": {"branches": "conv"},
    "Transformer branch alone": {"branches": "tokens"},
}


def epochs_of(options: argparse.Namespace) -> dict[str, int]:
    """The epochs each variant gets; seconds per epoch are measured once and kept in pace.json."""
    if options.minutes is None:
        return dict.fromkeys(VARIANTS, options.epochs)
    file = pace_file(options)
    if not file.exists():
        seconds = {}
        for variant in VARIANTS:
            rows = train(variant, 0, 1, Path(options.out) / f"pace-{variant.replace(' ', '-')}", options)
            seconds[variant] = float(rows[-1]["seconds"])
        file.write_text(json.dumps(seconds, indent=1), encoding="utf-8")
    seconds = json.loads(file.read_text(encoding="utf-8"))
    return {variant: max(1, round(60 * options.minutes / seconds[variant])) for variant in VARIANTS}


def pace_file(options: argparse.Namespace) -> Path:
    return Path(options.out) / "pace.json"


def train(variant: str, seed: int, epochs: int, folder: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    """Train, or go on where a run was interrupted; the rows of its metrics."""
    if folder.exists():
        chiasm.train(resume=str(folder))
    else:
        chiasm.train(
            data=options.data, model=MODEL, model_args=VARIANTS[variant], recipe="quick", epochs=epochs,
            image_size=options.image_size, precision=options.precision, seed=seed, out=str(folder),
        )  # fmt: skip
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(variant: str, seed: int, epochs: int, options: argparse.Namespace) -> dict[str, Any]:
    """The metrics of the last epoch of one variant with one seed."""
    rows = train(variant, seed, epochs, Path(options.out) / f"{variant.replace(' ', '-')}-{seed}", options)
    accuracy = {
        key.removeprefix("val_").strip("_"): float(value) for key, value in rows[-1].items() if "val_top1" in key
    }
    seconds = sum(float(row["seconds"]) for row in rows)
    if options.minutes is not None:  # the clock of the quiet machine: the run itself may have shared it
        seconds = len(rows) * json.loads(pace_file(options).read_text(encoding="utf-8"))[variant]
    return {"seed": seed, "epochs": len(rows), "minutes": seconds / 60, **accuracy}


def table(study: dict[str, Any]) -> str:
    """The study as Markdown."""
    lines = [
        f"{study['date']}, {study['machine']}. `{study['command']}`",
        "",
        "| | parameters | epochs | val top-1, mean | each seed | conv head | Transformer head | minutes a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in study["variants"].items():
        runs = result["runs"]
        heads = [
            f"{statistics.mean(r[key] for r in runs):.1%}" if key in runs[0] else ""
            for key in ("top1_conv", "top1_tokens")
        ]
        lines.append(
            f"| {name} | {result['parameters'] / 1e6:.2f} M | {runs[0]['epochs']} | "
            f"**{statistics.mean(r['top1'] for r in runs):.1%}** | "
            f"{', '.join(format(r['top1'], '.1%') for r in runs)} | {heads[0]} | {heads[1]} | "
            f"{statistics.mean(r['minutes'] for r in runs):.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(study: dict[str, Any], path: Path) -> None:
    """One dot per seed and head, so that the spread is seen beside the difference."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = {"top1": "#222222", "top1_conv": "#0072b2", "top1_tokens": "#d55e00"}
    labels = {"top1": "model", "top1_conv": "conv head", "top1_tokens": "Transformer head"}
    for row, result in enumerate(study["variants"].values()):
        for offset, key in enumerate(colours):
            values = [100 * r[key] for r in result["runs"] if key in r]
            axes.plot(
                values, [row + 0.2 * (offset - 1)] * len(values), "o", color=colours[key], alpha=0.8,
                label=labels[key] if row == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(study["variants"])), list(study["variants"]))
    axes.invert_yaxis()
    axes.set_xlabel("val top-1, % (one dot per seed)")
    axes.grid(axis="x", alpha=0.3)
    axes.margins(y=0.1)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--minutes", type=float, help="equal training time instead of equal epochs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    epochs = epochs_of(options)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):  # seeds outermost: stopped early, the table still compares like with like
        for variant in VARIANTS:
            results[variant].append(run(variant, seed, epochs[variant], options))
        study = {
            "date": str(date.today()),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "command": " ".join(["python", "benchmarks/coupling_study.py", Path(options.data).name, *sys.argv[2:]]),
            "settings": {"model": MODEL, "recipe": "quick", "epochs": epochs, "image_size": options.image_size},
            "variants": {
                name: {
                    "parameters": sum(
                        p.numel() for p in chiasm.create_model(MODEL, num_classes=10, **VARIANTS[name]).parameters()
                    ),
                    "runs": runs,
                }
                for name, runs in results.items()
            },
        }
        out = Path(options.out)
        (out / "coupling_study.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
        (out / "coupling_study.md").write_text(table(study), encoding="utf-8")
        plot(study, out / "coupling_study.svg")
    print(table(study))


if __name__ == "__main__":
    main()
