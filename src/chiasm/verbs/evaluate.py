"""chiasm evaluate: a model and labelled images in; a table, metrics.json and report.html out."""

from __future__ import annotations

import csv
import heapq
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import EvaluateConfig
from chiasm.errors import ChiasmError, DataError, ImageError, nearest

if TYPE_CHECKING:
    from chiasm.data import ImageData, Split
    from chiasm.model_file import ModelInfo
    from chiasm.predictor import Predictor
    from chiasm.report.evaluation import Case, Illustrated
    from chiasm.results import Classification
    from chiasm.tasks.classify_metrics import ClassificationScores

_log = logging.getLogger("chiasm.evaluate")

ALL = "all"
LISTED = 24  # mistakes and disagreements that are named at most


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What was measured, and where it is written.

    Attributes:
        model: as it was named.
        architecture: its name.
        trained: False for random weights.
        data, split: what it was measured on.
        scores: the numbers.
        mistakes: the most confident ones, worst first.
        disagreements: images on which the branches disagree, the surest first; empty for a one-branch model.
        failures: the images that could not be read; they are left out of the scores.
        notes: what a reader must know before believing the numbers.
        images_per_second: reading included.
        metrics, report: the files written.
    """

    model: str
    architecture: str
    trained: bool
    data: str
    split: str
    scores: ClassificationScores
    mistakes: tuple[Case, ...]
    disagreements: tuple[Case, ...]
    failures: tuple[ImageError, ...]
    notes: tuple[str, ...]
    images_per_second: float
    metrics: Path
    report: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; shares are 0..1, a share of no images is null."""
        scores, agreement = self.scores, self.scores.agreement
        return {
            "model": self.model,
            "architecture": self.architecture,
            "trained": self.trained,
            "data": self.data,
            "split": self.split,
            "images": scores.top1.count,
            "top1": scores.top1.to_dict(),
            f"top{scores.k}": scores.topk.to_dict(),
            "balanced_accuracy": scores.balanced_accuracy,
            "macro_f1": scores.macro_f1,
            "calibration": asdict(scores.calibration),
            "branches": {
                branch.name: {"top1": branch.top1.to_dict(), "calibration": asdict(branch.calibration)}
                for branch in scores.branches
            },
            "agreement": agreement
            and {
                "share": agreement.share.to_dict(),
                "top1_when_agreed": agreement.when_agreed.to_dict(),
                "top1_when_not": agreement.when_not.to_dict(),
                "right_where_they_disagree": {**agreement.right_alone, "none": agreement.none_right},
                "either_right": agreement.either_right.to_dict(),
            },
            "classes": [asdict(score) for score in scores.classes],
            "labels": list(scores.labels),
            "confusion": [list(row) for row in scores.confusion],
            "mistakes": [asdict(case) for case in self.mistakes],
            "disagreements": [asdict(case) for case in self.disagreements],
            "unreadable": [{"path": error.path, "reason": error.reason} for error in self.failures],
            "notes": list(self.notes),
            "images_per_second": self.images_per_second,
        }


def evaluate(**flags: Any) -> EvaluationResult:
    """Measure a model on labelled images; the keyword arguments are the fields of `EvaluateConfig`.

    The val split of data that has none of its own is drawn as it was for training, so that no training image is
    measured by mistake; where that cannot be known, `notes` say so. metrics.json and report.html are written to `out`.

    Raises:
        ModelFileError, UnknownNameError: when `model` names none.
        DataError: for data that is missing, has classes that the model has not, or no readable image in the split.
        ChiasmError: for settings that cannot be, or files that cannot be written.
    """
    config = EvaluateConfig.from_flags(**flags)
    from chiasm.data import open_data
    from chiasm.model_file import resolve_model
    from chiasm.predictor import Predictor
    from chiasm.report.evaluation import evaluation_page
    from chiasm.report.html import write_text

    model, info = resolve_model(config.model)
    run = _run_folder(config.model)
    spec = config.data or info.data
    if spec is None:
        raise ChiasmError(
            f"{config.model} does not say what it was trained on: give the data, chiasm evaluate MODEL DATA."
        )
    drawn = _split_settings(config, flags, info)
    data = open_data(spec, strict=False, **drawn)
    data.need("classify")
    split = _split(data, config.split)
    if not info.trained and not Path(config.model).exists():
        # An architecture's name: random weights know no classes, so let them be the data's.
        model, info = resolve_model(config.model, num_classes=len(data.classes))
        info = replace(info, labels=data.classes)
    targets, notes = _targets(data, split, info)
    if not info.trained:
        notes.insert(0, "The weights are random: these numbers are chance, not knowledge.")
    notes += data.notes if config.split != ALL else ()
    if info.trained:
        notes += _trained_on(data, spec, config.split, drawn, info)
    for content in notes:
        _log.warning("%s", content)

    predictor = Predictor(model, info, device=config.device, image_size=config.image_size, branches=config.branches)
    start = time.perf_counter()
    scores, mistakes, disagreements, failures = _measure(predictor, split, targets, config)
    speed = scores.top1.count / (time.perf_counter() - start)

    out = Path(config.out) if config.out else (_folder_of(config.model) / "evaluation")
    result = EvaluationResult(
        model=config.model,
        architecture=info.architecture,
        trained=info.trained,
        data=spec,
        split=config.split,
        scores=scores,
        mistakes=mistakes,
        disagreements=disagreements,
        failures=failures,
        notes=tuple(notes),
        images_per_second=speed,
        metrics=out / "metrics.json",
        report=out / "report.html",
    )
    write_text(result.metrics, json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    height, width = predictor.info.preprocess.size
    page = evaluation_page(
        scores,
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
        mistakes=_illustrated(mistakes[: config.gallery], split),
        disagreements=_illustrated(disagreements[: config.gallery], split),
        failures=failures,
        notes=notes,
        history=_history(run),
    )
    page.write(result.report)
    return result


def show(result: EvaluationResult, config: EvaluateConfig) -> int:
    """Print the numbers; returns the exit code, 1 when images could not be read."""
    if config.format == "json":
        print(json.dumps(result.to_dict(), ensure_ascii=False))
    else:
        _print_tables(result)
    if result.failures:
        total = result.scores.top1.count + len(result.failures)
        print(f"{len(result.failures)} of {total} images could not be read", file=sys.stderr)
    return 1 if result.failures else 0


def _print_tables(result: EvaluationResult) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from chiasm.report.evaluation import interval, percent

    scores = result.scores
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{result.model} on {result.data} ({result.split}), {scores.top1.count:,} images", style="bold"))

    voters = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("answer of", "top-1", "95 % interval", "calibration error"):
        voters.add_column(column, justify="left" if column == "answer of" else "right")
    rows = [("the model", scores.top1, scores.calibration)]
    rows += [(f"{branch.name} branch alone", branch.top1, branch.calibration) for branch in scores.branches]
    for name, top1, calibration in rows:
        voters.add_row(name, percent(top1), interval(top1), f"{calibration.ece:.1%}")
    console.print(voters)
    if scores.k > 1:
        console.print(
            f"top-{scores.k} {percent(scores.topk)}, mean recall of the classes {scores.balanced_accuracy:.1%}"
        )
    if (agreement := scores.agreement) is not None:
        console.print(
            f"the branches agree on {percent(agreement.share)}; the model is right on {percent(agreement.when_agreed)} "
            f"of those and on {percent(agreement.when_not)} of the others"
        )
        right = [f"{name} {number:,}" for name, number in agreement.right_alone.items()]
        console.print(f"right where they disagree: {', '.join(right)}, none {agreement.none_right:,}")
    console.print()

    hardest = sorted((s for s in scores.classes if s.count), key=lambda s: s.f1 or 0.0)[:20]
    classes = Table(box=None, pad_edge=False, header_style="bold")
    classes.add_column("class, hardest first", overflow="fold")
    for column in ("images", "precision", "recall", "F1"):
        classes.add_column(column, justify="right")
    for score in hardest:
        numbers = ("–" if v is None else f"{v:.1%}" for v in (score.precision, score.recall, score.f1))
        classes.add_row(Text(score.label), f"{score.count:,}", *numbers)
    console.print(classes)
    console.print(Text(f"\nreport  {result.report}\nnumbers {result.metrics}"))


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


def _split(data: ImageData, name: str) -> Split:
    from chiasm.data.source import Joined

    chosen = [split for split in data.splits.values() if len(split)] if name == ALL else [data.split(name)]
    if not any(len(split) for split in chosen):
        raise DataError(data.problems[0] if data.problems else f"{data.name}: no images in its split '{name}'.")
    return chosen[0] if len(chosen) == 1 else Joined(chosen)


def _targets(data: ImageData, split: Split, info: ModelInfo) -> tuple[list[int], list[str]]:
    """Each image's class as the model counts them (classes are matched by name), and what is to be said of it.

    Raises:
        DataError: for a class of these images that the model does not have.
    """
    position = {label: i for i, label in enumerate(info.labels)}
    occurring = [data.classes[label] for label in sorted(set(split.labels))]
    if strangers := [name for name in occurring if name not in position]:
        near = nearest(strangers[0], info.labels)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise DataError(
            f"{data.name}: class '{strangers[0]}'{f' and {len(strangers) - 1} more' if len(strangers) > 1 else ''} is "
            f"unknown to the model{hint}; its {len(info.labels)} classes are {_list(info.labels)}. "
            "Rename the folders to match, or train on this data."
        )
    notes = []
    if absent := [label for label in info.labels if label not in occurring]:
        notes.append(f"No images here of {len(absent)} of the model's {len(info.labels)} classes: {_list(absent)}.")
    return [position[data.classes[label]] for label in split.labels], notes


def _list(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ------------------------------------------------------------------------------------------------------------ measuring


def _measure(
    predictor: Predictor, split: Split, targets: list[int], config: EvaluateConfig
) -> tuple[ClassificationScores, tuple[Case, ...], tuple[Case, ...], tuple[ImageError, ...]]:
    from chiasm.data.loader import eval_loader
    from chiasm.data.samples import eval_samples

    samples = eval_samples(split, "classify", predictor.info.preprocess)
    loader = eval_loader(samples, batch_size=config.batch_size, workers=config.workers)
    metrics = predictor.task.metrics()
    mistakes, disagreements = _Top(max(LISTED, config.gallery)), _Top(max(LISTED, config.gallery))
    for images, _, places in _progress(loader, len(loader)):
        indices = places.tolist()
        results = predictor.classify(images, [split.sources[i] for i in indices])
        metrics.update(results, [targets[i] for i in indices])
        for index, result in zip(indices, results, strict=True):
            true = result.labels[targets[index]]
            if result.label != true:
                mistakes.add(result.score, _case(index, true, result))
            if result.agreement is False:
                disagreements.add(min(float(p.max()) for p in result.branches.values()), _case(index, true, result))
    if not len(metrics):
        raise DataError(f"none of the {len(split)} images can be read; the first: {loader.failures[0]}")
    return metrics.compute(), mistakes.best(), disagreements.best(), tuple(loader.failures)


def _case(index: int, true: str, result: Classification) -> Case:
    from chiasm.report.evaluation import Case

    return Case(
        source=result.source,
        index=index,
        true=true,
        predicted=result.label,
        probability=result.score,
        votes={name: (vote, float(result.branches[name].max())) for name, vote in result.votes.items()},
    )


class _Top:
    """The `count` cases of the highest value; among equals the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[float, int, Case]] = []

    def add(self, value: float, case: Case) -> None:
        heapq.heappush(self._heap, (value, -case.index, case))
        if len(self._heap) > self.count:
            heapq.heappop(self._heap)

    def best(self) -> tuple[Case, ...]:
        return tuple(case for _, _, case in sorted(self._heap, key=lambda entry: entry[:2], reverse=True))


def _progress(batches: Iterable[Any], total: int) -> Iterator[Any]:
    """A bar with the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(batches, "measuring", total, console=console, transient=True, disable=not console.is_terminal)


def _illustrated(cases: Sequence[Case], split: Split) -> list[Illustrated]:
    from PIL import Image

    from chiasm.report.evaluation import Illustrated

    return [
        Illustrated(case=case, image=Image.fromarray(split.read(case.index).permute(1, 2, 0).numpy())) for case in cases
    ]


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
