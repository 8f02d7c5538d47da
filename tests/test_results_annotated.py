"""Objects and class maps as results: validated, JSON and back, drawn where they are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

import chiasm
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
    assert nothing.draw(Image.new("RGB", (30, 20))).size == (270, 180)


def test_objects_are_drawn_where_they_are() -> None:
    grey = Image.new("RGB", (30, 20), (90, 90, 90))
    drawn = np.asarray(chiasm.Detections(**SOUND | {"labels": ("cat", "dog")}).draw(grey)).astype(int)
    assert drawn.shape == (180, 270, 3)  # enlarged by nine
    changed = (drawn != 90).any(axis=2)
    assert changed[9 * 5, 9 * 6]
    assert changed[9 * 14, 9 * 20]
    assert not changed[9 * 19 + 4, 4]
    assert (drawn[9 * 5, 9 * 6] != drawn[9 * 14, 9 * 20]).any()  # each class has its colour


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
    assert drawn.shape[0] > 180  # the legend stands below
    assert (drawn[90, 50] != drawn[90, 250]).any()
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
