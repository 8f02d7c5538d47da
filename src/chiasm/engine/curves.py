"""The curves of a run as a picture: losses, and validation top-1 with each branch's own."""

from __future__ import annotations

import os
from pathlib import Path


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Write `path` (PNG) from the lines of metrics.csv; needs at least one."""
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) < 20 else ""
    figure = Figure(figsize=(9, 3.6))
    losses, scores = figure.subplots(1, 2, gridspec_kw={"left": 0.07, "right": 0.98, "bottom": 0.14, "wspace": 0.2})
    for name, label in (("train_loss", "train"), ("val_loss", "val")):
        losses.plot(epochs, [row[name] for row in history], marker=marker, markersize=3, label=label)
    losses.set(xlabel="epoch", ylabel="loss")
    scores.plot(epochs, [row["val_top1"] for row in history], marker=marker, markersize=3, label="model", color="black")
    for name in history[0]:
        if name.startswith("val_top1_"):
            values = [row[name] for row in history]
            scores.plot(epochs, values, marker=marker, markersize=3, linewidth=1, label=f"{name[9:]} branch")
    best = max(history, key=lambda row: row["val_top1"])
    scores.axhline(best["val_top1"], color="grey", linewidth=0.6, linestyle=":")
    scores.set(xlabel="epoch", ylabel="val top-1", title=f"best {best['val_top1']:.1%}, epoch {best['epoch']:.0f}")
    scores.yaxis.set_major_formatter("{x:.0%}")
    for axes in (losses, scores):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=110)
    os.replace(part, path)
