"""chiasm predict: images and videos in; a table, JSONL, CSV or COCO JSON out, row by row."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from chiasm.config import PredictConfig, default_of
from chiasm.errors import ChiasmError, DataError, ImageError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor

    from chiasm.data.video import Frame
    from chiasm.model_file import ModelInfo
    from chiasm.predictor import Predictor
    from chiasm.results import Detections, Result, Segmentation

    # Of an image that the stream has taken and not yet answered: the frame it is and, where it will be drawn on, its
    # pixels; None and None for a file.
    _Given = tuple[Frame | None, Tensor | None]

_log = logging.getLogger("chiasm.predict")

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".json": "coco"}

# Settings that are for some tasks alone, and what these are called.
TASKS_OF = {
    "top": (("classify",), "classifiers"),
    "threshold": (("detect", "instances"), "detectors"),
    "masks": (("instances", "segment"), "segmenters and detectors with masks"),
}


class Predictions:
    """The results, one by one in the order of the images; iterate once.

    Attributes:
        info: the model's description.
        seen: images looked at so far, unreadable ones among them.
        failed: how many of them could not be read; each was named in a warning and left out.
        total: how many images there are, where that is known.
        out: the file that holds the results, when one was asked for; there is nothing left to iterate then.
    """

    def __init__(self, predictor: Predictor, config: PredictConfig) -> None:
        self.info: ModelInfo = predictor.info
        self.seen = 0
        self.failed = 0
        self.total: int | None = None
        self.out: Path | None = None
        self._results = self._run(predictor, config)

    def __iter__(self) -> Iterator[Result]:
        return self._results

    def __next__(self) -> Result:
        return next(self._results)

    def _run(self, predictor: Predictor, config: PredictConfig) -> Iterator[Result]:
        from chiasm.report.pictures import Masks, Pictures

        given: deque[_Given | ImageError] = deque()
        masks = Masks(config.masks, config.images) if config.masks else None
        with ExitStack() as stack:
            pictures = None
            if config.draw:
                pictures = stack.enter_context(Pictures(config.draw, config.images, top=config.top, every=config.every))
            images = _images(config, given)
            # Masks and maps have the size of their images, so results of few are held at a time.
            usual = 32 if predictor.info.task == "classify" else 4
            batch_size = usual if config.batch_size is None else config.batch_size
            for outcome in predictor.stream(images, batch_size=batch_size, workers=config.workers):
                while isinstance(origin := given.popleft(), ImageError):
                    self._leave_out(origin)
                if isinstance(outcome, ImageError):
                    self._leave_out(outcome)
                    continue
                self.seen += 1
                if pictures:
                    pictures.add(outcome, *origin)
                if masks:
                    masks.add(cast("Detections | Segmentation", outcome), origin[0])
                yield outcome
            for error in given:
                self._leave_out(cast("ImageError", error))
        if not self.seen:
            raise DataError(f"{', '.join(config.images)}: no image named here; give files, folders or globs.")

    def _leave_out(self, error: ImageError) -> None:
        self.seen += 1
        self.failed += 1
        _log.warning("%s", error)


def predict(**flags: Any) -> Predictions:
    """Results of images and of the frames of videos; the keyword arguments are the fields of `PredictConfig`.

    Returns:
        the results, computed while you iterate. With `out` they have been written to that file on return.

    Raises:
        ModelFileError, UnknownNameError: when `model` names none.
        DataError: for a folder or glob without images, or no image at all.
        ChiasmError: for settings that cannot be or are not for the model's task, or a file that cannot be written.
    """
    config = PredictConfig.from_flags(**flags)
    _check(config)
    from chiasm.predictor import load

    predictor = load(
        config.model,
        device=config.device,
        image_size=config.image_size,
        branches=config.branches,
        threshold=config.threshold,
        zoom=config.zoom,
    )
    _check_task(config, predictor.info.task)
    if not predictor.info.trained:
        _log.warning("%s has random weights: what follows is chance, not knowledge.", config.model)
    results = Predictions(predictor, config)
    if config.out is not None:
        _to_file(results, config, Path(config.out))
    return results


def show(results: Predictions, config: PredictConfig) -> int:
    """Print the results, or where they are; returns the exit code, 1 when images could not be read."""
    if results.out is None:
        _write(results, sys.stdout, config)
    else:
        print(f"{results.seen - results.failed} predictions in {results.out}", file=sys.stderr)
    if results.failed:
        print(f"{results.failed} of {results.seen} images could not be read", file=sys.stderr)
    return 1 if results.failed else 0


def _check(config: PredictConfig) -> None:
    if not config.images:
        raise ChiasmError("which images? Give files, folders or globs, or - to read paths from stdin.")
    if config.top < 1:
        raise ChiasmError(f"top is {config.top}: expected 1 or more.")
    if config.every < 1:
        raise ChiasmError(f"every is {config.every}: expected 1 (all frames of a video) or more.")
    if config.out is not None and Path(config.out).is_dir():
        raise ChiasmError(f"{config.out}: a folder; expected a file's name such as {config.out}/predictions.csv.")


def _check_task(config: PredictConfig, task: str) -> None:
    """Refuse settings that this task has no use for."""
    defaults = {field.name: default_of(field) for field in fields(config)}
    for name, (tasks, of) in TASKS_OF.items():
        if task not in tasks and getattr(config, name) != defaults[name]:
            raise ChiasmError(f"--{name} is for {of}; {config.model} is for the task '{task}'.")
    if _format(config) == "coco" and task not in ("detect", "instances"):
        raise ChiasmError(
            f"COCO JSON is for detectors; {config.model} is for the task '{task}': take --format jsonl, or a name that "
            "ends in .jsonl."
        )


def _format(config: PredictConfig) -> str:
    """That of the name of `out`, unless another one than a table was asked for."""
    if config.out is None or config.format != "table":
        return config.format
    return FORMATS.get(Path(config.out).suffix.lower(), "table")


def _paths(config: PredictConfig) -> Iterator[str]:
    """The paths of images and videos, lazily; '-' stands for those on stdin, one a line."""
    for pattern in config.images:
        if pattern != "-":
            yield from _found(pattern, config)
            continue
        for line in sys.stdin:
            path = line.rstrip("\r\n")
            if os.path.isdir(path):
                yield from _found(path, config)
            elif path:
                yield path


def _found(pattern: str, config: PredictConfig) -> Iterator[str]:
    """What a pattern names, without the pictures that are written somewhere below."""
    from chiasm.data import images, video

    folders = [folder for folder in (config.draw, config.masks) if folder]
    return images.find_images([pattern], images.SUFFIXES | video.SUFFIXES, without=folders)


def _images(config: PredictConfig, given: deque[_Given | ImageError]) -> Iterator[str | tuple[str, Tensor]]:
    """What the predictor takes, videos as frames, and in `given` what each is; what is wrong with a video stands there
    at its end."""
    from chiasm.data.video import is_video, read_frames

    for path in _paths(config):
        if not is_video(path):
            given.append((None, None))
            yield path
            continue
        try:
            for frame, pixels in read_frames(path, config.every):
                given.append((frame, pixels if config.draw else None))
                yield frame.name, pixels
        except ImageError as error:
            given.append(ImageError(error.path, error.reason))  # without the frames that the caught one holds on to


def _to_file(results: Predictions, config: PredictConfig, out: Path) -> None:
    """Write beside `out` and rename at the end: a file of that name is always complete."""
    part = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8", newline="") as file:
            _write(results, file, config)
        part.replace(out)
    except OSError as error:
        raise ChiasmError(f"{out}: cannot be written ({error.strerror}); what there is lies in {part}.") from error
    except BaseException:
        if part.exists() and not part.stat().st_size:
            part.unlink()
        elif part.exists():
            _log.warning("stopped after %d images; their results are in %s", results.seen, part)
        raise
    results.out = out


def _write(results: Predictions, file: TextIO, config: PredictConfig) -> None:
    from chiasm.report.predictions import write_csv, write_jsonl, write_tables
    from chiasm.results.coco_json import write_coco

    with _progress(results, config, file) as bar:
        format, counted = _format(config), bar.count(results)
        if format == "jsonl":
            write_jsonl(counted, file, config.top)
        elif format == "csv":
            write_csv(counted, file, config.top)
        elif format == "coco":
            write_coco(cast("Iterator[Detections]", counted), results.info.labels, file)
        else:
            write_tables(counted, file, config.top, before=bar.hide)


def _count(config: PredictConfig) -> int | None:
    """How many images there are, frames of videos among them; None where a video does not tell."""
    from chiasm.data.video import count_frames, is_video

    total = 0
    for path in _paths(config):
        frames = count_frames(path) if is_video(path) else config.every
        if frames is None:
            return None
        total += -(-frames // config.every)
    return total


class _Bar:
    """Progress on stderr, or nothing."""

    def __init__(self, total: int | None, progress: Progress | None) -> None:
        self._progress = progress
        self._task = progress.add_task("images", total=total) if progress else None

    def count(self, results: Predictions) -> Iterator[Result]:
        """The results, each counted once it has been dealt with."""
        for result in results:
            yield result
            if self._progress and self._task is not None:
                self._progress.update(self._task, completed=results.seen)

    def hide(self) -> None:
        """Before something else is printed on the same terminal."""
        if self._progress:
            self._progress.stop()
            self._progress = None


@contextmanager
def _progress(results: Predictions, config: PredictConfig, file: TextIO) -> Iterator[_Bar]:
    """A bar with the time left where the number of images is known, else a spinner; on a terminal only, and not where
    the rows themselves appear on it."""
    rows_on_terminal = file.isatty() and config.format != "table"
    if not sys.stderr.isatty() or rows_on_terminal:
        yield _Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    if "-" not in config.images:
        results.total = _count(config)
    known = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    unknown = (SpinnerColumn(), TextColumn("{task.completed} images"))
    progress = Progress(
        *(known if results.total is not None else unknown),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # it would send rows that are piped elsewhere to the terminal
    )
    with progress:
        yield _Bar(results.total, progress)
