"""Which architecture a checkpoint is for, from the names and shapes of its weights.

Ours are all tried. timm has more than a thousand, so only those of them are tried that the file points to: by its own
name, by the name that a training checkpoint notes, or by the `config.json` beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import timm
from torch import Tensor, nn

from chiasm.models import ARCHITECTURES
from chiasm.models.checkpoints import classifiers, first_convs, is_classifier, read_weights, shapes_of, ways_to_read
from chiasm.models.dialects import Weight
from chiasm.models.sketch import sketch

NEAR = 0.9  # share of an architecture's weights from which on a file is taken to be meant for it


class Match(NamedTuple):
    """An architecture that weights fit.

    Attributes:
        architecture: its name.
        naming: whose names the weights have.
        share: of the architecture's weights that are there in their shape, classifier and first convolution aside.
        classes: of the classifier among the weights; 0 for none.
        in_chans: channels of the images that the first convolution reads.
    """

    architecture: str
    naming: str
    share: float
    classes: int
    in_chans: int

    @property
    def fits(self) -> bool:
        """Whether the weights are meant for it: nearly all are there, or all."""
        return self.share > NEAR


def identify(state: Mapping[str, Tensor], hints: tuple[str, ...] = ()) -> list[Match]:
    """The architectures that `state` fits best, as many as fit it alike; whether they really do, `Match.fits` says.

    Args:
        state: weights by name, from anywhere.
        hints: names that the file points to, the likeliest first: of ours, to choose among those that fit alike, and of
            timm's, to try where none of ours fits wholly.
    """
    shapes = shapes_of(state)
    matches: list[Match] = []
    for module in ARCHITECTURES:
        readings = [(way.naming, way.read(shapes)) for way in ways_to_read(shapes, module.DIALECTS)]
        first, *others = module.SIZES
        names = set(_known(first).state_dict())
        # The sizes of an architecture share most names; without those, none of them needs to be built.
        if any(2 * len(names & set(weights)) > min(len(names), len(weights)) for _, weights in readings):
            matches += [_match(name, _known(name), readings) for name in (first, *others)]
    best = max((match.share for match in matches), default=0.0)
    if best < 1:
        pointed_to = [fit(state, name) for name in hints]
        if (share := max((match.share for match in pointed_to), default=0.0)) > best:
            matches, best = pointed_to, share
    alike = [match for match in matches if match.share == best]
    return sorted(alike, key=lambda match: [*hints, match.architecture].index(match.architecture))


def fit(state: Mapping[str, Tensor], name: str, **model_args: Any) -> Match:
    """How `state` fits the architecture `name`, built with `model_args`."""
    model = sketch(name, **model_args)
    reading = read_weights(model, state)
    return _match(name, model, [(reading.naming, reading.weights)])


def hints_of(content: Any, source: str | Path) -> tuple[str, ...]:
    """Names of architectures that a checkpoint's `content`, its file's name or a file beside it point to."""
    path = Path(unquote(urlsplit(str(source)).path))
    named = [str(content.get(key)) for key in ("arch", "architecture") if isinstance(content, Mapping)]
    named += [stated] if (stated := _stated_beside(path)) else []
    text = re.sub(r"[^a-z0-9]+", "_", path.stem.lower())
    spoken = {name for name in timm.list_models() if f"_{name}_" in f"_{text}_"}
    found = [*named, *sorted(spoken, key=len, reverse=True)]
    return tuple(dict.fromkeys(name for name in found if timm.is_model(name)))


def _stated_beside(path: Path) -> str | None:
    """The architecture in timm's `config.json` in the same folder."""
    try:
        content = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    stated = content.get("architecture") if isinstance(content, dict) else None
    return stated if isinstance(stated, str) else None


_known = cache(sketch)


def _match(name: str, model: nn.Module, readings: list[tuple[str, dict[str, Weight]]]) -> Match:
    stems = tuple(f"{layer}.weight" for layer in first_convs(model))
    expected = {key: v for key, v in model.state_dict().items() if key not in stems and not is_classifier(model, key)}

    def fitting(weights: Mapping[str, Weight]) -> int:
        return sum(key in weights and weights[key].value.shape == value.shape for key, value in expected.items())

    naming, weights = max(readings, key=lambda reading: fitting(reading[1]))
    shapes = {key: weight.value.shape for key, weight in weights.items()}
    heads = [shapes[key] for layer in classifiers(model) if (key := f"{layer}.weight") in shapes]
    stem = next((shapes[key] for key in stems if key in shapes), (0, 3))
    return Match(
        architecture=name,
        naming=naming,
        share=fitting(weights) / len(expected),
        classes=heads[0][0] if heads and heads[0] else 0,
        in_chans=stem[1] if len(stem) > 1 else 3,
    )
