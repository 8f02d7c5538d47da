"""A CSV of images: the columns path and label and, if there are val images, split.

    path,label,split
    img/0001.jpg,cat,train
    img/0002.jpg,dog,val

Paths are relative to the CSV's folder. Comma, semicolon or tab separate, as the first line shows; UTF-8, with or
without a byte order mark. Further columns are left alone.
"""

from __future__ import annotations

import csv
from pathlib import Path

from chiasm.data.folder import FileSplit
from chiasm.data.source import SPLIT_NAMES, ImageData, as_name
from chiasm.errors import DataError, UnknownNameError, nearest

_EXPECTED = "expected the columns path,label and optionally split"


def open_table(path: Path) -> ImageData:
    """A CSV as data; see the top of this file.

    Raises:
        DataError, UnknownNameError: not UTF-8, a column missing, a row without path or label, an unknown split, no row.
            Files that do not exist are `problems` of the result.
    """
    rows = _read_rows(path)
    classes = tuple(sorted({label for _, label, _ in rows}))
    label_of = {name: label for label, name in enumerate(classes)}
    splits: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in ("train", "val", "test")}
    missing = []
    for file, label, split in rows:
        source = str(path.parent / file)
        if not Path(source).is_file():
            missing.append(source)
        splits[split][0].append(source)
        splits[split][1].append(label_of[label])
    problems = []
    if missing:
        problems.append(
            f"{path}: {len(missing)} of {len(rows)} files do not exist, the first {missing[0]}; "
            f"paths are relative to {path.parent.resolve()}."
        )
    return ImageData(
        name=as_name(path.stem),
        classes=classes,
        splits={name: FileSplit(*content) for name, content in splits.items() if content[0]},
        problems=tuple(problems),
    )


def _read_rows(path: Path) -> list[tuple[str, str, str]]:
    """(path, label, split) of every row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8; save the table as CSV in UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    lines = text.splitlines()
    if not lines:
        raise DataError(f"{path}: empty; {_EXPECTED}.")
    delimiter = max(",;\t", key=lines[0].count)
    try:
        reader = csv.DictReader(lines, delimiter=delimiter, restval="", strict=True)
        columns = _columns(path, [name.strip() for name in reader.fieldnames or []])
        reader.fieldnames = columns
        rows = []
        for row in reader:
            file, label = row["path"].strip(), row["label"].strip()
            if not file or not label:
                raise DataError(f"{path}, line {reader.line_num}: {'no label' if file else 'no path'}; expected both.")
            split = (row.get("split") or "").strip().lower() or "train"
            if split not in SPLIT_NAMES:
                raise UnknownNameError(f"split in {path}, line {reader.line_num}:", split, SPLIT_NAMES)
            rows.append((file, label, SPLIT_NAMES[split]))
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV ({error}); {_EXPECTED}.") from error
    if not rows:
        raise DataError(f"{path}: a header and no rows; expected one row per image.")
    return rows


def _columns(path: Path, names: list[str]) -> list[str]:
    lowered = [name.lower() for name in names]
    for needed in ("path", "label"):
        if needed not in lowered:
            near = nearest(needed, lowered, count=1)
            hint = f"; rename '{names[lowered.index(near[0])]}'" if near else ""
            raise DataError(f"{path}: no column '{needed}'{hint}; saw {', '.join(names)[:100]}, {_EXPECTED}.")
    return lowered
