"""chiasm predict: images in; a table, JSONL or CSV out, row by row."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from chiasm.config import PredictConfig
from chiasm.errors import ChiasmError, DataError, ImageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from chiasm.model_file import ModelInfo
    from chiasm.predictor import Predictor
    from chiasm.results import Classification

_log = logging.getLogger("chiasm.predict")

TABLE_ROWS = 500  # a table is laid out as a whole: a longer one is printed in pieces of this many rows
FORMATS = {".csv": "csv", ".jsonl": "jsonl"}


class Predictions:
    """The results, one by one in the order of the images; iterate once.

    Attributes:
        info: the model's description.
        seen: images looked at so far, unreadable ones among them.
        failed: how many of them could not be read; each was named in a warning and left out.
        total: how many images there are, where that is known.
        out: the file that holds the results, when one was asked for; there is nothing left to iterate then.
    """

    def __init__(self, predictor: Predictor, config: PredictConfig) -> None:
        self.info: ModelInfo = predictor.info
        self.seen = 0
        self.failed = 0
        self.total: int | None = None
        self.out: Path | None = None
        self._results = self._run(predictor, config)

    def __iter__(self) -> Iterator[Classification]:
        return self._results

    def __next__(self) -> Classification:
        return next(self._results)

    def _run(self, predictor: Predictor, config: PredictConfig) -> Iterator[Classification]:
        paths = _paths(config.images)
        gallery = _Gallery(config.draw, config.top) if config.draw else None
        for outcome in predictor.stream(paths, batch_size=config.batch_size, workers=config.workers):
            self.seen += 1
            if isinstance(outcome, ImageError):
                self.failed += 1
                _log.warning("%s", outcome)
                continue
            if gallery:
                gallery.add(outcome)
            yield outcome
        if not self.seen:
            raise DataError(f"{', '.join(config.images)}: no image named here; give files, folders or globs.")


def predict(**flags: Any) -> Predictions:
    """Classify images; the keyword arguments are the fields of `PredictConfig`.

    Returns:
        the results, computed while you iterate. With `out` they have been written to that file on return.

    Raises:
        ModelFileError, UnknownNameError: when `model` names none.
        DataError: for a folder or glob without images, or no image at all.
        ChiasmError: for settings that cannot be, or a file that cannot be written.
    """
    config = PredictConfig.from_flags(**flags)
    _check(config)
    from chiasm.predictor import load

    predictor = load(config.model, device=config.device, image_size=config.image_size, branches=config.branches)
    if not predictor.info.trained:
        _log.warning("%s has random weights: what follows is chance, not knowledge.", config.model)
    results = Predictions(predictor, config)
    if config.out is not None:
        _to_file(results, config, Path(config.out))
    return results


def show(results: Predictions, config: PredictConfig) -> int:
    """Print the results, or where they are; returns the exit code, 1 when images could not be read."""
    if results.out is None:
        _write(results, sys.stdout, config, config.format)
    else:
        print(f"{results.seen - results.failed} predictions in {results.out}", file=sys.stderr)
    if results.failed:
        print(f"{results.failed} of {results.seen} images could not be read", file=sys.stderr)
    return 1 if results.failed else 0


def _check(config: PredictConfig) -> None:
    if not config.images:
        raise ChiasmError("which images? Give files, folders or globs, or - to read paths from stdin.")
    if config.top < 1:
        raise ChiasmError(f"top is {config.top}: expected 1 or more.")
    if config.out is not None and Path(config.out).is_dir():
        raise ChiasmError(f"{config.out}: a folder; expected a file's name such as {config.out}/predictions.csv.")


def _paths(patterns: list[str]) -> Iterator[str]:
    """The images' paths, lazily; '-' stands for those on stdin, one a line."""
    from chiasm.data.images import find_images

    for pattern in patterns:
        if pattern != "-":
            yield from find_images([pattern])
            continue
        for line in sys.stdin:
            path = line.rstrip("\r\n")
            if os.path.isdir(path):
                yield from find_images([path])
            elif path:
                yield path


def _to_file(results: Predictions, config: PredictConfig, out: Path) -> None:
    """Write beside `out` and rename at the end: a file of that name is always complete."""
    part = out.with_name(f"{out.name}.part")
    format = FORMATS.get(out.suffix.lower(), config.format) if config.format == "table" else config.format
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8", newline="") as file:
            _write(results, file, config, format)
        part.replace(out)
    except OSError as error:
        raise ChiasmError(f"{out}: cannot be written ({error.strerror}); what there is lies in {part}.") from error
    except BaseException:
        if part.exists() and not part.stat().st_size:
            part.unlink()
        elif part.exists():
            _log.warning("stopped after %d images; their results are in %s", results.seen, part)
        raise
    results.out = out


def _write(results: Predictions, file: TextIO, config: PredictConfig, format: str) -> None:
    with _progress(results, config, file) as bar:
        if format == "jsonl":
            for result in results:
                file.write(json.dumps(result.to_dict(config.top), ensure_ascii=False) + "\n")
                bar.advance()
        elif format == "csv":
            _write_csv(results, file, config.top, bar)
        else:
            _write_tables(results, file, config.top, bar)


def _write_csv(results: Iterable[Classification], file: TextIO, top: int, bar: _Bar) -> None:
    """source,label,probability,agreement, then per branch its vote and probability, then the 2nd to `top`-th class."""
    writer = csv.writer(file, lineterminator="\n")
    for row, result in enumerate(results):
        ranked = result.top(top)
        if row == 0:
            columns = ["source", "label", "probability", "agreement"]
            columns += [column for name in result.branches for column in (f"{name}_label", f"{name}_probability")]
            columns += [c for rank in range(2, len(ranked) + 1) for c in (f"label_{rank}", f"probability_{rank}")]
            writer.writerow(columns)
        agreement = "" if result.agreement is None else str(result.agreement).lower()
        votes = [(vote, f"{result.branches[name].max():.6f}") for name, vote in result.votes.items()]
        others = [(label, f"{score:.6f}") for label, score in ranked[1:]]
        writer.writerow([result.source, result.label, f"{result.score:.6f}", agreement, *chain(*votes, *others)])
        bar.advance()


def _write_tables(results: Iterator[Classification], file: TextIO, top: int, bar: _Bar) -> None:
    rows: list[Classification] = []
    for result in results:
        rows.append(result)
        bar.advance()
        if len(rows) == TABLE_ROWS:
            bar.hide()
            file.write(_table(rows, top, file))
            rows.clear()
    bar.hide()
    if rows:
        file.write(_table(rows, top, file))


def _table(results: list[Classification], top: int, file: TextIO) -> str:
    """As text: written as a whole, so that a reader who has gone is noticed here and not inside rich."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(results[0].branches)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("image", overflow="fold")
    table.add_column("class", style="bold", overflow="fold")
    table.add_column("probability", justify="right")
    for name in names:
        table.add_column(f"{name} branch", overflow="fold")
    if names:
        table.add_column("agree")
    if top > 1:
        table.add_column("next", style="dim", overflow="fold")
    for result in results:
        cells: list[str | Text] = [Text(result.source), Text(result.label), f"{result.score:.1%}"]
        cells += [Text(f"{vote} {result.branches[name].max():.0%}") for name, vote in result.votes.items()]
        if names:
            cells.append("yes" if result.agreement else Text("no", style="yellow"))
        if top > 1:
            cells.append(Text(", ".join(f"{label} {score:.0%}" for label, score in result.top(top)[1:])))
        table.add_row(*cells)
    terminal = file.isatty()
    text = io.StringIO()
    # A file or pipe has no width: as wide as the longest row.
    console = Console(file=text, force_terminal=terminal, width=None if terminal else 10_000, highlight=False)
    console.print(table)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


class _Gallery:
    """Writes each image with its result drawn on it to a folder: NAME.predicted.jpg, numbered where names repeat."""

    def __init__(self, folder: str, top: int) -> None:
        self.folder = Path(folder)
        self.top = top
        self._used: dict[str, int] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ChiasmError(f"{folder}: cannot be made a folder for pictures ({error.strerror}).") from error

    def add(self, result: Classification) -> None:
        from PIL import Image

        from chiasm.data.images import read_image

        stem = Path(result.source).stem
        self._used[stem] = number = self._used.get(stem, 0) + 1
        path = self.folder / (f"{stem}.predicted.jpg" if number == 1 else f"{stem}-{number}.predicted.jpg")
        image = Image.fromarray(read_image(result.source).permute(1, 2, 0).numpy())
        try:
            result.draw(image, self.top).save(path, quality=90)
        except OSError as error:
            raise ChiasmError(f"{path}: cannot be written ({error.strerror or error}).") from error


class _Bar:
    """Progress on stderr, or nothing."""

    def __init__(self, results: Predictions, progress: Progress | None) -> None:
        self._results = results
        self._progress = progress
        self._task = progress.add_task("images", total=results.total) if progress else None

    def advance(self) -> None:
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=self._results.seen)

    def hide(self) -> None:
        """Before something else is printed on the same terminal."""
        if self._progress:
            self._progress.stop()
            self._progress = None


@contextmanager
def _progress(results: Predictions, config: PredictConfig, file: TextIO) -> Iterator[_Bar]:
    """A bar with the time left where the number of images is known, else a spinner; on a terminal only, and not where
    the rows themselves appear on it."""
    rows_on_terminal = file.isatty() and config.format != "table"
    if not sys.stderr.isatty() or rows_on_terminal:
        yield _Bar(results, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    if "-" not in config.images:
        results.total = sum(1 for _ in _paths(config.images))
    known = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    unknown = (SpinnerColumn(), TextColumn("{task.completed} images"))
    progress = Progress(
        *(known if results.total is not None else unknown),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # it would send rows that are piped elsewhere to the terminal
    )
    with progress:
        yield _Bar(results, progress)
