"""The built-in images: generated, seeded, of any size and number, without a download.

A scene shows four or five blobs that all carry one fine texture and stand in one arrangement. The class is the pair,
such as "striped-row": the texture is decided within a few pixels, the arrangement only across a good part of the image,
and the two are drawn independently. Who knows the texture alone is right once in as many times as there are
arrangements, and the other way round; only both together tell the class.

Colours, lighting, background, clutter, noise, number, size and outline of the blobs, scale, angle and phase of the
texture, and the place, extent and tilt of the arrangement vary from image to image and say nothing of the class.

Every image comes with its objects, for detection and segmentation: boxes, instance masks and a semantic map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from chiasm.data.source import ImageData, Split, read_options
from chiasm.errors import DataError

DEFAULTS = {"size": 64, "count": 2000, "val": 500, "seed": 0, "textures": 3, "arrangements": 3}
MIN_SIZE = 32
_SPLIT_IDS = {"train": 0, "val": 1}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One generated image and all that is known of it.

    Attributes:
        image: (3, S, S) uint8 RGB.
        label: index of the class, `texture * arrangements + arrangement`.
        texture: index of the texture, which is also the class of every object.
        arrangement: index of the arrangement.
        boxes: (N, 4) float32, left, top, right, bottom in pixels, the last two exclusive: the extent of the mask.
        masks: (N, S, S) bool, the visible pixels of each object; they do not overlap.
        semantic: (S, S) uint8: 0 background, 1 + texture where an object is.
    """

    image: Tensor
    label: int
    texture: int
    arrangement: int
    boxes: Tensor
    masks: Tensor
    semantic: Tensor


class SceneSplit(Split):
    """Scenes made on demand; each is a function of (seed, split, index) and the sizes alone."""

    def __init__(self, split: str, count: int, *, size: int, seed: int, textures: int, arrangements: int) -> None:
        self.size, self.seed, self.textures, self.arrangements = size, seed, textures, arrangements
        self._id = _SPLIT_IDS[split]
        self.labels = [i % (textures * arrangements) for i in range(count)]
        self.sources = [f"scenes/{split}/{i}" for i in range(count)]

    def scene(self, index: int) -> Scene:
        """Image `index` with its label, boxes and masks."""
        texture, arrangement = divmod(self.labels[index], self.arrangements)
        rng = np.random.default_rng([self.seed, self._id, index])
        return draw_scene(rng, self.size, texture, arrangement, label=self.labels[index])

    def read(self, index: int) -> Tensor:
        return self.scene(index).image


def open_scenes(options: str = "") -> ImageData:
    """The built-in data set.

    Args:
        options: `size=64,count=2000,val=500,seed=0,textures=3,arrangements=3` or some of these: side in pixels, images
            for training and for validation, how many of the textures and arrangements (2 to 4 each) make classes.

    Raises:
        DataError, UnknownNameError: options out of range, of another type, or unknown.
    """
    given = read_options(options, DEFAULTS, what="scenes")
    count, val = given.pop("count"), given.pop("val")
    for name, value, least, most in (
        ("size", given["size"], MIN_SIZE, 4096),
        ("count", count, 1, 10_000_000),
        ("val", val, 1, 10_000_000),
        ("seed", given["seed"], 0, 2**32 - 1),
        ("textures", given["textures"], 2, len(TEXTURES)),
        ("arrangements", given["arrangements"], 2, len(ARRANGEMENTS)),
    ):
        if not least <= value <= most:
            raise DataError(f"scenes: {name}={value}; expected {least} to {most}.")
    textures, arrangements = given["textures"], given["arrangements"]
    if count < textures * arrangements:
        raise DataError(f"scenes: count={count} for {textures * arrangements} classes; expected one of each or more.")
    classes = [f"{t}-{a}" for t in list(TEXTURES)[:textures] for a in list(ARRANGEMENTS)[:arrangements]]
    splits: dict[str, Split] = {
        "train": SceneSplit("train", count, **given),
        "val": SceneSplit("val", val, **given),
    }
    return ImageData(name="scenes", classes=tuple(classes), splits=splits)


# ------------------------------------------------------------------------------------------------------------ textures
# (rng, u, v) -> how much of the second colour, 0..1, half on average; u and v count periods along the texture's axes.

Texture = Callable[[Generator, np.ndarray, np.ndarray], np.ndarray]


def _wave(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * math.pi * x)


def _contrast(x: np.ndarray) -> np.ndarray:
    """Values about zero to 0..1 about a half, with soft edges."""
    return _unit(0.5 + 1.5 * x)


def _unit(x: np.ndarray) -> np.ndarray:
    """Clip to 0..1; `np.clip` takes three times as long on small arrays."""
    return np.minimum(np.maximum(x, 0), 1)


def _striped(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _contrast(_wave(u))


def _checked(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _contrast(_wave(u) * _wave(v))


def _speckled(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Random values on a grid of half a period, smoothly joined."""
    grid = rng.uniform(-1.2, 1.2, (32, 32)).astype(np.float32)
    x, y = 2 * u, 2 * v
    column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    x, y = x - column, y - row
    left, right, top, below = column & 31, (column + 1) & 31, row & 31, (row + 1) & 31
    upper = grid[top, left] * (1 - x) + grid[top, right] * x
    lower = grid[below, left] * (1 - x) + grid[below, right] * x
    return _contrast(upper * (1 - y) + lower * y)


def _dotted(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Sparse round dots; the ground is mixed so that the average stays half."""
    dots = _unit(2 * (_wave(u) + _wave(v)) - 1.6)
    return 0.28 + 0.72 * dots


TEXTURES: dict[str, Texture] = {
    "striped": _striped,
    "checked": _checked,
    "speckled": _speckled,
    "dotted": _dotted,
}

# -------------------------------------------------------------------------------------------------------- arrangements
# (rng, count) -> centres (count, 2) as x, y about (0, 0), in sides of the image.

Arrangement = Callable[[Generator, int], np.ndarray]


def _line(rng: Generator, count: int, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees + rng.uniform(-10, 10))
    along = np.linspace(-1, 1, count) * rng.uniform(0.32, 0.36)
    return np.stack([along * np.cos(angle), along * np.sin(angle)], axis=1)


def _row(rng: Generator, count: int) -> np.ndarray:
    return _line(rng, count, 0)


def _column(rng: Generator, count: int) -> np.ndarray:
    return _line(rng, count, 90)


def _ring(rng: Generator, count: int) -> np.ndarray:
    angles = rng.uniform(0, 2 * np.pi) + np.arange(count) * (2 * np.pi / count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.2, 0.3)


def _diagonal(rng: Generator, count: int) -> np.ndarray:
    return _line(rng, count, rng.choice([45, 135]))


ARRANGEMENTS: dict[str, Arrangement] = {
    "row": _row,
    "column": _column,
    "ring": _ring,
    "diagonal": _diagonal,
}

# ------------------------------------------------------------------------------------------------------------- drawing


def draw_scene(rng: Generator, size: int, texture: int, arrangement: int, *, label: int) -> Scene:
    """Draw one scene of `size` x `size` pixels; everything that is not given comes from `rng`."""
    canvas = _background(rng, size)
    _clutter(rng, canvas)
    count = int(rng.integers(4, 6))
    radius = rng.uniform(0.075, 0.09) * size
    period = max(rng.uniform(0.045, 0.06) * size, 2.5)  # pixels; finer cannot be told apart
    centres = list(ARRANGEMENTS.values())[arrangement](rng, count)
    reach = np.abs(centres).max(axis=0) + 1.25 * radius / size
    room = np.maximum(0.5 - reach, 0)
    centres = (centres + 0.5 + rng.uniform(-room, room) + rng.normal(0, 0.008, centres.shape)) * size
    pattern = list(TEXTURES.values())[texture]
    owner = np.zeros((size, size), dtype=np.uint8)
    for number, centre in enumerate(centres.tolist(), start=1):
        _blob(rng, canvas, owner, number, centre, radius, period, pattern)
    canvas *= _field(rng, size, 2, 0.7, 1.2)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(0.01, 0.04)
    image = (_unit(canvas) * 255 + 0.5).astype(np.uint8)
    masks = np.stack([owner == number for number in range(1, count + 1)])
    return Scene(
        image=torch.from_numpy(image),
        label=label,
        texture=texture,
        arrangement=arrangement,
        boxes=torch.from_numpy(_extents(masks)),
        masks=torch.from_numpy(masks),
        semantic=torch.from_numpy((owner > 0) * np.uint8(1 + texture)),
    )


def _blob(
    rng: Generator,
    canvas: np.ndarray,
    owner: np.ndarray,
    number: int,
    centre: list[float],
    radius: float,
    period: float,
    pattern: Texture,
) -> None:
    """Paint one object onto `canvas` (3, S, S) and write its number into `owner` (S, S), in its own window only."""
    size = owner.shape[0]
    radius *= rng.uniform(0.9, 1.1)
    window = tuple(
        slice(max(math.floor(c - 1.3 * radius - 1), 0), min(math.ceil(c + 1.3 * radius + 1), size))
        for c in reversed(centre)
    )
    y, x = (
        np.arange(side.start, side.stop, dtype=np.float32) + (0.5 - c)
        for side, c in zip(window, reversed(centre), strict=True)
    )
    y = y[:, None]
    lobes, swing, start = int(rng.integers(2, 5)), rng.uniform(0, 0.15), rng.uniform(0, 2 * math.pi)
    edge = radius * (1 + swing * np.sin(lobes * np.arctan2(y, x) + start))
    cover = _unit(edge - np.hypot(x, y) + 0.5)
    angle, scale = rng.uniform(0, math.pi), period * rng.uniform(0.9, 1.1)
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    mix = pattern(rng, x * cosine + y * sine + rng.uniform(0, 1), y * cosine - x * sine + rng.uniform(0, 1))
    ground, figure = _colours(rng)
    under = canvas[:, *window]
    under += (ground + (figure - ground) * mix - under) * cover
    owner[window][cover > 0.5] = number


def _colours(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours (3, 1, 1) of clearly different brightness, in random order."""
    dark, light = rng.random((2, 3, 1, 1), dtype=np.float32) * 0.4
    light += 0.6
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _background(rng: Generator, size: int) -> np.ndarray:
    """(3, S, S) float32: a soft field of colours about a random one."""
    return (_field(rng, size, 4, -0.15, 0.15, channels=3) + rng.uniform(0.25, 0.75, (3, 1, 1))).astype(np.float32)


def _clutter(rng: Generator, canvas: np.ndarray) -> None:
    """Plain little rectangles anywhere, as large as a part of an object."""
    size = canvas.shape[-1]
    count = rng.integers(6, 13)
    starts = (rng.uniform(0, 1, (count, 2)) * size).astype(int)
    extents = np.ceil(rng.uniform(0.02, 0.09, (count, 2)) * size).astype(int)
    colours = rng.uniform(0, 1, (count, 3, 1, 1))
    for (x, y), (w, h), colour in zip(starts.tolist(), extents.tolist(), colours, strict=True):
        canvas[:, y : y + h, x : x + w] = colour


def _field(rng: Generator, size: int, knots: int, low: float, high: float, channels: int = 1) -> np.ndarray:
    """(channels, S, S): random values at `knots` x `knots` points, bilinear in between."""
    rise = _between(size, knots)
    return rise @ rng.uniform(low, high, (channels, knots, knots)).astype(np.float32) @ rise.T


@cache
def _between(size: int, knots: int) -> np.ndarray:
    """(S, knots): the weights of linear interpolation."""
    position = np.linspace(0, knots - 1, size, dtype=np.float32)[:, None]
    return np.clip(1 - np.abs(position - np.arange(knots, dtype=np.float32)), 0, 1)


def _extents(masks: np.ndarray) -> np.ndarray:
    """(N, S, S) bool, none of them empty -> (N, 4) float32: left, top, right, bottom; the last two exclusive."""
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return np.array(boxes, dtype=np.float32)
