"""A file of class names, one a line, with the colours that stand for them in masks where there are any.

    Sky                  classes.txt, names.txt, obj.names, classes.names
    Sky 128 128 128      the same with red, green and blue
    128 128 128  Sky     label_colors.txt
    name,r,g,b           class_dict.csv; a first line that begins with 'name' is a header
    Sky:128,128,128::    labelmap.txt

An empty line is skipped.
"""

from __future__ import annotations

import re
from pathlib import Path

from chiasm.errors import DataError

FILES = (
    *("classes.txt", "names.txt", "labels.txt", "obj.names", "classes.names"),
    *("class_dict.csv", "label_colors.txt", "labelmap.txt"),
)
Colour = tuple[int, int, int]

_RGB = r"(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})"
_AFTER, _BEFORE = re.compile(rf"(.+?)[\s,:;]+{_RGB}[\s,:;]*"), re.compile(rf"{_RGB}[\s,:;]+(.+)")


def read_names(*folders: Path) -> list[str]:
    """The class names of the first file of names in `folders`; empty when there is none."""
    return [name for name, _ in read_colours(*folders)]


def read_colours(*folders: Path) -> list[tuple[str, Colour | None]]:
    """(name, colour) of each class; see the top of this file.

    Raises:
        DataError: a file that is not UTF-8, without a name, with one name twice, or a colour beyond 255.
    """
    path = next((folder / name for folder in folders for name in FILES if (folder / name).is_file()), None)
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8; expected one class name a line.") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if lines and re.match(r"name\s*[,;:\t]", lines[0], re.IGNORECASE):
        lines = lines[1:]
    classes: list[tuple[str, Colour | None]] = []
    for line in lines:
        if found := _AFTER.fullmatch(line):
            name, *rgb = found.groups()
        elif found := _BEFORE.fullmatch(line):
            *rgb, name = found.groups()
        else:
            name, rgb = line, []
        name = name.strip(" \t:,;")
        if any(int(value) > 255 for value in rgb):
            raise DataError(f"{path}: '{line}'; expected red, green and blue from 0 to 255.")
        if name in [other for other, _ in classes]:
            raise DataError(f"{path}: the class '{name}' stands there twice; keep one of them.")
        classes.append((name, (int(rgb[0]), int(rgb[1]), int(rgb[2])) if rgb else None))
    if not classes:
        raise DataError(f"{path}: empty; expected one class name a line.")
    return classes
