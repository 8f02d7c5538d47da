"""The contact sheet: some images of every class side by side, so that a person sees what the labels mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from chiasm.data.source import ImageData, Split
from chiasm.errors import DataError, ImageError

_SIDE, _GAP, _LEFT, _TOP, _MARGIN = 104, 6, 210, 76, 20
_ACROSS, _ROWS = 9, 60
_INK, _FAINT, _RULE = "#1c2733", "#6b7785", "#e4e8ec"


def write_sheet(data: ImageData, path: str | Path, *, seed: int = 0) -> Path:
    """Write a PNG with a row of up to nine images per class, drawn with `seed`; at most 60 classes.

    Images of train come first, those of the other splits fill up; unreadable ones are passed over.

    Raises:
        DataError: when the file cannot be written.
    """
    classes = data.classes[:_ROWS]
    across = min(
        _ACROSS, max(sum(split.labels.count(i) for split in data.splits.values()) for i in range(len(classes)))
    )
    width = _MARGIN * 2 + _LEFT + max(across, 4) * (_SIDE + _GAP)
    sheet = Image.new("RGB", (width, _MARGIN + _TOP + len(classes) * (_SIDE + 2 * _GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), data.name, fill=_INK, font=_font(24))
    total = "   ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    more = f"   the first {_ROWS} of {len(data.classes)} classes" if len(data.classes) > _ROWS else ""
    pen.text((_MARGIN, _MARGIN + 34), f"{len(data.classes)} classes   {total}{more}", fill=_FAINT, font=_font(14))
    for row, name in enumerate(classes):
        top = _MARGIN + _TOP + row * (_SIDE + 2 * _GAP)
        pen.line((_MARGIN, top - _GAP, width - _MARGIN, top - _GAP), fill=_RULE)
        counts = [(split_name, split.labels.count(row)) for split_name, split in data.splits.items()]
        lines = _wrap(name, _LEFT - 16)
        for i, line in enumerate(lines):
            pen.text((_MARGIN, top + 2 + 20 * i), line, fill=_INK, font=_font(16))
        text = "   ".join(f"{split_name} {count:,}" for split_name, count in counts)
        pen.text((_MARGIN, top + 6 + 20 * len(lines)), text, fill=_FAINT, font=_font(12))
        for column, thumbnail in enumerate(_thumbnails(data, row, across, seed)):
            sheet.paste(thumbnail, (_MARGIN + _LEFT + column * (_SIDE + _GAP), top))
    return save_sheet(sheet, path)


def save_sheet(sheet: Image.Image, path: str | Path) -> Path:
    """Write the picture as PNG.

    Raises:
        DataError: when the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except OSError as error:
        raise DataError(
            f"{path}: the contact sheet cannot be written ({error.strerror or error}); give --sheet."
        ) from error
    return path


def _thumbnails(data: ImageData, label: int, count: int, seed: int) -> list[Image.Image]:
    found: list[Image.Image] = []
    for split in data.splits.values():
        members = np.flatnonzero(np.asarray(split.labels) == label)
        for index in np.random.default_rng([seed % 2**32, label]).permutation(members).tolist():
            if len(found) == count:
                return found
            if (thumbnail := _thumbnail(split, index)) is not None:
                found.append(thumbnail)
    return found


def _thumbnail(split: Split, index: int) -> Image.Image | None:
    """The middle of the image, square; small images are enlarged without blurring; None when unreadable."""
    try:
        image = Image.fromarray(split.read(index).permute(1, 2, 0).numpy())
    except ImageError:
        return None
    small = min(image.size) * 2 <= _SIDE
    return ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def _wrap(name: str, width: int) -> list[str]:
    """A class's name in up to three lines that fit."""
    lines, font = [""], _font(16)
    for letter in name:
        if font.getlength(lines[-1] + letter) > width:
            lines.append("")
        lines[-1] += letter
    return lines if len(lines) <= 3 else [*lines[:2], lines[2][:-1] + "…"]


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows more scripts than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
