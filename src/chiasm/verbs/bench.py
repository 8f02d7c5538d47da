"""chiasm bench: models side by side in one run; a table, bench.md, bench.json and bench.svg out."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import BenchConfig, default_of, height_and_width
from chiasm.errors import ChiasmError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from torch import nn

    from chiasm.report.benchmark import Benchmark, Row

    Work = Callable[[], object]

_log = logging.getLogger("chiasm.bench")

LEAST_ROUNDS, MOST_ROUNDS = 5, 300
TRIAL_ROUNDS = 3  # of each memory format, to choose the better
RATE_SECONDS = 0.5  # between two matrix products at least
FORMATS = ("contiguous", "channels_last")


def bench(**flags: Any) -> Benchmark:
    """Measure models side by side; the keyword arguments are the fields of `BenchConfig`.

    All works of one comparison (a mode and a batch) are run once in each round, in an order drawn anew, and matrices
    are multiplied in between, so that every row can be held against the others and against the machine's own limit in
    the same minutes. Each model is given the memory format that suits it better. A model that fails has a row that says
    so, and the rest goes on; Ctrl-C keeps what was measured.

    Raises:
        UnknownNameError, ModelFileError: when a model is not known; nothing is measured then.
        ChiasmError: for settings that cannot be, or files that cannot be written.
    """
    config = BenchConfig.from_flags(**flags)
    _check(config)
    import torch

    from chiasm.measure import load_average
    from chiasm.predictor import choose_device

    load = load_average()
    device = choose_device(config.device)
    if "max" in config.batch and device.type != "cuda":
        raise ChiasmError("--batch max fills a GPU and there is none here; give numbers such as --batch 1 8.")
    subjects = [_subject(ref, config) for ref in config.models]
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


# ----------------------------------------------------------------------------------------------------------- the models


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure: as it was named, what it reads, and what it costs."""

    ref: str
    shape: tuple[int, int, int]
    parameters: int
    macs: int


def _subject(ref: str, config: BenchConfig) -> Subject:
    import torch

    from chiasm.measure import count_macs, first_line

    model, shape = _build(ref, height_and_width(config.image_size))
    try:
        _, macs = count_macs(model, torch.zeros(1, *shape))
    except Exception as error:  # it will have a row that says so
        _log.debug("%s: %s", ref, first_line(error))
        macs = {"": 0}
    return Subject(ref=ref, shape=shape, parameters=sum(p.numel() for p in model.parameters()), macs=macs[""])


def _build(ref: str, size: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model of that name in evaluation mode, and the (channels, height, width) that it reads.

    Raises:
        UnknownNameError, ModelFileError: where there is none.
        ChiasmError: where it does not take images of that size.
    """
    import timm
    import torch
    from torchvision import models as vision

    from chiasm.model_file import preprocess_of, resolve_model
    from chiasm.models import create_model, set_input_size
    from chiasm.models.checkpoints import input_channels

    torch.manual_seed(0)
    library, _, name = ref.partition(":")
    if library == "torchvision":
        known = vision.list_models(module=vision)
        if name not in known:
            raise UnknownNameError("torchvision model", name, known)
        model = vision.get_model(name, weights=None).eval()
        own = (*vision.get_model_weights(name).DEFAULT.transforms().crop_size * 2,)[:2]
    elif library == "timm" and name:
        if not timm.is_model(name):
            raise UnknownNameError("timm model", name, timm.list_models())
        model = create_model(name).eval()
        own = preprocess_of(model).size
    else:
        model, info = resolve_model(ref)
        if info.task != "classify":
            raise ChiasmError(
                f"{ref} is a model for '{info.task}': bench measures classifiers and backbones; give its backbone, "
                f"{info.architecture}."
            )
        own = info.preprocess.size
    if size is not None and size != own:
        set_input_size(model, size)
    return model, (input_channels(model), *(size or own))


def work_of(
    ref: str, shape: tuple[int, int, int], mode: str, form: str, batch: int, layout: str, precision: str, device: str
) -> Work:
    """What is timed: one forward pass, or one training step, of the model built anew."""
    import torch

    from chiasm.inference import optimize
    from chiasm.measure import synchronize
    from chiasm.tasks.classify import Classify

    where = torch.device(device)
    half = precision == "bf16"
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = _build(ref, shape[1:])[0].to(where).to(memory_format=memory_format)
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(where)
    images = images.contiguous(memory_format=memory_format)
    if mode == "inference":
        if half:
            model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
        if form == "optimized":
            model = optimize(model)
        runner: Any = torch.compile(model) if form == "compiled" else model

        @torch.inference_mode()
        def infer() -> None:
            runner(images)
            synchronize(where)

        return infer

    task: Any = Classify(model.train(), ())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)  # as `chiasm train` does
    targets = torch.zeros(batch, dtype=torch.long, device=where)
    forward = torch.compile(task) if form == "compiled" else task

    def step() -> None:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=half):
            loss = task.loss(forward(images), targets)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(where)

    return step


# ------------------------------------------------------------------------------------------------------------ measuring


class _Run:
    """One run of the benchmark: the rows as they come about, the machine's speed between them, the time left."""

    def __init__(self, config: BenchConfig, subjects: Sequence[Subject], device: torch.device) -> None:
        import torch

        from chiasm.measure import MatrixProduct

        self.config, self.subjects, self.device = config, subjects, device
        self.peer = config.peer or config.models[0]
        self.rates: list[float] = []
        self.rows: list[Row] = []
        self._product = MatrixProduct(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
        self._product()  # warm

    def measure(self, load: float | None) -> Benchmark:
        from statistics import median

        from chiasm.measure import machine, noise
        from chiasm.report.benchmark import Benchmark

        modes = ("inference", "training") if self.config.train else ("inference",)
        groups = [(mode, size) for mode in modes for size in self.config.batch]
        interrupted = False
        with _progress() as self._bar:
            self._task = self._bar.add_task("measuring", total=len(groups) * (1.5 if self.config.memory else 1.0))
            try:
                for mode, size in groups:
                    self._compare(mode, size)
                if self.config.memory:
                    self._add_memory(0.5 * len(groups))
            except KeyboardInterrupt:
                interrupted = True
        if not any(row.times or row.error for row in self.rows):
            raise KeyboardInterrupt
        return Benchmark(
            rows=tuple(self._with_speedup(row) for row in self.rows),
            peer=self.peer,
            limit=median(self.rates) if self.rates else 0.0,
            rates=tuple(self.rates),
            notes=tuple(noise(self.rates, load)),
            machine=machine(self.device),
            command=_command(self.config),
            date=str(date.today()),
            interrupted=interrupted,
        )

    def _compare(self, mode: str, size: str) -> None:
        """Time all models and forms at one mode and batch."""
        batch = self._filling(mode) if size == "max" else int(size)
        if any((row.mode, row.batch) == (mode, batch) for row in self.rows):
            return
        self._tell(f"{mode}, batch {batch}: warming up")
        others = {"optimized": mode == "inference", "compiled": self.config.compile}
        forms = ["eager", *(form for form, wanted in others.items() if wanted)]
        works: dict[tuple[str, str], Work] = {}
        rows: dict[tuple[str, str], Row] = {}
        try:
            for subject in self.subjects:
                layout = "channels_last"
                for form in forms:
                    row = self._row(subject, mode, form, batch)
                    work: Work | None
                    if form == "eager":
                        work, row = self._better_format(row, subject)
                        layout = row.memory_format or layout
                    else:
                        work, row = self._prepare(replace(row, memory_format=layout), subject)
                    rows[subject.ref, form] = row
                    if work is not None:
                        works[subject.ref, form] = work
            self._rounds(works, rows, f"{mode}, batch {batch}")
        finally:
            self.rows += [row for row in rows.values() if row.times or row.error]
            works.clear()
            _free()

    def _row(self, subject: Subject, mode: str, form: str, batch: int) -> Row:
        from chiasm.measure import TRAINING_PASSES
        from chiasm.report.benchmark import Row

        passes = TRAINING_PASSES if mode == "training" else 1
        return Row(
            model=subject.ref, mode=mode, form=form, batch=batch, image_size=subject.shape[1:],
            parameters=subject.parameters, flops=2 * subject.macs * batch * passes,
        )  # fmt: skip

    def _builder(self, row: Row, subject: Subject) -> Callable[[], Work]:
        """What makes the work of a row, also in another process."""
        layout = row.memory_format or "contiguous"
        how = (row.mode, row.form, row.batch, layout, self.config.precision, str(self.device))
        return partial(work_of, row.model, subject.shape, *how)

    def _prepare(self, row: Row, subject: Subject) -> tuple[Work | None, Row]:
        """The work, warmed up, or the row with its error."""
        from chiasm.measure import WARM, first_line

        try:
            work = self._builder(row, subject)()
            for _ in range(WARM):
                work()
        except Exception as error:  # one model's failure is a row of the table, not the end of the others
            _free()
            return None, replace(row, error=first_line(error))
        return work, row

    def _better_format(self, row: Row, subject: Subject) -> tuple[Work | None, Row]:
        """The eager work in the memory format in which it is faster, by a few rounds of both."""
        from itertools import islice

        from chiasm.measure import interleaved

        prepared = {layout: self._prepare(replace(row, memory_format=layout), subject) for layout in FORMATS}
        works = {layout: work for layout, (work, _) in prepared.items() if work is not None}
        best: dict[str, float] = {}
        for found in islice(interleaved(works), TRIAL_ROUNDS):
            for layout, seconds in found.items():
                if isinstance(seconds, float):
                    best[layout] = min(seconds, best.get(layout, seconds))
        return prepared[min(best, key=best.__getitem__, default=FORMATS[0])]

    def _rounds(self, works: dict[tuple[str, str], Work], rows: dict[tuple[str, str], Row], heading: str) -> None:
        """Interleaved rounds until the time or the rounds are used up; what was timed stays when interrupted."""
        from chiasm.measure import Times, first_line, interleaved

        groups = len(self.config.batch) * (2 if self.config.train else 1)
        budget = self.config.seconds / groups
        least, most = (LEAST_ROUNDS, MOST_ROUNDS) if self.config.rounds is None else (self.config.rounds,) * 2
        seen: dict[tuple[str, str], list[float]] = {key: [] for key in works}
        start = rated = time.perf_counter()
        self.rates.append(self._product())
        at = self._bar.tasks[0].completed
        try:
            for number, found in enumerate(interleaved(works), start=1):
                for key, outcome in found.items():
                    if isinstance(outcome, Exception):
                        rows[key] = replace(rows[key], error=first_line(outcome))
                        seen.pop(key)
                    else:
                        seen[key].append(outcome)
                now = time.perf_counter()
                if now - rated > RATE_SECONDS or number == most:
                    self.rates.append(self._product())
                    rated = now
                share = max(number / most, (now - start) / budget if self.config.rounds is None else 0.0)
                self._tell(f"{heading}: round {number}", at + min(share, 1.0))
                if number >= most or (number >= least and now - start >= budget):
                    break
        finally:
            for key, seconds in seen.items():
                if seconds:
                    rows[key] = replace(rows[key], times=Times(tuple(seconds)))

    def _filling(self, mode: str) -> int:
        """The batch that fills the GPU for the model that it fills first; models that fail will say so themselves."""
        from chiasm.measure import filling_batch, first_line

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

    def _add_memory(self, share: float) -> None:
        """Measure the peak memory of each row that could be timed; compiled ones on a GPU alone, where compiling itself
        takes none."""
        import torch

        from chiasm.measure import peak_memory

        at = self._bar.tasks[0].completed
        for place, row in enumerate(self.rows):
            self._tell(f"memory of {row.model}, {row.form}, {row.mode}", at + share * place / len(self.rows))
            if row.error is None and (row.form != "compiled" or self.device.type == "cuda"):
                subject = next(subject for subject in self.subjects if subject.ref == row.model)
                builder = self._builder(row, subject)
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
