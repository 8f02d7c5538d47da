"""What a model says of an image, typed: validated, printable as JSON, drawable.

The pictures are made with Pillow so that prediction needs neither matplotlib nor the training code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Classification:
    """The classes of one image.

    Attributes:
        source: the file's path, or another name of the image.
        labels: the class names, in the order of the probabilities.
        probabilities: (classes,) float32, softmax of the mean of the branch logits; sums to 1.
        branches: each branch's own probabilities (classes,) by the branch's name; empty for a one-branch model.
    """

    source: str
    labels: tuple[str, ...]
    probabilities: np.ndarray
    branches: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"probabilities": self.probabilities, **self.branches}.items():
            if values.shape != (len(self.labels),):
                raise ValueError(f"{name}: expected shape ({len(self.labels)},), saw {values.shape}")

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
        """The `count` most probable classes with their probabilities, best first."""
        order = self.probabilities.argsort()[::-1][:count]
        return [(self.labels[i], float(self.probabilities[i])) for i in order]

    def to_dict(self, top: int = 5) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "label": self.label,
            "score": self.score,
            "top": [{"label": label, "score": score} for label, score in self.top(top)],
            "branches": {
                name: {"label": self.votes[name], "score": float(values.max())} for name, values in self.branches.items()
            },
            "agreement": self.agreement,
        }

    def draw(self, image: Image.Image, top: int = 3) -> Image.Image:
        """A copy of `image` with the classes, and each branch's vote, written below it."""
        from PIL import Image, ImageDraw, ImageFont

        width = max(image.width, 240)
        font = ImageFont.load_default(size=max(12, width // 28))
        lines = [f"{label}  {score:.1%}" for label, score in self.top(top)]
        lines += [f"{name} branch: {vote}" for name, vote in self.votes.items()]
        step = int(font.size * 1.5)
        canvas = Image.new("RGB", (width, image.height + step * len(lines) + 8), "white")
        canvas.paste(image.convert("RGB"), ((width - image.width) // 2, 0))
        pen = ImageDraw.Draw(canvas)
        for row, line in enumerate(lines):
            pen.text((8, image.height + 4 + row * step), line, fill="black" if row else "#0b5cad", font=font)
        return canvas
