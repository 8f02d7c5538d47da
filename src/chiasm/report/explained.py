"""What models saw in an image, ready to be shown: as one picture, as arrays, as a row of the papers' figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chiasm.explaining.record import Feature
from chiasm.report.heat_panels import (
    BRANCHES,
    SMALL,
    Panel,
    feature_picture,
    heat_panel,
    overlap_seen,
    panels,
    resized,
    seen,
    shrunk,
    strength,
)
from chiasm.report.heat_sheet import Row, sheet
from chiasm.report.pictures import writing
from chiasm.report.whole_file import whole
from chiasm.results import Explanation

COUPLED, UNCOUPLED = "coupled, as the model works", "the same weights with the coupling off"
# A feature map shown beside those of other models has a place for every so many pixels of the canvas, or more.
FINE = 16
# Feature maps are stored in 16 bits where these hold their values; maps over the image with a longest side of so many
# pixels at most.
LARGEST, STORED_SIDE = 60_000.0, 1600
# What an NPZ file tells of each explanation, besides its maps.
TOLD = ("source", "size", "subject", "label", "scores", "region", "box")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer explained, and where there is one the same answer with the coupling off."""

    explanation: Explanation
    uncoupled: Explanation | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a branch holds behind a stage or block, as strength by place (`heat_panels.strength`).

    Attributes:
        branch, name: of the feature map.
        strength: (h, w).
        uncoupled: the same with the coupling off; None where that cannot be.
    """

    branch: str
    name: str
    strength: np.ndarray
    uncoupled: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one model saw in one image.

    Attributes:
        ground: an explanation without maps: the image's name and size, and what of it the network saw.
        canvas: height and width of the network's input in pixels.
        answers: the class, or the best objects, or the largest regions; empty where nothing was found.
        stages: in the order of the computation.
    """

    ground: Explanation
    canvas: tuple[int, int]
    answers: tuple[Answer, ...]
    stages: tuple[Stage, ...]

    @property
    def source(self) -> str:
        """The image's path."""
        return self.ground.source

    def fine_stage(self, branch: str) -> Stage | None:
        """The deepest feature map of a branch that still tells places apart; None of a branch without any."""
        least = 0.9 * self.canvas[0] * self.canvas[1] / FINE**2
        of_branch = [stage for stage in reversed(self.stages) if stage.branch == branch]
        fine = (stage for stage in of_branch if stage.strength.size >= least)
        return next(fine, of_branch[0] if of_branch else None)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What is kept of an image that is done.

    Attributes:
        source: its path.
        answers: the class, or the best objects, or the largest regions; empty where nothing was found.
        picture, arrays: the files written, NAME.png and NAME.npz (see `store`).
    """

    source: str
    answers: tuple[Answer, ...]
    picture: Path
    arrays: Path


def stages_of(coupled: Iterable[Feature], uncoupled: Sequence[Feature] = ()) -> tuple[Stage, ...]:
    """The features of a pass, and of a pass with the coupling off, as strengths."""
    found = [Stage(branch=f.branch, name=f.name, strength=strength(_values(f))) for f in coupled]
    off = {(f.branch, f.name): strength(_values(f)) for f in uncoupled}
    return tuple(replace(stage, uncoupled=off.get((stage.branch, stage.name))) for stage in found)


def draw(look: Look, image: Image.Image, title: str) -> Image.Image:
    """The panels of every answer as one picture.

    Args:
        look: what to draw.
        image: at any size.
        title: on top.
    """
    rows: list[Row] = []
    branches: tuple[str, ...] = ()
    for answer in look.answers:
        branches = answer.explanation.branches
        which = f"{answer.explanation.subject}: " if len(look.answers) > 1 else ""
        both = answer.uncoupled is not None
        rows.append(Row(panels=panels(image, answer.explanation), caption=f"{which}{COUPLED}" if both else which[:-2]))
        if answer.uncoupled is not None:
            rows.append(Row(panels=panels(image, answer.uncoupled), caption=f"{which}{UNCOUPLED}"))
    if not rows:
        nothing = Panel(image=shrunk(image), heading="the image", lines=("nothing was found here",))
        return sheet([Row(panels=[nothing])], title=title, heat="")
    return sheet(rows, title=title, branches=branches)


def store(look: Look, path: Path, features: Mapping[str, Sequence[Feature]]) -> None:
    """Write the arrays of an image to an NPZ file, which is there whole or not at all.

    In it are:

        about                          JSON: of each answer its prefix, what it is, its scores, where it lies
        conv/gradcam ...               each map at its own resolution, float32, sums to 1 or is 0
        conv/gradcam@image ...         the same over the image, float16, its largest value 1
        uncoupled/conv/gradcam ...     both with the coupling off
        2/conv/gradcam ...             of the second answer, where a detector or segmenter gives several
        features/conv/block 3 ...      what a branch holds behind a stage or block, (C, h, w)
        uncoupled/features/conv/...    the same with the coupling off

    Args:
        look: what was seen.
        path: of the file.
        features: by the prefix of their names.

    Raises:
        ChiasmError: when it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    about: list[dict[str, Any]] = []
    for number, answer in enumerate(look.answers, start=1):
        which = f"{number}/" if number > 1 else ""
        for prefix, one in ((which, answer.explanation), (f"{which}uncoupled/", answer.uncoupled)):
            if one is None:
                continue
            about.append({"prefix": prefix, "overlap": overlap_seen(one)} | {name: getattr(one, name) for name in TOLD})
            scale = min(1.0, STORED_SIDE / max(one.size))
            small = resized(one, (max(1, round(one.size[0] * scale)), max(1, round(one.size[1] * scale))))
            for name, values in one.maps.items():
                arrays[f"{prefix}{name}"] = values
                arrays[f"{prefix}{name}@image"] = small.over_image(values).astype(np.float16)
    for prefix, found in features.items():
        for feature in found:
            values = _values(feature)
            half = np.abs(values).max(initial=0) < LARGEST
            arrays[f"{prefix}{feature.branch}/{feature.name}"] = values.astype(np.float16 if half else np.float32)
    arrays["about"] = np.array(json.dumps(about, ensure_ascii=False))
    with writing(path), whole(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle


def _values(feature: Feature) -> np.ndarray:
    return feature.map[0].float().cpu().numpy()


# -------------------------------------------------------------------------------------------------- several models


@dataclass(kw_only=True)
class Comparison:
    """All images and all branches of several models side by side: the figure of the papers.

    Attributes:
        title, caption: what it shows.
        heat: what bright colours mean.
        branches: of each model, by its name.
        rows: of each image a panel per column.
    """

    title: str
    caption: str
    heat: str
    branches: Mapping[str, Sequence[str]]
    rows: list[list[Panel]] = field(default_factory=list)

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Of each the model's name, empty for the images themselves, and the branch in words."""
        return [("", "the image")] + [
            (name, BRANCHES.get(branch, branch)) for name, branches in self.branches.items() for branch in branches
        ]

    def add_heat(self, image: Image.Image, looks: Mapping[str, Look]) -> None:
        """A row of what spoke for the first answer of each model."""
        row = [Panel(image=shrunk(image, SMALL), heading="the image")]
        for name, branches in self.branches.items():
            for branch in branches:
                if not looks[name].answers:
                    row.append(_nothing(image, branch))
                    continue
                one = looks[name].answers[0].explanation
                panel = heat_panel(image, one, branch, side=SMALL)
                score = one.scores.get(branch, one.scores.get("model"))
                said = one.subject if score is None or one.box else f"{one.subject}: {score:.0%}"
                row.append(replace(panel, lines=(said, panel.lines[-1])))
        self.rows.append(row)

    def add_features(self, image: Image.Image, looks: Mapping[str, Look]) -> None:
        """A row of the deepest fine feature map of each branch of each model."""
        row = [Panel(image=seen(image, next(iter(looks.values())).ground, SMALL), heading="the image")]
        for name, branches in self.branches.items():
            for branch in branches:
                stage = looks[name].fine_stage(branch)
                if stage is None:
                    row.append(_nothing(image, branch))
                    continue
                picture = feature_picture(stage.strength, looks[name].ground, SMALL)
                row.append(Panel(image=picture, heading=BRANCHES.get(branch, branch), lines=(stage.name,)))
        self.rows.append(row)

    def draw(self) -> Image.Image:
        """The figure as one picture."""
        groups = [("", 1), *((name, len(branches)) for name, branches in self.branches.items())]
        return sheet([Row(panels=row) for row in self.rows], title=self.title, groups=groups, heat=self.heat)


def _nothing(image: Image.Image, branch: str) -> Panel:
    return Panel(
        image=shrunk(image.convert("L"), SMALL), heading=BRANCHES.get(branch, branch), lines=("nothing was found",)
    )
