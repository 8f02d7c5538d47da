"""Heat maps as results: where they lie on the image, what they share, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from chiasm.results import Explanation
from chiasm.results.explanation import visible


def explanation(**changes: object) -> Explanation:
    corner, other = np.zeros((2, 2), np.float32), np.zeros((4, 4), np.float32)
    corner[0, 0] = other[3, 3] = 1
    given = {
        "source": "a.jpg",
        "size": (40, 80),
        "subject": "cat",
        "label": 1,
        "scores": {"conv": 0.75, "tokens": 0.5},
        "maps": {"conv/gradcam": corner, "tokens/rollout": np.ones((4, 4), np.float32) / 16, "tokens/gradcam": other},
        "region": (20, 0, 60, 40),
    }
    return Explanation(**(given | changes))  # type: ignore[arg-type]


def test_maps_lie_where_the_network_looked() -> None:
    whole = explanation().over_image(explanation().map_of("conv"))
    assert whole.shape == (40, 80)
    assert whole.max() == 1
    assert not whole[:, :20].any()  # beyond the crop's edges
    assert not whole[:, 60:].any()
    assert whole[5, 25] == 1
    assert whole[10, 30] == pytest.approx(1, abs=0.1)  # within half a cell of the corner
    assert whole[20, 40] == pytest.approx(0.25, abs=0.03)  # half-way along both axes
    assert whole[35, 55] == 0
    beyond = explanation(region=(-40, -40, 120, 80)).over_image(np.eye(2, dtype=np.float32))
    assert beyond[0, 0] > beyond[0, 79]  # a canvas larger than the image: its middle alone is seen
    assert beyond.shape == (40, 80)


def test_a_branchs_map_is_its_best() -> None:
    one = explanation()
    assert one.branches == ("conv", "tokens")
    assert one.map_of("tokens") is one.maps["tokens/gradcam"]
    assert one.map_of("tokens", "rollout") is one.maps["tokens/rollout"]
    with pytest.raises(KeyError, match="conv/rollout"):
        one.map_of("conv", "rollout")


def test_overlap_is_of_shared_places() -> None:
    same = np.random.default_rng(0).random((4, 4)).astype(np.float32)
    assert explanation(maps={"conv/gradcam": same, "tokens/gradcam": 3 * same}).overlap == pytest.approx(1, abs=1e-5)
    assert explanation().overlap == pytest.approx(0, abs=0.02)
    assert explanation(maps={"model/gradcam": same}).overlap is None
    differing = explanation().disagreement()
    assert np.abs(differing).max() == 1
    assert differing[5, 25] > 0 > differing[37, 57]
    nothing = np.zeros((3, 3), np.float32)
    assert explanation(maps={"conv/gradcam": nothing, "tokens/gradcam": nothing}).overlap == pytest.approx(1)


def test_json_and_pictures() -> None:
    image = Image.new("RGB", (80, 40), "white")
    one = explanation()
    assert json.loads(json.dumps(one.to_dict()))["maps"]["conv/gradcam"] == [[1, 0], [0, 0]]
    drawn = np.asarray(one.draw(image, "conv"))
    assert drawn.shape == (40, 80, 3)
    assert drawn[5, 25].sum() > drawn[35, 55].sum()
    with pytest.raises(ValueError, match="80, 40"):
        one.draw(Image.new("RGB", (8, 8)), "conv")


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan, np.float32), -np.ones((2, 2), np.float32), np.ones((2, 2))])
def test_refuses_what_is_no_map(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="conv/gradcam"):
        explanation(maps={"conv/gradcam": bad})
    with pytest.raises(ValueError, match="region"):
        explanation(region=(5, 0, 5, 1))


def test_a_single_hot_place_leaves_the_others_visible() -> None:
    heat = np.full((20, 20), 0.1, np.float32)
    heat[3, 3] = 1
    assert visible(heat)[10, 10] == pytest.approx(1)
    assert not visible(np.zeros((4, 4), np.float32)).any()
