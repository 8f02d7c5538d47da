"""The figures of reports and run folders, drawn with matplotlib in one palette that colour-blind eyes can tell apart.

Each function returns a `Figure`; `svg` makes it a piece of a page (its colours follow the page's light or dark theme)
and `png` a picture on white.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from chiasm.tasks.classify_metrics import BINS, Calibration
from chiasm.tasks.validation import SCORES, other_scores, score_of

# name: (on light, on dark). After Okabe and Ito's palette; figures are drawn in the light colours.
PALETTE = {
    "ink": ("#1b2733", "#e6ebf0"),
    "muted": ("#5b6876", "#9aa7b4"),
    "line": ("#d3d9df", "#3a4652"),
    "blue": ("#0072b2", "#56b4e9"),
    "vermilion": ("#d55e00", "#ff8c42"),
    "green": ("#009e73", "#2fcf9f"),
    "purple": ("#aa4499", "#e08fd0"),
    "inverse": ("#fefefe", "#10161c"),  # on an area in one of the colours
}
INK, MUTED, LINE, BLUE, VERMILION, GREEN, PURPLE, INVERSE = (light for light, _ in PALETTE.values())
# The model itself, then its branches in the order they come.
VOTERS = (BLUE, VERMILION, GREEN, PURPLE)
# Classes up to which each cell of a confusion matrix bears its number, and each row and column its name.
NUMBERED, NAMED = 20, 60
LABEL_LETTERS = 22

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"


def curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Training curves from the lines of metrics.csv, one or more: losses, and the validation score beside the others.

    Args:
        history: per epoch 'epoch', 'train_loss', 'val_<score>', and where there are 'val_loss' and other scores, such
            as 'val_top1_<branch>' (see tasks/validation.py).
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    style: dict[str, Any] = {"marker": "o" if len(history) < 20 else "", "markersize": 3}
    for (column, label), colour in zip((("train_loss", "training"), ("val_loss", "validation")), VOTERS, strict=False):
        if column in history[0]:
            losses.plot(epochs, [row[column] for row in history], color=colour, label=label, **style)
    score, others = score_of(history[0]), other_scores(history[0])
    for (column, words), colour in zip(others.items(), VOTERS[1:] * len(others), strict=False):
        label = f"{words} branch" if column.startswith("val_top1_") else words
        scores.plot(epochs, [row[column] for row in history], color=colour, linewidth=1.2, label=label, **style)
    values, words = [row[f"val_{score}"] for row in history], SCORES[score]
    label = "model" if score == "top1" else words
    scores.plot(epochs, values, color=BLUE, linewidth=2, label=label, **style)
    best = max(values)
    scores.axhline(best, color=MUTED, linewidth=0.8, linestyle=":")
    dress(losses, title="Loss", x="epoch")
    dress(scores, title=f"Validation {words}: best {best:.1%}, epoch {epochs[values.index(best)]:.0f}", x="epoch")
    scores.yaxis.set_major_formatter("{x:.0%}")
    for axes in (losses, scores):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return figure


def confusion(labels: Sequence[str], matrix: Sequence[Sequence[int]], *, percent: bool = False) -> Figure:
    """True classes down, predicted classes across; the deeper a cell, the larger its share of its row.

    Blue is right, vermilion wrong, so that a pale diagonal and a strong mistake both catch the eye.

    Args:
        labels: of rows and columns.
        matrix: [true][predicted] counts.
        percent: write the share of the row, in percent, in place of the count; less than half a percent is left out.
    """
    count = len(labels)
    side = min(8.0, max(4.6, 1.9 + 0.36 * count))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = [[number / max(1, sum(row)) for number in row] for row in matrix]
    colours = [[BLUE if i == j else VERMILION for j in range(count)] for i in range(count)]
    if count <= NUMBERED:
        size = 8.5 if count <= 12 else 6.5
        for i, j in itertools.product(range(count), repeat=2):
            share, number = shares[i][j], matrix[i][j]
            axes.add_patch(
                Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, facecolor=colours[i][j], alpha=share, linewidth=0)
            )
            if share >= 0.005 if percent else number:
                ink = INVERSE if share > 0.55 else INK
                told = f"{100 * share:.0f}" if percent else str(number)
                axes.text(j, i, told, ha="center", va="center", color=ink, fontsize=size)
        axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), aspect="equal")
    else:
        cells = [[(*to_rgb(colours[i][j]), shares[i][j]) for j in range(count)] for i in range(count)]
        axes.imshow(cells, interpolation="nearest")
    dress(axes, x="predicted", y="true")
    if count <= NAMED:
        names = [_short(label) for label in labels]
        size = 9 if count <= 12 else 7 if count <= 30 else 5
        axes.set_xticks(range(count), names, rotation=45 if count <= 12 else 90, fontsize=size)
        if count <= 12:
            for tick in axes.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def reliability(voters: Mapping[str, Calibration]) -> Figure:
    """Stated probability against the share that is right, a curve per voter; below, how many images the first stated.

    On the diagonal a stated 80 % is right 80 % of the time; below it the model is too sure of itself.
    """
    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    axes, counts = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
    for (name, calibration), colour in reversed(list(zip(voters.items(), VOTERS, strict=False))):
        points = [
            (stated, right, number)
            for stated, right, number in zip(
                calibration.confidence, calibration.accuracy, calibration.counts, strict=True
            )
            if stated is not None and right is not None
        ]
        total = sum(number for _, _, number in points)
        x, y = [point[0] for point in points], [point[1] for point in points]
        first = name == next(iter(voters))
        label = f"{name}, error {calibration.ece:.1%}"
        axes.plot(x, y, color=colour, linewidth=2.2 if first else 1.2, label=label)
        axes.scatter(
            x, y, s=[12 + 160 * number / total for _, _, number in points], color=colour, alpha=0.75, linewidths=0
        )
    first_calibration = next(iter(voters.values()))
    edges = [(i + 0.5) / BINS for i in range(BINS)]
    counts.bar(edges, first_calibration.counts, width=0.9 / BINS, color=BLUE, linewidth=0)
    dress(axes, y="share that is right")
    dress(counts, x="stated probability", y="images")
    for part in (axes, counts):
        part.set_xlim(0, 1)
        part.xaxis.set_major_formatter("{x:.0%}")
        part.grid(color=LINE, linewidth=0.6)
        part.set_axisbelow(True)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter("{x:.0%}")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], frameon=False, labelcolor=INK, fontsize=8.5, loc="upper left")
    return figure


def precision_recall(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Precision over recall, a curve per name; values at recalls evenly spaced from 0 to 1."""
    figure = Figure(figsize=(4.8, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(curves.items(), VOTERS, strict=False):
        recalls = [i / max(1, len(values) - 1) for i in range(len(values))]
        axes.plot(recalls, values, color=colour, linewidth=2, label=name)
    dress(axes, x="recall: share of the objects found", y="precision: share of detections right")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.0%}")
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower left")
    return figure


def bars(rows: Sequence[tuple[str, Mapping[str, float | None]]], *, x: str) -> Figure:
    """Horizontal dots per row, one colour per series, joined by a line: shares 0..1 of many things to compare.

    Args:
        rows: a name and its values by series, from the top down; None leaves the dot out.
        x: what the values are.
    """
    figure = Figure(figsize=(5.4, 1.0 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [_short(name) for name, _ in rows]
    for i, (_, values) in enumerate(rows):
        known = [value for value in values.values() if value is not None]
        if known:
            axes.plot([min(known), max(known)], [i, i], color=LINE, linewidth=3, zorder=1, solid_capstyle="round")
    for series, colour, marker in zip(rows[0][1], VOTERS, "os^D", strict=False):
        points = [(value, i) for i, (_, values) in enumerate(rows) if (value := values[series]) is not None]
        across, down = [value for value, _ in points], [i for _, i in points]
        axes.scatter(across, down, color=colour, marker=marker, s=34, label=series, zorder=2)
    dress(axes, x=x)
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.4, -0.6))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=len(rows[0][1]), loc="outside upper right")
    return figure


def svg(figure: Figure) -> str:
    """The figure as an <svg> element for a page that defines the palette as `--ink`, `--blue` ... in its CSS."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "chiasm"}), _any_script():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"'DejaVu Sans'[^;\"]*", _FONTS, drawing)
    for name, (light, _) in PALETTE.items():
        drawing = drawing.replace(light, f"var(--{name}, {light})")
    return drawing.strip()


def png(figure: Figure, *, dpi: int = 130) -> bytes:
    """The figure as a PNG file on white."""
    data = io.BytesIO()
    with _any_script():
        figure.savefig(data, format="png", dpi=dpi, facecolor="white")
    return data.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    """Class names may be in a script that matplotlib's font lacks: a browser has a font for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    axes.set_title(title, color=INK, fontsize=10.5, loc="left")
    axes.set_xlabel(x, color=MUTED, fontsize=9.5)
    axes.set_ylabel(y, color=MUTED, fontsize=9.5)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.set_facecolor("none")


def as_written(label: str) -> str:
    """A label as matplotlib shows it letter by letter: dollars would be read as mathematics."""
    return label.replace("$", r"\$")


def _short(label: str) -> str:
    label = as_written(label)
    return label if len(label) <= LABEL_LETTERS else label[: LABEL_LETTERS - 1] + "…"
