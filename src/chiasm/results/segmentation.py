"""The class of every pixel of one image: validated, printable as JSON, drawable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chiasm.results.drawing import DENSE_SIDE, IN_SERIES, colour_of, fit, paint_map, with_legend
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

    def draw(self, image: Image.Image, *, series: bool = False) -> Image.Image:
        """A copy of `image` with the classes' colours on it, and below it what they mean.

        Images wider or higher than 1600 px are made smaller, small ones are enlarged by a whole factor.

        Args:
            image: the one that was segmented.
            series: give pictures of all images of one size one size: those of a video.

        Raises:
            ValueError: for an image of another size.
        """
        from PIL import Image

        if image.size != self.classes.shape[::-1]:
            raise ValueError(f"image: expected {self.classes.shape[::-1]} pixels, saw {image.size}")
        picture = fit(image.convert("RGB"), DENSE_SIDE)
        small = Image.fromarray(self.classes).resize(picture.size, Image.Resampling.NEAREST)
        picture = paint_map(picture, np.asarray(small))
        shares = list(self.shares.items())
        if series:  # in the order of the labels, which does not change from image to image
            shares = sorted(shares[:IN_SERIES], key=lambda share: self.labels.index(share[0]))
        entries = [(colour_of(self.labels.index(name)), name, f"{share:.1%}") for name, share in shares]
        return with_legend(picture, entries, self.labels if series else None)
