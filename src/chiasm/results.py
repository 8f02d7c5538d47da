"""What a model says of an image, typed: validated, printable as JSON, drawable.

The pictures are made with Pillow so that prediction needs neither matplotlib nor the training code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFont

# Drawn pictures: their longest side at most, and the width that text needs at least, in pixels.
DRAWN_SIDE, DRAWN_WIDTH = 1600, 280
# Fonts tried in this order when a label has letters that Pillow's own font lacks; missing ones are passed over.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "NotoSans-Regular.ttf")


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The classes of one image.

    Attributes:
        source: the file's path, or another name of the image.
        labels: the class names, in the order of the probabilities.
        probabilities: (classes,) floats, softmax of the mean of the branch logits; sums to 1.
        branches: each branch's own probabilities (classes,) by the branch's name; empty for a one-branch model.

    Raises:
        ValueError: for probabilities of another shape, outside 0..1, or that do not sum to 1.
    """

    source: str
    labels: tuple[str, ...]
    probabilities: np.ndarray
    branches: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"probabilities": self.probabilities, **self.branches}.items():
            if values.shape != (len(self.labels),) or not self.labels:
                raise ValueError(
                    f"{name}: expected shape ({len(self.labels)},) with a class or more, saw {values.shape}"
                )
            total = float(values.sum(dtype=np.float64))  # NaN fails the comparison as well
            if not (values.min() >= 0 and abs(total - 1) < 1e-3):
                raise ValueError(f"{name}: expected values from 0 to 1 that sum to 1, saw a sum of {total:g}")

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[int(self.probabilities.argmax())]

    @property
    def score(self) -> float:
        """The probability of `label`."""
        return float(self.probabilities.max())

    @property
    def votes(self) -> dict[str, str]:
        """Each branch's own most probable class, by the branch's name."""
        return {name: self.labels[int(values.argmax())] for name, values in self.branches.items()}

    @property
    def agreement(self) -> bool | None:
        """Whether all branches vote for one class; None for a one-branch model."""
        return len(set(self.votes.values())) == 1 if self.branches else None

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The `count` most probable classes with their probabilities, best first; ties in the order of the labels."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]

    def to_dict(self, top: int = 5) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "label": self.label,
            "score": self.score,
            "top": [{"label": label, "score": score} for label, score in self.top(top)],
            "branches": {
                name: {"label": self.votes[name], "score": float(values.max())}
                for name, values in self.branches.items()
            },
            "agreement": self.agreement,
        }

    def draw(self, image: Image.Image, top: int = 3) -> Image.Image:
        """A copy of `image` with the classes, their probabilities as bars, and each branch's vote below it.

        Images wider or higher than 1600 px are made smaller, very small ones are enlarged by a whole factor.
        """
        from PIL import Image, ImageDraw

        picture = _fit(image.convert("RGB"))
        width = max(picture.width, DRAWN_WIDTH)
        size = max(13, width // 32)
        rows: list[tuple[str, str, float | None]] = [
            (label, f"{score:.1%}", score) for label, score in self.top(max(1, top))
        ]
        rows += [(f"{name} branch: {vote}", "", None) for name, vote in self.votes.items()]
        if self.agreement is False:
            rows.append(("the branches disagree", "", None))
        step, margin = round(size * 1.7), round(size * 0.6)
        canvas = Image.new("RGB", (width, picture.height + step * len(rows) + 2 * margin), "white")
        canvas.paste(picture, ((width - picture.width) // 2, 0))
        pen = ImageDraw.Draw(canvas)
        inner = width - 2 * margin
        for row, (text, number, share) in enumerate(rows):
            top_edge = picture.height + margin + row * step
            if share is not None:
                box = (margin, top_edge, margin + round(inner * share), top_edge + step - 4)
                pen.rectangle(box, fill="#bcd9ee" if row == 0 else "#e3e8ec")
            baseline = top_edge + (step - 4) // 2
            number_font = _font(size, number)
            room = inner - 2 * margin - pen.textlength(number, font=number_font)
            font = _font(size, text)
            colour = "black" if share is not None else "#b34700" if self.agreement is False else "#444444"
            pen.text((2 * margin, baseline), _shorten(text, font, room), fill=colour, font=font, anchor="lm")
            pen.text((width - 2 * margin, baseline), number, fill="black", font=number_font, anchor="rm")
        return canvas


def _fit(image: Image.Image) -> Image.Image:
    """The image at a size that can be looked at: at most `DRAWN_SIDE`, tiny ones enlarged without blurring."""
    from PIL import Image

    longest = max(image.size)
    if longest > DRAWN_SIDE:
        scale = DRAWN_SIDE / longest
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    factor = max(1, DRAWN_WIDTH // longest)
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


@lru_cache(maxsize=64)
def _font(size: int, text: str) -> Any:
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


def _shorten(text: str, font: Any, room: float) -> str:
    """`text` on one line, cut with '...' where it is wider than `room` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."
