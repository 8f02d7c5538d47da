"""Weights from elsewhere into a model, with an account of every key.

Published checkpoints name and lay out the same weights in their own ways (`chiasm.models.dialects`). Which way a file
follows is found by trying each; for timm's models, timm's own `checkpoint_filter_fn` is asked. Everything is checked
before the first weight is copied.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from chiasm.errors import CheckpointError
from chiasm.models.checkpoint_file import read_checkpoint
from chiasm.models.dialects import Dialect, Weight

# Where training checkpoints keep their weights, best first: averaged ones only where there are no others, since most
# trainers that keep both measure and publish the plain ones.
WEIGHTS_UNDER = (
    "state_dict", "model", "model_state", "model_state_dict", "network", "net", "weights",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
)  # fmt: skip

OWN_NAMES = "the model's own names"
NAMES_TIMM_CONVERTS = "names that timm converts"

# Entries of published files that are computed from the model's sizes; ours are not stored.
MADE_BY_THE_MODEL = ("relative_position_index", "attn_mask", "num_batches_tracked")


# -------------------------------------------------------------------------------------------------------------- report


class Adapted(NamedTuple):
    """Where an entry of the file went, and what was done to it."""

    key: str
    what: str


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What became of every entry of a checkpoint and of every weight of the model.

    Each entry of the file is in exactly one of `loaded`, `renamed`, `adapted` and `left_out`; each weight or buffer of
    the model is in `loaded`, a target of `renamed` or `adapted`, or in `missing`.

    Attributes:
        source: the file, URL or 'state dict'.
        naming: whose names the file uses.
        loaded: loaded under the same name.
        renamed: loaded, by the file's name: the model's.
        adapted: by the file's name: the model's, and what was done (query, key and value joined, columns reordered,
            channels from BGR to RGB, classifier reset ...); several entries may go into one weight. Where timm merges
            them, by the model's name.
        left_out: by the file's name: why the model did not take it.
        missing: weights of the model that the file lacks; they stay as they were initialised.
    """

    source: str
    naming: str
    loaded: tuple[str, ...]
    renamed: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, Adapted] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "source": self.source,
            "naming": self.naming,
            "loaded": list(self.loaded),
            "renamed": dict(self.renamed),
            "adapted": {key: {"key": to.key, "what": to.what} for key, to in self.adapted.items()},
            "left_out": dict(self.left_out),
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        rows = {
            "loaded": list(self.loaded),
            "renamed": [f"{old} -> {new}" for old, new in self.renamed.items()],
            "adapted": [f"{key} -> {to.key}: {to.what}" for key, to in self.adapted.items()],
            "left out": [f"{key}: {why}" for key, why in self.left_out.items()],
            "missing": list(self.missing),
        }
        lines = [f"weights of {self.source}, in {self.naming}"]
        for title, items in rows.items():
            shown = "; ".join(items[:2]) + ("; ..." if len(items) > 2 else "")
            lines.append(f"  {title:<9}{len(items):>6}  {shown}".rstrip())
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- readings


class Way(NamedTuple):
    """One way to read a file: what stands in front of its names, and whose they are (None for the model's own)."""

    prefix: str
    dialect: Dialect | None

    @property
    def naming(self) -> str:
        return self.dialect.name if self.dialect else OWN_NAMES

    def entries(self, state: Iterable[str]) -> dict[str, str]:
        """The file's keys by their name without the prefix; those that have it win over others of the same name."""
        entries: dict[str, str] = {}
        for key in sorted(state, key=lambda key: not key.startswith(self.prefix)):
            entries.setdefault(key.removeprefix(self.prefix), key)
        return entries

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Weight]:
        """The weights by our names."""
        entries = self.entries(state)
        if self.dialect is None:
            return {bare: Weight(state[key], (key,), "") for bare, key in entries.items()}
        weights = self.dialect.read({bare: state[key] for bare, key in entries.items()})
        return {ours: weight._replace(keys=tuple(entries[k] for k in weight.keys)) for ours, weight in weights.items()}


def ways_to_read(state: Iterable[str], dialects: Iterable[Dialect]) -> list[Way]:
    """Every way to read a file with these keys."""
    return [Way(prefix, dialect) for prefix in _prefixes(list(state)) for dialect in (None, *dialects)]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same entries without numbers: all that is needed to find how a file is to be read."""
    return {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in state.items()}


def fitting(expected: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> tuple[int, int]:
    """How many of a model's weights are there in their shape, and how many are there at all."""
    there = [key for key in expected if key in weights]
    return sum(expected[key].shape == weights[key].value.shape for key in there), len(there)


def renamed_for(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A published state dict (or the checkpoint around it) as the model's, as timm's `checkpoint_filter_fn`.

    Entries that the model has no place for keep their name, so that strict loading still finds them; buffers that it
    makes itself go.
    """
    state, _ = unwrap(state_dict)
    way = _best_way(model, state)
    expected, weights = model.state_dict(), way.read(state)
    result: dict[str, Any] = {}
    used: set[str] = set()
    for ours, weight in weights.items():
        if ours in expected:
            fitted = _adapt(model, ours, weight.value, expected[ours])
            result[ours] = weight.value if fitted is None else fitted[0]
            used.update(weight.keys)
    return result | {key: value for key, value in state.items() if key not in used and not _is_made(key)}


def _best_way(model: nn.Module, state: Mapping[str, Tensor]) -> Way:
    """The way to read `state` that gives most weights of the model a value of the right shape."""
    expected, shapes = model.state_dict(), shapes_of(state)
    ways = ways_to_read(state, beside(model, "DIALECTS") or ())
    return max(ways, key=lambda way: fitting(expected, way.read(shapes)))


class Reading(NamedTuple):
    """A file as it is read for a model.

    Attributes:
        naming: whose names it has.
        weights: what it holds of the model's weights, by the model's names.
        unused: why entries are of no use, by the file's names, where the way of reading tells.
    """

    naming: str
    weights: dict[str, Weight]
    unused: dict[str, str]


def read_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Reading:
    """What `state` holds of the model's weights, read in the way that fits best."""
    way, expected = _best_way(model, state), model.state_dict()
    weights = {ours: weight for ours, weight in way.read(state).items() if ours in expected}
    places = {key: way.dialect.to_ours(bare) for bare, key in way.entries(state).items()} if way.dialect else {}
    broken = {
        key: f"a part of '{place.key}', which is not whole in the file"
        for key, place in places.items()
        if place and place.parts > 1 and place.key in expected and place.key not in weights
    }
    return _converted_by_timm(model, way, weights, state) or Reading(way.naming, weights, broken)


def _converted_by_timm(
    model: nn.Module, way: Way, weights: Mapping[str, Weight], state: Mapping[str, Tensor]
) -> Reading | None:
    """The same through timm's own conversion for this model, where it has one and it fits as well or better."""
    convert = beside(model, "checkpoint_filter_fn")
    if convert is None or beside(model, "DIALECTS") is not None:
        return None
    expected, entries = model.state_dict(), way.entries(state)
    origin = {id(state[key]): key for key in entries.values()}
    try:
        converted = convert({bare: state[key] for bare, key in entries.items()}, model)
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError, AssertionError, TypeError):
        return None  # timm's conversions expect one of the layouts they know
    result = {}
    for ours, value in converted.items():
        if ours not in expected or not isinstance(value, Tensor):
            continue
        key = origin.get(id(value)) or entries.get(ours, ours)
        what = ""
        if id(value) not in origin:
            before = state[key].shape if key in state else None
            shapes = f" from {tuple(before)} to {tuple(value.shape)}" if before not in (None, value.shape) else ""
            what = f"converted by timm{shapes}"
        result[ours] = Weight(value, (key,), what)
    if fitting(expected, result) < fitting(expected, weights):
        return None
    same = {ours: weight.keys for ours, weight in result.items()} == {ours: w.keys for ours, w in weights.items()}
    changed = any(weight.what for weight in result.values())
    why = "merged into other weights, or not needed, by timm's conversion"
    return Reading(way.naming if same else NAMES_TIMM_CONVERTS, result, dict.fromkeys(state, why) if changed else {})


def _prefixes(keys: list[str]) -> list[str]:
    """What may stand in front of the model's names: each leading path of a fifth of the keys or more, and nothing.

    Averaged weights stand first: a chiasm training checkpoint keeps both, and the averaged ones are what it measured.
    """
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts))))
    common = [prefix for prefix, count in counts.items() if 5 * count >= len(keys)]
    return ["", *sorted(common, key=lambda prefix: not prefix.startswith("ema."))]


def beside(model: nn.Module, name: str) -> Any:
    """What the file of the model's class defines under `name`, or None."""
    return getattr(sys.modules[type(model).__module__], name, None)


# -------------------------------------------------------------------------------------------------------------- loading


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> WeightsReport:
    """Load published or own weights into `model`, whatever they are called.

    A classifier for another number of classes is left at its initial values, the first convolution is adapted to the
    model's input channels as timm does, a table of relative positions to its window: all of it stands in the report as
    adapted. Nothing is changed unless all fits.

    Args:
        model: one of ours or any other module, also compiled or with `features_only`.
        source: a path (.safetensors, .pth, .pt, .ckpt ...), an http(s) URL (kept in torch.hub's cache), or a state
            dict; also a training checkpoint around one.

    Raises:
        CheckpointError: for a file that cannot be read, holds more than plain data, or is for another model. The model
            is as before.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    model = model.model if isinstance(model, FeatureGetterNet) else model  # and so does features_only
    label = "state dict" if isinstance(source, Mapping) else str(source)
    report, fresh = plan(model, source if isinstance(source, Mapping) else read_checkpoint(source), label)
    model.load_state_dict(fresh, strict=False)
    return report


def plan(model: nn.Module, content: Any, label: str) -> tuple[WeightsReport, dict[str, Tensor]]:
    """What would become of every entry of a checkpoint's `content`, and the values that the model would take.

    Raises:
        CheckpointError: when the weights are not for this model, or there are none.
    """
    state, left_out = weights_in(content, label)
    expected = model.state_dict()
    naming, weights, unused = read_weights(model, state)
    fresh: dict[str, Tensor] = {}
    loaded, renamed, adapted, misfits = [], {}, {}, []
    for ours, (value, keys, what) in weights.items():
        wanted = expected[ours]
        if value.shape == wanted.shape:
            fresh[ours] = value
        elif is_classifier(model, ours) and value.shape[1:] == wanted.shape[1:]:
            what = f"reset, the file has {value.shape[0]} classes and the model {wanted.shape[0]}"
        elif (fitted := _adapt(model, ours, value, wanted)) is not None:
            fresh[ours] = fitted[0]
            what = "; ".join(filter(None, (what, fitted[1])))
        else:
            misfits.append(f"'{ours}' has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
        for key in keys:
            if what:
                adapted[key] = Adapted(ours, what)
            elif key == ours:
                loaded.append(key)
            else:
                renamed[key] = ours
    if misfits or 2 * len(fresh) < len(expected):
        raise CheckpointError(_says_for_another_model(label, model, state, len(fresh), misfits))
    used = {key for weight in weights.values() for key in weight.keys}
    left_out |= {key: unused.get(key) or _why_left_out(model, key) for key in state if key not in used}
    report = WeightsReport(
        source=label,
        naming=naming,
        loaded=tuple(loaded),
        renamed=renamed,
        adapted=adapted,
        left_out=left_out,
        missing=tuple(key for key in expected if key not in weights),
    )
    return report, fresh


def unwrap(content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint by name, and its other entries with the reason why they are no weights."""
    others: dict[str, str] = {}
    path = ""
    while isinstance(content, Mapping):
        inner = next((key for key in WEIGHTS_UNDER if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None:
            break
        others |= {f"{path}{key}": f"beside the weights in '{inner}'" for key in content if key != inner}
        path += f"{inner}."
        content = content[inner]
    if not isinstance(content, Mapping):
        return {}, {**others, type(content).__name__: "not a state dict"}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    values = {f"{path}{key}": value for key, value in content.items() if not isinstance(value, Tensor)}
    return tensors, others | {key: f"not a tensor but {type(value).__name__}" for key, value in values.items()}


def weights_in(content: Any, label: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same, for content that must hold weights.

    Raises:
        CheckpointError: when it holds none.
    """
    state, others = unwrap(content)
    if not state:
        held = ", ".join(islice(others, 5)) or "nothing"
        raise CheckpointError(f"{label}: holds no weights; expected a state dict, saw {held}.")
    return state, others


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits, as the model's `pretrained_cfg` states them."""
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (stated,) if isinstance(stated, str) else tuple(stated)


def is_classifier(model: nn.Module, key: str) -> bool:
    return key.rpartition(".")[0] in classifiers(model)


def _adapt(model: nn.Module, key: str, value: Tensor, wanted: Tensor) -> tuple[Tensor, str] | None:
    """`value` made to fit where it is of another shape, and how, in words; None where it cannot be."""
    if value.shape == wanted.shape:
        return None
    fitted = _adapt_stem(model, key, value, wanted)
    if fitted is None and (adapt_weight := beside(model, "adapt_weight")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch's, about timm's interpolation
            fitted = adapt_weight(model, key, value, wanted)
    return fitted if fitted is not None and fitted[0].shape == wanted.shape else None


def _adapt_stem(model: nn.Module, key: str, value: Tensor, wanted: Tensor) -> tuple[Tensor, str] | None:
    """The first convolution's weight for the model's input channels; None where that is not what differs."""
    name, _, kind = key.rpartition(".")
    if kind != "weight" or name not in first_convs(model) or value.ndim != 4:
        return None
    try:
        stem = adapt_input_conv(wanted.shape[1], value)
    except (NotImplementedError, AssertionError, ValueError):  # not from three channels
        return None
    return stem, f"input channels from {value.shape[1]} to {wanted.shape[1]}"


def _is_made(key: str) -> bool:
    return any(part in key for part in MADE_BY_THE_MODEL)


def _why_left_out(model: nn.Module, key: str) -> str:
    if _is_made(key):
        return "a buffer that the model makes itself"
    return f"no such weight in {name_of(model)}"


def name_of(model: nn.Module) -> str:
    """The architecture's name where the model states it, else its class."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _says_for_another_model(
    label: str, model: nn.Module, state: Mapping[str, Tensor], fits: int, misfits: list[str]
) -> str:
    """Why the weights cannot be loaded, in one line, with the architecture of ours that they fit."""
    from chiasm.models.identify import identify  # it builds the architectures, which import this file

    seen = misfits[0] if misfits else f"it has '{next(iter(state))}', expected '{next(iter(model.state_dict()))}'"
    more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    fitting = (match.architecture for match in identify(state) if match.fits)
    better = next((name for name in fitting if name != name_of(model)), None)
    hint = f" It fits {better}: chiasm.create_model('{better}')." if better else ""
    total = len(model.state_dict())
    return f"{label}: weights for another model, {fits} of {total} fit {name_of(model)}; {seen}{more}.{hint}"


# --------------------------------------------------------------------------------------------------------------- inputs


def first_convs(model: nn.Module) -> list[str]:
    """Names of the layers that read the image, as the model's `pretrained_cfg` states them; [] when it does not."""
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = (stated,) if isinstance(stated, str) else tuple(stated)
    modules = dict(model.named_modules())
    return [name for name in names if getattr(modules.get(name), "weight", None) is not None]


def input_channels(model: nn.Module) -> int:
    """The channels of the images that the model reads."""
    names = first_convs(model)
    if not names:
        return int(getattr(model, "in_chans", 3))
    layer: Any = model.get_submodule(names[0])
    return int(layer.weight.shape[1]) * getattr(layer, "groups", 1)
