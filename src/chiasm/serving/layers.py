"""See-through pictures to lay over an image: what was found in it, and where the network looked.

None is larger than `SIDE`, for a browser stretches it over the image; all are PNG.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from chiasm.results import DRAWN_SIDE as SIDE
from chiasm.results import Detections, Explanation, Segmentation
from chiasm.results.drawing import colour_of
from chiasm.results.explanation import BLUE, FUSED, ORANGE, visible

if TYPE_CHECKING:
    from PIL import Image


def small(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer over an image of that height and width."""
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG, made quickly rather than small."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def found_layer(result: Detections | Segmentation) -> Image.Image:
    """The class map in its colours; or masks, their edges and boxes in those of their classes, the best on top."""
    from PIL import Image, ImageDraw

    if isinstance(result, Segmentation):
        height, width = small((result.classes.shape[0], result.classes.shape[1]))
        classes = Image.fromarray(result.classes).resize((width, height), Image.Resampling.NEAREST)
        table = np.array([colour_of(label) for label in range(256)], dtype=np.uint8)
        return _painted(np.asarray(classes), table, np.full(256, 255, dtype=np.uint8))
    height, width = small(result.size)
    layer = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(layer)
    line = max(1, round(max(width, height) / 300))
    for index in np.argsort(result.scores, kind="stable").tolist():
        colour = colour_of(int(result.classes[index]))
        if result.masks is not None:
            mask = Image.fromarray(result.masks[index]).resize((width, height))
            layer.paste((*colour, 110), mask=mask)
            there = np.pad(np.asarray(mask), 1)
            inner = there[:-2, 1:-1] & there[2:, 1:-1] & there[1:-1, :-2] & there[1:-1, 2:]
            layer.paste((*colour, 255), mask=Image.fromarray(there[1:-1, 1:-1] & ~inner))
        left, top, right, bottom = (
            result.boxes[index] * np.array([width / result.size[1], height / result.size[0]] * 2)
        ).tolist()
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=(*colour, 255), width=line)
    return layer


def heat_layers(explanation: Explanation) -> Iterator[tuple[str, Image.Image]]:
    """Each branch's own map and 'fused' in colours from violet to yellow, the less there is the less of it is seen;
    with two branches 'disagreement', orange where the first looks alone and blue where the second does."""
    fitted = shrunk(explanation)
    for name in (*explanation.branches, FUSED):
        heat = visible(fitted.over_image(fitted.map_of(name)))
        yield name, _painted(np.rint(255 * heat).astype(np.uint8), *_heat_colours())
    if len(explanation.branches) > 1:
        difference = fitted.disagreement()
        strength = np.rint(127 * difference).astype(np.int16) + 128
        sides = np.arange(256)
        colours = np.where(sides[:, None] > 128, np.array(ORANGE), np.array(BLUE)).astype(np.uint8)
        alpha = np.rint(217 * (np.abs(sides - 128) / 128) ** 0.7).astype(np.uint8)
        yield "disagreement", _painted(strength.clip(0, 255).astype(np.uint8), colours, alpha)


def shrunk(explanation: Explanation) -> Explanation:
    """The same of the image at the size of a layer."""
    from chiasm.report.heat_panels import resized  # and with it matplotlib, which predictions do without

    return resized(explanation, small(explanation.size))


def grey(values: np.ndarray) -> Image.Image:
    """A map (h, w) from 0 as 8-bit grey at its own resolution, its peak 255."""
    from PIL import Image

    return Image.fromarray(np.rint(255 * values / max(float(values.max()), 1e-30)).astype(np.uint8))


@cache
def _heat_colours() -> tuple[np.ndarray, np.ndarray]:
    from matplotlib import colormaps

    shares = np.arange(256) / 255
    return (colormaps["inferno"](shares)[:, :3] * 255).astype(np.uint8), np.rint(255 * shares**0.6).astype(np.uint8)


def _painted(values: np.ndarray, colours: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """uint8 (H, W) in `colours` (256, 3) and `alpha` (256,), both uint8; the palette keeps the PNG small."""
    from PIL import Image

    picture = Image.fromarray(values).convert("L")
    picture.putpalette(colours.tobytes())
    picture.info["transparency"] = alpha.tobytes()
    return picture
