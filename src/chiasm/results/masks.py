"""Masks as the COCO format writes them, polygons or run lengths: read without trust, and written.

    [[x1, y1, x2, y2, x3, y3, ...], ...]      polygons, corners in pixels; a mask may have several
    {"size": [H, W], "counts": [5, 2, ...]}   run lengths down the columns: background, object, background, ...
    {"size": [H, W], "counts": "52..."}       the same, compressed to text

What pycocotools would read past its buffers for, or allocate without bound, is refused before it gets there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def check_mask(outline: Any, height: int, width: int) -> None:
    """Whether `outline` is a mask of an image of that size.

    Raises:
        ValueError: when it is not, saying in a few words why.
    """
    if isinstance(outline, dict):
        _runs(outline, height, width)
        return
    if not isinstance(outline, list) or not outline:
        raise ValueError("neither polygons nor run lengths")
    for polygon in outline:
        if not isinstance(polygon, list) or not all(_is_number(value) for value in polygon):
            raise ValueError("a polygon that is not a list of numbers")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers, expected x, y of three corners or more")


def decode_mask(outline: Any, height: int, width: int) -> np.ndarray:
    """(H, W) bool.

    Raises:
        ValueError: as `check_mask`.
    """
    from pycocotools import mask as coco

    check_mask(outline, height, width)
    if isinstance(outline, dict):
        runs = _runs(outline, height, width)
        values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.ascontiguousarray(values.reshape(width, height).T)
    return coco.decode(_rasterise(outline, height, width)).astype(bool)


def encode_outline(outline: Any, height: int, width: int) -> dict[str, Any]:
    """The mask as compressed run lengths, plain values for JSON; polygons are rasterised, runs are not decoded.

    Raises:
        ValueError: as `check_mask`.
    """
    from pycocotools import mask as coco

    check_mask(outline, height, width)
    if not isinstance(outline, dict):
        return _plain(_rasterise(outline, height, width))
    runs = _runs(outline, height, width)
    if 0 in runs[1:]:  # empty runs may be written, but overlaps of such masks would come out wrong
        return encode_mask(decode_mask(outline, height, width))
    return _plain(coco.frPyObjects({"size": [height, width], "counts": runs}, height, width))


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) bool as compressed run lengths, plain values for JSON."""
    from pycocotools import mask as coco

    return _plain(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def _plain(encoded: dict[str, Any]) -> dict[str, Any]:
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _rasterise(polygons: list[list[float]], height: int, width: int) -> dict[str, Any]:
    from pycocotools import mask as coco

    # The rasteriser's memory grows with the corners' distances, so corners far outside are drawn nearer.
    far = 4 * max(height, width)
    near = [np.clip(np.asarray(polygon, dtype=np.float64), -far, far).tolist() for polygon in polygons]
    return coco.merge(coco.frPyObjects(near, height, width))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _runs(outline: dict[str, Any], height: int, width: int) -> list[int]:
    size, counts = outline.get("size"), outline.get("counts")
    if size != [height, width]:
        raise ValueError(f"run lengths of size {str(size)[:40]}, its image has [{height}, {width}]")
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("run lengths that are not whole numbers from 0")
    if sum(runs) != height * width:
        raise ValueError(f"run lengths of {sum(runs)} pixels together, its image has {height * width}")
    return runs


def _runs_of_text(text: str) -> list[int]:
    """Numbers in base 32, lowest digit first, 32 added while more follow; from the fourth on, each is the difference
    to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        digit = ord(letter) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError("run lengths that are broken text")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (1 << shift) if digit & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("run lengths that are cut off")
    return runs
