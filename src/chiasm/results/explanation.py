"""What in an image spoke for an answer, branch by branch: heat maps, validated, printable as JSON, drawable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FUSED = "fused"
# Of a branch's maps the first that it has stands for it: of an answer about the image, and of one about a part of it,
# where attention leads to what else was looked at.
METHODS = ("gradient_rollout", "gradcam", "rollout")
METHODS_OF_PART = ("gradcam", "gradient_rollout")
# Where the first branch looks alone, and where the second does.
ORANGE, BLUE = (230, 126, 20), (30, 110, 220)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The heat maps of one answer of one image.

    Attributes:
        source: the file's path, or another name of the image.
        size: height and width of the image in pixels.
        subject: what is explained, in words: a class, or an object's class, score and place.
        label: the index of its class.
        scores: what the model gives the class, 0..1, as 'model', and what each branch with a head gives it, by name.
        maps: (h, w) float32, from 0, by name: '<branch>/<method>' of each branch ('conv' and 'tokens', or 'model';
            methods 'gradcam', 'rollout', 'gradient_rollout'), each at the resolution it was computed at, and 'fused',
            which of one branch is that branch's. A map sums to 1, or is 0 where nothing spoke for the class.
        region: left, top, right, bottom of what the maps cover, in pixels of the image: a part of it where the network
            saw its middle alone, more than it where it lay on a larger canvas.
        box: of an object its left, top, right, bottom in pixels of the image; None otherwise.
        whole: whether the answer is about the image as a whole, not about an object or region.

    Raises:
        ValueError: for maps of another shape or range.
    """

    source: str
    size: tuple[int, int]
    subject: str
    label: int
    scores: dict[str, float]
    maps: dict[str, np.ndarray]
    region: tuple[float, float, float, float]
    box: tuple[float, float, float, float] | None = None
    whole: bool = True

    def __post_init__(self) -> None:
        for name, values in self.maps.items():
            if values.ndim != 2 or values.dtype != np.float32 or not values.size:
                raise ValueError(f"map {name}: expected (h, w) float32, saw {values.shape} {values.dtype}")
            if not (np.isfinite(values).all() and values.min() >= 0):
                raise ValueError(f"map {name}: expected finite values from 0")
        left, top, right, bottom = self.region
        if not (right > left and bottom > top):
            raise ValueError(f"region: expected left, top, right, bottom, saw {self.region}")

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that have maps: ('conv', 'tokens'), or one."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.maps if name != FUSED))

    def map_of(self, branch: str, method: str | None = None) -> np.ndarray:
        """The map (h, w) of a branch, or of 'fused', by that method or the first of `METHODS` (of an object or region
        `METHODS_OF_PART`) that it has.

        Raises:
            KeyError: for one that is not there.
        """
        if branch == FUSED:
            return self.maps[FUSED]
        names = [f"{branch}/{name}" for name in ((method,) if method else METHODS if self.whole else METHODS_OF_PART)]
        return self.maps[next((name for name in names if name in self.maps), names[0])]

    def over_image(self, values: np.ndarray) -> np.ndarray:
        """A map (h, w) at the image's size (H, W), interpolated; 0 outside of what it covers, its largest value 1."""
        from PIL import Image

        left, top, right, bottom = self.region
        height, width = self.size
        rows, columns = values.shape
        across, down = columns / (right - left), rows / (bottom - top)  # map pixels for one of the image
        # PIL samples at pixel centres, so the corner of the image is where it lies in the map.
        spread = Image.fromarray(np.pad(values, 1, mode="edge")).transform(
            (width, height),
            Image.Transform.AFFINE,
            (across, 0, 1 - left * across, 0, down, 1 - top * down),
            resample=Image.Resampling.BILINEAR,
        )
        whole = np.asarray(spread, dtype=np.float32).copy()
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        whole[(y < top) | (y > bottom)] = 0
        whole[:, (x < left) | (x > right)] = 0
        peak = whole.max()
        return whole / peak if peak > 0 else whole

    @property
    def overlap(self) -> float | None:
        """How far the two branches look at the same places: the shared part of their maps, 0..1; None with one."""
        if len(self.branches) < 2:
            return None
        one, other = (_share(self.over_image(self.map_of(branch))) for branch in self.branches)
        return float(np.minimum(one, other).sum())

    def disagreement(self) -> np.ndarray:
        """(H, W) float32, -1..1: positive where the first branch looks and the second does not, negative the other way.

        Raises:
            ValueError: with one branch.
        """
        if len(self.branches) < 2:
            raise ValueError("one branch alone agrees with itself")
        one, other = (_share(self.over_image(self.map_of(branch))) for branch in self.branches)
        difference = one - other
        return (difference / max(np.abs(difference).max(), np.finfo(np.float32).tiny)).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; maps as nested lists."""
        return {
            "source": self.source,
            "height": self.size[0],
            "width": self.size[1],
            "subject": self.subject,
            "label": self.label,
            "scores": self.scores,
            "overlap": self.overlap,
            "region": list(self.region),
            "box": None if self.box is None else list(self.box),
            "maps": {name: values.tolist() for name, values in self.maps.items()},
        }

    def draw(self, image: Image.Image, branch: str = FUSED, method: str | None = None) -> Image.Image:
        """A copy of `image` with a map laid on it.

        Raises:
            ValueError: for an image of another size.
            KeyError: for a map that is not there.
        """
        if image.size != self.size[::-1]:
            raise ValueError(f"image: expected {self.size[::-1]} pixels, saw {image.size}")
        return paint_heat(image, self.over_image(self.map_of(branch, method)))


def visible(heat: np.ndarray) -> np.ndarray:
    """A map (H, W) from 0 as it is shown, 0..1: its hottest hundredth is 1, or one hot place would hide all else."""
    hot = heat[heat > 0]
    most = np.quantile(hot, 0.99) if hot.size else 0
    return np.clip(heat / most, 0, 1) if most > 0 else np.zeros_like(heat)


def paint_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """A copy of `image`, grey, with `heat` (H, W), from 0, in colours from violet to yellow laid on it: the hotter, the
    less of the image shows through."""
    from matplotlib import colormaps
    from PIL import Image

    heat = visible(heat)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    colours = colormaps["inferno"](heat)[..., :3].astype(np.float32) * 255
    opaque = 0.25 + 0.5 * heat[..., None]
    return Image.fromarray(np.clip((1 - opaque) * grey + opaque * colours, 0, 255).astype(np.uint8))


def paint_disagreement(image: Image.Image, difference: np.ndarray) -> Image.Image:
    """A copy of `image`, grey, with `difference` (H, W) -1..1 laid on it: orange where the first branch looks alone,
    blue where the second does."""
    from PIL import Image

    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32)
    colours = np.where(difference[..., None] > 0, np.array(ORANGE, np.float32), np.array(BLUE, np.float32))
    opaque = 0.85 * np.abs(difference)[..., None] ** 0.7
    return Image.fromarray(np.clip((1 - opaque) * 0.8 * grey + opaque * colours, 0, 255).astype(np.uint8))


def _share(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else np.full_like(values, 1 / values.size)
