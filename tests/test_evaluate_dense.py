"""`chiasm evaluate` of detectors and segmenters, on networks made by hand whose answers are known and on files."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from torch import Tensor, nn

import chiasm
import chiasm.predictor  # now, or it would keep the name that a test has patched
from chiasm.cli import main
from chiasm.config import Preprocess
from chiasm.errors import ChiasmError, DataError, ImageError
from chiasm.evaluation.reading import ReadAhead
from chiasm.model_file import ModelInfo, save_model
from chiasm.models.heads import with_head

SIDE = 64
LABELS = ("red", "green")
PREPROCESS = Preprocess(size=(SIDE, SIDE), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop=1.0)
NANO = "conformer_nano_patch16_128"


class Colours(nn.Module):
    """A detector that finds patches of pure red and green; the brighter, the surer. Blue it takes for green."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"image": images}

    def detect(self, pyramid: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return [self._one(image) for image in pyramid["image"]]

    def _one(self, image: Tensor) -> dict[str, Tensor]:
        boxes, labels, scores = [], [], []
        for channel in range(3):
            others = image.sum(0) - image[channel]
            patches, _ = ndimage.label(((image[channel] > 0.2) & (others < 0.1)).numpy())
            for rows, columns in ndimage.find_objects(patches):
                boxes.append([columns.start, rows.start, columns.stop, rows.stop])
                labels.append(min(channel, 1))
                scores.append(float(image[channel, rows, columns].max()))
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores),
            "masks": torch.ones(len(boxes), 8, 8),
        }


class Pixels(nn.Module):
    """A segmenter that calls a pixel red or green, whichever is more."""

    def forward(self, images: Tensor) -> Tensor:
        return 50 * images[:, :2]


def _use(monkeypatch: pytest.MonkeyPatch, task: str, labels: tuple[str, ...] = LABELS, data: str | None = None) -> None:
    """Let the name of any model mean the network made by hand for `task`."""
    model = Pixels() if task == "segment" else Colours()
    info = ModelInfo(architecture="by hand", task=task, labels=labels, preprocess=PREPROCESS, data=data)
    monkeypatch.setattr("chiasm.model_file.resolve_model", lambda ref, **_: (model, info))


Patch = tuple[tuple[int, int, int], tuple[int, int, int, int]]  # colour, and left, top, right, bottom


def _picture(patches: list[Patch]) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE))
    for colour, (left, top, right, bottom) in patches:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=colour)
    return image


IDS = {"green": 7, "red": 3, "never": 5}


def _coco(root: Path, images: list[tuple[list[Patch], list[tuple[str, tuple[int, int, int, int]]]]]) -> Path:
    """Images of patches, and of each the objects that are annotated; ids with gaps, in an order of their own."""
    (root / "val").mkdir(parents=True)
    entries, annotations = [], []
    for number, (patches, objects) in enumerate(images):
        _picture(patches).save(root / "val" / f"{number}.png")
        entries.append({"id": 90 - number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        for label, (left, top, right, bottom) in objects:
            corners = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": 90 - number, "category_id": IDS[label], "iscrowd": 0,
                    "bbox": [left, top, right - left, bottom - top], "segmentation": [corners],
                    "area": (right - left) * (bottom - top),
                }
            )  # fmt: skip
    categories = [{"id": key, "name": name} for name, key in IDS.items()]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "val" / "_annotations.coco.json").write_text(json.dumps(content))
    return root


A, B, C = (4, 4, 24, 24), (30, 8, 60, 28), (8, 36, 40, 60)


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Five objects: three found, one at the wrong class, one dark and so found with a low score."""
    return _coco(
        tmp_path / "patches",
        [
            ([((250, 0, 0), A), ((0, 240, 0), B)], [("red", A), ("green", B)]),
            ([((230, 0, 0), A), ((0, 0, 220), C)], [("red", A), ("red", C)]),
            ([((0, 90, 0), B)], [("green", B)]),
            ([], []),
        ],
    )


def _evaluate(data: Path | str, out: Path, *, model: str = "by-hand", **flags: object) -> Any:
    return chiasm.evaluate(model=model, data=str(data), out=str(out), device="cpu", workers=0, **flags)


def _official(data: Path, detections: Path, kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "val" / "_annotations.coco.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(detections)), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(value) for value in evaluator.stats[:3]]


@pytest.mark.parametrize("task", ["detect", "instances"])
def test_known_objects(task: str, patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, task)
    result = _evaluate(patches, tmp_path / "out", gallery=4, batch_size=3)
    scores = result.scores
    assert (result.task, scores.images, scores.objects, scores.labels) == (task, 4, 5, LABELS)
    assert (scores.masks is None) == (task == "detect")
    # Red: two of three found. Green: the first found is right, the second is the red one, the dark one is right again.
    red, green = scores.main.classes
    assert (red.objects, green.objects) == (3, 2)
    assert red.ap50 == pytest.approx(67 / 101, abs=1e-6)
    assert green.ap50 == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-6)
    assert (scores.total.right, scores.total.false, scores.total.missed) == (3, 1, 2)
    assert [Path(case.source).name for case in result.measured.worst] == ["2.png", "1.png", "0.png"]
    assert [case.f1 for case in result.measured.best] == [1.0, 0.5, 0.0]

    numbers = json.loads(result.metrics.read_text(encoding="utf-8"))
    assert numbers == json.loads(json.dumps(result.to_dict()))
    assert numbers["boxes"]["ap50"] == pytest.approx(scores.boxes.ap50)
    assert numbers["at_score_50"]["right"] == 3
    for kind, ours in (("bbox", scores.boxes), *((("segm", scores.masks),) if scores.masks else ())):
        official = _official(patches, tmp_path / "out" / "detections.json", kind)
        assert official == pytest.approx([ours.ap, ours.ap50, ours.ap75], abs=1e-9)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} == {IDS["red"], IDS["green"]}
    assert ("segmentation" in rows[0]) == (task == "instances")

    page = result.report.read_text(encoding="utf-8")
    for said in ("The worst images", "The best images", "AP75", "green", "val/2.png", "Of 5 objects 3 are found"):
        assert said in page, said
    # Of three images with objects, one can be shown among the worst and one among the best.
    assert page.count("data:image/jpeg;base64,") == 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page asks for something from outside"


def test_objects_in_a_table(
    patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _use(monkeypatch, "instances")
    Image.new("RGB", (SIDE, SIDE + 1)).save(patches / "val" / "1.png")
    assert main(["evaluate", "by-hand", str(patches), "--out", str(tmp_path / "out"), "--gallery", "0"]) == 1
    told = capsys.readouterr()
    for said in ("boxes", "masks", "AR100", "2 of 3 objects found, 1 missed", "red", "report"):
        assert said in told.out, said
    assert "1 of 4 images could not be read" in told.err
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "its annotation is for 64 x 64" in page
    assert "data:image" not in page


def test_all_splits_of_a_file_and_of_two(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "detect")
    file = patches / "val" / "_annotations.coco.json"
    whole = _evaluate(file, tmp_path / "out", split="all")
    assert whole.scores.objects == 5
    ids = {row["image_id"] for row in json.loads((tmp_path / "out" / "detections.json").read_text())}
    assert ids == {90, 89, 88}
    _coco(tmp_path / "other", [([((250, 0, 0), A)], [("red", A)])])
    (tmp_path / "other" / "val").rename(patches / "train")
    both = _evaluate(patches, tmp_path / "out", split="all")
    assert both.scores.objects == 6
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["image_id"] for row in rows} == {1, 2, 3, 4}, "image 90 is in both files, so they are counted anew"


def test_detections_on_data_that_is_not_cocos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "detect")
    for folder in ("images", "labels"):
        (tmp_path / "yolo" / folder / "val").mkdir(parents=True)
    (tmp_path / "yolo" / "data.yaml").write_text("path: .\nval: images/val\nnames: [green, red]\n")
    for number, line in enumerate(("1 0.21875 0.21875 0.3125 0.3125\n", "")):  # patch A
        _picture([((250, 0, 0), A)]).save(tmp_path / "yolo" / "images" / "val" / f"{number}.png")
        (tmp_path / "yolo" / "labels" / "val" / f"{number}.txt").write_text(line)
    result = _evaluate(tmp_path / "yolo", tmp_path / "out")
    assert result.scores.boxes.ap == pytest.approx(1.0)
    assert (result.scores.total.right, result.scores.total.false) == (1, 1)
    assert "No objects here of 1 of the model's 2 classes: green." in result.notes
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(1, 1), (2, 1)], "red is the model's first class"
    assert rows[0]["bbox"] == [4, 4, 20, 20]


def test_objects_that_cannot_be_measured(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "detect", ("red", "greem"))
    with pytest.raises(DataError, match=r"class 'green' is unknown to the model \(nearest: greem\)"):
        _evaluate(patches, tmp_path / "out")
    _use(monkeypatch, "detect")
    nothing = _coco(tmp_path / "nothing", [([], []), ([], [])])
    with pytest.raises(DataError, match="none of the 2 images has an object, so average precision is undefined"):
        _evaluate(nothing, tmp_path / "out")
    with pytest.raises(ChiasmError, match="zoom is 2"):
        _evaluate(patches, tmp_path / "out", zoom=2)
    with pytest.raises(ChiasmError, match="batch_size is 0"):
        _evaluate(patches, tmp_path / "out", batch_size=0)
    for path in (patches / "val").glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 4 images can be read; the first: .*0\.png"):
        _evaluate(patches, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_for_another_task_than_the_data(patches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "segment")
    with pytest.raises(DataError, match=r"by-hand is a model for 'segment'\. .*expected folders images and masks"):
        _evaluate(patches, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"resnet is a model for 'classify'\. .*annotated for 'instances'"):
        _evaluate(patches, tmp_path / "out", model="test_resnet")
    _use(monkeypatch, "detect")
    (tmp_path / "photos" / "val" / "red").mkdir(parents=True)
    _picture([]).save(tmp_path / "photos" / "val" / "red" / "a.png")
    with pytest.raises(DataError, match=r"by-hand is a model for 'detect'\. .*expected COCO JSON"):
        _evaluate(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(DataError, match=r"^nowhere: no such"):
        _evaluate("nowhere", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- class maps


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """Three images: one right, one whose green quarter is labelled red, one whose mask is unknown but for a corner."""
    root = tmp_path / "fields"
    for folder in ("images", "masks"):
        (root / "val" / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("green\nred\n")  # in another order than the model's
    image = _picture([((200, 0, 0), (0, 0, SIDE, SIDE)), ((0, 200, 0), (0, 0, 32, 32))])
    right = np.ones((SIDE, SIDE), dtype=np.uint8)
    right[:32, :32] = 0
    corner = np.full((SIDE, SIDE), 255, dtype=np.uint8)
    corner[-8:, -8:] = 1
    for number, mask in enumerate((right, np.ones_like(right), corner)):
        image.save(root / "val" / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "val" / "masks" / f"{number}.png")
    return root


def test_known_pixels(fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "segment")
    result = _evaluate(fields, tmp_path / "out", gallery=2)
    scores = result.scores
    whole, quarter, corner = SIDE * SIDE, SIDE * SIDE // 4, 64
    assert (scores.labels, scores.images, scores.pixels) == (LABELS, 3, 2 * whole + corner)
    assert scores.confusion == ((2 * whole - 2 * quarter + corner, quarter), (0, quarter))
    red, green = scores.classes
    assert green.iou == pytest.approx(0.5)
    assert red.iou == pytest.approx((2 * whole - 2 * quarter + corner) / (2 * whole - quarter + corner))
    assert scores.image_miou == (1.0, pytest.approx(0.375), 1.0)
    assert scores.boundary == pytest.approx((1.0 + 0.0) / 2), "the third image has no border"
    assert [Path(case.source).name for case in result.measured.worst] == ["1.png", "0.png", "2.png"]
    numbers = json.loads(result.metrics.read_text(encoding="utf-8"))
    assert numbers["miou"] == pytest.approx(scores.miou)
    assert not (tmp_path / "out" / "detections.json").exists()
    page = result.report.read_text(encoding="utf-8")
    for said in ("mIoU", "What is taken for what", "images/1.png", "of the borders right"):
        assert said in page, said
    assert page.count("data:image/jpeg;base64,") == 2
    assert _evaluate(fields, tmp_path / "out", zoom=2.0).scores.miou == pytest.approx(scores.miou, abs=0.02)


def test_pixels_in_a_table(
    fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _use(monkeypatch, "segment")
    Image.new("L", (3, 3)).save(fields / "val" / "masks" / "0.png")
    assert main(["evaluate", "by-hand", str(fields), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    told = capsys.readouterr()
    for said in ("mIoU", "borders", "green", "report"):
        assert said in told.out, said
    assert "1 of 3 images could not be read" in told.err


def test_what_the_training_ignored_is_ignored(fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fields / "classes.txt").write_text("green\nred\nsky\n")
    _use(monkeypatch, "segment", ("red", "sky"), data=str(fields))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("ignore_index: 0\n")
    known = 2 * SIDE * SIDE - SIDE * SIDE // 4 + 64
    run = str(tmp_path / "run")
    assert chiasm.evaluate(model=run, device="cpu", workers=0).scores.pixels == known
    assert _evaluate(fields, tmp_path / "out", ignore_index=0).scores.pixels == known
    with pytest.raises(DataError, match="class 'green' is unknown to the model"):
        _evaluate(fields, tmp_path / "out")


def test_maps_that_cannot_be_measured(fields: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, "segment", ("red", "blue"))
    with pytest.raises(DataError, match=r"fields: class 'green' is unknown to the model; .* red, blue\. Rename the cl"):
        _evaluate(fields, tmp_path / "out")
    _use(monkeypatch, "segment")
    (fields / "classes.txt").write_text("green\nred\nvoid\n")
    for path in (fields / "val" / "masks").glob("*.png"):
        Image.new("L", (SIDE, SIDE), 2).save(path)
    with pytest.raises(DataError, match="none of the 3 images has a pixel of a known class"):
        _evaluate(fields, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("task", ["detect", "instances", "segment"])
def test_a_model_file_of_each_task(task: str, patches: Path, fields: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = {"name": "auto", "channels": 64}
    model = with_head(chiasm.create_model(NANO, num_classes=0), 2, task=task, architecture=NANO, **head)
    path = tmp_path / "model.safetensors"
    data = fields if task == "segment" else patches
    info = ModelInfo(
        architecture=NANO, task=task, head=head, labels=LABELS, preprocess=PREPROCESS, data=str(data), seed=0
    )
    save_model(path, model, info)
    result = chiasm.evaluate(model=str(path), device="cpu", workers=0)
    assert result.report == tmp_path / "evaluation" / "report.html"
    assert result.task == task
    assert "does not say which images it was trained on" in result.notes[-1]
    assert result.report.is_file()
    assert (result.scores.miou if task == "segment" else result.scores.main.ap) is not None


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("workers", [0, 3])
def test_images_are_read_ahead_in_order_and_no_further(workers: int) -> None:
    begun: list[int] = []

    def read(index: int) -> int:
        begun.append(index)
        if index % 5 == 2:
            raise ImageError(f"{index}.png", "broken.")
        return index * index

    reader = ReadAhead(read, 11, batch_size=2, workers=workers)
    batches = iter(reader)
    assert next(batches) == [(0, 0), (1, 1)]
    assert max(begun) < 4
    rest = [pair for batch in batches for pair in batch]
    assert rest == [(i, i * i) for i in (3, 4, 5, 6, 8, 9, 10)]
    assert [error.path for error in reader.failures] == ["2.png", "7.png"]
    assert list(ReadAhead(read, 0, batch_size=2, workers=workers)) == []
