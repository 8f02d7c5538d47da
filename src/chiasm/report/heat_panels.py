"""The panels of an explanation: the image, what each branch looked at, where they disagree; and what colours mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw

from chiasm.results.explanation import BLUE, FUSED, ORANGE, Explanation, paint_disagreement, paint_heat

# Longest side of a panel in pixels: in a picture of one image, and in a figure of many.
SIDE, SMALL = 320, 200
# Around a small object so many times its box is shown.
AROUND = 5

BRANCHES = {"conv": "convolution branch", "tokens": "Transformer branch", "model": "the model"}
METHODS = {"gradcam": "Grad-CAM", "rollout": "attention rollout", "gradient_rollout": "gradient-weighted rollout"}

_BOX = (0, 230, 118)  # green, which neither heat nor disagreement has


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A picture, the words above it and the lines below it."""

    image: Image.Image
    heading: str = ""
    lines: tuple[str, ...] = ()


def shrunk(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The image with a longest side of `side` pixels; a small one is enlarged."""
    scale = side / max(image.size)
    if scale == 1:
        return image.convert("RGB")
    width, height = (max(1, round(length * scale)) for length in image.size)
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((width, height), way)


def resized(explanation: Explanation, size: tuple[int, int]) -> Explanation:
    """The same explanation of the image at another height and width."""
    across, down = size[1] / explanation.size[1], size[0] / explanation.size[0]

    def scaled(place: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        return place[0] * across, place[1] * down, place[2] * across, place[3] * down

    box = None if explanation.box is None else scaled(explanation.box)
    return replace(explanation, size=size, region=scaled(explanation.region), box=box)


def overlap_seen(explanation: Explanation) -> float | None:
    """The explanation's overlap, 0..1, at the size of its panels; None with one branch."""
    scale = SIDE / max(explanation.size)
    height, width = (max(1, round(length * scale)) for length in explanation.size)
    return resized(explanation, (height, width)).overlap


def panels(image: Image.Image, explanation: Explanation, side: int = SIDE) -> list[Panel]:
    """The image, what each branch looked at, and of two branches both fused and where they disagree.

    Args:
        image: at any size; a small object's surroundings are cut from it.
        explanation: of that image.
        side: longest side of a panel in pixels.
    """
    whole = shrunk(image, side)
    at = resized(explanation, (whole.height, whole.width))
    picture, near = close_up(image, explanation, side)
    score = None if at.box else at.scores.get("model")  # an object's stands in its subject
    lines = [at.subject] if score is None else [at.subject, f"the model gives it {score:.0%}"]
    if near.box != at.box:
        lines.append("beside it: what is around the box")
    found = [Panel(image=_boxed(whole, at), heading="the image", lines=tuple(lines))]
    found += [heat_panel(image, explanation, branch, side=side) for branch in at.branches]
    if len(at.branches) == 1:
        found[1] = replace(found[1], heading="what it looked at")
    if at.overlap is not None:
        found.append(replace(heat_panel(image, explanation, FUSED, side=side), heading="both, fused"))
        found.append(
            Panel(
                image=_boxed(paint_disagreement(picture, near.disagreement()), near),
                heading="where they disagree",
                lines=(f"{at.overlap:.0%} of where they look is shared",),
            )
        )
    return found


def heat_panel(
    image: Image.Image, explanation: Explanation, branch: str, method: str | None = None, *, side: int = SIDE
) -> Panel:
    """A map of one branch, or 'fused', on the image or, of a small object, on what is around it; below it the branch's
    score and how far the map is spread over the whole image."""
    picture, near = close_up(image, explanation, side)
    values = explanation.map_of(branch, method)
    heat = near.over_image(values)
    everywhere = heat
    if near.box is not None:
        everywhere = resized(explanation, shrunk(image, side).size[::-1]).over_image(values)
    score = explanation.scores.get(branch) if len(explanation.branches) > 1 else None
    lines = () if score is None else (f"gives it {score:.0%}",)
    return Panel(
        image=_boxed(paint_heat(picture, heat), near),
        heading=BRANCHES.get(branch, branch),
        lines=(*lines, _spread(everywhere)),
    )


def every_map(image: Image.Image, explanation: Explanation) -> list[Panel]:
    """Each map by each method."""
    found = []
    for name in explanation.maps:
        branch, _, method = name.partition("/")
        if method:
            panel = heat_panel(image, explanation, branch, method)
            found.append(replace(panel, heading=METHODS.get(method, method), lines=(panel.heading, panel.lines[-1])))
    return found


def close_up(image: Image.Image, explanation: Explanation, side: int) -> tuple[Image.Image, Explanation]:
    """A small object with its surroundings, in the image's proportions, else the whole image; and its explanation."""
    at = resized(explanation, (image.height, image.width))
    if at.box is not None:
        left, top, right, bottom = at.box
        scale = AROUND * max((right - left) / image.width, (bottom - top) / image.height)
        width, height = (max(8, round(scale * length)) for length in image.size)
        if scale < 0.6 and width < image.width and height < image.height:
            x = min(max(round((left + right - width) / 2), 0), image.width - width)
            y = min(max(round((top + bottom - height) / 2), 0), image.height - height)
            image = image.crop((x, y, x + width, y + height))
            region = (at.region[0] - x, at.region[1] - y, at.region[2] - x, at.region[3] - y)
            at = replace(at, size=(height, width), region=region, box=(left - x, top - y, right - x, bottom - y))
    picture = shrunk(image, side)
    return picture, resized(at, (picture.height, picture.width))


def strength(features: np.ndarray) -> np.ndarray:
    """How much each place of a feature map (C, h, w) differs from the map's average place: the length of the
    difference over the channels, less that of the place that differs least, (h, w) float32, its largest value 1."""
    away = features.astype(np.float64)
    away = np.sqrt(((away - away.mean(axis=(1, 2), keepdims=True)) ** 2).sum(axis=0))
    away -= away.min()
    return (away / max(away.max(), 1e-12)).astype(np.float32)


def seen(image: Image.Image, ground: Explanation, side: int) -> Image.Image:
    """The part of the image that the network saw, which feature maps cover; black where it lay on a larger canvas."""
    left, top, right, bottom = resized(ground, (image.height, image.width)).region
    return shrunk(image.crop((round(left), round(top), round(right), round(bottom))), side)


def feature_picture(values: np.ndarray, ground: Explanation, side: int) -> Image.Image:
    """The strength (h, w) of a feature map in the colours of heat, in the proportions of what the network saw."""
    left, top, right, bottom = ground.region
    scale = side / max(right - left, bottom - top)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    return _coloured(np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)))


def _boxed(image: Image.Image, explanation: Explanation) -> Image.Image:
    if explanation.box is None:
        return image
    boxed = image.copy()
    left, top, right, bottom = explanation.box
    place = left, top, max(right - 1, left), max(bottom - 1, top)
    ImageDraw.Draw(boxed).rectangle(place, outline=_BOX, width=max(1, min(3, round(max(image.size) / 100))))
    return boxed


def _spread(heat: np.ndarray) -> str:
    """The fewest pixels that hold half of a map, as a share of the image."""
    ordered = np.sort(heat, axis=None)[::-1].cumsum(dtype=np.float64)
    if not ordered[-1]:
        return "nothing here speaks for it"
    count = np.searchsorted(ordered, ordered[-1] / 2) + 1
    return f"half of it on {count / heat.size:.0%}"


def heat_scale(width: int = 160, height: int = 18) -> Image.Image:
    """The colours of heat, from nothing to the most."""
    return _coloured(np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1)))


def _coloured(heat: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * colormaps["inferno"](heat)[..., :3]).astype(np.uint8))


def disagreement_words(branches: Sequence[str]) -> tuple[tuple[tuple[int, int, int], str], ...]:
    """The two colours of disagreement and what each means."""
    one, other = (BRANCHES.get(name, name) for name in branches)
    return (
        (ORANGE, f"the {one} looks here more than the {other}"),
        (BLUE, f"the {other} looks here more than the {one}"),
    )
