"""`chiasm data`: look at every image before training, and say what must be mended."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chiasm.config import DataConfig

if TYPE_CHECKING:
    from rich.console import Console

    from chiasm.data.check import DataReport
    from chiasm.data.check_annotated import AnnotatedReport

_LISTED = 10  # files named per kind of finding; JSON has them all


def check_data(**flags: Any) -> DataReport:
    """Check a data set: counts, sizes, unreadable files, duplicates, classes missing somewhere; with a contact sheet.

    Args:
        flags: the fields of `DataConfig`; `data` is needed.

    Returns:
        what was found; `report.ok` says whether training can start.

    Raises:
        DataError: when there is no such data, or the contact sheet cannot be written.
    """
    from chiasm.data import open_data
    from chiasm.data.annotated import AnnotatedData
    from chiasm.data.check import inspect_data
    from chiasm.data.check_annotated import inspect_annotated
    from chiasm.data.sheet import write_sheet
    from chiasm.data.sheet_annotated import write_annotated_sheet

    config = DataConfig.from_flags(**flags)
    data = open_data(
        config.data,
        task=None if config.task == "auto" else config.task,
        val_fraction=config.val_fraction,
        seed=config.seed,
        ignore_index=config.ignore_index,
        strict=False,
    )
    report: DataReport
    if isinstance(data, AnnotatedData):
        report = inspect_annotated(data, workers=config.workers)
    else:
        report = inspect_data(data, workers=config.workers)
    if config.sheet is None or config.sheet in ("", "none"):
        return report
    if isinstance(data, AnnotatedData):
        sheet = write_annotated_sheet(data, config.sheet, seed=config.seed)
    else:
        sheet = write_sheet(data, config.sheet, seed=config.seed)
    return replace(report, sheet=str(sheet))


def show(result: DataReport, config: DataConfig) -> int:
    """Print the report; returns the exit code, 1 when something must be mended before training."""
    if config.format == "json":
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        from rich.console import Console

        _print(result, Console(highlight=False, soft_wrap=True))
    return 0 if result.ok else 1


def _print(result: DataReport, console: Console) -> None:
    from rich.text import Text

    from chiasm.data.check_annotated import AnnotatedReport

    console.print(Text(result.name, style="bold"))
    if isinstance(result, AnnotatedReport):
        _print_annotations(result, console)
    else:
        _print_counts(result, console)
    if result.sizes:
        sizes = (result.sizes.smallest, result.sizes.median, result.sizes.largest)
        told = ["{} x {}".format(*size) for size in sizes]
        console.print(f"\nsizes    {told[0]} smallest, {told[1]} median, {told[2]} largest (width x height)")
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.kinds.items())
    console.print(f"kinds    {kinds or 'none'}")
    if isinstance(result, AnnotatedReport):
        found: dict[str, list[str]] = {}
        for finding in result.findings:
            found.setdefault(f"{finding.kind}: {finding.done}", []).append(f"{finding.source}: {finding.what}")
        for title, lines in found.items():
            _list(console, title, lines)
    _list(console, "unreadable", [f"{source}: {reason}" for source, reason in result.broken.items()])
    _list(console, "the same image in several splits", [" = ".join(group) for group in result.across])
    _list(console, "the same image with different labels", [" = ".join(group) for group in result.conflicts])
    _list(console, "the same image more than once in a class", [" = ".join(group) for group in result.within])
    for title, lines, style in (("worth knowing", result.notes, ""), ("to mend", result.problems, "red")):
        if lines:
            console.print(Text(f"\n{title}", style=f"bold {style}"))
            for line in lines:
                console.print(Text(f"  {line}"))
    if result.sheet:
        console.print(Text(f"\npicture  {result.sheet}"))
    console.print("ready to train" if result.ok else "not ready: see 'to mend'", style="bold")


def _print_counts(result: DataReport, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    classes = list(next(iter(result.counts.values())))
    table.add_column("class", footer=f"{len(classes)} classes")
    for split, counts in result.counts.items():
        table.add_column(split, justify="right", footer=f"{sum(counts.values()):,}")
    for name in classes:
        table.add_row(Text(name), *(f"{counts[name]:,}" for counts in result.counts.values()))
    console.print(table)


def _print_annotations(result: AnnotatedReport, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    maps = result.task == "segment"
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column("class", footer=f"{len(next(iter(result.counts.values())))} classes")
    for split, count in result.images.items():
        total = sum(result.amounts[split].values())
        table.add_column(f"{split} {'pixels' if maps else 'objects'}", justify="right", footer=f"{total:,}")
        table.add_column("in images", justify="right", footer=f"{count:,}")
    for name in next(iter(result.counts.values())):
        cells = []
        for split in result.images:
            amount = result.amounts[split][name]
            total = sum(result.amounts[split].values())
            cells += [f"{amount / max(total, 1):.1%}" if maps else f"{amount:,}", f"{result.counts[split][name]:,}"]
        table.add_row(Text(name), *cells)
    console.print(table)
    for split in result.images:
        boxes = ", ".join(f"{count:,} {size}" for size, count in result.boxes[split].items())
        told = [f"{boxes} (below 32 x 32 pixels, below 96 x 96, larger)"] if boxes else []
        told += [f"{result.crowds[split]:,} crowds"] if result.crowds[split] else []
        told += [f"{result.empty[split]:,} images without {'a class' if maps else 'objects'}"]
        told += [f"{result.ignored[split]:,} pixels ignored"] if maps else []
        console.print(Text(f"{split:<8} {'; '.join(told)}"))


def _list(console: Console, title: str, lines: list[str]) -> None:
    from rich.text import Text

    if not lines:
        return
    console.print(Text(f"\n{title} ({len(lines)})", style="bold"))
    for line in lines[:_LISTED]:
        console.print(Text(f"  {line}"))
    if len(lines) > _LISTED:
        console.print(f"  ... and {len(lines) - _LISTED} more; --format json lists all")
