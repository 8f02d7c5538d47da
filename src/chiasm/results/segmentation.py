"""The class of every pixel of one image: validated, printable as JSON, drawable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.results.drawing import DRAWN_WIDTH, colour_of, fit, font_for, paint_map, shorten
from chiasm.results.masks import encode_mask

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """A class for every pixel of one image.

    Attributes:
        source: the file's path, or another name of the image.
        labels: the class names.
        classes: (height, width) uint8 at the original image's size, indices of `labels`.

    Raises:
        ValueError: for a map of another shape or type, or with a value that is no class.
    """

    source: str
    labels: tuple[str, ...]
    classes: np.ndarray

    def __post_init__(self) -> None:
        if self.classes.ndim != 2 or self.classes.dtype != np.uint8 or not self.classes.size:
            raise ValueError(f"classes: expected (H, W) uint8, saw {self.classes.shape} {self.classes.dtype}")
        if self.classes.max() >= len(self.labels):
            raise ValueError(f"classes: expected indices of {len(self.labels)} classes, saw {self.classes.max()}")

    @property
    def shares(self) -> dict[str, float]:
        """The share of the image that each class has, largest first; without those that do not occur."""
        counts = np.bincount(self.classes.ravel(), minlength=len(self.labels))
        order = np.argsort(-counts, kind="stable")
        return {self.labels[i]: float(counts[i] / self.classes.size) for i in order if counts[i]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; each class that occurs with its mask as COCO's compressed run lengths."""
        height, width = self.classes.shape
        regions = [
            {"label": name, "share": share, "mask": encode_mask(self.classes == self.labels.index(name))}
            for name, share in self.shares.items()
        ]
        return {"source": self.source, "height": height, "width": width, "regions": regions}

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of `image` with the classes' colours on it, and below it what they mean.

        Images wider or higher than 1600 px are made smaller, very small ones are enlarged by a whole factor.

        Raises:
            ValueError: for an image of another size.
        """
        from PIL import Image, ImageDraw

        if image.size != self.classes.shape[::-1]:
            raise ValueError(f"image: expected {self.classes.shape[::-1]} pixels, saw {image.size}")
        picture = fit(image.convert("RGB"))
        small = Image.fromarray(self.classes).resize(picture.size, Image.Resampling.NEAREST)
        picture = paint_map(picture, np.asarray(small))
        width = max(picture.width, DRAWN_WIDTH)
        size = max(13, width // 45)
        columns = max(1, width // (14 * size))
        step, shares = round(1.7 * size), self.shares
        canvas = Image.new("RGB", (width, picture.height + step * -(-len(shares) // columns) + size), "white")
        canvas.paste(picture, ((width - picture.width) // 2, 0))
        pen = ImageDraw.Draw(canvas)
        for number, (name, share) in enumerate(shares.items()):
            left = number % columns * (width // columns) + size // 2
            top = picture.height + size // 2 + number // columns * step
            pen.rectangle((left, top, left + size, top + size), fill=colour_of(self.labels.index(name)))
            font = font_for(size, name)
            text = shorten(f"{name} {share:.1%}", font, width // columns - 3 * size)
            pen.text((left + 1.5 * size, top + size // 2), text, fill="black", font=font, anchor="lm")
        return canvas
