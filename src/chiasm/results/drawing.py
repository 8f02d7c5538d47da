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

Colour = tuple[int, int, int]


def colour_of(label: int) -> Colour:
    """The colour of a class, the same wherever it is drawn: hues a golden angle apart, so neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * 0.618034) % 1, (0.85, 0.55)[label // 12 % 2], 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def paint_masks(image: Image.Image, masks: Iterable[np.ndarray], colours: Iterable[Colour]) -> Image.Image:
    """A copy of `image` with each mask (H, W) bool of the image's size laid on it, half transparent."""
    from PIL import Image

    pixels = np.array(image.convert("RGB"))
    for mask, colour in zip(masks, colours, strict=True):
        pixels[mask] = (0.5 * pixels[mask] + 0.5 * np.array(colour)).astype(np.uint8)
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


def paint_boxes(image: Image.Image, boxes: np.ndarray, colours: Sequence[Colour], texts: Sequence[str]) -> Image.Image:
    """A copy of `image` with boxes (N, 4), left, top, right, bottom in its pixels, and a text at each ('' for none)."""
    from PIL import ImageDraw

    picture = image.convert("RGB")
    pen = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 400))
    size = max(11, picture.width // 60)
    for (left, top, right, bottom), colour, text in zip(boxes.tolist(), colours, texts, strict=True):
        pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=line)
        if text:
            font = font_for(size, text)
            place = pen.textbbox((left + 2, max(top, size + 2)), text, font=font, anchor="ls")
            pen.rectangle((place[0] - 2, place[1] - 1, place[2] + 2, place[3] + 1), fill=colour)
            pen.text((left + 2, max(top, size + 2)), text, fill="black", font=font, anchor="ls")
    return picture


def fit(image: Image.Image) -> Image.Image:
    """The image at a size that can be looked at: at most `DRAWN_SIDE`, tiny ones enlarged without blurring."""
    from PIL import Image

    longest = max(image.size)
    if longest > DRAWN_SIDE:
        scale = DRAWN_SIDE / longest
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, DRAWN_WIDTH // longest)
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
