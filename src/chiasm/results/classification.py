"""The classes of one image: validated, printable as JSON, drawable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.results.drawing import DRAWN_WIDTH, fit, font_for, shorten

if TYPE_CHECKING:
    from PIL import Image


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

    def draw(self, image: Image.Image, top: int = 3, *, series: bool = False) -> Image.Image:
        """A copy of `image` with the classes, their probabilities as bars, and each branch's vote below it.

        Images wider or higher than 1600 px are made smaller, very small ones are enlarged by a whole factor.

        Args:
            image: the one that was classified.
            top: classes that are shown.
            series: give pictures of all images of one size one size: those of a video.
        """
        from PIL import Image, ImageDraw

        picture = fit(image.convert("RGB"))
        width = max(picture.width, DRAWN_WIDTH)
        size = max(13, width // 32)
        rows: list[tuple[str, str, float | None]] = [
            (label, f"{score:.1%}", score) for label, score in self.top(max(1, top))
        ]
        rows += [(f"{name} branch: {vote}", "", None) for name, vote in self.votes.items()]
        if self.agreement is False:
            rows.append(("the branches disagree", "", None))
        step, margin = round(size * 1.7), round(size * 0.6)
        rooms = len(rows) + (series and self.agreement is True)  # for the row that says when branches disagree
        canvas = Image.new("RGB", (width, picture.height + step * rooms + 2 * margin), "white")
        canvas.paste(picture, ((width - picture.width) // 2, 0))
        pen = ImageDraw.Draw(canvas)
        inner = width - 2 * margin
        for row, (text, number, share) in enumerate(rows):
            top_edge = picture.height + margin + row * step
            if share is not None:
                box = (margin, top_edge, margin + round(inner * share), top_edge + step - 4)
                pen.rectangle(box, fill="#bcd9ee" if row == 0 else "#e3e8ec")
            baseline = top_edge + (step - 4) // 2
            number_font = font_for(size, number)
            room = inner - 2 * margin - pen.textlength(number, font=number_font)
            font = font_for(size, text)
            colour = "black" if share is not None else "#b34700" if self.agreement is False else "#444444"
            pen.text((2 * margin, baseline), shorten(text, font, room), fill=colour, font=font, anchor="lm")
            pen.text((width - 2 * margin, baseline), number, fill="black", font=number_font, anchor="rm")
        return canvas
