"""The contact sheet of boxes, masks and class maps: images with what is known of them drawn in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from chiasm.data.annotated import IGNORE, AnnotatedData, MapSplit, ObjectSplit
from chiasm.data.sheet import save_sheet
from chiasm.data.source import Split
from chiasm.errors import ImageError
from chiasm.results.drawing import colour_of, font_for, paint_boxes, paint_map, paint_masks, shorten

_ACROSS, _IMAGES, _SIDE, _GAP, _MARGIN = 4, 24, 320, 10, 20
_NAMED = 40  # classes in the legend


def write_annotated_sheet(data: AnnotatedData, path: str | Path, *, seed: int = 0) -> Path:
    """Write a PNG of up to 24 images drawn with `seed`, train's first; unreadable ones are passed over.

    Raises:
        DataError: when the file cannot be written.
    """
    pictures = _pictures(data, seed)
    named = data.classes[:_NAMED]
    columns = 4
    top = _MARGIN + 66 + 22 * -(-len(named) // columns)
    width = 2 * _MARGIN + _ACROSS * (_SIDE + _GAP) - _GAP
    rows = [pictures[i : i + _ACROSS] for i in range(0, len(pictures), _ACROSS)]
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * len(rows) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), data.name, fill="#1c2733", font=font_for(24, data.name))
    total = "   ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    more = f"   the first {_NAMED} of {len(data.classes)} classes" if len(data.classes) > _NAMED else ""
    pen.text((_MARGIN, _MARGIN + 34), f"{data.task}   {total}{more}", fill="#6b7785", font=font_for(14, ""))
    for label, name in enumerate(named):
        left = _MARGIN + label % columns * ((width - 2 * _MARGIN) // columns)
        y = _MARGIN + 62 + 22 * (label // columns)
        pen.rectangle((left, y, left + 14, y + 14), fill=colour_of(label))
        font = font_for(14, name)
        pen.text((left + 20, y - 1), shorten(name, font, width // columns - 40), fill="#1c2733", font=font)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(picture, (_MARGIN + column * (_SIDE + _GAP), y))
        y += height + _GAP
    return save_sheet(sheet, path)


def _pictures(data: AnnotatedData, seed: int) -> list[Image.Image]:
    found: list[Image.Image] = []
    for split in data.splits.values():
        for index in np.random.default_rng([seed % 2**32, len(split)]).permutation(len(split)).tolist():
            if len(found) == _IMAGES:
                return found
            try:
                found.append(_picture(split, index))
            except ImageError:
                continue
    return found


def _picture(split: Split, index: int) -> Image.Image:
    """One image, `_SIDE` wide and at most twice as high, with its annotation."""
    if isinstance(split, MapSplit):
        image, classes = split.sample(index)
        return draw_map(_shrink(image), classes.numpy())
    image = split.read(index)
    picture = _shrink(image)
    if not isinstance(split, ObjectSplit):
        return picture
    objects = split.objects(index)
    colours = [colour_of(label) for label in objects.labels.tolist()]
    if objects.outlines:
        masks = (Image.fromarray(mask.numpy()).resize(picture.size) for mask in objects.masks())
        picture = paint_masks(picture, (np.asarray(mask) for mask in masks), colours)
    scale = torch.tensor([picture.width / objects.width, picture.height / objects.height] * 2)
    return paint_boxes(picture, (objects.boxes * scale).numpy(), colours)


def draw_map(picture: Image.Image, classes: np.ndarray) -> Image.Image:
    """A copy of the image, whatever its size now, with the class map (H, W) uint8 on it; `IGNORE` stays grey."""
    small = Image.fromarray(classes).resize(picture.size, Image.Resampling.NEAREST)
    return paint_map(picture, np.asarray(small), IGNORE)


def _shrink(image: torch.Tensor) -> Image.Image:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    factor = min(_SIDE / picture.width, 2 * _SIDE / picture.height)
    return picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.BILINEAR)
