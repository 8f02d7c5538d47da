"""Objects and class maps as predictions: rows, COCO JSON, masks and pictures, each read back."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chiasm.report import predictions
from chiasm.report.pictures import Masks, Pictures
from chiasm.report.predictions import write_csv, write_jsonl, write_tables
from chiasm.results import Detections, Result, Segmentation
from chiasm.results.coco_json import write_coco
from chiasm.results.drawing import colour_of
from chiasm.results.masks import decode_mask

LABELS = ("cat", "wild dog", "犬")


def _objects(source: str, count: int, *, masks: bool = True, size: tuple[int, int] = (24, 36)) -> Detections:
    """Random objects; later ones overlap earlier ones and are better or worse."""
    pixels = np.random.default_rng(count)
    height, width = size
    corners = pixels.uniform(0, [width - 9, height - 9], (count, 2))
    boxes = np.concatenate([corners, corners + pixels.uniform(4, 9, (count, 2))], axis=1).astype(np.float32)
    shapes = np.zeros((count, height, width), dtype=bool)
    for shape, (left, top, right, bottom) in zip(shapes, boxes.astype(int), strict=True):
        shape[top:bottom, left:right] = True
    return Detections(
        source=source,
        labels=LABELS,
        size=size,
        boxes=boxes,
        classes=pixels.integers(0, 3, count),
        scores=pixels.uniform(0.5, 1, count).astype(np.float32),
        masks=shapes if masks else None,
    )


def _map(source: str, seed: int = 0, size: tuple[int, int] = (24, 36)) -> Segmentation:
    classes = np.random.default_rng(seed).integers(0, 3, size, dtype=np.uint8)
    return Segmentation(source=source, labels=LABELS, classes=classes)


OBJECTS = [_objects("a,b.png", 5), _objects("empty.png", 0), _objects("c.png", 2)]
MAPS = [_map("a,b.png", 0), _map("c.png", 1)]


def _written(write: object, results: list[Result], *arguments: object) -> str:
    file = io.StringIO()
    write(iter(results), file, *arguments)  # type: ignore[operator]
    return file.getvalue()


# ----------------------------------------------------------------------------------------------------------------- rows


def test_objects_as_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(_written(write_csv, OBJECTS, 3))))
    assert list(rows[0]) == ["source", "label", "score", "left", "top", "right", "bottom", "area"]
    assert [row["source"] for row in rows] == ["a,b.png"] * 5 + ["c.png"] * 2
    first = OBJECTS[0]
    for row, box, score, name, mask in zip(rows, first.boxes, first.scores, first.names, first.masks, strict=False):
        assert [float(row[side]) for side in ("left", "top", "right", "bottom")] == pytest.approx(box, abs=0.006)
        assert float(row["score"]) == pytest.approx(score, abs=1e-6)
        assert (row["label"], int(row["area"])) == (name, mask.sum())


def test_boxes_alone_have_no_area_and_no_objects_still_a_heading() -> None:
    text = _written(write_csv, [_objects("a.png", 0, masks=False), _objects("b.png", 1, masks=False)], 3)
    lines = text.splitlines()
    assert lines[0] == "source,label,score,left,top,right,bottom"
    assert len(lines) == 2
    assert lines[1].count(",") == 6


def test_objects_as_jsonl() -> None:
    rows = [json.loads(line) for line in _written(write_jsonl, OBJECTS, 3).splitlines()]
    assert rows == [json.loads(json.dumps(result.to_dict())) for result in OBJECTS]
    assert rows[1]["objects"] == []
    for found, mask in zip(rows[0]["objects"], OBJECTS[0].masks, strict=True):
        assert np.array_equal(decode_mask(found["mask"], 24, 36), mask)


def test_objects_as_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "TABLE_ROWS", 2)
    pauses: list[bool] = []
    text = _written(write_tables, OBJECTS, 3, lambda: pauses.append(True))
    lines = text.splitlines()
    assert sum(line.startswith("image ") for line in lines) == len(pauses) == 2
    for result in OBJECTS:
        line = next(line for line in lines if line.startswith(result.source))
        assert line.split()[1] == str(len(result)), "an image without objects has its row too"
        for name, count, best in result.counts():
            assert f"{count} {name} {best:.0%}" in line
    assert sum(count for _, count, _ in OBJECTS[0].counts()) == 5


def test_class_maps_as_rows() -> None:
    rows = list(csv.DictReader(io.StringIO(_written(write_csv, MAPS, 3))))
    assert list(rows[0]) == ["source", "label", "share"]
    assert len(rows) == 6
    assert {row["label"]: float(row["share"]) for row in rows[:3]} == pytest.approx(MAPS[0].shares, abs=1e-6)
    records = [json.loads(line) for line in _written(write_jsonl, MAPS, 3).splitlines()]
    assert records == [json.loads(json.dumps(result.to_dict())) for result in MAPS]
    table = _written(write_tables, MAPS, 3, lambda: None)
    line = next(line for line in table.splitlines() if line.startswith("c.png"))
    assert all(f"{name} {share:.1%}" in line for name, share in MAPS[1].shares.items())


# ----------------------------------------------------------------------------------------------------------------- COCO


def test_pycocotools_reads_the_objects_back(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    path = tmp_path / "objects.json"
    path.write_text(_written(lambda results, file: write_coco(results, LABELS, file), OBJECTS), encoding="utf-8")
    content = json.loads(path.read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it takes
        coco = COCO(str(path))
        found = coco.loadRes(content["annotations"])
    assert [coco.cats[i]["name"] for i in (1, 2, 3)] == list(LABELS)
    for image_id, result in enumerate(OBJECTS, start=1):
        image = coco.imgs[image_id]
        assert (image["file_name"], image["width"], image["height"]) == (result.source, 36, 24)
        for read in (coco, found):
            annotations = read.loadAnns(read.getAnnIds(imgIds=[image_id]))
            assert len(annotations) == len(result)
            for index, annotation in enumerate(annotations):
                left, top, width, height = annotation["bbox"]
                assert [left, top, left + width, top + height] == pytest.approx(result.boxes[index], abs=0.002)
                assert annotation["category_id"] == result.classes[index] + 1
                assert annotation["score"] == pytest.approx(result.scores[index], abs=1e-6)
                assert annotation["iscrowd"] == 0
                assert np.array_equal(read.annToMask(annotation).astype(bool), result.masks[index])
                if read is coco:  # `loadRes` takes the box's area
                    assert annotation["area"] == result.masks[index].sum()
    assert len({annotation["id"] for annotation in content["annotations"]}) == 7


def test_coco_of_boxes_alone_and_of_nothing() -> None:
    write = lambda results, file: write_coco(results, LABELS, file)  # noqa: E731
    boxes = _objects("a.png", 3, masks=False)
    content = json.loads(_written(write, [boxes]))
    assert "segmentation" not in content["annotations"][0]
    sides = boxes.boxes[0, 2:] - boxes.boxes[0, :2]
    assert content["annotations"][0]["area"] == pytest.approx(sides.prod(), rel=1e-3)
    nothing = json.loads(_written(write, []))
    assert (nothing["images"], nothing["annotations"], len(nothing["categories"])) == ([], [], 3)


def test_coco_is_written_as_results_come() -> None:
    file = io.StringIO()
    lengths = []

    def results() -> Iterator[Detections]:
        for _ in range(5):
            yield _objects("a.png", 30)
            lengths.append(len(file.getvalue()))

    write_coco(results(), LABELS, file)
    steps = np.diff(lengths)
    assert (steps > 30 * 100).all(), "annotations are kept back"
    json.loads(file.getvalue())


# ------------------------------------------------------------------------------------------------------ masks, pictures


def test_masks_are_read_back_equal(tmp_path: Path) -> None:
    masks = Masks(str(tmp_path / "masks"), [])
    for result in (*MAPS, *OBJECTS):
        masks.add(result, None)
    with Image.open(tmp_path / "masks" / "c.png") as image:
        assert np.array_equal(np.asarray(image), MAPS[1].classes)
        assert np.asarray(image.convert("RGB"))[0, 0].tolist() == list(colour_of(int(MAPS[1].classes[0, 0])))
    with Image.open(tmp_path / "masks" / "a,b-2.png") as image:
        numbers = np.asarray(image)
    assert numbers.dtype == np.uint16
    best = OBJECTS[0].masks * (OBJECTS[0].scores[:, None, None] + 1)
    assert np.array_equal(numbers, np.where(best.any(0), best.argmax(0) + 1, 0)), "the best object lies on top"
    with Image.open(tmp_path / "masks" / "empty.png") as image:
        assert not np.asarray(image).any()


@pytest.mark.parametrize("given", ["folder", "files", "glob", "stdin"])
def test_no_input_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """The mask of a.jpg would be a.png, which is a photograph still to come."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("photos")
    photos = ["photos/a.jpg", "photos/a.png", "photos/b.jpg"]
    for path in photos:
        Image.new("RGB", (36, 24), "orange").save(path)
    before = [Path(path).read_bytes() for path in photos]
    inputs = {"folder": ["photos"], "files": photos, "glob": ["pho*/*.*"], "stdin": ["-"]}[given]
    masks = Masks("photos", inputs)
    for path in photos:
        masks.add(_map(path), None)
    assert [Path(path).read_bytes() for path in photos] == before
    assert sorted(set(os.listdir("photos"))) == ["a-2.png", "a-3.png", "a.jpg", "a.png", "b.jpg", "b.png"]


def test_pictures_of_objects_and_maps(tmp_path: Path) -> None:
    sources = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for source in sources:
        Image.new("RGB", (36, 24), "grey").save(source)
    with Pictures(str(tmp_path / "drawn"), sources, top=3, every=1) as pictures:
        pictures.add(_objects(sources[0], 4), None, None)
        pictures.add(_map(sources[1]), None, None)
    for name in ("a", "b"):
        with Image.open(tmp_path / "drawn" / f"{name}.predicted.jpg") as image:
            assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 50
