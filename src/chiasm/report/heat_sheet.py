"""Rows of panels as one picture, with words and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from chiasm.report.heat_panels import Panel, disagreement_words, heat_scale
from chiasm.report.plots import INK, MUTED
from chiasm.results.drawing import font_for, shorten

_MARGIN, _GAP = 24, 12
_WIDEST = 900  # that a picture becomes for its title's sake
_TITLE, _HEADING, _LINE = 27, 20, 17  # heights of letters in pixels


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels side by side, and what is said above them."""

    panels: Sequence[Panel]
    caption: str = ""


def sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    groups: Sequence[tuple[str, int]] = (),
    branches: Sequence[str] = (),
    heat: str = "how much a place speaks for the answer: little to most",
) -> Image.Image:
    """Rows of panels as one picture on white, with a legend of the colours.

    Args:
        rows: one or more. Headings that repeat those of the row above are left out.
        title: on top.
        groups: over the first row, names that span so many panels each; an empty name leaves its panels without.
        branches: those that disagreement is shown of; none leaves it out of the legend.
        heat: what bright colours mean; '' where there are none.
    """
    widths = [0] * max(len(row.panels) for row in rows)
    for row in rows:
        for i, panel in enumerate(row.panels):
            widths[i] = max(widths[i], panel.image.width, 200)
    legend = _legend(heat, branches)
    words = [*(part.width for part in legend), min(_WIDEST, round(font_for(_TITLE, title).getlength(title)))]
    width = max(sum(widths) + _GAP * (len(widths) - 1), *words) + 2 * _MARGIN
    pen = _Pen(width)
    if title:
        pen.line(_MARGIN, title, _TITLE, INK, width - 2 * _MARGIN, advance=1.5)
    if groups:
        pen.groups(groups, widths)
    above: list[str] = []
    for row in rows:
        if row.caption:
            pen.down(_GAP // 2)
            pen.line(_MARGIN, row.caption, _LINE, MUTED, width - 2 * _MARGIN, advance=1.5)
        headings = [panel.heading for panel in row.panels]
        if any(headings) and headings != above:
            pen.across(headings, widths, _HEADING, INK)
        above = headings
        pen.pictures([panel.image for panel in row.panels], widths)
        for i in range(max(len(panel.lines) for panel in row.panels)):
            pen.across(["".join(panel.lines[i : i + 1]) for panel in row.panels], widths, _LINE, MUTED)
        pen.down(_GAP)
    for part in legend:
        pen.paste(part)
    return pen.picture()


class _Pen:
    """Writes and pastes from the top down; the picture grows with it."""

    def __init__(self, width: int) -> None:
        self._canvas = Image.new("RGB", (width, 400), "white")
        self._pen = ImageDraw.Draw(self._canvas)
        self._top = _MARGIN

    def down(self, pixels: int) -> None:
        self._top += pixels

    def line(self, left: float, text: str, size: int, colour: str, room: float, advance: float = 1.4) -> None:
        self._reach(round(size * advance))
        font = font_for(size, text)
        self._pen.text((left, self._top), shorten(text, font, room), fill=colour, font=font)
        self._top += round(size * advance)

    def across(self, texts: Sequence[str], widths: Sequence[int], size: int, colour: str) -> None:
        """A text per column on one line."""
        top, left = self._top, _MARGIN
        for text, width in zip(texts, widths, strict=False):
            self._top = top
            self.line(left, text, size, colour, width)
            left += width + _GAP

    def groups(self, groups: Sequence[tuple[str, int]], widths: Sequence[int]) -> None:
        """Names that span columns, each with a line below it."""
        top, left, first = self._top, _MARGIN, 0
        for name, count in groups:
            span = sum(widths[first : first + count]) + _GAP * (count - 1)
            self._top = top
            self.line(left, name, _HEADING, INK, span, advance=1.5)
            if name:
                self._pen.line((left, self._top, left + span, self._top), fill=MUTED, width=2)
            left, first = left + span + _GAP, first + count
        self._top += _GAP // 2

    def pictures(self, images: Sequence[Image.Image], widths: Sequence[int]) -> None:
        height = max(image.height for image in images)
        self._reach(height + 6)
        left = _MARGIN
        for image, width in zip(images, widths, strict=False):
            self._canvas.paste(image, (left, self._top))
            left += width + _GAP
        self._top += height + 6

    def paste(self, image: Image.Image) -> None:
        self._reach(image.height)
        self._canvas.paste(image, (_MARGIN, self._top))
        self._top += image.height

    def picture(self) -> Image.Image:
        return self._canvas.crop((0, 0, self._canvas.width, self._top + _MARGIN - _GAP))

    def _reach(self, pixels: int) -> None:
        """Room for so many pixels more."""
        if (needed := self._top + pixels + _MARGIN) > self._canvas.height:
            larger = Image.new("RGB", (self._canvas.width, max(needed, 2 * self._canvas.height)), "white")
            larger.paste(self._canvas)
            self._canvas, self._pen = larger, ImageDraw.Draw(larger)


def _legend(heat: str, branches: Sequence[str]) -> list[Image.Image]:
    """Lines of a legend, each a picture."""
    entries = [(heat_scale(), heat)] if heat else []
    if len(branches) == 2:
        entries += [(Image.new("RGB", (18, 18), colour), words) for colour, words in disagreement_words(branches)]
    lines = []
    for picture, words in entries:
        font = font_for(_LINE, words)
        line = Image.new("RGB", (round(picture.width + 10 + font.getlength(words)) + 2, 28), "white")
        line.paste(picture, (0, 5))
        ImageDraw.Draw(line).text((picture.width + 10, 14), words, fill=MUTED, font=font, anchor="lm")
        lines.append(line)
    return lines
