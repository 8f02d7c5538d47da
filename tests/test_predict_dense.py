"""Objects and class maps as predictions: rows, COCO JSON, masks and pictures, each read back."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.config import Preprocess
from chiasm.data.video import VideoWriter, read_frames
from chiasm.errors import ChiasmError
from chiasm.model_file import ModelInfo, save_model
from chiasm.models.heads import with_head
from chiasm.predictor import load
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


def test_a_numbered_name_is_not_given_again(tmp_path: Path) -> None:
    masks = Masks(str(tmp_path), [])
    for source in ("a.jpg", "x/a.jpg", "a-2.jpg", "y/a.jpg"):
        masks.add(_map(source), None)
    assert sorted(os.listdir(tmp_path)) == ["a-2-2.png", "a-2.png", "a-3.png", "a.png"]


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


# ---------------------------------------------------------------------------------------------------------- real models

HEADS = {"detect": "faster_rcnn", "instances": "mask_rcnn", "segment": "fpn"}


def _model(folder: Path, task: str) -> str:
    torch.manual_seed(0)
    head = {"name": HEADS[task], "channels": 64, "maps": "auto"}
    backbone = chiasm.create_model("test_resnet", num_classes=0)
    model = with_head(backbone, 3, task=task, architecture="test_resnet", **head)
    info = ModelInfo(
        architecture="test_resnet",
        task=task,
        head=head,
        labels=LABELS,
        preprocess=Preprocess(size=(64, 64), crop=1.0),
    )
    save_model(folder / f"{task}.safetensors", model, info)
    return str(folder / f"{task}.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {task: _model(folder, task) for task in HEADS}


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    paths = [str(folder / name) for name in ("a.png", "b.jpg", "c ü.png")]
    for index, path in enumerate(paths):
        Image.fromarray(pixels.integers(0, 256, (40 - 3 * index, 50, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("format", ["table", "csv", "jsonl", "coco"])
def test_every_format_of_every_task(
    models: dict[str, str], photos: list[str], task: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", models[task], *photos, "--format", format]
    if task != "segment":
        words += ["--threshold", "0.01"]
    if (task, format) == ("segment", "coco"):
        assert main(words) == 2
        assert "COCO JSON is for detectors" in capsys.readouterr().err
        return
    assert main(words) == 0
    told = capsys.readouterr().out
    expected = load(models[task], threshold=0 if task == "segment" else 0.01)(photos)
    if task != "segment":
        assert sum(len(result) for result in expected) > 3, "nothing is tested without objects"
    if format == "jsonl":
        rows = [json.loads(line) for line in told.splitlines()]
        assert [row["source"] for row in rows] == photos
        regions = "regions" if task == "segment" else "objects"
        for row, result in zip(rows, expected, strict=True):
            wanted = result.to_dict()[regions]
            assert [found["label"] for found in row[regions]] == [found["label"] for found in wanted]
            assert all(("mask" in found) == (task != "detect") for found in row[regions])
    elif format == "csv":
        rows = list(csv.DictReader(io.StringIO(told)))
        wanted = [result.shares if task == "segment" else result.names for result in expected]
        assert [row["label"] for row in rows] == [name for names in wanted for name in names]
        assert ("area" in rows[0]) == (task == "instances")
    elif format == "coco":
        content = json.loads(told)
        assert [image["file_name"] for image in content["images"]] == photos
        assert len(content["annotations"]) == sum(len(result) for result in expected)
        assert all(("segmentation" in found) == (task == "instances") for found in content["annotations"])
    else:
        assert sum(line.startswith(str(Path(photos[0]).parent)) for line in told.splitlines()) == 3


def test_masks_and_pictures_by_the_command(models: dict[str, str], photos: list[str], tmp_path: Path) -> None:
    for task, flags in (("segment", ["--zoom", "2"]), ("instances", ["--threshold", "0.01"])):
        out = tmp_path / task
        words = [
            "predict",
            models[task],
            *photos,
            "--masks",
            str(out),
            "--draw",
            str(out),
            "--out",
            str(out / "all.jsonl"),
        ]
        assert main([*words, *flags]) == 0
        rows = [json.loads(line) for line in (out / "all.jsonl").read_text(encoding="utf-8").splitlines()]
        for row in rows:
            stem = Path(row["source"]).stem
            assert (out / f"{stem}.predicted.jpg").exists()
            with Image.open(out / f"{stem}.png") as image:
                values = np.asarray(image)
            regions = row["regions"] if task == "segment" else list(reversed(row["objects"]))
            expected = np.zeros_like(values)
            for number, region in enumerate(regions):
                mask = decode_mask(region["mask"], *values.shape)
                expected[mask] = LABELS.index(region["label"]) if task == "segment" else len(regions) - number
            assert np.array_equal(values, expected)
            assert values.any(), "nothing is tested without a mask"


@pytest.mark.parametrize("given", ["folder", "glob"])
def test_pictures_among_the_images_are_not_predicted(models: dict[str, str], photos: list[str], given: str) -> None:
    folder = Path(photos[0]).parent
    pattern = str(folder if given == "folder" else folder / "**" / "*")
    for _ in range(2):
        results = chiasm.predict(
            model=models["segment"], images=[pattern], draw=str(folder / "drawn"), masks=str(folder / "z" / "masks")
        )
        assert sorted(result.source for result in results) == photos
        assert len(os.listdir(folder / "drawn")) == len(os.listdir(folder / "z" / "masks")) == 3


def test_frames_of_videos(models: dict[str, str], photos: list[str], tmp_path: Path) -> None:
    pytest.importorskip("av", reason="videos need PyAV")
    clip, drawn = tmp_path / "clip.mp4", tmp_path / "drawn"
    writer = VideoWriter(clip, Fraction(10))
    for path in photos:
        with Image.open(path) as image:
            writer.add(image)
    writer.finish()
    frames = [pixels for _, pixels in read_frames(str(clip))]
    for task in HEADS:
        found = list(chiasm.predict(model=models[task], images=[str(clip)], draw=str(drawn / task), batch_size=2))
        assert [result.source for result in found] == [f"{clip}#{number}" for number in range(3)]
        for result, expected in zip(
            found, load(models[task], threshold=0.5 * (task != "segment"))(frames), strict=True
        ):
            regions = "regions" if task == "segment" else "objects"
            assert result.to_dict()[regions] == expected.to_dict()[regions]
        assert len(list(read_frames(str(drawn / task / "clip.predicted.mp4")))) == 3


def test_the_name_of_the_file_chooses_coco(models: dict[str, str], photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "objects.json"
    results = chiasm.predict(model=models["detect"], images=photos, out=str(out), threshold=0.01)
    assert results.out == out
    assert len(json.loads(out.read_text(encoding="utf-8"))["images"]) == 3
    before = out.read_bytes()
    with pytest.raises(ChiasmError, match="no image files"):
        chiasm.predict(model=models["detect"], images=[*photos, models["detect"][:-18]], out=str(out), batch_size=1)
    assert out.read_bytes() == before, "the complete file was replaced by half a one"


@pytest.mark.parametrize(
    ("task", "flags", "said"),
    [
        (
            "classify",
            {"masks": "m"},
            "--masks is for segmenters and detectors with masks; .* is for the task 'classify'",
        ),
        ("classify", {"threshold": 0.7}, "--threshold is for detectors"),
        ("classify", {"zoom": 2}, "zoom is 2"),
        ("classify", {"out": "a.json"}, "COCO JSON is for detectors.*--format jsonl"),
        ("detect", {"masks": "m"}, "--masks is for segmenters and detectors with masks; .* is for the task 'detect'"),
        ("detect", {"top": 5}, "--top is for classifiers"),
        ("instances", {"zoom": 2}, "zoom is 2"),
        ("segment", {"threshold": 0.7}, "--threshold is for detectors"),
        ("segment", {"format": "coco"}, "COCO JSON is for detectors"),
        ("segment", {"zoom": 0.5}, "zoom is 0.5"),
        ("detect", {"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_settings_of_another_task(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, flags: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChiasmError, match=said) as told:
        chiasm.predict(model=models.get(task, "test_resnet"), images=["a.png"], **flags)
    assert "\n" not in str(told.value)
    assert os.listdir() == []
