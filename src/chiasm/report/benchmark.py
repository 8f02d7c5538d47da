"""A benchmark for people to read: its rows, as a table in Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from chiasm.measure import Times
from chiasm.report.plots import BLUE, GREEN, INK, LINE, MUTED, VERMILION, dress

FORMS = {"eager": BLUE, "kept": MUTED, "optimized": VERMILION, "compiled": GREEN}
HEADERS = ("model", "form", "ms", "10 to 90 %", "images/s", "x peer", "95 %", "GFLOP/s", "of limit", "peak MB")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one form at one task.

    Attributes:
        model: as it was named.
        mode: 'inference' or 'training', which is forward, loss, backward and the optimiser's step.
        form: 'eager'; 'kept', the same where freed memory is kept; 'optimized' (`chiasm.optimize`, and freed memory is
            kept where it can be); or 'compiled' (`torch.compile`).
        batch: images at a time.
        image_size: height and width in pixels.
        memory_format: 'channels_last' or 'contiguous', in which weights and images are given: the one in which the
            eager form is faster.
        times: seconds of each round; None where it failed.
        error: why it failed.
        parameters: weights of the model.
        flops: of one run: two for each multiply-accumulate, three times the forward pass for a training step.
        memory: bytes at the peak; None where it was not measured.
        speedup: how many times as fast as the peer's eager form, and the ends of the 95 % interval.
    """

    model: str
    mode: str
    form: str
    batch: int
    image_size: tuple[int, int]
    memory_format: str | None = None
    times: Times | None = None
    error: str | None = None
    parameters: int = 0
    flops: int = 0
    memory: int | None = None
    speedup: tuple[float, float, float] | None = None

    @property
    def gflops(self) -> float | None:
        """GFLOP/s."""
        return None if self.times is None else self.flops / self.times.median / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; seconds of every round among them."""
        plain = asdict(self)
        if self.times is not None:
            low, high = self.times.spread
            plain["times"] = {"median": self.times.median, "p10": low, "p90": high, "rounds": list(self.times.seconds)}
            plain |= {"images_per_second": self.batch / self.times.median, "gflops": self.gflops}
        return plain


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured in one run.

    Attributes:
        rows: grouped by mode and batch.
        peer: the model whose eager form is 1.
        where: whether each had a process of its own, a sentence; '' on a GPU.
        limit: GFLOP/s of a product of matrices, the median of those between the rounds.
        rates: all of these.
        notes: why the machine was too noisy to judge; empty where it was not.
        machine, command, date: what ran where, how and when.
        interrupted: whether it was stopped before its end.
    """

    rows: tuple[Row, ...]
    peer: str
    where: str
    limit: float
    rates: tuple[float, ...]
    notes: tuple[str, ...]
    machine: dict[str, Any]
    command: str
    date: str
    interrupted: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """What belongs together, with its heading."""
        for mode, batch in dict.fromkeys((row.mode, row.batch) for row in self.rows):
            heading = "training step" if mode == "training" else mode
            yield f"{heading}, batch {batch}", [row for row in self.rows if (row.mode, row.batch) == (mode, batch)]

    def lines(self) -> Iterator[str]:
        """What is to be said beside the table."""
        machine = self.machine
        where = machine["gpu"] or f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"
        yield f"{self.date}, {where}, torch {machine['torch']}, {machine['system']}"
        if self.rates:
            yield f"Limit: a product of matrices at {self.limit:.0f} GFLOP/s, measured between the rounds."
        if self.where:
            yield self.where
        if any(row.form == "kept" for row in self.rows):
            yield "'kept' and 'optimized': in processes that keep freed memory, as most of chiasm's commands do."
        yield f"'x peer' is how many times as fast as the eager form of {self.peer}, in its better memory format."
        for row in self.rows:
            if row.error is not None:
                yield f"{row.model}, {row.form}, {row.mode}, batch {row.batch}, failed: {row.error}"
        if self.interrupted:
            yield "Stopped before its end: this is what was measured until then."
        for sentence in self.notes:
            yield f"Too noisy to judge. {sentence}"


def cells(row: Row, limit: float) -> list[str]:
    """A row of the table, a text for each of `HEADERS`."""
    height, width = row.image_size
    name = f"{row.model} @{height}" if height == width else f"{row.model} @{height}x{width}"
    memory = "" if row.memory is None else f"{row.memory / 1e6:,.0f}"
    if row.times is None or row.gflops is None:
        return [name, row.form, "failed", *[""] * (len(HEADERS) - 4), memory]
    low, high = row.times.spread
    speedup, interval = "", ""
    if row.speedup is not None:
        speedup, interval = f"{row.speedup[0]:.2f}", f"{row.speedup[1]:.2f} to {row.speedup[2]:.2f}"
    return [
        name,
        row.form,
        _milliseconds(row.times.median),
        f"{_milliseconds(low)} to {_milliseconds(high)}",
        f"{row.batch / row.times.median:,.1f}",
        speedup,
        interval,
        f"{row.gflops:,.0f}",
        f"{row.gflops / limit:.0%}" if limit else "",
        memory,
    ]


def markdown(result: Benchmark) -> str:
    """The benchmark as a Markdown page, beside bench.svg."""
    lines = ["# Benchmark", "", f"`{result.command}`", "", *(f"* {line}" for line in result.lines())]
    for heading, rows in result.groups():
        lines += ["", f"## {heading[0].upper()}{heading[1:]}", ""]
        lines += [f"| {' | '.join(HEADERS)} |", f"|---|---|{'---:|' * (len(HEADERS) - 2)}"]
        lines += [f"| {' | '.join(cells(row, result.limit))} |" for row in rows]
    return "\n".join([*lines, "", "![time by model and form](bench.svg)", ""])


def figure(result: Benchmark) -> Figure:
    """A panel per comparison: the median time of each row as a bar, with its 10 and 90 % points."""
    groups = [(heading, [row for row in rows if row.times]) for heading, rows in result.groups()]
    groups = [(heading, rows) for heading, rows in groups if rows]
    count = sum(len(rows) for _, rows in groups)
    drawing = Figure(figsize=(7.5, 0.7 + 0.75 * len(groups) + 0.28 * count), layout="constrained")
    if not groups:
        return drawing
    heights = [len(rows) + 1 for _, rows in groups]
    panels = drawing.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (heading, rows) in zip(panels, groups, strict=True):
        for place, row in enumerate(rows):
            assert row.times is not None
            low, high = (1e3 * point for point in row.times.spread)
            axes.barh(place, 1e3 * row.times.median, color=FORMS[row.form], height=0.7)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
        axes.set_yticks(range(len(rows)), [row.model for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        dress(axes, title=heading, x="ms" if axes is panels[-1] else "")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
    shown = [form for form in FORMS if any(row.form == form for _, rows in groups for row in rows)]
    handles = [panels[0].barh(0, 0, color=FORMS[form], label=form) for form in shown]
    drawing.legend(handles=handles, frameon=False, labelcolor=MUTED, fontsize=9, ncols=3, loc="outside upper right")
    return drawing


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
