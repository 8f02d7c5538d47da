"""The page of `chiasm explain`: what each branch looked at, image by image, stage by stage, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

import numpy as np
from PIL import Image

from chiasm import __version__
from chiasm.errors import ImageError
from chiasm.report.evaluation import tail
from chiasm.report.explained import UNCOUPLED, Comparison, Look
from chiasm.report.explanation_measures import evenly
from chiasm.report.heat_panels import (
    BRANCHES,
    SIDE,
    Panel,
    disagreement_words,
    every_map,
    feature_picture,
    heat_scale,
    overlap_seen,
    panels,
    seen,
    shrunk,
)
from chiasm.report.html import (
    Card,
    Html,
    Page,
    Picture,
    cards,
    details,
    embedded,
    escape,
    gallery,
    heading,
    legend,
    note,
    table,
    text,
)
from chiasm.report.own_files import MARK

# Images that the page shows; each takes some 300 kB.
SHOWN = 24
# Feature maps of a branch that the page shows, evenly over its depth, and the side of each in pixels.
STAGES, STAGE_SIDE = 7, 100
# Side of the pictures in a table of several models: five stand side by side.
CELL = 180

OFF_MEANS = (
    "With the coupling off nothing passes between the branches. The weights are the same and were never trained that "
    "way, so this shows what the exchanges carry, not what two networks trained alone would see; for that, train them "
    "and give them with --beside."
)


class ExplanationPage:
    """Collects what the page shows, image by image, so that none need be kept.

    Args:
        model: what it is called.
        branches: of the model.
        exchanges: whether the coupling can be turned off.
    """

    def __init__(self, model: str, branches: Sequence[str], *, exchanges: bool) -> None:
        self._model = model
        self._branches = branches
        self._exchanges = exchanges
        self._images: list[tuple[str, list[Html]]] = []
        self._overlaps: list[float] = []
        self._off: list[float] = []
        self.count = 0

    def add(self, look: Look, image: Image.Image) -> None:
        """Add an image; beyond `SHOWN` it counts, but is not shown."""
        self.count += 1
        for answer in look.answers:
            for found, sums in ((answer.explanation, self._overlaps), (answer.uncoupled, self._off)):
                if found is not None and (shared := overlap_seen(found)) is not None:
                    sums.append(shared)
        if len(self._images) < SHOWN:
            self._images.append((_title(look), _image(look, image)))

    def page(
        self,
        *,
        notes: Sequence[str],
        about: Sequence[tuple[str, str]],
        figures: Sequence[Comparison] = (),
        sections: Sequence[tuple[str, Sequence[Html]]] = (),
        failures: Sequence[ImageError] = (),
    ) -> Page:
        """Build the page.

        Args:
            notes: what a reader must know before believing the pictures.
            about: name and value of each circumstance.
            figures: what is shown of all images side by side.
            sections: what was measured: title and pieces of each.
            failures: images that could not be read.
        """
        plural = "image" if self.count == 1 else "images"
        page = Page(f"What {self._model} looked at", subtitle=f"{self.count:,} {plural}", generator=MARK)
        page.section("", *map(note, notes), *self._headline(), *self._reading())
        for figure in figures:
            headings = [Html("<br>".join(escape(word) for word in column if word)) for column in figure.columns]
            rows = [[_cell(panel) for panel in row] for row in figure.rows]
            page.section(figure.title, text(figure.caption), table(headings, rows, words=len(headings)))
        for title, pieces in self._images:
            page.section(title, *pieces)
        if self.count > len(self._images):
            left = self.count - len(self._images)
            page.section("", text(f"{left:,} more are in the folder of this page, as NAME.png and NAME.npz."))
        for title, measured in sections:
            page.section(title, *measured)
        if failures:
            page.section(
                "Images that could not be read",
                table(["image", "why"], [[e.path, e.reason] for e in failures], words=2),
            )
        made = ("made", f"{datetime.now():%Y-%m-%d %H:%M} by chiasm {__version__}")
        page.section("How this was made", table(["", ""], [*about, made], words=2))
        return page

    def _headline(self) -> list[Html]:
        items = []
        if self._overlaps:
            detail = "mean share of their heat maps that lies on the same places"
            items.append(Card(f"{np.mean(self._overlaps):.0%}", "of where the branches look is shared", detail))
        if self._off:
            items.append(Card(f"{np.mean(self._off):.0%}", "with the coupling off", "the same weights, no exchange"))
        return [cards(items)] if items else []

    def _reading(self) -> list[Html]:
        if not self.count:
            return []
        pieces = [
            text(
                "Bright places are those that the answer rests on, as far as the method can tell; a map shows where a "
                "network looked, not whether it was right. Each map is scaled by itself, so compare "
                "where the light lies, not how bright it is. 'Half of it on 9%' tells how local a map is: the "
                "brightest 9% of the image hold half of it."
            ),
            Html(f'<p class="legend"><span>little {embedded(heat_scale(), "from black to yellow")} most</span></p>'),
        ]
        if len(self._branches) == 2:
            pieces.append(legend(disagreement_words(self._branches)))
        return [*pieces, text(OFF_MEANS)] if self._exchanges else pieces


def _cell(panel: Panel) -> Html:
    words = "<br>".join(map(escape, panel.lines))
    return Html(f"{embedded(panel.image, panel.heading, side=CELL)}<figcaption>{words}</figcaption>")


# ----------------------------------------------------------------------------------------------------------- one image


def _title(look: Look) -> str:
    if len(look.answers) == 1:
        return f"{tail(look.source)}: {look.answers[0].explanation.subject}"
    return tail(look.source)


def _image(look: Look, image: Image.Image) -> list[Html]:
    pieces: list[Html] = []
    if not look.answers:
        pieces += [text("Nothing was found here, so there is nothing to explain."), _row([Panel(image=shrunk(image))])]
    several = len(look.answers) > 1
    for answer in look.answers:
        if several:
            pieces.append(heading(answer.explanation.subject))
        pieces.append(_row(panels(image, answer.explanation)))
        if answer.uncoupled is not None:
            pieces += [text(f"{UNCOUPLED.capitalize()}:"), _row(panels(image, answer.uncoupled))]
        every = every_map(image, answer.explanation)
        if len(every) > len(answer.explanation.branches):
            pieces.append(details("Every map, by every method", _row(every)))
    if look.stages:
        pieces.append(details("Stage by stage: what each branch holds", *_stages(look, image)))
    return pieces


def _row(found: Iterable[Panel]) -> Html:
    return gallery((Picture(panel.image, (panel.heading, *panel.lines)) for panel in found), side=SIDE, shape="row")


def _stages(look: Look, image: Image.Image) -> list[Html]:
    pieces = [
        text(
            "Bright: places whose features differ most from the average place of that map. Early maps follow edges, "
            "late ones what the network takes for things."
        )
    ]
    whole = embedded(seen(image, look.ground, STAGE_SIDE), "what the network saw", side=STAGE_SIDE)
    for branch in dict.fromkeys(stage.branch for stage in look.stages):
        of_branch = [stage for stage in look.stages if stage.branch == branch]
        shown = evenly(of_branch, STAGES)
        rows = [["coupled", whole, *(_stage(look, stage.name, stage.strength) for stage in shown)]]
        off = [_stage(look, stage.name, stage.uncoupled) for stage in shown if stage.uncoupled is not None]
        if len(off) == len(shown):
            rows.append(["coupling off", "", *off])
        else:
            rows[0][0] = ""
        left = f" ({len(shown)} of {len(of_branch)}; the NPZ file has all)" if len(shown) < len(of_branch) else ""
        pieces.append(heading(f"{BRANCHES.get(branch, branch).capitalize()}{left}"))
        pieces.append(table(["", "", *(stage.name for stage in shown)], rows, words=len(shown) + 2))
    return pieces


def _stage(look: Look, name: str, values: np.ndarray) -> Html:
    return embedded(feature_picture(values, look.ground, STAGE_SIDE), name, side=STAGE_SIDE)
