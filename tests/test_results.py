"""Classification: what is refused, what is printed, and drawings of odd images and odd labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.results import DRAWN_SIDE, Classification


def _result(probabilities: list[float], labels: tuple[str, ...] = ("cat", "dog", "owl"), **branches: list[float]):
    return Classification(
        source="photo.jpg",
        labels=labels,
        probabilities=np.array(probabilities, dtype=np.float32),
        branches={name: np.array(values, dtype=np.float32) for name, values in branches.items()},
    )


def test_what_it_says() -> None:
    result = _result([0.2, 0.5, 0.3], conv=[0.1, 0.8, 0.1], tokens=[0.3, 0.2, 0.5])
    assert (result.label, result.score) == ("dog", 0.5)
    assert result.votes == {"conv": "dog", "tokens": "owl"}
    assert result.agreement is False
    assert [label for label, _ in result.top(9)] == ["dog", "owl", "cat"]
    assert _result([1, 0, 0], conv=[1, 0, 0], tokens=[0.6, 0.4, 0]).agreement is True
    assert _result([1, 0, 0]).agreement is None
    plain = json.loads(json.dumps(result.to_dict(top=2)))
    assert plain["top"] == [{"label": "dog", "score": 0.5}, {"label": "owl", "score": pytest.approx(0.3)}]
    assert plain["branches"]["tokens"] == {"label": "owl", "score": 0.5}


def test_ties_go_to_the_first_label() -> None:
    result = _result([0.25, 0.375, 0.375])
    assert result.label == result.top(1)[0][0] == "dog"


@pytest.mark.parametrize(
    ("probabilities", "said"),
    [
        ([0.5, 0.5], "shape"),
        ([0.5, 0.6, 0.1], "sum"),
        ([1.5, -0.5, 0.0], "from 0 to 1"),
        ([float("nan")] * 3, "sum"),
    ],
)
def test_impossible_probabilities_are_refused(probabilities: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _result(probabilities)
    with pytest.raises(ValueError, match=f"conv: .*{said}"):
        _result([1, 0, 0], conv=probabilities)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK", "1"]),
    labels=st.lists(st.text(max_size=200), min_size=3, max_size=3),
)
def test_any_image_can_be_drawn_on(size: tuple[int, int], mode: str, labels: list[str]) -> None:
    drawn = _result([0.2, 0.5, 0.3], tuple(labels), conv=[0, 0.5, 0.5]).draw(Image.new(mode, size), top=3)
    assert drawn.mode == "RGB"
    assert drawn.width >= 280
    assert drawn.height > size[1]


def test_drawing_keeps_the_picture_and_writes_below_it() -> None:
    picture = Image.new("RGB", (400, 300), (10, 200, 30))
    drawn = _result([0.2, 0.5, 0.3]).draw(picture)
    assert drawn.crop((0, 0, 400, 300)).tobytes() == picture.tobytes()
    below = np.asarray(drawn.crop((0, 300, 400, drawn.height)))
    assert (below < 60).all(-1).any(), "no dark letters below the picture"


def test_huge_images_are_made_smaller_and_tiny_ones_enlarged() -> None:
    result = _result([0.2, 0.5, 0.3])
    assert result.draw(Image.new("RGB", (9000, 3))).width == DRAWN_SIDE
    assert result.draw(Image.new("RGB", (2, 5000))).height < DRAWN_SIDE + 200
    tiny = result.draw(Image.new("RGB", (7, 7), "red"))
    assert tiny.getpixel((140, 140)) == (255, 0, 0)


def test_long_labels_stay_inside() -> None:
    drawn = np.asarray(
        _result([0.2, 0.5, 0.3], ("w" * 500, "m " * 300, "x"), conv=[0, 1, 0]).draw(Image.new("RGB", (300, 9)))
    )
    assert (drawn[300:, -6:] == 255).all(), "letters reach the right edge"
