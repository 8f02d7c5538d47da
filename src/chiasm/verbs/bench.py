"""chiasm bench: models side by side in one run; a table, bench.md, bench.json and bench.svg out."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import BenchConfig, default_of, height_and_width
from chiasm.errors import ChiasmError, UnknownNameError, first_line

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from chiasm.report.benchmark import Benchmark, Row
    from chiasm.works import Subject

    Work = Callable[[], float]  # runs once and gives its seconds
    Key = tuple[str, str]  # a model and its form

_log = logging.getLogger("chiasm.bench")

LEAST_ROUNDS, MOST_ROUNDS = 5, 300
TRIAL_ROUNDS = 5  # of each memory format, to choose the better
RATE_SECONDS = 0.5  # between two matrix products at least
FORMATS = ("channels_last", "contiguous")
MEMORY_SHARE = 1.0  # of the progress, where a comparison is 1


def bench(**flags: Any) -> Benchmark:
    """Measure models side by side; the keyword arguments are the fields of `BenchConfig`.

    All works of one comparison (a mode and a batch) are run once in each round, in an order drawn anew, and matrices
    are multiplied in between, so that every row can be held against the others and against the machine's own limit in
    the same minutes. On a CPU each has a process of its own, as in use (see `chiasm.apart`). Each model is given the
    memory format that suits it better. A model that fails has a row that says so, and the rest goes on; Ctrl-C keeps
    what was measured. A script that calls this needs `if __name__ == "__main__":`, as processes are started.

    Raises:
        UnknownNameError, ModelFileError: when a model is not known; nothing is measured then.
        ChiasmError: for settings that cannot be, or files that cannot be written.
    """
    config = BenchConfig.from_flags(**flags)
    _check(config)
    import torch

    from chiasm.measure import load_average
    from chiasm.predictor import choose_device
    from chiasm.works import subject_of

    load = load_average()
    device = choose_device(config.device)
    if "max" in config.batch and device.type != "cuda":
        raise ChiasmError("--batch max fills a GPU and there is none here; give numbers such as --batch 1 8.")
    subjects = [subject_of(ref, height_and_width(config.image_size)) for ref in config.models]
    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        result = _Run(config, subjects, device).measure(load)
    finally:
        torch.set_num_threads(threads)
    if config.out is not None:
        _write(result, Path(config.out))
    return result


def show(result: Benchmark, config: BenchConfig) -> int:
    """Print the table; returns the exit code: 1 where a model failed, 130 after Ctrl-C."""
    if config.format == "json":
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        _print_tables(result, config)
    if result.interrupted:
        return 130
    return 1 if any(row.error for row in result.rows) else 0


def _check(config: BenchConfig) -> None:
    if not config.models:
        raise ChiasmError("which models? Give names such as swin_tiny_window7_224 timm:swin_tiny_patch4_window7_224.")
    if len(set(config.models)) < len(config.models):
        raise ChiasmError(f"a model is named twice: {', '.join(config.models)}.")
    if config.peer is not None and config.peer not in config.models:
        raise UnknownNameError("peer", config.peer, config.models, "It is one of the models.")
    if not config.batch or any(size != "max" and not (size.isdecimal() and int(size) > 0) for size in config.batch):
        raise ChiasmError(f"--batch {' '.join(config.batch)}: expected whole numbers such as 1 8, or 'max'.")
    if not 0 <= config.drop_path < 1:
        raise ChiasmError(f"drop_path is {config.drop_path:g}: expected a rate from 0 up, below 1.")
    for name in ("seconds", "rounds", "threads"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ChiasmError(f"{name} is {value}: expected more than 0.")
    height_and_width(config.image_size)


def _print_tables(result: Benchmark, config: BenchConfig) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from chiasm.report.benchmark import HEADERS, cells

    # A file or pipe has no width: as wide as the longest row.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for heading, rows in result.groups():
        table = Table(box=None, pad_edge=False, header_style="bold", title=heading, title_justify="left")
        for header in HEADERS:
            left = header in HEADERS[:2]
            table.add_column(header, justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in rows:
            table.add_row(*map(Text, cells(row, result.limit)))
        console.print(table)
        console.print()
    for line in result.lines():
        console.print(Text(line))
    if config.out is not None:
        console.print(Text(f"table {Path(config.out) / 'bench.md'}, numbers bench.json, figure bench.svg"))


def _write(result: Benchmark, out: Path) -> None:
    from chiasm.report.benchmark import figure, markdown
    from chiasm.report.html import write_text

    write_text(out / "bench.json", json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(out / "bench.md", markdown(result))
    figure(result).savefig(out / "bench.svg", metadata={"Date": None})


def _command(config: BenchConfig) -> str:
    """The command that does this again: what differs from the defaults."""
    words = ["chiasm", "bench", *config.models]
    for item in fields(config):
        value, name = getattr(config, item.name), item.name.replace("_", "-")
        if item.metadata.get("positional") or value == default_of(item) or item.name in ("out", "format"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


# ------------------------------------------------------------------------------------------------------------ measuring


class _Run:
    """One run of the benchmark: the rows as they come about, the machine's speed between them, the time left."""

    def __init__(self, config: BenchConfig, subjects: Sequence[Subject], device: torch.device) -> None:
        import torch

        from chiasm.measure import MatrixProduct

        self.config, self.subjects, self.device = config, subjects, device
        self.peer = config.peer or config.models[0]
        self.apart, self.where = self._place()
        self.rates: list[float] = []
        self.rows: list[Row] = []
        self._product = MatrixProduct(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        self._product()  # warm

    def _place(self) -> tuple[bool, str]:
        """Whether each work has a process of its own, and that in words."""
        from chiasm.apart import Apart
        from chiasm.works import find

        if self.device.type != "cpu":
            return False, ""
        if not self.config.apart:
            return False, "All in one process (--no-apart), where they share what its memory allocator holds."
        try:
            Apart(partial(find, self.config.models), threads=1).close()
        except (ChiasmError, OSError, AssertionError) as error:  # the last two where no process can be started
            return False, (
                "All in one process, where they share what its memory allocator holds; one of its own says: "
                f"{first_line(error)}"
            )
        return True, "Each in a process of its own, taking turns."

    def measure(self, load: float | None) -> Benchmark:
        from statistics import median

        from chiasm.measure import machine, noise
        from chiasm.report.benchmark import Benchmark

        modes = ("inference", "training") if self.config.train else ("inference",)
        groups = [(mode, size) for mode in modes for size in self.config.batch]
        interrupted = False
        with _progress() as self._bar:
            self._task = self._bar.add_task("measuring", total=len(groups) + MEMORY_SHARE * self.config.memory)
            try:
                for number, (mode, size) in enumerate(groups):
                    self._compare(mode, size, number)
                if self.config.memory:
                    self._add_memory(len(groups))
            except KeyboardInterrupt:
                interrupted = True
        if not any(row.times or row.error for row in self.rows):
            raise KeyboardInterrupt
        return Benchmark(
            rows=tuple(self._with_speedup(row) for row in self.rows),
            peer=self.peer,
            where=self.where,
            limit=median(self.rates) if self.rates else 0.0,
            rates=tuple(self.rates),
            notes=tuple(noise(self.rates, load)),
            machine=machine(self.device),
            command=_command(self.config),
            date=str(date.today()),
            interrupted=interrupted,
        )

    def _compare(self, mode: str, size: str, number: int) -> None:
        """Time all models and forms at one mode and batch."""
        batch = self._filling(mode) if size == "max" else int(size)
        if any((row.mode, row.batch) == (mode, batch) for row in self.rows):
            return
        heading = f"{mode}, batch {batch}"
        self._tell(f"{heading}: warming up", number)
        works: dict[Key, Work] = {}
        rows: dict[Key, Row] = {}
        try:
            for subject in self.subjects:
                layout = ""
                for form in self._forms(mode):
                    row = self._row(subject, mode, form, batch)
                    work: Work | None
                    if form == "eager":
                        work, row = self._better_format(row, subject)
                        layout = row.memory_format or ""
                    else:
                        work, row = self._prepare(replace(row, memory_format=layout), subject)
                    rows[subject.ref, form] = row
                    if work is not None:
                        works[subject.ref, form] = work
            self._rounds(works, rows, heading, number)
        finally:
            self.rows += [row for row in rows.values() if row.times or row.error]
            for work in works.values():
                _end(work)
            works.clear()
            _free()

    def _forms(self, mode: str) -> list[str]:
        from chiasm.data.machine import can_keep_freed_memory

        others = {
            "kept": self.apart and can_keep_freed_memory(),
            "optimized": mode == "inference",
            "compiled": self.config.compile,
        }
        return ["eager", *(form for form, wanted in others.items() if wanted)]

    def _row(self, subject: Subject, mode: str, form: str, batch: int) -> Row:
        from chiasm.measure import TRAINING_PASSES
        from chiasm.report.benchmark import Row

        passes = TRAINING_PASSES if mode == "training" else 1
        return Row(
            model=subject.ref, mode=mode, form=form, batch=batch, image_size=subject.shape[1:],
            parameters=subject.parameters, flops=2 * subject.macs * batch * passes,
        )  # fmt: skip

    def _builder(self, row: Row, subject: Subject) -> Callable[[], Callable[[], object]]:
        """What makes the work of a row, also in another process."""
        from chiasm.works import work_of

        layout = row.memory_format or "contiguous"
        config = self.config
        how = (row.mode, row.form, row.batch, layout, config.precision, str(self.device), config.drop_path)
        return partial(work_of, row.model, subject.shape, *how)

    def _spare(self, row: Row) -> int | None:
        """How much freed memory the process keeps: as chiasm's commands do, or None for as it comes."""
        from chiasm.data.machine import ALL, SPARE

        if row.form not in ("kept", "optimized"):
            return None
        return ALL if row.mode == "training" else SPARE

    def _prepare(self, row: Row, subject: Subject) -> tuple[Work | None, Row]:
        """The work, warmed up, or the row with its error."""
        import torch

        from chiasm.apart import WARM, Apart
        from chiasm.measure import timed

        build = self._builder(row, subject)
        try:
            if self.apart:
                return Apart(build, threads=torch.get_num_threads(), spare=self._spare(row)), row
            work = build()
            for _ in range(WARM):
                work()
        except Exception as error:  # one model's failure is a row of the table, not the end of the others
            _free()
            return None, replace(row, error=first_line(error))
        return timed(work), row

    def _better_format(self, row: Row, subject: Subject) -> tuple[Work | None, Row]:
        """The eager work in the memory format in which it is faster, by a few rounds of both."""
        from itertools import islice

        from chiasm.measure import Times, interleaved

        prepared = {layout: self._prepare(replace(row, memory_format=layout), subject) for layout in FORMATS}
        works = {layout: work for layout, (work, _) in prepared.items() if work is not None}
        seen: dict[str, list[float]] = {}
        try:
            for found in islice(interleaved(works), TRIAL_ROUNDS):
                for layout, seconds in found.items():
                    if isinstance(seconds, float):
                        seen.setdefault(layout, []).append(seconds)
        finally:
            chosen = min(seen, key=lambda layout: Times(tuple(seen[layout])).median, default=FORMATS[0])
            for layout, work in works.items():
                if layout != chosen:
                    _end(work)
        return prepared[chosen]

    def _rounds(self, works: dict[Key, Work], rows: dict[Key, Row], heading: str, done: int) -> None:
        """Interleaved rounds until the time or the rounds are used up; what was timed stays when interrupted."""
        from chiasm.measure import Times, interleaved

        groups = len(self.config.batch) * (2 if self.config.train else 1)
        budget = self.config.seconds / groups
        least, most = (LEAST_ROUNDS, MOST_ROUNDS) if self.config.rounds is None else (self.config.rounds,) * 2
        start = rated = time.perf_counter()
        self.rates.append(self._product())
        for number, found in enumerate(interleaved(works), start=1):
            for key, outcome in found.items():
                if isinstance(outcome, Exception):
                    rows[key] = replace(rows[key], error=first_line(outcome), times=None)
                    _end(works.pop(key))
                else:
                    before = rows[key].times
                    rows[key] = replace(rows[key], times=Times((*(before.seconds if before else ()), outcome)))
            now = time.perf_counter()
            if now - rated > RATE_SECONDS or number == most:
                self.rates.append(self._product())
                rated = now
            share = max(number / most, (now - start) / budget if self.config.rounds is None else 0.0)
            self._tell(f"{heading}: round {number}", done + min(share, 1.0))
            if number >= most or (number >= least and now - start >= budget):
                break

    def _filling(self, mode: str) -> int:
        """The batch that fills the GPU for the model that it fills first; models that fail will say so themselves."""
        from chiasm.measure import filling_batch

        self._tell(f"{mode}: looking for the batch that fills the GPU")

        def speed(subject: Subject, batch: int) -> float:
            _free()
            row = replace(self._row(subject, mode, "eager", batch), memory_format="channels_last")
            work = self._builder(row, subject)()
            work()
            start = time.perf_counter()
            work()
            return batch / (time.perf_counter() - start)

        found = []
        for subject in self.subjects:
            try:
                found.append(filling_batch(partial(speed, subject)))
            except Exception as error:
                _log.debug("%s: %s", subject.ref, first_line(error))
        return min(found, default=1)

    def _add_memory(self, done: int) -> None:
        """The peak memory of each row that could be timed. It is what is in use, so kept is as eager; compiling
        takes memory itself: compiled ones are measured on a GPU alone."""
        import torch

        from chiasm.measure import peak_memory

        subjects = {subject.ref: subject for subject in self.subjects}
        for place, row in enumerate(self.rows):
            self._tell(f"memory of {row.model}, {row.form}, {row.mode}", done + MEMORY_SHARE * place / len(self.rows))
            unmeasured = ("kept",) if self.device.type == "cuda" else ("kept", "compiled")
            if row.error is not None or row.form in unmeasured:
                continue
            builder = self._builder(row, subjects[row.model])
            try:
                memory = peak_memory(builder, self.device, threads=torch.get_num_threads())
            except ChiasmError as error:
                _log.warning("%s, %s, %s: peak memory not measured: %s", row.model, row.form, row.mode, error)
            else:
                self.rows[place] = replace(row, memory=memory)

    def _with_speedup(self, row: Row) -> Row:
        from chiasm.measure import ratio

        same = (row.mode, row.batch)
        peers = (r for r in self.rows if (r.model, r.form) == (self.peer, "eager") and (r.mode, r.batch) == same)
        peer = next(peers, None)
        if peer is None or peer.times is None or row.times is None:
            return row
        return replace(row, speedup=ratio(peer.times, row.times))

    def _tell(self, what: str, completed: float | None = None) -> None:
        self._bar.update(self._task, description=what, completed=completed)


def _end(work: Work) -> None:
    """End the process of a work that has one."""
    from chiasm.apart import Apart

    if isinstance(work, Apart):
        work.close()


def _free() -> None:
    """Give back the memory of models that are gone."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar with the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield progress
