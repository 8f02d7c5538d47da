"""The page of an evaluation, whatever the task: the numbers, what they mean, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from chiasm import __version__
from chiasm.errors import ImageError
from chiasm.report import plots
from chiasm.report.html import Card, Html, Page, cards, figure, note, table, text


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How something was measured.

    Attributes:
        subject: what was measured on, for the title.
        about: name and value of each circumstance.
        notes: what a reader must know before believing the numbers.
        history: the lines of the run's metrics.csv; may be empty.
    """

    subject: str
    about: Sequence[tuple[str, str]]
    notes: Sequence[str]
    history: Sequence[dict[str, float]]


def evaluation_page(
    title: str,
    subtitle: str,
    headline: Sequence[Card],
    meaning: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Html]]],
    failures: Sequence[ImageError],
    setting: Setting,
) -> Page:
    """Build a page.

    Args:
        title, subtitle: of the page.
        headline: the numbers that come first.
        meaning: what they mean, in sentences.
        sections: title and pieces of each; those without pieces are left out.
        failures: the images that could not be read.
        setting: how all this was measured.
    """
    page = Page(title, subtitle=subtitle)
    page.section("", *map(note, setting.notes), cards(headline), *map(text, meaning))
    for heading, pieces in sections:
        if pieces:
            page.section(heading, *pieces)
    if setting.history:
        page.section(
            "How it was trained", figure(plots.curves(setting.history), "Loss and validation score after each epoch.")
        )
    if failures:
        page.section(
            "Images left out",
            text(f"{len(failures)} could not be read and count neither way."),
            table(["image", "why"], [[error.path, error.reason] for error in failures], words=2),
        )
    made = ("made", f"{datetime.now():%Y-%m-%d %H:%M} by chiasm {__version__}")
    page.section("How this was measured", table(["", ""], [*setting.about, made], words=2))
    return page


def share(value: float | None) -> str:
    """A share 0..1 for people; a dash where there is none."""
    return "–" if value is None else f"{value:.1%}"


def tail(source: str) -> str:
    """The file's name with its folder: enough to find it."""
    return "/".join(source.replace("\\", "/").split("/")[-2:])
