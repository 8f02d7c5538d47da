"""Results as rows: tables for people, CSV for spreadsheets, JSONL for programs. Each kind of result has its own.

classification   a row per image in all three
objects          a row per image in tables and JSONL, a row per object in CSV
class maps       a row per image in tables and JSONL, a row per class that occurs in CSV
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TextIO, TypeVar

from chiasm.results import Classification, Detections, Result, Segmentation

if TYPE_CHECKING:
    from rich.table import Table

R = TypeVar("R", bound=Result)

TABLE_ROWS = 500  # a table is laid out as a whole: a longer one is printed in pieces of this many rows


def write_jsonl(results: Iterable[Result], file: TextIO, top: int) -> None:
    """One JSON object a line, an image each."""
    for result in results:
        file.write(json.dumps(_rows_of(result, top).record(result), ensure_ascii=False) + "\n")


def write_csv(results: Iterable[Result], file: TextIO, top: int) -> None:
    """A line of column names, then rows; nothing where there is no result."""
    writer = csv.writer(file, lineterminator="\n")
    for number, result in enumerate(results):
        rows = _rows_of(result, top)
        if number == 0:
            writer.writerow(rows.columns(result))
        writer.writerows(rows.lines(result))


def write_tables(results: Iterable[Result], file: TextIO, top: int, before: Callable[[], None]) -> None:
    """Tables of `TABLE_ROWS` rows; `before` is called before each is written."""
    waiting: list[Result] = []
    for result in results:
        waiting.append(result)
        if len(waiting) == TABLE_ROWS:
            before()
            file.write(_text(_rows_of(waiting[0], top).table(waiting), file))
            waiting.clear()
    before()
    if waiting:
        file.write(_text(_rows_of(waiting[0], top).table(waiting), file))


class _Rows(ABC, Generic[R]):
    """How one kind of result is written.

    Args:
        top: classes listed per image, where results rank them.
    """

    def __init__(self, top: int) -> None:
        self.top = top

    def record(self, result: R) -> dict[str, Any]:
        """For JSON."""
        return result.to_dict()

    @abstractmethod
    def columns(self, first: R) -> list[str]:
        """Of the CSV, as the first result tells them."""

    @abstractmethod
    def lines(self, result: R) -> Iterator[list[str]]:
        """Of the CSV."""

    @abstractmethod
    def table(self, results: list[R]) -> Table:
        """For people."""


class _Classes(_Rows[Classification]):
    """source,label,probability,agreement, then per branch its vote and probability, then the 2nd to `top`-th class."""

    def record(self, result: Classification) -> dict[str, Any]:
        return result.to_dict(self.top)

    def columns(self, first: Classification) -> list[str]:
        columns = ["source", "label", "probability", "agreement"]
        columns += [column for name in first.branches for column in (f"{name}_label", f"{name}_probability")]
        ranks = range(2, len(first.top(self.top)) + 1)
        return columns + [column for rank in ranks for column in (f"label_{rank}", f"probability_{rank}")]

    def lines(self, result: Classification) -> Iterator[list[str]]:
        agreement = "" if result.agreement is None else str(result.agreement).lower()
        votes = [(vote, f"{result.branches[name].max():.6f}") for name, vote in result.votes.items()]
        others = [(label, f"{score:.6f}") for label, score in result.top(self.top)[1:]]
        yield [result.source, result.label, f"{result.score:.6f}", agreement, *chain(*votes, *others)]

    def table(self, results: list[Classification]) -> Table:
        from rich.text import Text

        names = list(results[0].branches)
        table = _empty_table()
        table.add_column("class", style="bold", overflow="fold")
        table.add_column("probability", justify="right")
        for name in names:
            table.add_column(f"{name} branch", overflow="fold")
        if names:
            table.add_column("agree")
        if self.top > 1:
            table.add_column("next", style="dim", overflow="fold")
        for result in results:
            cells: list[str | Text] = [Text(result.source), Text(result.label), f"{result.score:.1%}"]
            cells += [Text(f"{vote} {result.branches[name].max():.0%}") for name, vote in result.votes.items()]
            if names:
                cells.append("yes" if result.agreement else Text("no", style="yellow"))
            if self.top > 1:
                cells.append(Text(", ".join(f"{label} {score:.0%}" for label, score in result.top(self.top)[1:])))
            table.add_row(*cells)
        return table


class _Objects(_Rows[Detections]):
    """source,label,score,left,top,right,bottom, and of masks their area; all in pixels of the original image."""

    def columns(self, first: Detections) -> list[str]:
        area = [] if first.masks is None else ["area"]
        return ["source", "label", "score", "left", "top", "right", "bottom", *area]

    def lines(self, result: Detections) -> Iterator[list[str]]:
        for index, (name, box) in enumerate(zip(result.names, result.boxes.tolist(), strict=True)):
            area = [] if result.masks is None else [str(int(result.masks[index].sum()))]
            yield [result.source, name, f"{result.scores[index]:.6f}", *(f"{side:.2f}" for side in box), *area]

    def table(self, results: list[Detections]) -> Table:
        from rich.text import Text

        table = _empty_table()
        table.add_column("objects", justify="right", style="bold")
        table.add_column("of each class, and the best score", overflow="fold")
        for result in results:
            found = ", ".join(f"{count} {name} {best:.0%}" for name, count, best in result.counts())
            table.add_row(Text(result.source), str(len(result)), Text(found))
        return table


class _Shares(_Rows[Segmentation]):
    """source,label,share: the classes that occur, largest first."""

    def columns(self, first: Segmentation) -> list[str]:
        return ["source", "label", "share"]

    def lines(self, result: Segmentation) -> Iterator[list[str]]:
        for name, share in result.shares.items():
            yield [result.source, name, f"{share:.6f}"]

    def table(self, results: list[Segmentation]) -> Table:
        from rich.text import Text

        table = _empty_table()
        table.add_column("share of the image", overflow="fold")
        for result in results:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in result.shares.items())
            table.add_row(Text(result.source), Text(shares))
        return table


_KINDS: dict[type, type[_Rows[Any]]] = {Classification: _Classes, Detections: _Objects, Segmentation: _Shares}


def _rows_of(result: Result, top: int) -> _Rows[Any]:
    return _KINDS[type(result)](top)


def _empty_table() -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("image", overflow="fold")
    return table


def _text(table: Table, file: TextIO) -> str:
    """As text: written as a whole, so that a reader who has gone is noticed here and not inside rich."""
    from rich.console import Console

    terminal = file.isatty()
    text = io.StringIO()
    # A file or pipe has no width: as wide as the longest row.
    console = Console(file=text, force_terminal=terminal, width=None if terminal else 10_000, highlight=False)
    console.print(table)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())
