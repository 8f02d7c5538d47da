"""chiasm weights: whose checkpoint it is, which architecture it fits, the fate of every key; converted on request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import nn

from chiasm.config import WeightsConfig
from chiasm.errors import CheckpointError, ChiasmError
from chiasm.model_file import METADATA_KEY, RUN_FILE, ModelInfo, load_model, preprocess_of, save_model
from chiasm.models import create_model, list_models
from chiasm.models.checkpoint_file import read_checkpoint
from chiasm.models.checkpoints import WeightsReport, plan, weights_in
from chiasm.models.identify import fit, hints_of, identify
from chiasm.models.sketch import sketch

LINE = 1000  # characters; longer than any row


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a checkpoint and what becomes of it.

    Attributes:
        key: its name in the file.
        shape: of its tensor; None where it is none.
        fate: 'loaded', 'renamed', 'adapted' or 'left out'.
        weight: the architecture's weight that it goes into, '' for none.
        what: what was done to it, or why it was left out; '' where it is taken as it is.
    """

    key: str
    shape: tuple[int, ...] | None
    fate: str
    weight: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Identified:
    """What a checkpoint is.

    Attributes:
        file: as it was named.
        architecture: the one that its weights fit.
        known_by: what says so: 'its weights', 'a name and its weights', 'its own description' or '--model'.
        alternatives: other architectures that the weights fit as well.
        naming: whose names the weights have.
        classes: of the classifier in the file; 0 for none.
        in_chans: channels of the images that the first convolution reads.
        entries: all of the file, in its order.
        missing: weights of the architecture that the file lacks.
        out: the model file that was written, if one was.
    """

    file: str
    architecture: str
    known_by: str
    alternatives: tuple[str, ...]
    naming: str
    classes: int
    in_chans: int
    entries: tuple[Entry, ...]
    missing: tuple[str, ...]
    out: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """Which model the file is for, before it is read in full."""

    architecture: str
    known_by: str
    classes: int
    in_chans: int = 3
    alternatives: tuple[str, ...] = ()
    info: ModelInfo | None = None


def weights(**flags: Any) -> Identified:
    """Say what a checkpoint is, and with `out` write it as a model file; the flags are the fields of `WeightsConfig`.

    No code is run from the file. Of chiasm's architectures all are tried, of timm's those that the name of the file, an
    entry in it or a `config.json` beside it points to.

    Raises:
        CheckpointError: for a file that cannot be read, fits no architecture, or lacks what a model file needs.
        ChiasmError: for labels that are not as many as the classes, or flags that do not go together.
        ModelFileError: when the model file cannot be written.
    """
    config = WeightsConfig.from_flags(**flags)
    path = Path(config.file).expanduser() / RUN_FILE
    source = str(path) if path.is_file() else config.file
    _check(config, source)
    content = read_checkpoint(source)
    try:
        found = _find(config, source, content)
        args = dict(found.info.model_args if found.info else config.model_args)
        if found.in_chans != 3:
            args.setdefault("in_chans", found.in_chans)
        build = create_model if config.out else sketch  # without --out, shapes are all that is asked
        model = build(found.architecture, num_classes=found.classes, **args)
    except (TypeError, ValueError, AssertionError) as error:
        if not config.model_args:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ChiasmError(f"{config.model} cannot be built with {config.model_args}: {reason}.") from error
    report, values = plan(model, content, config.file)
    if config.out:
        info = _describe(config, found, report, model, args)
        model.load_state_dict(values, strict=False)
        save_model(config.out, model, info)
    return Identified(
        file=config.file,
        architecture=found.architecture,
        known_by=found.known_by,
        alternatives=found.alternatives,
        naming=report.naming,
        classes=found.classes,
        in_chans=found.in_chans,
        entries=tuple(_entries(report, content)),
        missing=report.missing,
        out=config.out,
    )


def show(result: Identified, config: WeightsConfig) -> int:
    """Print what a checkpoint is as a table, or as JSON."""
    if config.format == "json":
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=LINE)  # one line for each key in files and pipes
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("in the file", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("fate", no_wrap=True)
    table.add_column(f"in {result.architecture}", overflow="fold")
    for entry in result.entries:
        goes_to = entry.weight if entry.weight != entry.key else ""
        shape = "" if entry.shape is None else "x".join(map(str, entry.shape)) or "1"
        table.add_row(entry.key, shape, entry.fate, ": ".join(filter(None, (goes_to, entry.what))))
    for key in result.missing:
        table.add_row("", "", "missing", key)
    console.print(table, highlight=False, markup=False)
    for line in _summary(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _summary(result: Identified) -> Iterator[str]:
    classes = f"{result.classes} classes" if result.classes else "no classifier"
    yield f"\n{result.file}: {result.architecture}, {classes}, in {result.naming}; known by {result.known_by}"
    if result.alternatives:
        yield f"  the weights alone would fit {', '.join(result.alternatives)} as well: if so, say it with --model"
    counts = Counter(entry.fate for entry in result.entries)
    fates = ", ".join(f"{counts[fate]} {fate}" for fate in ("loaded", "renamed", "adapted", "left out"))
    yield f"  {len(result.entries)} entries: {fates}; {len(result.missing)} weights missing"
    if result.out:
        yield f"  written as a model file: {result.out}"


# ------------------------------------------------------------------------------------------------------------- finding


def _find(config: WeightsConfig, source: str, content: Any) -> _Finding:
    state, _ = weights_in(content, config.file)
    if config.model:
        match = fit(state, config.model, **config.model_args)
        return _Finding(architecture=config.model, known_by="--model", classes=match.classes, in_chans=match.in_chans)
    if (info := _own_description(source)) is not None:
        return _Finding(
            architecture=info.architecture,
            known_by="its own description",
            classes=len(info.labels),
            in_chans=len(info.preprocess.mean),
            info=info,
        )
    matches = identify(state, hints_of(content, source))
    if not (matches and matches[0].fits):
        near = f"; nearest is {matches[0].architecture}, {matches[0].share:.0%}" if matches and matches[0].share else ""
        raise CheckpointError(
            f"{config.file}: {len(state)} weights, the first '{next(iter(state))}', that fit no architecture of chiasm "
            f"and none of timm's that the file points to{near}. Name it: --model NAME ('chiasm models --all')."
        )
    match, *others = matches
    return _Finding(
        architecture=match.architecture,
        known_by="its weights" if match.architecture in list_models() else "a name and its weights",
        classes=match.classes,
        in_chans=match.in_chans,
        alternatives=tuple(other.architecture for other in others),
    )


def _own_description(source: str) -> ModelInfo | None:
    """What a chiasm model file says of itself; None for any other file."""
    try:
        with safe_open(source, framework="pt") as file:
            described = METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return None
    return load_model(source)[1] if described else None


def _entries(report: WeightsReport, content: Any) -> Iterator[Entry]:
    state, others = weights_in(content, report.source)
    same = set(report.loaded)
    for key in (*state, *others):
        shape = tuple(state[key].shape) if key in state else None
        if key in report.left_out:
            yield Entry(key=key, shape=shape, fate="left out", weight="", what=report.left_out[key])
        elif key in report.adapted:
            weight, what = report.adapted[key]
            yield Entry(key=key, shape=shape, fate="adapted", weight=weight, what=what)
        else:
            fate = "loaded" if key in same else "renamed"
            yield Entry(key=key, shape=shape, fate=fate, weight=report.renamed.get(key, key), what="")


# ------------------------------------------------------------------------------------------------------------- writing


def _check(config: WeightsConfig, source: str) -> None:
    if config.model_args and not config.model:
        raise ChiasmError("--model-args are those of an architecture: name it with --model.")
    if config.out is None:
        if config.labels:
            raise ChiasmError("--labels names the classes of the model file that --out writes; give --out as well.")
        return
    target = Path(config.out)
    if target.suffix != ".safetensors":
        raise ChiasmError(f"--out {config.out}: expected a model file's name, such as {target.stem}.safetensors")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ChiasmError(f"--out {config.out}: that is the file itself; give another name.")


def _describe(
    config: WeightsConfig, found: _Finding, report: WeightsReport, model: nn.Module, args: dict[str, Any]
) -> ModelInfo:
    """What the model file says of itself; refused where it would hold numbers that nobody trained."""
    untrained = [key for key in report.missing if not key.endswith("num_batches_tracked")]
    if not found.classes or untrained:
        lacks = f"{len(untrained)} weights, such as '{untrained[0]}'" if untrained else "a classifier"
        raise CheckpointError(
            f"{config.file}: lacks {lacks}, so it makes no model file. Train from it: chiasm train DATA --model "
            f"{found.architecture} --weights {config.file}"
        )
    labels = _labels(config.labels, found.classes)
    if found.info:
        return replace(found.info, labels=labels or found.info.labels)
    return ModelInfo(
        architecture=found.architecture,
        model_args=args,
        labels=labels or tuple(f"class {i}" for i in range(found.classes)),
        preprocess=preprocess_of(model),
    )


def _labels(file: str | None, classes: int) -> tuple[str, ...]:
    """The class names in a text file, one per line; none without a file."""
    if file is None:
        return ()
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise ChiasmError(f"--labels {file}: cannot be read ({reason}).") from error
    labels = tuple(name for line in lines if (name := line.strip()))
    if len(labels) != classes:
        raise ChiasmError(f"--labels {file}: {len(labels)} names, expected {classes}, one class per line.")
    return labels
