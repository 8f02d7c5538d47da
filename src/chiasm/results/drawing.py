"""Pictures of results, made with Pillow so that prediction needs neither matplotlib nor the training code."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFont

# Drawn pictures: their longest side at most, and the width that text needs at least, in pixels.
DRAWN_SIDE, DRAWN_WIDTH = 1600, 280
# Fonts tried in this order when a label has letters that Pillow's own font lacks; missing ones are passed over.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "NotoSans-Regular.ttf")

# Dense results are enlarged more than others, for what is in them is small; in pixels.
DENSE_SIDE = 640
# Of up to so many objects small ones are labelled too.
FEW = 20
# Entries that a legend has room for where a series of pictures has legends of one size.
IN_SERIES = 12

Colour = tuple[int, int, int]
Place = tuple[float, float, float, float]  # left, top, right, bottom


def colour_of(label: int) -> Colour:
    """The colour of a class, the same wherever it is drawn: hues a golden angle apart in three shades, so that classes
    with neighbouring numbers differ, and those whose hues come close again (5, 8, 13 further on) differ in shade."""
    saturation, value = ((0.85, 0.9), (0.9, 0.62), (0.5, 1.0))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * 0.618034) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def paint_masks(image: Image.Image, masks: Iterable[np.ndarray], colours: Iterable[Colour]) -> Image.Image:
    """A copy of `image` with each mask (H, W) bool of its size laid on it: an edge, half transparent within."""
    from PIL import Image

    pixels = np.array(image.convert("RGB"))
    for mask, colour in zip(masks, colours, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            continue
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        there, under = mask[part], pixels[part]
        under[there] = (0.55 * under[there] + 0.45 * np.array(colour)).astype(np.uint8)
        around = np.pad(there, 1)
        inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        under[there & ~inner] = colour
    return Image.fromarray(pixels)


def paint_map(image: Image.Image, classes: np.ndarray, ignored: int | None = None) -> Image.Image:
    """A copy of `image` with the class map (H, W) uint8 laid on it; pixels of the value `ignored` stay grey."""
    from PIL import Image

    table = np.array([colour_of(label) for label in range(256)], dtype=np.float32)
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    painted = 0.4 * pixels + 0.6 * table[classes]
    if ignored is not None:
        painted[classes == ignored] = pixels[classes == ignored].mean(axis=1, keepdims=True)
    return Image.fromarray(painted.astype(np.uint8))


def paint_boxes(image: Image.Image, boxes: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """A copy of `image` with boxes (N, 4), left, top, right, bottom in its pixels; thin lines for small ones."""
    from PIL import ImageDraw

    picture = image.convert("RGB")
    pen = ImageDraw.Draw(picture)
    thickest = max(1, round(max(picture.size) / 400))
    for (left, top, right, bottom), colour in zip(boxes.tolist(), colours, strict=True):
        line = max(1, min(thickest, round(min(right - left, bottom - top) / 16)))
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=line)
    return picture


def place_labels(size: tuple[int, int], boxes: np.ndarray, texts: Sequence[str]) -> list[Place | None]:
    """Where each box's text goes: above its box, within a picture of that width and height.

    None where it would hide a text that comes later in the list (those are the better ones), and, of more than `FEW`
    boxes, where it would be larger than half of its box.
    """
    letters = _letters(size)
    places: list[Place | None] = [None] * len(texts)
    taken: list[Place] = []
    for index in reversed(range(len(texts))):
        left, top, right, bottom = boxes[index].tolist()
        width, height = font_for(letters, texts[index]).getlength(texts[index]) + 4, 1.35 * letters
        if len(texts) > FEW and width * height > (right - left) * (bottom - top) / 2:
            continue
        x, y = max(0.0, min(left, size[0] - width)), max(0.0, top - height)
        place = x, y, x + width, y + height
        if all(x >= other[2] or other[0] >= place[2] or y >= other[3] or other[1] >= place[3] for other in taken):
            places[index] = place
            taken.append(place)
    return places


def paint_labels(
    image: Image.Image, places: Sequence[Place | None], colours: Sequence[Colour], texts: Sequence[str]
) -> Image.Image:
    """A copy of `image` with the texts that have a place."""
    from PIL import ImageDraw

    picture = image.convert("RGB")
    pen = ImageDraw.Draw(picture)
    letters = _letters(picture.size)
    for place, colour, text in zip(places, colours, texts, strict=True):
        if place:
            pen.rectangle(place, fill=colour)
            dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 110
            middle = place[0] + 2, (place[1] + place[3]) / 2
            pen.text(middle, text, fill="white" if dark else "black", font=font_for(letters, text), anchor="lm")
    return picture


def with_legend(
    picture: Image.Image, entries: Sequence[tuple[Colour, str, str]], names: Sequence[str] | None = None
) -> Image.Image:
    """The picture with a legend below it: colours, names, and a number to each.

    Args:
        entries: long names are shortened, numbers are not.
        names: all that may stand here in pictures of one series: they get legends of one size, for up to `IN_SERIES`
            entries. Default: those of the entries, all of them.
    """
    from PIL import Image, ImageDraw

    width = max(picture.width, DRAWN_WIDTH)
    size = max(13, width // 60)
    room = len(entries) if names is None else min(len(names), IN_SERIES)
    names = [name for _, name, _ in entries] if names is None else names
    longest = max((font_for(size, name).getlength(name) for name in names), default=0)
    columns = max(1, min(room, int(width // (longest + 6 * size))))
    column, step = width // columns, round(1.7 * size)
    canvas = Image.new("RGB", (width, picture.height + step * -(-room // columns) + size), "white")
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    for index, (colour, name, number) in enumerate(entries[:room]):
        left = index % columns * column + size // 2
        top = picture.height + size // 2 + index // columns * step
        pen.rectangle((left, top, left + size, top + size), fill=colour)
        font = font_for(size, name)
        name = shorten(name, font, column - 2.5 * size - font.getlength(f" {number}"))
        pen.text((left + 1.5 * size, top + size // 2), f"{name} {number}", fill="black", font=font, anchor="lm")
    return canvas


def _letters(size: tuple[int, int]) -> int:
    return max(11, size[0] // 75)


def fit(image: Image.Image, least: int = DRAWN_WIDTH) -> Image.Image:
    """The image at a size that can be looked at: at most `DRAWN_SIDE`, and one of less than half of `least` pixels
    enlarged by a whole factor, without blurring."""
    from PIL import Image

    longest = max(image.size)
    if longest > DRAWN_SIDE:
        scale = DRAWN_SIDE / longest
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, least // longest)
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


@lru_cache(maxsize=64)
def font_for(size: int, text: str) -> Any:
    """Pillow's own font, or the first of `FONTS` here that has every letter of `text`."""
    from PIL import ImageFont

    own = ImageFont.load_default(size=size)
    if text.isascii() or not isinstance(own, ImageFont.FreeTypeFont):
        return own
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        if _has_letters(font, text):
            return font
    return own


def _has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether no letter is drawn as the font's 'missing' box."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isspace())


def shorten(text: str, font: Any, room: float) -> str:
    """`text` on one line, cut with '...' where it is wider than `room` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."
