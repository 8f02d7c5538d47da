"""Weights from elsewhere into a model, with an account of every key.

Published checkpoints name the same weights in their own ways ("dialects"). An architecture states them as tables beside
its model (`DIALECTS` in its file); for timm's models, timm's own `checkpoint_filter_fn` is asked. Everything is checked
before the first weight is copied, and no code is run from a file.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from chiasm.errors import CheckpointError

# Where training checkpoints keep their weights, best first: averaged ones only where there are no others, since most
# trainers that keep both measure and publish the plain ones.
WEIGHTS_UNDER = (
    "state_dict", "model", "model_state", "model_state_dict", "network", "net", "weights",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
)  # fmt: skip

OWN_NAMES = "the model's own names"
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # as torch.hub and OpenMMLab write it


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
        adapted: by the file's name: the model's, and what was done (classifier reset, input channels changed ...);
            where timm merges several entries into one weight, by the model's name.
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
            "adapted": [f"{to.key}: {to.what}" for to in self.adapted.values()],
            "left out": [f"{key}: {why}" for key, why in self.left_out.items()],
            "missing": list(self.missing),
        }
        lines = [f"weights of {self.source}, in {self.naming}"]
        for title, items in rows.items():
            shown = "; ".join(items[:2]) + ("; ..." if len(items) > 2 else "")
            lines.append(f"  {title:<9}{len(items):>6}  {shown}".rstrip())
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- dialects


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How another code base names the weights of an architecture. Both directions, no tensor changes.

    Attributes:
        name: whose names, in words.
        starts: pairs (ours, theirs) of a key's beginning, the first that fits counts; '{i}' stands for a number and
            '{i+1}' for that number plus one.
        parts: pairs (ours, theirs) of whole parts (between dots) of what follows the beginning.
    """

    name: str
    starts: tuple[tuple[str, str], ...]
    parts: tuple[tuple[str, str], ...] = ()

    def to_ours(self, key: str) -> str | None:
        """Our name of their `key`; None when it is none of theirs."""
        return self._translate(key, 1, 0)

    def to_theirs(self, key: str) -> str | None:
        """Their name of our `key`; None when they have no such weight."""
        return self._translate(key, 0, 1)

    def _translate(self, key: str, source: int, target: int) -> str | None:
        for start in self.starts:
            if found := _pattern(start[source]).match(key):
                i = int(found[1]) - ("{i+1}" in start[source]) if found.groups() else 0
                begin = start[target].replace("{i}", str(i)).replace("{i+1}", str(i + 1))
                rest = key[found.end() :] + "."
                for part in self.parts:
                    rest = rest.replace(f".{part[source]}.", f".{part[target]}.")
                return begin + rest[:-1]
        return None


@cache
def _pattern(start: str) -> re.Pattern[str]:
    """A key that begins with `start`, whose '{i}' or '{i+1}' is a number."""
    return re.compile(re.sub(r"\\{i(\\\+1)?\\}", r"(\\d+)", re.escape(start)) + r"(?=\.|$)")


def renamed_for(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A published state dict (or the checkpoint around it) under the model's names, as timm's `checkpoint_filter_fn`.

    Entries that the model has no name for keep theirs, so that strict loading still finds them.
    """
    state, _ = _unwrap(state_dict)
    reading = _read_keys(model, state)
    return {reading.names.get(key, key): value for key, value in state.items()}


class _Reading(NamedTuple):
    """One way to read a file: the model's name for each of its keys that has one."""

    naming: str
    names: dict[str, str]
    values: Mapping[str, Any]  # by the file's keys, with what timm's conversion made of them
    notes: dict[str, str]  # by the file's keys: what timm's conversion did


def _read_keys(model: nn.Module, state: Mapping[str, Any]) -> _Reading:
    """The reading of `state` that gives most weights of the model a value of the right shape."""
    expected = model.state_dict()
    namings: list[tuple[str, Callable[[str], str | None]]] = [(OWN_NAMES, lambda key: key)]
    namings += [(dialect.name, dialect.to_ours) for dialect in _beside(model, "DIALECTS") or ()]
    readings = []
    for prefix in _prefixes(state):
        bare = {key: key.removeprefix(prefix) for key in state}
        # Keys under the prefix come first, so that they win over others of the same name.
        order = sorted(state, key=lambda key: not key.startswith(prefix)) if prefix else list(state)
        for naming, to_ours in namings:
            names: dict[str, str] = {}
            taken = set()
            for key in order:
                ours = to_ours(bare[key])
                if ours in expected and ours not in taken:
                    names[key] = ours
                    taken.add(ours)
            readings.append(_Reading(naming, names, state, {}))
    best = max(readings, key=lambda reading: _fitting(expected, reading))
    return _converted_by_timm(model, best, state) or best


def _fitting(expected: Mapping[str, Tensor], reading: _Reading) -> tuple[int, int]:
    same = sum(expected[ours].shape == reading.values[key].shape for key, ours in reading.names.items())
    return same, len(reading.names)


def _converted_by_timm(model: nn.Module, reading: _Reading, state: Mapping[str, Any]) -> _Reading | None:
    """The reading through timm's own conversion for this model, where it has one and it fits as well or better."""
    convert = _beside(model, "checkpoint_filter_fn")
    if convert is None or _beside(model, "DIALECTS"):
        return None
    expected = model.state_dict()
    bare = {reading.names.get(key, key): value for key, value in state.items()}
    origin = {id(value): key for key, value in zip(state, bare.values(), strict=True)}
    by_name = {reading.names.get(key, key): key for key in state}
    try:
        converted = convert(dict(bare), model)
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError, AssertionError, TypeError):
        return None  # timm's conversions expect one of the layouts they know
    names, values, notes = {}, dict(state), {}
    for ours, value in converted.items():
        if ours not in expected or not isinstance(value, Tensor):
            continue
        key = origin.get(id(value)) or by_name.get(ours, ours)
        if id(value) not in origin:
            before = state[key].shape if key in state else None
            shapes = f" from {tuple(before)} to {tuple(value.shape)}" if before not in (None, value.shape) else ""
            notes[key] = f"converted by timm{shapes}"
        names[key], values[key] = ours, value
    result = _Reading(reading.naming if names == reading.names else "names that timm converts", names, values, notes)
    return result if _fitting(expected, result) >= _fitting(expected, reading) else None


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """What may stand in front of the model's names: each leading path of a fifth of the keys or more, and nothing.

    Averaged weights stand first: a chiasm training checkpoint keeps both, and the averaged ones are what it measured.
    """
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        counts.update(".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts))))
    common = [prefix for prefix, count in counts.items() if 5 * count >= len(state)]
    return ["", *sorted(common, key=lambda prefix: not prefix.startswith("ema."))]


def _beside(model: nn.Module, name: str) -> Any:
    """What the file of the model's class defines under `name`, or None."""
    return getattr(sys.modules[type(model).__module__], name, None)


# -------------------------------------------------------------------------------------------------------------- loading


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> WeightsReport:
    """Load published or own weights into `model`, whatever they are called.

    A classifier for another number of classes is left at its initial values, the first convolution is adapted to the
    model's input channels as timm does; both stand in the report as adapted. Nothing is changed unless all fits.

    Args:
        model: one of ours or any other module.
        source: a path (.safetensors, .pth, .pt, .ckpt ...), an http(s) URL (kept in torch.hub's cache), or a state
            dict; also a training checkpoint around one.

    Raises:
        CheckpointError: for a file that cannot be read, holds more than plain data, or is for another model. The model
            is as before.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    label = "state dict" if isinstance(source, Mapping) else str(source)
    state, left_out = _unwrap(source if isinstance(source, Mapping) else _read(source))
    if not state:
        held = ", ".join(islice(left_out, 5)) or "nothing"
        raise CheckpointError(f"{label}: holds no weights; expected a state dict, saw {held}.")
    expected = model.state_dict()
    reading = _read_keys(model, state)
    fresh: dict[str, Tensor] = {}
    loaded, renamed, adapted, misfits = [], {}, {}, []
    for key, ours in reading.names.items():
        value, wanted = reading.values[key], expected[ours]
        if value.shape == wanted.shape:
            fresh[ours] = value
            if key in reading.notes:
                adapted[key] = Adapted(ours, reading.notes[key])
            elif key == ours:
                loaded.append(key)
            else:
                renamed[key] = ours
        elif _is_classifier(model, ours) and value.shape[1:] == wanted.shape[1:]:
            what = f"reset, the file has {value.shape[0]} classes and the model {wanted.shape[0]}"
            adapted[key] = Adapted(ours, what)
        elif (stem := _adapt_stem(model, ours, value, wanted)) is not None:
            fresh[ours] = stem
            what = f"input channels from {value.shape[1]} to {wanted.shape[1]}"
            adapted[key] = Adapted(ours, what)
        else:
            misfits.append(f"'{ours}' has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
    if misfits or 2 * len(fresh) < len(expected):
        raise CheckpointError(_says_for_another_model(label, model, state, len(fresh), misfits))
    merged = bool(reading.notes)
    for key in state:
        if key not in reading.names:
            left_out[key] = _why_left_out(model, key, merged)
    given = set(reading.names.values())
    missing = tuple(key for key in expected if key not in given)
    model.load_state_dict(fresh, strict=False)
    return WeightsReport(
        source=label,
        naming=reading.naming,
        loaded=tuple(loaded),
        renamed=renamed,
        adapted=adapted,
        left_out=left_out,
        missing=missing,
    )


def _unwrap(content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint by name, and its other entries with the reason why they are no weights."""
    beside: dict[str, str] = {}
    path = ""
    while isinstance(content, Mapping):
        inner = next((key for key in WEIGHTS_UNDER if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None:
            break
        beside |= {f"{path}{key}": f"beside the weights in '{inner}'" for key in content if key != inner}
        path += f"{inner}."
        content = content[inner]
    if not isinstance(content, Mapping):
        return {}, {**beside, type(content).__name__: "not a state dict"}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    others = {f"{path}{key}": value for key, value in content.items() if not isinstance(value, Tensor)}
    return tensors, beside | {key: f"not a tensor but {type(value).__name__}" for key, value in others.items()}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (stated,) if isinstance(stated, str) else tuple(stated)


def _is_classifier(model: nn.Module, key: str) -> bool:
    return key.rpartition(".")[0] in _classifiers(model)


def _adapt_stem(model: nn.Module, key: str, value: Tensor, wanted: Tensor) -> Tensor | None:
    """The first convolution's weight for the model's input channels; None where that is not what differs."""
    name, _, kind = key.rpartition(".")
    if kind != "weight" or name not in first_convs(model) or value.ndim != 4:
        return None
    try:
        stem = adapt_input_conv(wanted.shape[1], value)
    except (NotImplementedError, AssertionError, ValueError):  # not from three channels
        return None
    return stem if stem.shape == wanted.shape else None


def _why_left_out(model: nn.Module, key: str, merged: bool) -> str:
    if merged:
        return "merged into other weights, or not needed, by timm's conversion"
    if any(part in key for part in ("relative_position_index", "attn_mask", "num_batches_tracked")):
        return "a buffer that the model makes itself"
    return f"no such weight in {_name(model)}"


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _says_for_another_model(
    label: str, model: nn.Module, state: Mapping[str, Tensor], fitting: int, misfits: list[str]
) -> str:
    """Why the weights cannot be loaded, in one line, with the architecture of ours that they fit."""
    seen = misfits[0] if misfits else f"it has '{next(iter(state))}', expected '{next(iter(model.state_dict()))}'"
    more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    better = _fits_which(state)
    hint = f" It fits {better}: chiasm.create_model('{better}')." if better and better != _name(model) else ""
    total = len(model.state_dict())
    return f"{label}: weights for another model, {fitting} of {total} fit {_name(model)}; {seen}{more}.{hint}"


def _fits_which(state: Mapping[str, Tensor]) -> str | None:
    """The architecture of ours whose weights these are (all but the classifier), or None."""
    from chiasm.models import create_model, list_models  # they import the architectures, which import this file

    shares = {}
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        expected = {key: value for key, value in model.state_dict().items() if not _is_classifier(model, key)}
        reading = _read_keys(model, state)
        same = sum(expected[ours].shape == state[key].shape for key, ours in reading.names.items() if ours in expected)
        shares[name] = same / len(expected)
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0.9 else None


# -------------------------------------------------------------------------------------------------------------- reading


def _read(source: str | Path) -> Any:
    """What a path or URL holds, read without running code from it."""
    if re.match(r"https?://", str(source)):
        return _read_file(_download(str(source)), str(source))
    return _read_file(Path(source).expanduser(), str(source))


def _download(url: str) -> Path:
    """Fetch `url` into torch.hub's cache, once; a sha256 prefix in its name is checked."""
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # Two addresses may end in one file name: only names that carry a hash are the same file wherever they come from.
    stated = HASH_IN_NAME.search(name)
    target = folder / (name if stated else f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}")
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(target), stated[1] if stated else None, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise CheckpointError(f"{url}: what was downloaded is damaged or another file ({error}); try again.") from error
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        reason = str(error).strip("<>")
        raise CheckpointError(
            f"{url}: cannot be downloaded ({reason}). Without a network, copy the file here and give its path."
        ) from error
    return target


def _read_file(path: Path, label: str) -> Any:
    if not path.exists():
        raise CheckpointError(
            f"{label}: no such file; expected a checkpoint (.safetensors, .pth, .pt, .ckpt) or a URL."
        )
    if path.is_dir():
        raise CheckpointError(f"{label}: a folder; expected a checkpoint file, such as {path / 'model.safetensors'}.")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read ({error.strerror}).") from error
    size = os.path.getsize(path)
    if size == 0:
        raise CheckpointError(f"{label}: empty (0 bytes); download or copy it again.")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{label}: a web page, not weights; download the file itself (the 'raw' link).")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{label}: a git-lfs pointer, not the weights; fetch them: git lfs pull")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e8:  # the length of the JSON that starts there
        return _read_safetensors(path, label, size)
    return _read_torch(path, label, size, zipped=head.startswith(b"PK"))


def _read_safetensors(path: Path, label: str, size: int) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{label}: incomplete or damaged .safetensors file ({size} bytes, {reason}).") from error


def _read_torch(path: Path, label: str, size: int, *, zipped: bool) -> Any:
    """torch.load of plain data. Of Python's own classes, only the empty shell argparse.Namespace is let through."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if named := re.search(r"(?:GLOBAL|class|function|type) ([\w.]+\.[\w.]+)", str(error)):
            raise CheckpointError(
                f"{label}: holds '{named[1]}' besides weights; code from files is never run. If you trust its origin, "
                f'convert it once: python -c "import torch; c = torch.load({str(path)!r}, weights_only=False); '
                "torch.save(c.get('model', c.get('state_dict', c)), 'weights.pth')\""
            ) from error
        reason = " ".join(str(error).split())[-120:]
    except Exception as error:  # damaged bytes, read as a pickle, fail in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
    raise CheckpointError(f"{label}: not a complete checkpoint ({size} bytes, {reason}); download or copy it again.")


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
