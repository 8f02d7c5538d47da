"""Self-contained HTML pages from small pieces: no script, no request to anywhere, light and dark, wide and narrow.

    page = Page("Evaluation of photos", subtitle="val, 3,791 images")
    page.section("Result", cards([Card("92.1 %", "top-1")]), text("..."))
    page.section("Classes", table(["class", "images"], [["cat", 12]]), figure(plots.bars(...), "Per class."))
    page.write("report.html")

Pieces are `Html`, text that is already safe; whatever else is given (class names, files' names) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from chiasm.errors import ChiasmError
from chiasm.report.plots import PALETTE, svg
from chiasm.report.whole_file import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


class Html(str):
    """Text that may stand in a page as it is."""


@dataclass(frozen=True)
class Card:
    """A headline number, what it is, and a line of detail below."""

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Picture:
    """An image of a gallery with its lines of text: the first is bold."""

    image: Image.Image
    lines: Sequence[str]


class Page:
    """A page: a title, then sections; `generator`, unseen, is what made it."""

    def __init__(self, title: str, *, subtitle: str = "", generator: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._generator = generator
        self._sections: list[Html] = []

    def section(self, title: str, *pieces: Html) -> None:
        """Add a section; `title` may be empty."""
        heading = f"<h2>{escape(title)}</h2>" if title else ""
        self._sections.append(Html(f"<section>{heading}{''.join(pieces)}</section>"))

    def __str__(self) -> str:
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        generator = f'<meta name="generator" content="{escape(self._generator)}">' if self._generator else ""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{generator}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_theme()}{_STYLE}</style></head>\n"
            f"<body><main><header><h1>{escape(self.title)}</h1>{subtitle}</header>\n"
            + "\n".join(self._sections)
            + "\n</main></body></html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page; a page that was there stays until the new one is complete.

        Raises:
            ChiasmError: when it cannot be written.
        """
        write_text(path, str(self))


def escape(value: object) -> Html:
    """`value` as text of a page; `Html` passes as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def text(content: str) -> Html:
    """A paragraph."""
    return Html(f"<p>{escape(content)}</p>")


def cards(items: Iterable[Card]) -> Html:
    """Headline numbers side by side."""
    inner = "".join(
        f'<div class="card"><div class="value">{escape(card.value)}</div><div class="label">{escape(card.label)}</div>'
        + (f'<div class="detail">{escape(card.detail)}</div>' if card.detail else "")
        + "</div>"
        for card in items
    )
    return Html(f'<div class="cards">{inner}</div>')


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> Html:
    """A table whose first `words` columns are text and whose others are numbers, set flush right."""

    def cells(row: Sequence[object], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i < words else ' class=number'}>{escape(value)}</{tag}>" for i, value in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return Html(
        f'<div class="scroll"><table><thead><tr>{cells(headers, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figure(drawing: Figure, caption: str) -> Html:
    """A figure with its caption, as vector graphics that follow the page's theme."""
    widest, narrowest = (drawing.get_figwidth() * pixels for pixels in (88, 56))  # text stays legible: scroll beyond
    return Html(
        f'<figure><div class="scroll"><div class="drawing" style="min-width:{narrowest:.0f}px;'
        f'max-width:{widest:.0f}px" role="img" '
        f'aria-label="{escape(caption)}">{svg(drawing)}</div></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def gallery(pictures: Iterable[Picture], *, side: int = 180, shape: Literal["", "wide", "row"] = "") -> Html:
    """Images with their captions in as many columns as fit; each is embedded as a JPEG of at most `side` pixels.

    `shape` 'wide' is for pictures beside each other in one: columns of more than double the width. 'row' is for
    pictures of one size that belong side by side: one row where the screen is wide enough, two columns on a phone.
    """
    inner = "".join(
        f"<figure>{embedded(picture.image, picture.lines[0], side=side)}<figcaption>"
        + "".join(f"<{tag}>{escape(line)}</{tag}>" for tag, line in _tagged(picture.lines))
        + "</figcaption></figure>"
        for picture in pictures
    )
    return Html(f'<div class="{f"gallery {shape}".strip()}">{inner}</div>')


def embedded(image: Image.Image, alt: str, *, side: int = 180) -> Html:
    """An image as a JPEG of at most `side` pixels, for a cell of a table or beside text."""
    return Html(f'<img alt="{escape(alt)}" src="{_jpeg(image, side)}">')


def heading(content: str) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{escape(content)}</h3>")


def legend(entries: Iterable[tuple[tuple[int, int, int], str]]) -> Html:
    """What colours mean: (red, green, blue), each 0..255, and a name."""
    inner = "".join(f'<span><i style="background:rgb{colour}"></i>{escape(name)}</span>' for colour, name in entries)
    return Html(f'<p class="legend">{inner}</p>')


def columns(*pieces: Html) -> Html:
    """Pieces side by side where the screen is wide enough."""
    return Html(f'<div class="columns">{"".join(f"<div>{piece}</div>" for piece in pieces)}</div>')


def details(summary: str, *pieces: Html) -> Html:
    """Pieces that are folded away until the summary is clicked."""
    return Html(f"<details><summary>{escape(summary)}</summary>{''.join(pieces)}</details>")


def note(content: str) -> Html:
    """A paragraph set off as a warning."""
    return Html(f'<p class="note">{escape(content)}</p>')


def write_text(path: str | Path, content: str) -> None:
    """Write a text file whole or not at all, its folder made where missing.

    Raises:
        ChiasmError: when it cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as part:
            part.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ChiasmError(f"{target}: cannot be written ({error.strerror}); give another folder with --out.") from error


def _tagged(lines: Sequence[str]) -> Iterable[tuple[str, str]]:
    return (("b" if i == 0 else "span", line) for i, line in enumerate(lines))


def _jpeg(image: Image.Image, side: int) -> str:
    from PIL import Image

    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _theme() -> str:
    """The palette and the page's own colours, light and dark."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}--page:#f6f7f9;--panel:#ffffff;--warn:#fff4e0}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}--page:#12171d;--panel:#1b222a;--warn:#3a2e17}}}}"
    )


_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 16px 64px}
header{padding:0 4px 8px}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 12px;overflow-wrap:anywhere}
h3{font-size:1rem;margin:18px 0 8px}
.subtitle{color:var(--muted);margin:6px 0 0;overflow-wrap:anywhere}
section{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:20px;margin-top:16px}
p{margin:0 0 12px;max-width:75ch;overflow-wrap:anywhere}
section>:last-child,section>:last-child>p:last-child{margin-bottom:0}
.note{background:var(--warn);border-radius:8px;padding:10px 14px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:16px}
.card{border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.value{font-size:1.75rem;font-weight:650;line-height:1.15;color:var(--blue);font-variant-numeric:tabular-nums}
.label{font-weight:600;margin-top:2px}
.detail{color:var(--muted);font-size:.83rem;line-height:1.35}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:20px;align-items:start}
.columns>div{min-width:0}
.columns+.columns,.scroll+.columns{margin-top:20px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th{text-align:left;color:var(--muted);font-weight:600}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
.number{text-align:right;font-variant-numeric:tabular-nums}
td.number{white-space:nowrap}
figure{margin:0 0 12px}
figcaption{color:var(--muted);font-size:.85rem;line-height:1.4;margin-top:6px;max-width:75ch}
.drawing svg{display:block;width:100%;height:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(145px,1fr));gap:16px 12px}
.gallery img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--page);border-radius:8px;display:block}
.gallery.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
.gallery.row{display:flex;flex-wrap:wrap;margin-bottom:12px}
.gallery.row figure{flex:1 1 150px;max-width:240px;margin:0}
.gallery.wide img,.gallery.row img{aspect-ratio:auto}
td img{display:block;border-radius:6px;max-width:none}
.legend span{display:inline-block;margin-right:16px}
.legend img{height:14px;border-radius:3px;vertical-align:-2px;margin:0 4px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.gallery b,.gallery span{display:block;overflow-wrap:anywhere}
.gallery b{color:var(--ink)}
details{margin-top:12px}
summary{cursor:pointer;color:var(--blue);font-weight:600;margin-bottom:8px}
@media (max-width:520px){main{padding:16px 8px 40px}section{padding:14px}
table{font-size:.82rem}th,td{padding-right:8px}.value{font-size:1.5rem}
.cards{grid-template-columns:repeat(2,1fr)}.gallery{grid-template-columns:repeat(2,1fr)}
.gallery.wide{grid-template-columns:1fr}.gallery.row figure{flex:0 0 calc(50% - 6px)}}
@media print{section{break-inside:avoid}body{background:none}}
"""
