"""Whether heat maps tell the truth, measured: what happens when the places they name are taken away or given back, and
how much of them lies on the objects.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from chiasm.errors import ChiasmError, DataError, ImageError
from chiasm.explaining.ground_truth import Finder, open_truth
from chiasm.layers.tokens import resize_map
from chiasm.results import Explanation

if TYPE_CHECKING:
    from chiasm.data import ImageData
    from chiasm.explaining.explainer import Explainer

LIMIT = 200
STEPS = 12
LEVEL = 0.95
RESAMPLES = 2000
FEWEST = 8  # images that an interval can be drawn from
MODEL = "model"
_BATCH = 32  # canvases that go through the network at a time
_BLUR = 0.05  # standard deviation, over the canvas's longer side


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over images, with its 95 % interval by bootstrap over them.

    Attributes:
        mean: of the images' values.
        low, high: the interval; None of fewer than `FEWEST` images.
        images: how many.
    """

    mean: float
    low: float | None
    high: float | None
    images: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measure of a kind of map beside chance.

    Attributes:
        value: what it reaches.
        chance: what a map of nothing reaches: random of the same resolution for deletion and insertion, uniform for
            localisation.
        gain: how much better than chance, image by image: above 0 the map knows something.
    """

    value: Estimate
    chance: Estimate
    gain: Estimate


@dataclass(frozen=True, kw_only=True)
class MapScores:
    """What one kind of map is worth.

    Attributes:
        name: of the map: '<branch>/<method>' or 'fused'.
        coupled: False with the exchanges between the branches turned off.
        localisation: share of the map on the object's pixels, 0..1; None where that is not known.
        deletion: area under the probability while the map's places are taken away, 0..1, small is good; None of
            detectors and segmenters.
        insertion: the same while they are given back, large is good.
        curves: 'deletion' and 'insertion', and 'random deletion' and 'random insertion' of random maps: the mean
            probability with 0, 1/steps ... 1 of the pixels taken or given; empty of detectors and segmenters.
    """

    name: str
    coupled: bool
    localisation: Score | None
    deletion: Score | None
    insertion: Score | None
    curves: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much more a kind of map gains over chance with the exchanges on than with them off, image by image.

    Gains are compared, not areas: a network that was trained with its exchanges answers differently without them, and
    with its probabilities fall those of random maps. None where it is not known.
    """

    name: str
    localisation: Estimate | None
    deletion: Estimate | None
    insertion: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """What the maps of a model are worth.

    Attributes:
        data, split: what it was measured on.
        images: how many were read.
        unplaced: explanations whose object could not be found in the image's annotation; None where none has one.
        maps: a kind of map each; with the exchanges on, then off where they can be.
        differences: of the kinds that are there with the exchanges on and off.
        notes: what a reader must know before believing the numbers.
        failures: the images that could not be read.
    """

    data: str
    split: str
    images: int
    unplaced: int | None
    maps: tuple[MapScores, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    failures: tuple[ImageError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "data": self.data,
            "split": self.split,
            "images": self.images,
            "unplaced": self.unplaced,
            "maps": [
                {**asdict(scores), "curves": {k: list(v) for k, v in scores.curves.items()}} for scores in self.maps
            ],
            "coupled_less_uncoupled": [asdict(difference) for difference in self.differences],
            "notes": list(self.notes),
            "unreadable": [{"path": error.path, "reason": error.reason} for error in self.failures],
        }


def evaluate_explanations(
    explainer: Explainer,
    data: str | ImageData,
    *,
    split: str = "val",
    limit: int = LIMIT,
    steps: int = STEPS,
    seed: int = 0,
    tick: Callable[[int, int], None] | None = None,
) -> Faithfulness:
    """Measure a model's heat maps on annotated images.

    A classifier's maps are measured by deletion, insertion and, where the data tells the objects' places, localisation;
    a detector's and a segmenter's by localisation. Deletion and insertion watch the probability of the predicted class,
    as the map's own branch gives it where the branch has a head, else the model. With the exchanges off a classifier
    explains the class that it predicts with them on.

    Args:
        explainer: of the model.
        data: a data set, or its name; see `open_truth`.
        split: which images.
        limit: how many of them at most, evenly spaced.
        steps: of the curves of deletion and insertion.
        seed: of random maps and of the bootstrap.
        tick: told how many images are done, and of how many.

    Raises:
        DataError: for data that does not fit the model, or none of whose images can be read.
        ChiasmError: for a limit or steps below 1.
    """
    for name, given in (("limit", limit), ("steps", steps)):
        if given < 1:
            raise ChiasmError(f"{name} is {given}: expected 1 or more.")
    truth = open_truth(data, split, explainer.info)
    sums, failures = _Sums(steps), list[ImageError]()
    count = len(truth.split)
    chosen = np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int)).tolist()
    for done, index in enumerate(chosen, start=1):
        try:
            pixels, where = truth.read(index)
        except ImageError as error:
            failures.append(ImageError(error.path, error.reason))  # a fresh one does not hold on to the image
        else:
            _measure(explainer, pixels, truth.split.sources[index], where, sums, [seed, index])
        if tick is not None:
            tick(done, len(chosen))
    if len(failures) == len(chosen):
        raise DataError(f"none of the {len(chosen)} images can be read; the first: {failures[0]}")
    return Faithfulness(
        data=data if isinstance(data, str) else data.name,
        split=split,
        images=len(chosen) - len(failures),
        unplaced=sums.unplaced if truth.located else None,
        maps=tuple(sums.maps(seed)),
        differences=tuple(sums.differences(seed)),
        notes=truth.notes,
        failures=tuple(failures),
    )


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of one value per image, with its interval: the percentiles of means of images drawn anew.

    Raises:
        ValueError: without values.
    """
    if not len(values):
        raise ValueError("an estimate of nothing")
    given, count = np.asarray(values, dtype=np.float64), len(values)
    low = high = None
    if count >= FEWEST:
        rng = np.random.default_rng(seed)
        means = [rng.multinomial(count, np.full(count, 1 / count)) @ given / count for _ in range(RESAMPLES)]
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Estimate(mean=float(given.mean()), low=low, high=high, images=count)


# ----------------------------------------------------------------------------------------------- deletion and insertion


def perturbation_curves(
    probabilities: Callable[[Tensor], Tensor],
    canvas: Tensor,
    maps: Sequence[np.ndarray],
    *,
    steps: int = STEPS,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Deletion and insertion: what becomes of probabilities while the places that maps name go, or come.

    After Petsiuk et al., "RISE" (2018, arXiv 1806.07421). Pixels are taken in the order of the map, the largest first,
    equal ones in random order. Deletion paints them in the image's mean colour; insertion starts from the blurred image
    and gives them back.

    Args:
        probabilities: of canvases (B, C, h, w) the numbers that are watched, (B, V).
        canvas: (1, C, h, w), the image as the network takes it.
        maps: (h', w') each, on the canvas at any resolution.
        steps: equal shares of the pixels.
        rng: for the order of equal pixels.

    Returns:
        Deletion and insertion, (maps, V, steps + 1) float64 each: with 0, 1/steps ... 1 of the pixels taken or given.
    """
    height, width = canvas.shape[-2:]
    sigma = _BLUR * max(height, width)
    reach = min(int(np.ceil(2.5 * sigma)), min(height, width) - 1)
    blurred = F.gaussian_blur(canvas, [2 * reach + 1] * 2, [sigma] * 2)
    mean = canvas.mean(dim=(-2, -1), keepdim=True).expand_as(canvas)
    orders = [_order(values, (height, width), rng).to(canvas.device) for values in maps]
    # All curves share their ends: the image as it is, and nothing of it.
    whole, nothing, blur = probabilities(torch.cat((canvas, mean, blurred))).cpu().double().numpy()
    curves = np.empty((2, len(maps), len(whole), steps + 1))
    curves[0, ..., 0], curves[0, ..., -1], curves[1, ..., 0], curves[1, ..., -1] = whole, nothing, blur, whole
    between = [(m, k) for m in range(len(maps)) for k in range(1, steps)]
    # Canvases are made as they are needed, so memory does not grow with maps or steps.
    for which, (without, within) in enumerate(((canvas, mean), (blurred, canvas))):
        for start in range(0, len(between), _BATCH):
            part = between[start : start + _BATCH]
            taken = torch.stack([orders[m] * steps < k * height * width for m, k in part])[:, None]
            values = probabilities(torch.where(taken, within, without)).cpu().double().numpy()
            for (m, k), value in zip(part, values, strict=True):
                curves[which, m, :, k] = value
    return curves[0], curves[1]


def area(curve: np.ndarray) -> np.ndarray:
    """The area under curves (..., steps + 1) over 0..1, by trapezoids."""
    return (curve[..., :-1] + curve[..., 1:]).mean(-1) / 2


def _order(values: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """(h, w) int64: of each pixel of the canvas how many come before it."""
    spread = resize_map(torch.from_numpy(values)[None, None], size).flatten().numpy()
    before = np.empty(spread.size, dtype=np.int64)
    before[np.lexsort((rng.random(spread.size), -spread))] = np.arange(spread.size)
    return torch.from_numpy(before.reshape(size))


# --------------------------------------------------------------------------------------------------------- localisation


def localisation(explanation: Explanation, values: np.ndarray, mask: np.ndarray) -> float:
    """The share, 0..1, of a map (h, w) that lies on `mask` (H, W) bool of the image; of what lies on the image at all.

    A map that is 0 on all of it tells no place from another and counts as uniform.
    """
    whole = explanation.over_image(values)
    if not whole.any():
        whole = explanation.over_image(np.ones((1, 1), np.float32))
    return float(whole[mask].sum(dtype=np.float64) / whole.sum(dtype=np.float64))


# --------------------------------------------------------------------------------------------------------- over images


_Key = tuple[str, bool]  # a map's name, and whether the exchanges were on
# Of each measure what chance is, and whether more is better.
CHANCE = {
    "localisation": ("uniform localisation", 1),
    "deletion": ("random deletion", -1),
    "insertion": ("random insertion", 1),
}


class _Sums:
    """What was found so far: values by measure, kind of map and image."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.unplaced = 0
        self._images = 0
        self._values: dict[str, dict[_Key, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        self._curves: dict[_Key, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(steps + 1)))
        self._keys: dict[_Key, None] = {}  # in the order they came

    def next_image(self) -> None:
        self._images += 1

    def add(self, key: _Key, measure: str, value: float) -> None:
        """A value of this image."""
        self._keys[key] = None
        self._values[measure][key][self._images] = value

    def add_curve(self, key: _Key, kind: str, curve: np.ndarray) -> None:
        self._curves[key][kind] += curve
        self.add(key, kind, float(area(curve)))

    def maps(self, seed: int) -> Iterable[MapScores]:
        for key in sorted(self._keys, key=lambda key: not key[1]):
            curves = {
                kind: tuple((sum_ / len(self._values[kind][key])).tolist()) for kind, sum_ in self._curves[key].items()
            }
            yield MapScores(
                name=key[0],
                coupled=key[1],
                localisation=self._score(key, "localisation", seed),
                deletion=self._score(key, "deletion", seed),
                insertion=self._score(key, "insertion", seed),
                curves=curves,
            )

    def differences(self, seed: int) -> Iterable[Difference]:
        for name in [name for name, coupled in self._keys if coupled and (name, False) in self._keys]:
            yield Difference(name=name, **{measure: self._difference(name, measure, seed) for measure in CHANCE})

    def _score(self, key: _Key, measure: str, seed: int) -> Score | None:
        ours, theirs = self._values[measure][key], self._values[CHANCE[measure][0]][key]
        if not ours:
            return None
        return Score(
            value=estimate(list(ours.values()), seed),
            chance=estimate(list(theirs.values()), seed),
            gain=estimate(list(self._gains(key, measure).values()), seed),
        )

    def _gains(self, key: _Key, measure: str) -> dict[int, float]:
        chance, sign = CHANCE[measure]
        theirs = self._values[chance][key]
        return {i: sign * (value - theirs[i]) for i, value in self._values[measure][key].items()}

    def _difference(self, name: str, measure: str, seed: int) -> Estimate | None:
        on, off = (self._gains((name, coupled), measure) for coupled in (True, False))
        both = [on[i] - off[i] for i in on if i in off]
        return estimate(both, seed) if both else None


def _measure(
    explainer: Explainer, pixels: Tensor, source: str, where: Finder, sums: _Sums, seed: Sequence[int]
) -> None:
    """Explain one image, with the exchanges on and off, and measure the maps."""
    sums.next_image()
    classifies = explainer.info.task == "classify"
    label: int | None = None
    for coupled in (True, False) if explainer.exchanges else (True,):
        explanations = explainer.explain(pixels, source, label=label, coupled=coupled)
        _locate(explanations, where, coupled, sums)
        if classifies:
            (explanation,) = explanations
            label = explanation.label
            _perturb(explainer, pixels, explanation, coupled, sums, np.random.default_rng(seed))


def _locate(explanations: Sequence[Explanation], where: Finder, coupled: bool, sums: _Sums) -> None:
    """Localisation of an image's explanations; of several their mean."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for explanation in explanations:
        mask = where(explanation)
        uniform = 0.0 if mask is None else localisation(explanation, np.ones((1, 1), np.float32), mask)
        if mask is None or uniform == 0:
            sums.unplaced += coupled
            continue
        for name, values in explanation.maps.items():
            found[name].append((localisation(explanation, values, mask), uniform))
    for name, pairs in found.items():
        sums.add((name, coupled), "localisation", float(np.mean([value for value, _ in pairs])))
        sums.add((name, coupled), "uniform localisation", float(np.mean([uniform for _, uniform in pairs])))


def _perturb(
    explainer: Explainer,
    pixels: Tensor,
    explanation: Explanation,
    coupled: bool,
    sums: _Sums,
    rng: np.random.Generator,
) -> None:
    """Deletion and insertion of an image's maps and of random ones, one of each resolution."""
    maps = explanation.maps
    voters = list(explanation.scores)

    def probabilities(canvases: Tensor) -> Tensor:
        found = explainer.probabilities(canvases, coupled=coupled)
        return torch.stack([found[voter][:, explanation.label] for voter in voters], dim=1)

    shapes = sorted({values.shape for values in maps.values()})
    random = [rng.random(shape, dtype=np.float32) for shape in shapes]
    canvas = explainer.canvas(pixels)[0]
    both = perturbation_curves(probabilities, canvas, [*maps.values(), *random], steps=sums.steps, rng=rng)
    for kind, curves in zip(("deletion", "insertion"), both, strict=True):
        for i, (name, values) in enumerate(maps.items()):
            branch = name.partition("/")[0]
            voter = voters.index(branch if branch in voters else MODEL)
            sums.add_curve((name, coupled), kind, curves[i, voter])
            sums.add_curve((name, coupled), f"random {kind}", curves[len(maps) + shapes.index(values.shape), voter])
