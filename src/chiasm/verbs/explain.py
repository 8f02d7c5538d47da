"""chiasm explain: a model and images in; what each branch looked at as pictures, arrays and a page."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.config import ExplainConfig, default_of
from chiasm.errors import ChiasmError, DataError, ImageError, UnknownNameError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress
    from rich.table import Table
    from torch import Tensor

    from chiasm.explaining.explainer import Explainer
    from chiasm.explaining.faithfulness import Faithfulness
    from chiasm.explaining.measures import Measures
    from chiasm.explaining.record import Feature
    from chiasm.model_file import ModelInfo
    from chiasm.report.explained import Comparison, Explained, Look
    from chiasm.report.html import Html
    from chiasm.results import Explanation

_log = logging.getLogger("chiasm.explain")

PAGE, MEASURES, EVALUATION = "index.html", "measures.json", "evaluation.json"
# What is of no use without images.
OF_IMAGES = {"label": "--label", "top": "--top", "beside": "--beside", "measures": "--no-measures"}
# Images that are measured, and rows of the figures: the first ones.
MEASURED, ROWS = 32, 24


@dataclass(frozen=True, kw_only=True)
class ExplainResult:
    """What was explained, and where it is written.

    Attributes:
        model: as it was named.
        architecture, task: of it.
        trained: False for random weights.
        branches: ('conv', 'tokens'), or ('model',).
        images: of each image its explanations, with the coupling on and off, and the files written.
        measures: what local and global mean in this network; None where it was not asked for.
        evaluation: whether the maps are right; None where it was not asked for.
        failures: the images that could not be read.
        notes: what a reader must know before believing the pictures.
        page: index.html; figure.png and the JSON files lie beside it.
    """

    model: str
    architecture: str
    task: str
    trained: bool
    branches: tuple[str, ...]
    images: tuple[Explained, ...]
    measures: Measures | None
    evaluation: Faithfulness | None
    failures: tuple[ImageError, ...]
    notes: tuple[str, ...]
    page: Path

    @property
    def explanations(self) -> tuple[Explanation, ...]:
        """Of all images in order; of detectors and segmenters up to `top` of each."""
        return tuple(answer.explanation for image in self.images for answer in image.answers)


def explain(**flags: Any) -> ExplainResult:
    """Explain a model's answers; the keyword arguments are the fields of `ExplainConfig`.

    Files go to `out`: index.html, which needs no other file; of each image NAME.png, what each branch looked at, and
    NAME.npz, the raw maps; figure.png and features.png, all images side by side; measures.json; evaluation.json.

    Raises:
        ModelFileError, UnknownNameError: when `model` or one of `beside` names none, or the model has no such class.
        DataError: for a folder or glob without images, or data that does not fit the model.
        ChiasmError: for settings that cannot be, or files that cannot be written.
    """
    config = ExplainConfig.from_flags(**flags)
    _check(config)
    _check_out(config)
    paths = _paths(config)
    work = _Work(config, _opened(config))
    with _progress() as bar:
        try:
            for path in bar.over(paths, "explaining"):
                work.explain(path)
            work.measure(bar)
            work.evaluate(bar)
        except BaseException:
            if work.images:
                with suppress(ChiasmError):  # a full disk is told by the first error
                    _log.warning("stopped after %d of %d images; see %s", len(work.images), len(paths), work.write())
            raise
    return work.result(work.write())


def show(result: ExplainResult, config: ExplainConfig) -> int:
    """Print what was explained, what was measured and where it is; returns the exit code, 1 when images could not be
    read."""
    from rich.console import Console

    console = Console(highlight=False)
    if result.explanations:
        console.print(_explanations_table(result))
    read = len(result.images)
    if result.evaluation is not None:
        console.print(_evaluation_table(result.evaluation))
        read += result.evaluation.images
    print(f"page {result.page}")
    if result.failures:
        print(f"{len(result.failures)} of {read + len(result.failures)} images could not be read", file=sys.stderr)
    return 1 if result.failures else 0


def _explanations_table(result: ExplainResult) -> Table:
    from rich.table import Table
    from rich.text import Text

    from chiasm.report.evaluation import tail
    from chiasm.report.heat_panels import overlap_seen

    table = Table(box=None, pad_edge=False)
    branches = result.branches if len(result.branches) > 1 else ()
    table.add_column("image", overflow="ellipsis")
    table.add_column("explained", overflow="ellipsis")
    for name in ("model", *branches, *(("shared", "coupling off") if branches else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for image in result.images:
        for answer in image.answers:
            found, off = answer.explanation, answer.uncoupled
            cells = [_percent(found.scores.get(name)) for name in ("model", *branches)]
            if branches:
                cells += [_percent(overlap_seen(found)), _percent(None if off is None else overlap_seen(off))]
            table.add_row(*map(Text, (tail(image.source), found.subject, *cells)))
    return table


def _evaluation_table(evaluation: Faithfulness) -> Table:
    from rich.table import Table
    from rich.text import Text

    from chiasm.report.explanation_measures import SHORT, known_measures

    # Two lines a row, for 80 columns: a value and below it its interval, beside it what chance is.
    title = f"{evaluation.images:,} images, in percent, with 95 % intervals"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    measures = known_measures(evaluation)
    table.add_column("map", no_wrap=True)
    for header in (header for measure in measures for header in SHORT[measure]):
        table.add_column(header, justify="right", no_wrap=True)
    for scores in evaluation.maps:
        cells = [Text.assemble(scores.name, ("" if scores.coupled else "\n  exchanges off", "dim"))]
        for score in (getattr(scores, measure) for measure in measures):
            if score is None:
                cells += [Text("–"), Text("–")]
                continue
            low, high = score.value.low, score.value.high
            interval = "" if low is None or high is None else f"\n{100 * low:.1f}–{100 * high:.1f}"
            value, chance = (f"{100 * estimate.mean:.1f}" for estimate in (score.value, score.chance))
            cells += [Text.assemble(value, (interval, "dim")), Text(chance)]
        table.add_row(*cells)
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _check(config: ExplainConfig) -> None:
    if not config.images and not config.evaluate:
        raise ChiasmError("which images? Give files, folders or globs, or --evaluate DATA.")
    defaults = {field.name: default_of(field) for field in fields(config)}
    for name, flag in OF_IMAGES.items():
        if not config.images and getattr(config, name) != defaults[name]:
            raise ChiasmError(f"{flag} is for images, which --evaluate has no part in: give files, folders or globs.")
    for name in ("top", "limit"):
        if (value := getattr(config, name)) < 1:
            raise ChiasmError(f"{name} is {value}: expected 1 or more.")
    for name in ("split", "limit"):
        if config.evaluate is None and getattr(config, name) != defaults[name]:
            raise ChiasmError(f"--{name} is for --evaluate DATA, which is not given.")
    if Path(config.out).is_file():
        raise ChiasmError(f"{config.out}: a file; --out takes a folder.")


def _paths(config: ExplainConfig) -> list[str]:
    """The images; of what folders and globs give without the pictures of an earlier run in `out`."""
    from chiasm.data.images import find_images
    from chiasm.report.own_files import is_own

    out = os.path.realpath(config.out)

    def is_of_earlier_run(path: str) -> bool:
        return os.path.realpath(os.path.dirname(path)) == out and is_own(Path(path))

    paths = [path for path in find_images(config.images) if path in config.images or not is_of_earlier_run(path)]
    if config.images and not paths:
        raise DataError(f"{', '.join(config.images)}: no image here but pictures of an earlier run of explain.")
    return paths


def _check_out(config: ExplainConfig) -> None:
    """Refuse a folder where a file of a person would be written over: these three names cannot be numbered."""
    from chiasm.report.own_files import is_own

    measured = [MEASURES] if config.measures and config.images else []
    for name in (PAGE, *measured, *([EVALUATION] if config.evaluate is not None else [])):
        path = Path(config.out) / name
        if os.path.lexists(path) and not is_own(path):
            raise ChiasmError(f"{path}: not of an earlier run of explain, so it stays; give another folder with --out.")


def _opened(config: ExplainConfig) -> dict[str, Explainer]:
    """The models by their names in a figure. What the first cannot do is said before any other work, and a level that
    one of them does not have is found on a pattern in an image's place."""
    import torch

    from chiasm.explaining.explainer import open_explainer

    explainers: dict[str, Explainer] = {}
    for name, ref in _names([config.model, *config.beside]).items():
        explainer = open_explainer(ref, device=config.device, image_size=config.image_size, level=config.level)
        if not explainers:
            _check_model(config, explainer.info)
        if config.level is not None and explainer.info.task == "classify":
            height, width = explainer.info.preprocess.size
            pattern = torch.arange(3 * height * width).remainder(251).to(torch.uint8)
            explainer.explain(pattern.reshape(3, height, width), name)
        explainers[name] = explainer
    return explainers


def _check_model(config: ExplainConfig, info: ModelInfo) -> None:
    if config.label is not None and config.label not in info.labels:
        raise UnknownNameError("class", config.label, info.labels)
    if info.task != "classify" and config.level is not None:
        raise ChiasmError("--level is for classifiers: maps of objects and regions are made of every stage.")
    if info.task == "classify" and config.top != ExplainConfig.top:
        raise ChiasmError(f"--top is for detectors and segmenters; {config.model} has one answer for an image.")
    if config.evaluate is not None:
        from chiasm.explaining.ground_truth import open_truth

        open_truth(config.evaluate, config.split, info)  # what is wrong with it is said at once


def _names(refs: Sequence[str]) -> dict[str, str]:
    """What models are called in a figure, shortly: the run folder's name, or the file's, or the architecture's."""
    named: dict[str, str] = {}
    for ref in refs:
        path = Path(ref).expanduser()
        of_file = path.parent.resolve().name if path.stem == "model" else path.stem
        short = name = path.resolve().name if path.is_dir() else of_file if path.is_file() else ref
        number = 1
        while name in named:
            number += 1
            name = f"{short} ({number})"
        named[name] = ref
    return named


# --------------------------------------------------------------------------------------------------------------- work


class _Work:
    """What was made so far; it can be written at any time."""

    def __init__(self, config: ExplainConfig, explainers: dict[str, Explainer]) -> None:
        from chiasm.report.explanation import ExplanationPage
        from chiasm.report.own_files import is_own
        from chiasm.report.pictures import Names

        self.images: list[Explained] = []
        self.failures: list[ImageError] = []
        self.measures: Measures | None = None
        self.evaluation: Faithfulness | None = None
        self._config = config
        self._explainers = explainers
        self._name, self._explainer = next(iter(explainers.items()))
        self._files = Names(config.out, config.images, is_own)
        self._sections: list[tuple[str, Sequence[Html]]] = []
        self._page = ExplanationPage(self._name, self._explainer.branches, exchanges=self._explainer.exchanges)
        self._figures = _figures(explainers)
        self._pictures = [self._files.new(name, ".png") for name in self._figures]  # first: images may be called so
        self.notes = [
            f"{name} has random weights: what it looks at is chance, not knowledge."
            for name, explainer in explainers.items()
            if not explainer.info.trained
        ]
        for content in self.notes:
            _log.warning("%s", content)

    def explain(self, path: str) -> None:
        """Explain an image and write its files; one that cannot be read is named and left out."""
        from PIL import Image

        from chiasm.data.images import read_image
        from chiasm.report.explained import Explained, draw, store
        from chiasm.report.heat_panels import shrunk
        from chiasm.results.drawing import fit

        try:
            pixels = read_image(path)
        except ImageError as error:
            _log.warning("%s", error)
            self.failures.append(error)
            return
        image = fit(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
        look, features = _look(self._explainer, pixels, path, label=self._config.label, top=self._config.top)
        if all(answer.explanation.box is None for answer in look.answers):
            image = shrunk(image)  # nothing will be cut from it
        picture = self._files.new(path, ".png", ".npz")
        arrays = picture.with_suffix(".npz")
        store(look, arrays, features)
        _save(draw(look, image, f"{Path(path).name}: what {self._name} looked at"), picture)
        self._page.add(look, image)
        if len(self.images) < ROWS:
            looks = {
                name: look if name == self._name else self._beside(name, look, pixels) for name in self._explainers
            }
            self._figures["figure"].add_heat(image, looks)
            self._figures["features"].add_features(image, looks)
        self.images.append(Explained(source=path, answers=look.answers, picture=picture, arrays=arrays))

    def measure(self, bar: _Bar) -> None:
        """What local and global mean here, measured on the first images."""
        if not self._config.measures or not self.images:
            return
        from chiasm.explaining.measures import measure
        from chiasm.report.explanation_measures import measures_sections

        paths = [image.source for image in self.images[:MEASURED]]
        self.measures = measure(self._explainer, _read(paths), bar.tick(len(paths), "measuring"))
        self._sections += measures_sections(self.measures)
        self._write_json(MEASURES, self.measures.to_dict())

    def evaluate(self, bar: _Bar) -> None:
        """Whether the maps are right, on annotated images."""
        if self._config.evaluate is None:
            return
        from chiasm.explaining.faithfulness import evaluate_explanations
        from chiasm.report.explanation_measures import faithfulness_sections

        self.evaluation = evaluate_explanations(
            self._explainer,
            self._config.evaluate,
            split=self._config.split,
            limit=self._config.limit,
            tick=bar.tick(self._config.limit, "evaluating"),
        )
        for content in self.evaluation.notes:
            _log.warning("%s", content)
        for error in self.evaluation.failures:
            _log.warning("%s", error)
        self._sections += faithfulness_sections(self.evaluation)
        self._write_json(EVALUATION, self.evaluation.to_dict())

    def write(self) -> Path:
        """Write the page and the figures of all that was made, and remove what an earlier run measured and this one did
        not; returns the page's path."""
        from chiasm.report.own_files import is_own
        from chiasm.report.pictures import writing

        shown = [figure for figure in self._figures.values() if figure.rows]
        for figure, path in zip(shown, self._pictures, strict=False):
            _save(figure.draw(), path)
        info, config = self._explainer.info, self._config
        height, width = info.preprocess.size
        about = [
            ("model", config.model),
            ("architecture", info.architecture),
            *([("beside it", ", ".join(config.beside))] if config.beside else []),
            *([("explained", self._subject())] if self.images else []),
            ("image size", f"{height} x {width} px"),
            ("device", str(self._explainer.device)),
        ]
        page = self._page.page(
            notes=self.notes,
            about=about,
            figures=shown if config.beside else (),
            sections=self._sections,
            failures=self.failures,
        )
        path = Path(config.out) / PAGE
        page.write(path)
        for name, made in ((MEASURES, self.measures), (EVALUATION, self.evaluation)):
            if made is None and is_own(stale := path.with_name(name)):
                with writing(stale):
                    stale.unlink()
        return path

    def result(self, page: Path) -> ExplainResult:
        info = self._explainer.info
        return ExplainResult(
            model=self._config.model,
            architecture=info.architecture,
            task=info.task,
            trained=info.trained,
            branches=self._explainer.branches,
            images=tuple(self.images),
            measures=self.measures,
            evaluation=self.evaluation,
            failures=(*self.failures, *(self.evaluation.failures if self.evaluation else ())),
            notes=tuple(self.notes),
            page=page,
        )

    def _subject(self) -> str:
        if self._config.label is None:
            return "what the model says"
        found = any(image.answers for image in self.images)
        return f"the class '{self._config.label}'{'' if found else ', which was found nowhere'}"

    def _beside(self, name: str, first: Look, pixels: Tensor) -> Look:
        """What another model saw: of the same class where it has it."""
        explainer, label = self._explainers[name], None
        if first.answers:
            same = self._explainer.info.labels[first.answers[0].explanation.label]
            label = same if same in explainer.info.labels else None
        return _look(explainer, pixels, first.source, label=label, top=1, uncoupled=False)[0]

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        from chiasm.report.html import write_text
        from chiasm.report.own_files import MARK

        content = {"generator": MARK} | content
        write_text(Path(self._config.out) / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _look(
    explainer: Explainer, pixels: Tensor, path: str, *, label: str | None, top: int, uncoupled: bool = True
) -> tuple[Look, dict[str, list[Feature]]]:
    """What a model sees in an image, and its features by the prefix of their names in the NPZ file.

    `uncoupled`: also with the coupling off, where that can be.
    """
    from chiasm.report.explained import Answer, Look, stages_of
    from chiasm.results import Explanation

    found = explainer.explain(pixels, path, label=label, top=top)
    features = {"features/": explainer.record(pixels).features}
    off: list[Explanation | None] = [None] * len(found)
    if uncoupled and explainer.exchanges:
        for i, one in enumerate(found):  # of an object or region what is found of its class, in its place
            same = explainer.explain(pixels, path, label=one.label, coupled=False, top=1, box=one.box)
            off[i] = same[0] if same else None
        features["uncoupled/features/"] = explainer.record(pixels, coupled=False).features
    _, placement = explainer.canvas(pixels)
    ground = Explanation(
        source=path, size=placement.original, subject="", label=-1, scores={}, maps={}, region=placement.region
    )
    look = Look(
        ground=ground,
        canvas=placement.canvas,
        answers=tuple(Answer(explanation=one, uncoupled=same) for one, same in zip(found, off, strict=True)),
        stages=stages_of(*features.values()),
    )
    return look, features


def _figures(explainers: dict[str, Explainer]) -> dict[str, Comparison]:
    """The figures over all images, by the names of their files."""
    from chiasm.report.explained import Comparison

    first, *others = explainers
    branches = {name: explainers[name].branches for name in (*others, first)}  # the papers show what is coupled last
    return {
        "figure": Comparison(
            title="What each branch looked at",
            caption=f"Where the answer came from, for the first {ROWS} images: all models explain the class "
            "that the last one says, where they know it. Below: the probability that the model or its branch gives the "
            "class, and on how much of the image half of the map lies.",
            heat="how much a place speaks for the answer: little to most",
            branches=branches,
        ),
        "features": Comparison(
            title="What each branch holds",
            caption="Deep feature maps, whatever the class: bright where a place differs from the average place.",
            heat="how much a place differs from the average place: little to most",
            branches=branches,
        ),
    }


def _save(picture: Image, path: Path) -> None:
    from chiasm.report.own_files import signed
    from chiasm.report.pictures import writing
    from chiasm.report.whole_file import whole

    with writing(path), whole(path) as part:
        picture.save(part, "PNG", pnginfo=signed())


def _read(paths: Sequence[str]) -> Iterator[tuple[str, Tensor | ImageError]]:
    """The images once more, one at a time; one that has gone in between comes as the error."""
    from chiasm.data.images import read_image

    for path in paths:
        try:
            pixels: Tensor | ImageError = read_image(path)
        except ImageError as error:
            pixels = error
        yield path, pixels


# ----------------------------------------------------------------------------------------------------------- progress


class _Bar:
    """Progress on stderr, or nothing."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def over(self, paths: Sequence[str], what: str) -> Iterator[str]:
        """The paths, each counted once it has been dealt with."""
        tick = self.tick(len(paths), what)
        for done, path in enumerate(paths, start=1):
            yield path
            tick(done, len(paths))

    def tick(self, total: int, what: str) -> Callable[[int, int], None]:
        """A function to be told how many are done, and of how many."""
        if self._progress is None or not total:
            return lambda done, total: None
        progress, task = self._progress, self._progress.add_task(what, total=total)
        return lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _progress() -> Iterator[_Bar]:
    """Bars with the time left, on a terminal."""
    if not sys.stderr.isatty():
        yield _Bar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    ) as progress:
        yield _Bar(progress)
