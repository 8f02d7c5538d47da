"""Objects and class maps as results: validated, JSON and back, drawn where they are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

import chiasm
from chiasm.results.drawing import colour_of, place_labels
from chiasm.results.masks import decode_mask, encode_mask, encode_outline

MASKS = np.zeros((2, 20, 30), dtype=bool)
MASKS[0, 3:9, 4:10] = MASKS[1, 10:18, 12:28] = True
SOUND: dict[str, Any] = {
    "source": "a.png",
    "labels": ("cat", "犬"),
    "size": (20, 30),
    "boxes": np.array([[4.0, 3, 10, 9], [12, 10, 28, 18]]),
    "classes": np.array([1, 0]),
    "scores": np.array([0.9, 0.25]),
    "masks": MASKS,
}


def test_objects_as_json_and_back() -> None:
    told = json.loads(json.dumps(chiasm.Detections(**SOUND).to_dict()))
    assert (told["height"], told["width"]) == (20, 30)
    assert [found["label"] for found in told["objects"]] == ["犬", "cat"]
    assert told["objects"][0]["box"] == [4, 3, 10, 9]
    masks = [decode_mask(found["mask"], 20, 30) for found in told["objects"]]
    assert np.array_equal(np.stack(masks), MASKS)


def test_outlines_become_run_lengths_without_being_decoded() -> None:
    polygon = [[4, 3, 10, 3, 10, 9, 4, 9]]
    runs = {"size": [4, 3], "counts": [1, 0, 2, 3, 0, 1, 5]}  # with runs of nothing
    for outline, height, width in ((polygon, 20, 30), (encode_mask(MASKS[1]), 20, 30), (runs, 4, 3)):
        expected = encode_mask(decode_mask(outline, height, width))
        assert encode_outline(outline, height, width) == expected
    with pytest.raises(ValueError, match="11 pixels together"):
        encode_outline({"size": [4, 3], "counts": [1, 10]}, 4, 3)


def test_objects_above_a_score_and_none() -> None:
    found = chiasm.Detections(**SOUND)
    best = found.above(0.5)
    assert best.names == ("犬",)
    assert best.masks is not None
    assert best.masks.shape == (1, 20, 30)
    nothing = found.above(0.95)
    assert len(nothing) == 0
    assert nothing.to_dict()["objects"] == []
    assert nothing.draw(Image.new("RGB", (30, 20))).size == (630, 420)


def test_objects_are_drawn_where_they_are() -> None:
    grey = Image.new("RGB", (30, 20), (90, 90, 90))
    drawn = np.asarray(chiasm.Detections(**SOUND | {"labels": ("cat", "dog")}).draw(grey)).astype(int)
    assert drawn.shape == (420, 630, 3)  # enlarged by 21
    changed = (drawn != 90).any(axis=2)
    assert changed[21 * 5, 21 * 6]
    assert changed[21 * 14, 21 * 20]
    assert not changed[21 * 19 + 4, 4]
    assert (drawn[21 * 5, 21 * 6] != drawn[21 * 14, 21 * 20]).any()  # each class has its colour


def test_objects_are_counted() -> None:
    classes, scores = np.array([1, 0, 1]), np.array([0.5, 0.25, 0.75])
    boxes = np.array([[0.0, 0, 5, 5]] * 3)
    found = chiasm.Detections(**SOUND | {"classes": classes, "scores": scores, "boxes": boxes, "masks": None})
    assert found.counts() == [("犬", 2, 0.75), ("cat", 1, 0.25)]
    assert found.above(0.9).counts() == []


def _crowd(side: int, masks: bool) -> chiasm.Detections:
    """A hundred objects of that many pixels on a grid of 40 pixels."""
    corners = np.array([(40.0 * x, 40.0 * y) for y in range(10) for x in range(10)])
    shapes = np.zeros((100, 400, 400), dtype=bool)
    for shape, (left, top) in zip(shapes, corners.astype(int), strict=True):
        shape[top : top + side, left : left + side] = True
    return chiasm.Detections(
        source="a.png",
        labels=("nucleus",),
        size=(400, 400),
        boxes=np.concatenate([corners, corners + side], axis=1),
        classes=np.zeros(100, dtype=int),
        scores=np.linspace(0.1, 1, 100),
        masks=shapes if masks else None,
    )


@pytest.mark.parametrize("masks", [True, False])
def test_many_small_objects_are_not_hidden_by_their_labels(masks: bool) -> None:
    grey = Image.new("RGB", (400, 400), (90, 90, 90))
    drawn = np.asarray(_crowd(14, masks).draw(grey)).astype(int)
    assert drawn.shape[0] > 400, "a legend tells what the colour means"
    changed = (drawn[:400] != 90).any(axis=2)
    inner, edge, between = changed[7::40, 7::40], changed[0::40, 7::40], changed[27::40, 27::40]
    assert edge.all()
    assert not between.any()
    assert inner.all() == masks


def test_a_label_hides_no_better_one() -> None:
    """Two objects in one place: the better one's text is read."""
    boxes = np.array([[50.0, 60, 300, 300], [52, 62, 302, 302]])
    texts = ["worse 50%", "better 90%"]
    places = place_labels((640, 480), boxes, texts)
    assert places[0] is None
    assert places[1] is not None
    assert place_labels((640, 480), boxes + np.array([[0], [100]]), texts).count(None) == 0
    (right,) = place_labels((640, 480), np.array([[630.0, 60, 640, 70]]), ["long name 50%"])
    assert right is not None
    assert right[2] <= 640


@pytest.mark.parametrize("classes", [3, 40])
def test_legends_are_not_cut_off(classes: int) -> None:
    labels = tuple(f"class {index} with quite a long name" for index in range(classes))
    found = np.arange(40 * 60).reshape(40, 60) * classes // 2400
    result = chiasm.Segmentation(source="a.png", labels=labels, classes=found.astype(np.uint8))
    image = Image.new("RGB", (60, 40), "grey")
    drawn = np.asarray(result.draw(image))
    for label in range(classes):
        assert (drawn[400:] == colour_of(label)).all(axis=2).any(), f"class {label} is not in the legend"
    assert (drawn[-3:] == 255).all(), "the last row touches the margin"
    assert (drawn[400:, -3:] == 255).all(), "a text runs out of the picture"


def test_pictures_of_a_series_have_one_size() -> None:
    few, many = np.zeros((20, 30), dtype=np.uint8), np.arange(600).reshape(20, 30) % 40
    labels = tuple(f"class {index}" for index in range(40))
    image = Image.new("RGB", (30, 20), "grey")
    maps = [chiasm.Segmentation(source="a", labels=labels, classes=c.astype(np.uint8)) for c in (few, many)]
    assert len({found.draw(image, series=True).size for found in maps}) == 1
    objects = chiasm.Detections(**SOUND)
    assert len({found.draw(image, series=True).size for found in (objects, objects.above(0.95))}) == 1
    branches = [{"conv": np.array([0.9, 0.1]), "tokens": votes} for votes in np.array([[0.8, 0.2], [0.2, 0.8]])]
    classes = [
        chiasm.Classification(source="a", labels=("x", "y"), probabilities=np.array([0.6, 0.4]), branches=votes)
        for votes in branches
    ]
    assert len({found.draw(image).size for found in classes}) == 2
    assert len({found.draw(image, series=True).size for found in classes}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": np.zeros((2, 3))}, "boxes: expected shape"),
        ({"scores": np.zeros(3)}, "scores: expected shape"),
        ({"masks": MASKS[:1]}, "masks: expected shape"),
        ({"masks": MASKS.astype(np.uint8)}, "masks: expected bool"),
        ({"boxes": np.array([[4.0, 3, 10, 9], [12, 10, 31, 18]])}, "within 30 x 20"),
        ({"boxes": np.array([[4.0, 3, 10, 9], [12, 10, 11, 18]])}, "within 30 x 20"),
        ({"boxes": np.array([[4.0, 3, 10, np.nan], [12, 10, 13, 18]])}, "within 30 x 20"),
        ({"classes": np.array([0, 2])}, "indices of 2 classes"),
        ({"scores": np.array([0.1, 1.5])}, "from 0 to 1"),
    ],
)
def test_objects_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chiasm.Detections(**SOUND | change)


def test_class_maps() -> None:
    classes = np.zeros((20, 30), dtype=np.uint8)
    classes[:, 21:] = 2
    found = chiasm.Segmentation(source="a.png", labels=("sky", "road", "car"), classes=classes)
    assert found.shares == {"sky": 0.7, "car": 0.3}
    told = json.loads(json.dumps(found.to_dict()))
    assert np.array_equal(decode_mask(told["regions"][1]["mask"], 20, 30), classes == 2)
    drawn = np.asarray(found.draw(Image.new("RGB", (30, 20), "grey")))
    assert drawn.shape[0] > 420  # the legend stands below
    assert (drawn[210, 50] != drawn[210, 600]).any()
    with pytest.raises(ValueError, match="expected"):
        found.draw(Image.new("RGB", (20, 30)))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (np.zeros((2, 2, 2), dtype=np.uint8), "uint8"),
        (np.zeros((2, 2)), "uint8"),
        (np.zeros((0, 2), dtype=np.uint8), "uint8"),
        (np.full((2, 2), 3, dtype=np.uint8), "indices of 2 classes, saw 3"),
    ],
)
def test_class_maps_that_cannot_be(classes: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chiasm.Segmentation(source="a", labels=("a", "b"), classes=classes)
