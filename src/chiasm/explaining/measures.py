"""What local and global mean in a network, measured: how far attention looks, what of the image a place depends on, and
how alike two branches are before and after they exchange.

Distances and sides are pixels of the canvas, the network's input. All sums are float64, so they do not depend on the
order or the number of the images that come at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import length_hint
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chiasm.errors import DataError, ImageError
from chiasm.explaining.record import Attention, Recording, record
from chiasm.layers.tokens import map_to_tokens, resize_map

if TYPE_CHECKING:
    from chiasm.explaining.explainer import Explainer

FIELD_IMAGES = 8  # a field takes a backward pass for every feature map, and settles after few images
HALF = 0.5
MASKED = 1e-30  # least weight of what is not masked; masks add -100 or less before the softmax, which leaves e-44


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far one attention looks.

    Attributes:
        branch, name: of the attention.
        coupled: False with the exchanges between the branches turned off.
        heads: of each head the mean distance between query and key, in pixels.
        even: what attention spread evenly over the tokens that it sees would have; in windows they are few.
    """

    branch: str
    name: str
    coupled: bool
    heads: tuple[float, ...]
    even: float

    @property
    def mean(self) -> float:
        """Over the heads, in pixels."""
        return float(np.mean(self.heads))


@dataclass(frozen=True, kw_only=True)
class Field:
    """What of the image the centre of a feature map depends on: its effective receptive field.

    Attributes:
        branch, name: of the feature map.
        coupled: False with the exchanges between the branches turned off.
        map: (H, W) float64 on the canvas, sums to 1; 0 everywhere where nothing of the image arrives.
    """

    branch: str
    name: str
    coupled: bool
    map: np.ndarray

    @property
    def side(self) -> float:
        """In pixels, of the square of the same area as the fewest pixels that hold half of the field."""
        return field_side(self.map)


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How alike two branches are at one exchange, by linear CKA, 0..1.

    Attributes:
        name: of the exchange.
        before, after: it.
        places: tokens that were compared; with fewer than there are channels, any two branches look alike.
        channels: of the branch that has more of them.
    """

    name: str
    before: float
    after: float
    places: int
    channels: int


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What was measured of a network.

    Attributes:
        images: how many went in.
        canvas: height and width of the network's input in pixels.
        distances: of each attention in order; with the exchanges on, then off where they can be.
        fields: of each feature map in order, likewise; of the first `FIELD_IMAGES` images.
        similarities: of each exchange in order.
        failures: the images that could not be read.
    """

    images: int
    canvas: tuple[int, int]
    distances: tuple[Distance, ...]
    fields: tuple[Field, ...]
    similarities: tuple[Similarity, ...]
    failures: tuple[ImageError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the fields their sides."""
        return {
            "images": self.images,
            "canvas": list(self.canvas),
            "attention_distance": [
                {"branch": d.branch, "name": d.name, "coupled": d.coupled, "heads": list(d.heads), "even": d.even}
                for d in self.distances
            ],
            "receptive_field": [
                {"branch": f.branch, "name": f.name, "coupled": f.coupled, "side": f.side} for f in self.fields
            ],
            "receptive_field_images": min(self.images, FIELD_IMAGES),
            "similarity": [
                {"name": s.name, "before": s.before, "after": s.after, "places": s.places, "channels": s.channels}
                for s in self.similarities
            ],
            "unreadable": [{"path": error.path, "reason": error.reason} for error in self.failures],
        }


def measure(
    explainer: Explainer,
    images: Iterable[tuple[str, Tensor | ImageError]],
    tick: Callable[[int, int], None] | None = None,
) -> Measures:
    """Measure a network on some images; a few dozen are enough.

    Args:
        explainer: of the model.
        images: name and pixels, uint8 (3, H, W), of each, one at a time; or why it cannot be read.
        tick: told how many images are done, and of how many as far as `images` knows.

    Raises:
        DataError: when there is no image that can be read.
    """
    failures: list[ImageError] = []
    sums = {coupled: _Sums() for coupled in ((True, False) if explainer.exchanges else (True,))}
    canvas, total = torch.empty(0), length_hint(images)
    for done, (_, pixels) in enumerate(images, start=1):
        if isinstance(pixels, ImageError):
            failures.append(pixels)
        else:
            canvas = explainer.canvas(pixels)[0]
            for coupled, sum_ in sums.items():
                if sum_.images < FIELD_IMAGES:
                    sum_.add_fields(receptive_field(explainer.network, canvas, coupled=coupled))
                sum_.add(explainer.record(pixels, coupled=coupled))
        if tick is not None:
            tick(done, max(done, total))
    images_read = sums[True].images
    if not images_read:
        raise DataError(
            f"none of the {len(failures)} images can be read; the first: {failures[0]}"
            if failures
            else "no images to measure on; name some."
        )
    return Measures(
        images=images_read,
        canvas=(canvas.shape[-2], canvas.shape[-1]),
        distances=tuple(d for coupled, sum_ in sums.items() for d in sum_.distances(coupled)),
        fields=tuple(f for coupled, sum_ in sums.items() for f in sum_.fields(coupled)),
        similarities=tuple(sums[True].similarities()),
        failures=tuple(failures),
    )


# --------------------------------------------------------------------------------------------------- attention distance


def attention_distance(attention: Attention) -> Tensor:
    """How far each head looks: the mean distance between query and key, weighted by attention.

    After Raghu et al., "Do Vision Transformers See Like Convolutional Neural Networks?" (2021, arXiv 2108.08810). What
    a query gives to class and register tokens is left out, and the rest counts as the whole; all queries count alike,
    and one that looks at nothing else has distance 0.

    Returns:
        (heads,) float64 on the CPU, in pixels.
    """
    index = attention.index.cpu()
    places = (index - attention.prefix).clamp(min=0)
    on_map = (index >= attention.prefix).double()  # (G, N)
    down, across = attention.stride
    width = attention.grid[1]
    points = torch.stack((places // width * down, places % width * across), dim=-1).double()
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # (G, N, N), exact
    heads = []
    for weights in attention.weights.detach().unbind(1):  # one at a time: they are the largest thing there is
        mass = weights.cpu().double() * on_map[:, None]
        far = (mass * apart).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
        heads.append((far * on_map).sum() / on_map.sum())
    return torch.stack(heads)


def even_distance(attention: Attention) -> float:
    """The distance, in pixels, of attention that is spread evenly over the tokens that the heads see."""
    seen = attention.weights.detach().amax(1, keepdim=True) > MASKED
    return float(attention_distance(replace(attention, weights=seen)))


# -------------------------------------------------------------------------------------------- effective receptive field


def receptive_field(network: nn.Module, image: Tensor, *, coupled: bool = True) -> list[Field]:
    """The effective receptive field of each feature map's centre, for one image.

    Args:
        network: a classifier, or the backbone of a detector or segmenter.
        image: (1, C, H, W) float, normalised.
        coupled: False turns the exchanges between the branches off.

    Raises:
        ChiasmError: when there are none to turn off.
    """
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        features = record(network, image, coupled=coupled).features
        return [
            Field(branch=f.branch, name=f.name, coupled=coupled, map=gradient_field(f.map, image)) for f in features
        ]


def gradient_field(feature: Tensor, image: Tensor) -> np.ndarray:
    """How much each pixel of `image` moves the centre of `feature`: the gradient's size, all channels together.

    After Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (2016, arXiv
    1701.04128). Their plain sum of the centre's channels is constant behind a layer norm, whatever the image; here each
    channel has a sign, drawn once.

    Args:
        feature: (1, D, h, w), computed from `image`.
        image: (1, C, H, W), a leaf that requires gradients.

    Returns:
        (H, W) float64 that sums to 1; 0 everywhere where the gradient is.
    """
    height, width = feature.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (feature.shape[1],), generator=generator).mul(2).sub(1).to(feature)
    centre = (feature[0, :, height // 2, width // 2] * signs).sum()
    (gradient,) = torch.autograd.grad(centre, image, retain_graph=True, allow_unused=True, materialize_grads=True)
    found = gradient[0].abs().cpu().double().sum(0).numpy()
    return found / (found.sum() or 1.0)


def field_side(values: np.ndarray, share: float = HALF) -> float:
    """The side, in pixels, of the square of the same area as the fewest pixels that hold that share of `values`."""
    largest_first = np.cumsum(np.sort(values, axis=None)[::-1])
    if largest_first[-1] == 0:
        return 0.0
    enough = share * largest_first[-1] * (1 - 1e-9)  # a sum of thousands is right to so many digits
    return float(np.sqrt(1 + np.searchsorted(largest_first, enough)))


# ------------------------------------------------------------------------------------------------------------------ CKA


class CKA:
    """Linear centred kernel alignment of two descriptions of the same things, which may come part by part.

    Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019, arXiv 1905.00414), in the form of
    features: |Y'X|^2 / (|X'X| |Y'Y|) in Frobenius norms, X and Y centred. Scatter matrices of the parts are joined
    about their own means (Chan et al., 1983), so none of the digits is lost to large means.
    """

    def __init__(self) -> None:
        self.count = 0
        self._split = 0
        self._mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add n things: their descriptions (n, p) and (n, q)."""
        both = torch.cat((x.detach().cpu().double(), y.detach().cpu().double()), dim=1)
        mean, more = both.mean(0), len(both)
        scatter = (both - mean).T @ (both - mean)
        if self.count:
            apart = mean - self._mean
            total = self.count + more
            self._scatter += scatter.addr_(apart, apart, alpha=self.count * more / total)
            self._mean += apart * (more / total)
        else:
            self._split, self._mean, self._scatter = x.shape[1], mean, scatter
        self.count += more

    @property
    def channels(self) -> tuple[int, int]:
        """p and q."""
        return self._split, len(self._mean) - self._split

    @property
    def value(self) -> float:
        """0..1; 0 where one of the two is everywhere the same."""
        p = self._split
        own = self._scatter[:p, :p].norm() * self._scatter[p:, p:].norm()
        return float(self._scatter[:p, p:].square().sum() / own) if own > 0 else 0.0


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA, 0..1, of the descriptions (n, p) and (n, q) of the same n things; see `CKA`."""
    sums = CKA()
    sums.add(x, y)
    return sums.value


def _compare(sums: CKA, conv: Tensor, tokens: Tensor) -> None:
    """A map (1, C, h, w) and tokens as a map (1, D, h', w'), place by place on the tokens' grid."""
    there = (tokens.shape[-2], tokens.shape[-1])
    sums.add(map_to_tokens(resize_map(conv, there))[0], map_to_tokens(tokens)[0])


# --------------------------------------------------------------------------------------------------------- over images


class _Sums:
    """What was found so far, over the images of one network with its exchanges on, or off."""

    def __init__(self) -> None:
        self.images = 0
        self._attentions: list[tuple[str, str, float]] = []  # branch, name, even
        self._heads: list[Tensor] = []
        self._fields: list[Field] = []
        self._crossings: dict[str, tuple[CKA, CKA]] = {}

    def add(self, recording: Recording) -> None:
        far = [attention_distance(attention) for attention in recording.attentions]
        if not self.images:
            self._attentions = [(a.branch, a.name, even_distance(a)) for a in recording.attentions]
            self._heads = [torch.zeros_like(heads) for heads in far]
        for sum_, heads in zip(self._heads, far, strict=True):
            sum_ += heads
        for crossing in recording.crossings:
            before, after = self._crossings.setdefault(crossing.name, (CKA(), CKA()))
            _compare(before, crossing.conv, crossing.tokens)
            _compare(after, crossing.conv_after, crossing.tokens_after)
        self.images += 1

    def add_fields(self, fields: list[Field]) -> None:
        if not self._fields:
            self._fields = fields
            return
        for sum_, found in zip(self._fields, fields, strict=True):
            sum_.map[:] += found.map

    def distances(self, coupled: bool) -> list[Distance]:
        return [
            Distance(branch=branch, name=name, coupled=coupled, heads=tuple((sum_ / self.images).tolist()), even=even)
            for (branch, name, even), sum_ in zip(self._attentions, self._heads, strict=True)
        ]

    def fields(self, coupled: bool) -> list[Field]:
        return [
            Field(branch=f.branch, name=f.name, coupled=coupled, map=f.map / (f.map.sum() or 1.0)) for f in self._fields
        ]

    def similarities(self) -> list[Similarity]:
        return [
            Similarity(
                name=name, before=before.value, after=after.value, places=after.count, channels=max(after.channels)
            )
            for name, (before, after) in self._crossings.items()
        ]
