"""chiasm evaluate: a model and annotated images in; a table, metrics.json and report.html out."""

from __future__ import annotations

import csv
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import EvaluateConfig, read_yaml
from chiasm.errors import ChiasmError, DataError, ImageError, nearest

if TYPE_CHECKING:
    from chiasm.data import ImageData, Split
    from chiasm.evaluation.measured import Measured
    from chiasm.model_file import ModelInfo
    from chiasm.predictor import Predictor

_log = logging.getLogger("chiasm.evaluate")

ALL = "all"
BATCHES = {"classify": 64, "detect": 8, "instances": 8, "segment": 8}  # large images, and large results


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What was measured, and where it is written.

    Attributes:
        model: as it was named.
        architecture: its name.
        task: what it does.
        trained: False for random weights.
        data, split: what it was measured on.
        measured: the measurements: `Classified`, `ObjectsMeasured` or `MapsMeasured` of `chiasm.evaluation`.
        notes: what a reader must know before believing the numbers.
        images_per_second: reading included.
        metrics, report: the files written.
    """

    model: str
    architecture: str
    task: str
    trained: bool
    data: str
    split: str
    measured: Measured
    notes: tuple[str, ...]
    images_per_second: float
    metrics: Path
    report: Path

    @property
    def scores(self) -> Any:
        """The numbers: `ClassificationScores`, `DetectionScores` or `SegmentationScores`, by the task."""
        return self.measured.scores

    @property
    def failures(self) -> tuple[ImageError, ...]:
        """The images that could not be read; they are left out of the scores."""
        return self.measured.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; shares are 0..1, a share of nothing is null."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "task": self.task,
            "trained": self.trained,
            "data": self.data,
            "split": self.split,
            **self.measured.to_dict(),
            "unreadable": [{"path": error.path, "reason": error.reason} for error in self.failures],
            "notes": list(self.notes),
            "images_per_second": self.images_per_second,
        }


def evaluate(**flags: Any) -> EvaluationResult:
    """Measure a model on annotated images; the keyword arguments are the fields of `EvaluateConfig`.

    The val split of data that has none of its own is drawn as it was for training, so that no training image is
    measured by mistake; where that cannot be known, `notes` say so. metrics.json and report.html are written to `out`,
    of a detector detections.json as well.

    Raises:
        ModelFileError, UnknownNameError: when `model` names none.
        DataError: for data that is missing, of another task, has classes that the model has not, or no readable image
            in the split.
        ChiasmError: for settings that cannot be, or files that cannot be written.
    """
    config = EvaluateConfig.from_flags(**flags)
    from chiasm.model_file import resolve_model
    from chiasm.predictor import Predictor
    from chiasm.report.evaluation import Setting
    from chiasm.report.html import write_text

    model, info = resolve_model(config.model)
    run = _run_folder(config.model)
    spec = config.data or info.data
    if spec is None:
        raise ChiasmError(
            f"{config.model} does not say what it was trained on: give the data, chiasm evaluate MODEL DATA."
        )
    drawn = _split_settings(config, flags, info)
    data = _open(config, spec, info, run, drawn)
    splits = _splits(data, config.split)
    if not info.trained and not Path(config.model).exists():
        # An architecture's name: random weights know no classes, so let them be the data's.
        model, info = resolve_model(config.model, num_classes=len(data.classes))
        info = replace(info, labels=data.classes)
    lookup, notes = _matched(data, splits, info)
    if not info.trained:
        notes.insert(0, "The weights are random: these numbers are chance, not knowledge.")
    notes += data.notes if config.split != ALL else ()
    if info.trained:
        notes += _trained_on(data, spec, config.split, drawn, info)
    for content in notes:
        _log.warning("%s", content)

    predictor = Predictor(
        model,
        info,
        device=config.device,
        image_size=config.image_size,
        branches=config.branches,
        zoom=config.zoom,
    )
    start = time.perf_counter()
    measured = _measure(predictor, data, splits, lookup, config)
    speed = measured.images / (time.perf_counter() - start)

    out = Path(config.out) if config.out else (_folder_of(config.model) / "evaluation")
    result = EvaluationResult(
        model=config.model,
        architecture=info.architecture,
        task=info.task,
        trained=info.trained,
        data=spec,
        split=config.split,
        measured=measured,
        notes=tuple(notes),
        images_per_second=speed,
        metrics=out / "metrics.json",
        report=out / "report.html",
    )
    write_text(result.metrics, json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    for name, content in measured.files().items():
        write_text(out / name, content)
    height, width = predictor.info.preprocess.size
    setting = Setting(
        subject=f"{data.name} ({config.split})",
        about=[
            ("model", config.model),
            ("architecture", info.architecture),
            ("data", spec),
            ("split", config.split),
            ("image size", f"{height} x {width} px"),
            ("device", str(predictor.device)),
            ("speed", f"{speed:.0f} images a second, reading included"),
        ],
        notes=notes,
        history=_history(run),
    )
    measured.page(setting).write(result.report)
    return result


def show(result: EvaluationResult, config: EvaluateConfig) -> int:
    """Print the numbers; returns the exit code, 1 when images could not be read."""
    measured = result.measured
    if config.format == "json":
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False, soft_wrap=True)
        told = f"{result.model} on {result.data} ({result.split}), {measured.images:,} images"
        console.print(Text(told, style="bold"))
        measured.print(console)
        console.print(Text(f"\nreport  {result.report}\nnumbers {result.metrics}"))
    if result.failures:
        total = measured.images + len(result.failures)
        print(f"{len(result.failures)} of {total} images could not be read", file=sys.stderr)
    return 1 if result.failures else 0


# -------------------------------------------------------------------------------------------------- what is measured on


def _folder_of(ref: str) -> Path:
    """Where a model's own files lie; for an architecture's name the current folder."""
    path = Path(ref).expanduser()
    return path if path.is_dir() else path.parent if path.is_file() else Path()


def _run_folder(ref: str) -> Path | None:
    """The run that a run folder or the model file in it belongs to."""
    folder = _folder_of(ref)
    return folder if Path(ref).expanduser().exists() and (folder / "config.yaml").is_file() else None


def _split_settings(config: EvaluateConfig, flags: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Seed and share of a val split that must be drawn: those given, else the training's, else the defaults."""
    return {
        name: flags[name] if flags.get(name) is not None else default if stored is None else stored
        for name, stored, default in (
            ("seed", info.seed, config.seed),
            ("val_fraction", info.val_fraction, config.val_fraction),
        )
    }


def _trained_on(data: ImageData, spec: str, split: str, drawn: dict[str, Any], info: ModelInfo) -> Iterator[str]:
    """What is to be said where images that the model was trained on may be among those measured."""
    if data.fingerprint() == info.fingerprint:
        if split in ("train", ALL):
            yield "The model was trained on images of this split: these numbers say how well it remembers them."
    elif drawn != {"seed": info.seed, "val_fraction": info.val_fraction} and info.fingerprint:
        yield (
            f"The model was trained with seed {info.seed} and val_fraction {info.val_fraction}, not with these: if "
            "this is the data it was trained on, images it was trained on are measured."
        )
    elif _same(spec, info.data):
        yield (
            "The model file does not say which images it was trained on: some may be measured here."
            if info.fingerprint is None
            else "Images have been added, taken away or renamed since training: some that it was trained on may be "
            "measured here."
        )


def _same(one: str, other: str | None) -> bool:
    """Whether two descriptions of data mean the same."""
    return other is not None and (
        one == other or Path(one).expanduser().absolute() == Path(other).expanduser().absolute()
    )


def _open(config: EvaluateConfig, spec: str, info: ModelInfo, run: Path | None, drawn: dict[str, Any]) -> ImageData:
    """The data for the model's task.

    Raises:
        DataError: for data of another task, saying whose.
    """
    from chiasm.data import open_data

    ignored = config.ignore_index
    if ignored is None and info.task == "segment" and run and _same(spec, info.data):
        ignored = read_yaml(run / "config.yaml").get("ignore_index")  # what the training ignored
    task = None if info.task == "classify" else info.task  # classes of images need not be asked for
    try:
        data = open_data(spec, task=task, strict=False, ignore_index=ignored, **drawn)
        data.need(info.task)
    except DataError as error:
        if not Path(spec).expanduser().exists():
            raise
        raise DataError(f"{config.model} is a model for '{info.task}'. {error}") from error
    return data


def _splits(data: ImageData, name: str) -> list[Split]:
    chosen = [split for split in data.splits.values() if len(split)] if name == ALL else [data.split(name)]
    if not any(len(split) for split in chosen):
        raise DataError(data.problems[0] if data.problems else f"{data.name}: no images in its split '{name}'.")
    return chosen


def _matched(data: ImageData, splits: Sequence[Split], info: ModelInfo) -> tuple[list[int], list[str]]:
    """Each class of the data as the model counts them (classes are matched by name; -1: it has none), and what is to
    be said of it.

    Raises:
        DataError: for a class of these images that the model does not have.
    """
    position = {label: i for i, label in enumerate(info.labels)}
    lookup = [position.get(name, -1) for name in data.classes]
    if info.task == "segment":  # what occurs in class maps is seen when they are read
        return lookup, []
    occurring = [data.classes[label] for label in sorted(set().union(*map(_labels, splits)))]
    if strangers := [name for name in occurring if name not in position]:
        raise _stranger(data, strangers, info)
    absent = [label for label in info.labels if label not in occurring]
    what = "images" if info.task == "classify" else "objects"
    told = f"No {what} here of {len(absent)} of the model's {len(info.labels)} classes: {_list(absent)}."
    return lookup, [told] if absent else []


def _labels(split: Split) -> set[int]:
    """The classes that occur in a split."""
    from chiasm.data.annotated import ObjectSplit

    if isinstance(split, ObjectSplit):
        return {label for i in range(len(split)) for label in split.objects(i).labels.tolist()}
    return set(split.labels)


def _stranger(data: ImageData, strangers: Sequence[str], info: ModelInfo) -> DataError:
    near = nearest(strangers[0], info.labels)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    mend = "Rename the folders" if info.task == "classify" else "Rename the classes"
    return DataError(
        f"{data.name}: class '{strangers[0]}'{f' and {len(strangers) - 1} more' if len(strangers) > 1 else ''} is "
        f"unknown to the model{hint}; its {len(info.labels)} classes are {_list(info.labels)}. "
        f"{mend} to match, or train on this data."
    )


def _list(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ------------------------------------------------------------------------------------------------------------ measuring


def _measure(
    predictor: Predictor, data: ImageData, splits: Sequence[Split], lookup: list[int], config: EvaluateConfig
) -> Measured:
    from chiasm.data.annotated import MapSplit, ObjectSplit
    from chiasm.data.source import Joined
    from chiasm.evaluation import classify, maps, objects
    from chiasm.evaluation.measured import Manner

    info = predictor.info
    manner = Manner(
        batch_size=BATCHES[info.task] if config.batch_size is None else config.batch_size,
        workers=config.workers,
        gallery=config.gallery,
        watch=_progress,
    )
    if info.task == "classify":
        return classify.measure(predictor, splits[0] if len(splits) == 1 else Joined(splits), lookup, manner)
    if info.task == "segment":
        return maps.measure(
            predictor,
            [(split, i) for split in splits if isinstance(split, MapSplit) for i in range(len(split))],
            lookup,
            lambda label: _stranger(data, [data.classes[label]], info),
            manner,
        )
    places = [(split, i) for split in splits if isinstance(split, ObjectSplit) for i in range(len(split))]
    return objects.measure(predictor, places, lookup, data.classes, manner)


def _progress(batches: Iterable[Any], total: int) -> Iterator[Any]:
    """A bar with the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(batches, "measuring", total, console=console, transient=True, disable=not console.is_terminal)


def _history(run: Path | None) -> list[dict[str, float]]:
    """The lines of the run's metrics.csv; none when it is not there or not whole."""
    from chiasm.tasks.validation import score_of

    if run is None:
        return []
    try:
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        return []
    return rows if all({"epoch", "train_loss"} <= set(row) and score_of(row) for row in rows) else []
