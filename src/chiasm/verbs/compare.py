"""chiasm compare: several networks trained alike on your images; a report on which is worth its cost."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import CompareConfig
from chiasm.errors import InterruptedRunError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from chiasm.engine.study import Study
    from chiasm.report.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """What was found, and where it is written.

    Attributes:
        comparison: the candidates with all that came of them; `list(verdict(comparison))` says it in words.
        folder: the study: report.html, comparison.md with its figures, comparison.json, runs.csv, and every run.
    """

    comparison: Comparison
    folder: Path

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def compare(**flags: Any) -> CompareResult:
    """Train candidates under the same data order, recipe and budget, and compare them.

    The keyword arguments are the fields of `CompareConfig`. A study that was interrupted goes on when it is started
    again, and one that is there is added to where `models` or `seeds` are more. A candidate that fails is left out, and
    the report says so.

    Raises:
        UnknownNameError: for an architecture that does not exist, with the nearest.
        ChiasmError: for candidates that cannot be built, a budget that is none, or a folder of another study.
        DataError: for data that cannot be trained on.
        InterruptedRunError: after Ctrl-C or SIGTERM, with everything saved.
    """
    config = CompareConfig.from_flags(**flags)
    from rich.console import Console

    from chiasm.engine.interrupt import Interrupt
    from chiasm.engine.study import Study

    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        with Interrupt() as interrupt:
            study = Study(config)
            for candidate in study.candidates:
                cost = study.costs[candidate.label]
                size = f"{cost.parameters / 1e6:.2f} M parameters, {cost.macs / 1e6:,.0f} M MACs"
                console.print(f"{candidate.label}: {size}")
            for line in study.notes:
                console.print(line)
            _run_all(study, interrupt, console)
            _result(study, {})
            console.print("measuring the speed of each")
            return _result(study, study.images_per_second())
    except InterruptedRunError as error:
        raise InterruptedRunError(
            "stopped; what was trained is saved. To go on, give the same command again.", error.exit_code
        ) from error


def show(result: CompareResult, config: CompareConfig) -> int:
    """Print what was found; returns the exit code, 1 where a candidate failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from chiasm.report.comparison import BRANCH_HEADERS, HEADERS, IN_SHORT, branch_cells, cells, failures, verdict

    comparison = result.comparison
    if config.format == "json":
        print(json.dumps(comparison.to_dict(), ensure_ascii=False))
    else:
        console = Console(highlight=False, soft_wrap=True)
        short = [[row[i] for i in IN_SHORT] for row in (list(HEADERS), *cells(comparison))]
        for headers, *rows in (short, [list(BRANCH_HEADERS), *branch_cells(comparison)]):
            table = Table(box=None, pad_edge=False, header_style="bold")
            table.add_column(headers[0], overflow="fold")
            for header in headers[1:]:
                table.add_column(header, justify="right", min_width=max(map(len, header.split())))
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
            console.print()
        for sentence in verdict(comparison):
            console.print(Text(sentence))
        console.print(Text(f"\nreport  {result.report}\nnumbers {result.folder / 'comparison.json'}, runs.csv"))
    for sentence in failures(comparison):
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if failures(comparison) else 0


def _run_all(study: Study, interrupt: Any, console: Console) -> None:
    """Every run, under one bar with the time left; off a terminal a line for each. After each seed the report is
    written, for those who look in."""
    from chiasm.engine.state import Stopwatch

    runs = list(study.runs())
    weights = [study.weight(candidate) for candidate, _ in runs]
    total, done, worked, watch = sum(weights), 0.0, 0.0, Stopwatch()
    with _progress(console) as bar:
        task = bar.add_task("", total=total)
        for number, ((candidate, seed), weight) in enumerate(zip(runs, weights, strict=True), start=1):
            heading = f"[{number}/{len(runs)}] {candidate.label}, seed {seed}"
            bar.update(task, description=heading)

            def report(share: float, where: str, heading: str = heading, done: float = done, weight: float = weight):  # type: ignore[no-untyped-def]
                bar.update(task, description=f"{heading}: {where}", completed=done + share * weight)

            trained = not study.is_done(candidate, seed)
            outcome = study.run(candidate, seed, interrupt, report)
            done += weight
            worked += weight if trained else 0.0  # what was there before says nothing of the speed
            bar.update(task, completed=done)
            if outcome is None:
                console.print(f"{heading}: failed, {study.failures[candidate.label, seed]}")
            elif trained:
                left = watch.seconds / worked * (total - done)
                about = f" (about {timedelta(seconds=round(left))} left)" if total > done else ""
                console.print(
                    f"{heading}: val top-1 {outcome.top1:.1%} after {outcome.epochs} epochs, "
                    f"{outcome.minutes:.1f} minutes{about}"
                )
            if trained and number < len(runs) and runs[number][1] > seed:
                _result(study, {})


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar with the time left, on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=1800
    ) as progress:
        yield progress


def _result(study: Study, speeds: dict[str, float]) -> CompareResult:
    """What has been found so far, written."""
    result = CompareResult(comparison=_comparison(study, speeds), folder=study.folder)
    _write(result)
    return result


def _comparison(study: Study, speeds: dict[str, float]) -> Comparison:
    from chiasm.measure import machine
    from chiasm.predictor import choose_device
    from chiasm.report.comparison import Comparison, Entry

    entries = []
    for candidate in study.candidates:
        outcomes = study.outcomes[candidate.label]
        own = tuple(outcomes[0].branches) if outcomes else ()
        entries.append(
            Entry(
                label=candidate.label,
                model=candidate.model,
                model_args=candidate.model_args,
                settings=candidate.settings,
                joins=candidate.coupled or own,
                cost=study.costs[candidate.label],
                outcomes=tuple(outcomes),
                failures={seed: why for (label, seed), why in study.failures.items() if label == candidate.label},
                images_per_second=speeds.get(candidate.label),
            )
        )
    return Comparison(
        entries=tuple(entries),
        reference=study.reference.label,
        data=study.data.name,
        train_images=study.train_images,
        val_images=study.val_images,
        budget=str(study.budget),
        recipe=study.config.recipe,
        seeds=study.config.seeds,
        machine=machine(choose_device(study.device)),
        command=_command(study.config),
        date=str(date.today()),
        notes=tuple(study.notes),
    )


def _command(config: CompareConfig) -> str:
    """The command that makes the study, with what was given."""
    import shlex

    default = CompareConfig(data="").to_dict()
    words = ["chiasm", "compare"]
    for name, value in config.to_dict().items():
        if name in ("out", "format") or value == default[name]:
            continue
        words.append(f"--{name.replace('_', '-')}")
        words += map(
            str, value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        )
    return shlex.join(words)


def _write(result: CompareResult) -> None:
    """All files of the study, its figures among them."""
    from chiasm.report.comparison import FIGURES, comparison_page, markdown
    from chiasm.report.html import write_text

    comparison, folder = result.comparison, result.folder
    write_text(folder / "comparison.json", json.dumps(comparison.to_dict(), indent=1, ensure_ascii=False) + "\n")
    rows = comparison.rows()
    lines = io.StringIO()
    if rows:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(folder / "runs.csv", lines.getvalue())
    if comparison.measured:
        for name, (draw, _) in FIGURES.items():
            draw(comparison).savefig(folder / f"{name}.svg", metadata={"Date": None})
        write_text(folder / "comparison.md", markdown(comparison))
    comparison_page(comparison).write(result.report)
