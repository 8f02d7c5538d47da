"""Pages and figures: nothing is asked from outside, everything is escaped, colours follow the theme."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from chiasm.errors import ChiasmError
from chiasm.report import plots
from chiasm.report.html import Card, Page, Picture, cards, columns, details, figure, gallery, note, table, text
from chiasm.tasks.classify_metrics import BINS, Calibration

NASTY = '<script>alert("1 & 2")</script> 猫 $x_1$'


class _Balance(HTMLParser):
    """Collects elements that are closed wrongly, and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _calibration(ece: float = 0.1) -> Calibration:
    filled = tuple(i / BINS for i in range(BINS))
    return Calibration(
        ece=ece, counts=(0, *range(1, BINS)), confidence=(None, *filled[1:]), accuracy=(None, *filled[1:])
    )


def _history(epochs: int) -> list[dict[str, float]]:
    return [
        {"epoch": e, "train_loss": 2 / e, "val_loss": 2.2 / e, "val_top1": 1 - 1 / e, "val_top1_conv": 0.9 - 0.8 / e}
        for e in range(1, epochs + 1)
    ]


def _matrix(count: int) -> list[list[int]]:
    return [[9 if i == j else (i + j) % 2 for j in range(count)] for i in range(count)]


def _history_of_objects(epochs: int) -> list[dict[str, float]]:
    """Without a validation loss."""
    names = ("ap", "ap50", "mask_ap", "mask_ap50")
    scores = [{f"val_{name}": (1 - 1 / e) / n for n, name in enumerate(names, 1)} for e in range(1, epochs + 1)]
    return [{"epoch": e, "train_loss": 2 / e, **found} for e, found in enumerate(scores, 1)]


FIGURES = {
    "curves": lambda: plots.curves(_history(30)),
    "curves of objects": lambda: plots.curves(_history_of_objects(8)),
    "curves of one epoch": lambda: plots.curves(_history(1)),
    "confusion": lambda: plots.confusion([NASTY, "dog", "owl"], _matrix(3)),
    "confusion of a class without images": lambda: plots.confusion(["cat", "dog"], [[0, 0], [1, 2]]),
    "confusion of many": lambda: plots.confusion([f"class {i}" for i in range(30)], _matrix(30)),
    "confusion of very many": lambda: plots.confusion([f"class {i}" for i in range(80)], _matrix(80)),
    "reliability": lambda: plots.reliability({"model": _calibration(), "conv branch": _calibration(0.2)}),
    "bars": lambda: plots.bars([(NASTY, {"a": 0.5, "b": None}), ("dog", {"a": None, "b": None})], x="share"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_vector_graphics_in_the_theme(name: str) -> None:
    drawing = plots.svg(FIGURES[name]())
    assert drawing.startswith("<svg")
    assert drawing.endswith("</svg>")
    assert "var(--ink" in drawing
    own = re.sub(r"var\(--\w+, #\w+\)", "", drawing)
    assert not [light for light, _ in plots.PALETTE.values() if light in own], "a colour that ignores the theme"
    assert "<script" not in drawing


def test_figures_are_the_same_each_time() -> None:
    assert plots.svg(FIGURES["confusion"]()) == plots.svg(FIGURES["confusion"]())


def test_curves_name_the_score_that_chooses_and_its_best_epoch() -> None:
    title = plots.curves(_history(4)).axes[1].get_title(loc="left")
    assert title == "Validation top-1: best 75.0%, epoch 4"
    losses, scores = plots.curves(_history_of_objects(4)).axes
    assert scores.get_title(loc="left") == "Validation mask AP: best 25.0%, epoch 4"
    told = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (losses, scores)]
    assert told == [["training"], ["AP", "AP50", "mask AP50", "mask AP"]]


def test_figures_are_pictures_as_well(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_bytes(plots.png(plots.curves(_history(5))))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 2 * image.height > 400
        assert image.getpixel((0, 0))[:3] == (255, 255, 255)


def test_a_confusion_matrix_shows_its_numbers() -> None:
    drawing = plots.svg(plots.confusion(["cat", "dog"], [[8, 123], [0, 45]]))
    assert all(f">{number}</text>" in drawing for number in (8, 123, 45))
    assert ">0</text>" not in drawing


def _page() -> Page:
    page = Page(f"About {NASTY}", subtitle=NASTY)
    page.section(NASTY, note(NASTY), cards([Card(NASTY, NASTY, NASTY)]), text(NASTY))
    page.section(
        "Everything",
        columns(table([NASTY, "n"], [[NASTY, 3]]), figure(plots.confusion([NASTY, "dog"], [[1, 2], [3, 4]]), NASTY)),
        details(NASTY, text("folded")),
        gallery([Picture(Image.new("RGBA", (900, 20), "red"), [NASTY, NASTY])]),
    )
    return page


def test_a_page_is_self_contained_and_escaped() -> None:
    content = str(_page())
    assert "<script" not in content
    assert "&lt;script&gt;" in content
    parser = _Balance()
    parser.feed(content)
    assert parser.open == [], "elements left open"
    sources = [value for _, name, value in parser.attributes if name in ("src", "href", "xlink:href", "action")]
    assert sources
    assert all(value.startswith(("data:image/", "#")) for value in sources), sources
    # xml name spaces are names; nothing is fetched from them
    assert "url(http" not in content
    assert "@import" not in content


def test_the_same_figure_twice_does_not_mix_up_their_parts() -> None:
    """Marks are defined once and used by id: ids that two figures share must define the same thing."""
    first, second = (plots.svg(FIGURES[name]()) for name in ("curves", "reliability"))
    for defined in set(re.findall(r'<(?:path|clipPath)\s+id="(m\w+|p\w+)"', first)):
        if f'id="{defined}"' in second:
            pattern = rf'id="{defined}".*?(?:/>|</clipPath>)'
            assert re.search(pattern, first, re.S)[0] == re.search(pattern, second, re.S)[0]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "neu ü" / "report.html"
    _page().write(path)
    assert path.read_text(encoding="utf-8") == str(_page())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ChiasmError, match=r"report\.html: cannot be written .*--out"):
        _page().write(tmp_path / "file" / "report.html")
