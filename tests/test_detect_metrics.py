"""Average precision equals what pycocotools says of the files themselves, on real and on random data."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from chiasm.data import open_data
from chiasm.data.annotated import Objects
from chiasm.errors import DataError
from chiasm.results import Detections
from chiasm.results.masks import encode_mask
from chiasm.tasks.detect_metrics import DetectionMetrics, DetectionScores, PrecisionScores


def _numbers(scores: PrecisionScores) -> list[float | None]:
    return [getattr(scores, name) for name in ("ap", "ap50", "ap75", "small", "medium", "large", "ar")]


def _official(content: dict[str, Any], rows: list[dict[str, Any]], folder: Path, kind: str) -> list[float | None]:
    """What pycocotools' summary says of two files, in the order of `_numbers`."""
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "found.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(folder / "found.json")), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [None if value == -1 else float(value) for value in evaluator.stats[[0, 1, 2, 3, 4, 5, 8]]]


def _rows(found: Detections, image_id: Any, category: list[int], kind: str) -> list[dict[str, Any]]:
    """Lines of a results file; of masks without boxes, so that pycocotools takes the masks' areas."""
    rows = []
    for i, (left, top, right, bottom) in enumerate(found.boxes.tolist()):
        row = {
            "image_id": image_id,
            "category_id": category[int(found.classes[i])],
            "score": float(found.scores[i]),
        }
        if kind == "segm":
            assert found.masks is not None
            row["segmentation"] = encode_mask(found.masks[i])
        else:
            row["bbox"] = [left, top, right - left, bottom - top]
        rows.append(row)
    return rows


def _shaken(truth: Objects, labels: tuple[str, ...], strength: float, random: np.random.Generator) -> Detections:
    """The objects as if they had been found: moved, some missed, some invented, some of another class."""
    size, kept = (truth.height, truth.width), ~truth.crowd.numpy()
    sides = truth.boxes.numpy()[kept].astype(np.float64)
    masks, classes = truth.masks().numpy()[kept], truth.labels.numpy()[kept]
    scores = np.ones(len(classes))
    if strength:
        extent = np.tile(sides[:, 2:] - sides[:, :2], 2)
        sides = np.sort((sides + strength * extent * random.normal(size=sides.shape)).reshape(-1, 2, 2), 1)
        sides = sides.reshape(-1, 4).clip(0, [*size[::-1]] * 2)
        shifts = random.integers(-3, 4, (len(masks), 2))
        masks = np.array([np.roll(m, s, (0, 1)) for m, s in zip(masks, shifts, strict=True)], bool).reshape(-1, *size)
        classes = np.where(random.random(len(classes)) < 0.1, random.integers(0, len(labels), len(classes)), classes)
        scores = random.random(len(classes))
        chosen = random.permutation(len(classes))[: round(0.9 * len(classes))]
        sides, masks, classes, scores = sides[chosen], masks[chosen], classes[chosen], scores[chosen]
    return Detections(source="", labels=labels, size=size, boxes=sides, classes=classes, scores=scores, masks=masks)


@pytest.mark.parametrize(("name", "images"), [("coco_mini", 24), ("dsb2018", 5)])
def test_equal_to_pycocotools_on_the_files_themselves(
    name: str, images: int, shared_data: Path, tmp_path: Path
) -> None:
    file = shared_data / name / "annotations" / "instances_val.json"
    data = open_data(str(shared_data / name), task="instances")
    split, content = data.objects("val"), json.loads(file.read_text())
    known = {finding.what.split(" of ")[-1].split(":")[0] for finding in data.findings}
    chosen = [
        i for i in range(len(split)) if 0 < len(split.objects(i)) <= 100 and Path(split.sources[i]).name not in known
    ][:images]
    truths = [split.objects(i) for i in chosen]
    ids = {truth.image_id for truth in truths}
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    category_of = {entry["name"]: entry["id"] for entry in content["categories"]}
    category = [category_of[label] for label in data.classes]

    for strength in (0.0, 0.06):
        random = np.random.default_rng(0)
        found = [_shaken(truth, data.classes, strength, random) for truth in truths]
        metrics = DetectionMetrics(data.classes, masks=True)
        metrics.update(found, truths)
        scores = metrics.compute()
        assert (scores.images, scores.limit) == (len(chosen), 100)
        assert scores.objects == sum(not entry["iscrowd"] for entry in content["annotations"])
        assert scores.masks is not None
        for kind, ours in (("bbox", scores.boxes), ("segm", scores.masks)):
            rows = [
                row
                for result, truth in zip(found, truths, strict=True)
                for row in _rows(result, truth.image_id, category, kind)
            ]
            assert _numbers(ours) == pytest.approx(_official(content, rows, tmp_path, kind), abs=1e-9)
            assert ours.ap == pytest.approx(1.0) if not strength else 0.05 < ours.ap < 0.95
        right = sum(image.right for image in scores.matches)
        assert right == scores.objects if not strength else 0 < right < scores.objects


def _objects(boxes: list[tuple[int, ...]], labels: list[int], crowd: list[bool], size: tuple[int, int]) -> Objects:
    sides = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Objects(
        image_id=1,
        height=size[0],
        width=size[1],
        boxes=sides,
        labels=torch.tensor(labels, dtype=torch.int64),
        crowd=torch.tensor(crowd, dtype=torch.bool),
        areas=(sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1]),
    )


def _found(boxes: list[tuple[int, ...]], classes: list[int], scores: list[float], size: tuple[int, int]) -> Detections:
    return Detections(
        source="",
        labels=("a", "b", "c"),
        size=size,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        classes=np.array(classes, dtype=np.int64),
        scores=np.array(scores, dtype=np.float64),
    )


@st.composite
def _images(draw: st.DrawFn) -> list[tuple[Objects, Detections]]:
    """Few images with few objects on a coarse grid, so that boxes often meet; any of them may be empty."""

    def boxes(count: int) -> list[tuple[int, ...]]:
        corner, side = st.integers(0, 8), st.integers(1, 8)
        rows = [[draw(corner), draw(corner), draw(side), draw(side)] for _ in range(count)]
        return [(8 * x, 8 * y, 8 * (x + w), 8 * (y + h)) for x, y, w, h in rows]

    images = []
    for _ in range(draw(st.integers(1, 3))):
        true, found = draw(st.integers(0, 4)), draw(st.integers(0, 5))
        scores = draw(st.lists(st.floats(0, 1), min_size=found, max_size=found, unique=True))
        classes = st.integers(0, 2)
        truth = _objects(
            boxes(true),
            [draw(classes) for _ in range(true)],
            [draw(st.booleans()) and draw(st.booleans()) for _ in range(true)],
            (128, 130),
        )
        images.append((truth, _found(boxes(found), [draw(classes) for _ in range(found)], scores, (128, 130))))
    return images


@settings(max_examples=40, deadline=None)
@given(images=_images())
def test_equal_to_pycocotools_on_random_boxes(images: list[tuple[Objects, Detections]], tmp_path_factory: Any) -> None:
    entries = []
    for number, (truth, _) in enumerate(images):
        for box, label, crowd in zip(truth.boxes.tolist(), truth.labels.tolist(), truth.crowd.tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            entry = {"id": len(entries) + 1, "image_id": number, "category_id": label, "iscrowd": int(crowd)}
            entries.append(entry | {"bbox": [box[0], box[1], width, height], "area": width * height})
    content = {
        "images": [{"id": i, "height": 128, "width": 130} for i in range(len(images))],
        "annotations": entries,
        "categories": [{"id": i, "name": name} for i, name in enumerate("abc")],
    }
    rows = [row for number, (_, found) in enumerate(images) for row in _rows(found, number, [0, 1, 2], "bbox")]
    # The images come from two processes; what they hold travels pickled.
    parts = [DetectionMetrics("abc", masks=False) for _ in range(2)]
    for i, (truth, found) in enumerate(images):
        parts[i * 2 // len(images)].update([found], [truth])
    metrics = DetectionMetrics("abc", masks=False)
    for part in parts:
        metrics.merge(pickle.loads(pickle.dumps(part.state())))
    scores = metrics.compute()
    if rows:  # pycocotools itself cannot read a results file without results
        folder = tmp_path_factory.mktemp("coco")
        assert _numbers(scores.boxes) == pytest.approx(_official(content, rows, folder, "bbox"), abs=1e-9)
    quick = metrics.compute(sizes=False)
    assert (quick.boxes.ap, quick.boxes.ar, quick.boxes.small) == (scores.boxes.ap, scores.boxes.ar, None)
    assert scores.masks is None
    known = [score.ap for score in scores.boxes.classes if score.objects]
    assert scores.boxes.ap == (pytest.approx(np.mean(known)) if known else None)
    assert sum(image.right + image.missed for image in scores.matches) == scores.objects
    if scores.boxes.ap50 is not None:
        assert np.mean(scores.boxes.curve) == pytest.approx(scores.boxes.ap50)


def test_without_objects_there_is_no_precision() -> None:
    nothing, size = _objects([], [], [], (20, 20)), (20, 20)
    empty = DetectionMetrics("abc", masks=False).compute()
    assert (empty.images, empty.objects, empty.boxes.ap, empty.boxes.curve, empty.matches) == (0, 0, None, (), ())
    metrics = DetectionMetrics("abc", masks=False)
    metrics.update([_found([], [], [], size), _found([(0, 0, 9, 9)], [2], [0.9], size)], [nothing, nothing])
    scores = metrics.compute()
    assert _numbers(scores.boxes) == [None] * 7
    assert [image.f1 for image in scores.matches] == [None, 0.0]


def test_a_class_without_objects_is_left_out_of_the_mean() -> None:
    size, box, other = (50, 50), (0, 0, 20, 20), (30, 30, 45, 45)
    metrics = DetectionMetrics("abc", masks=False)
    crowd = _objects([box, other], [0, 1], [False, True], size)
    metrics.update([_found([box, other, other], [0, 1, 2], [0.9, 0.95, 0.99], size)], [crowd])
    scores = metrics.compute()
    assert [(score.objects, score.ap) for score in scores.boxes.classes] == [
        (1, pytest.approx(1.0)),
        (0, None),
        (0, None),
    ]
    assert (scores.objects, scores.boxes.ap) == (1, pytest.approx(1.0))
    # The crowd counts neither way; what was found of a class that is not there is false.
    assert (scores.matches[0].right, scores.matches[0].false, scores.matches[0].missed) == (1, 1, 0)


def test_more_than_a_hundred_objects_raise_the_limit() -> None:
    size = (200, 200)
    boxes = [(x, y, x + 8, y + 8) for x in range(0, 200, 20) for y in range(0, 200, 16)][:120]
    metrics = DetectionMetrics("abc", masks=False)
    sure = [1 - i / 1000 for i in range(len(boxes))]
    metrics.update([_found(boxes, [0] * 120, sure, size)], [_objects(boxes, [0] * 120, [False] * 120, size)])
    raised, official = metrics.compute(), metrics.compute(limit=100)
    assert (raised.limit, raised.boxes.ap, raised.boxes.ar) == (200, pytest.approx(1.0), pytest.approx(1.0))
    assert (official.limit, official.boxes.ar) == (100, pytest.approx(100 / 120))
    assert official.boxes.ap == pytest.approx(84 / 101)  # the recalls 0, 0.01 ... 0.83 are reached


def test_masks_are_compared_with_masks() -> None:
    """Two boxes alike with masks unlike."""
    size, whole, half = (20, 20), np.zeros((1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    whole[:, 2:12, 2:12] = True
    half[:, 2:12, 2:7] = True
    box = _objects([(2, 2, 12, 12)], [0], [False], size)
    truth = Objects(**{**vars(box), "outlines": ([[2, 2, 12, 2, 12, 12, 2, 12]],)})
    scores = []
    for masks in (whole, half):
        found = _found([(2, 2, 12, 12)], [0], [0.9], size)
        metrics = DetectionMetrics("abc", masks=True)
        metrics.update([Detections(**{**vars(found), "masks": masks})], [truth])
        scores.append(metrics.compute())
    assert [score.boxes.ap for score in scores] == pytest.approx([1.0, 1.0])
    assert [score.masks and score.masks.ap for score in scores] == pytest.approx([1.0, 0.1])  # right at IoU 0.5 alone
    with pytest.raises(DataError, match="boxes without masks"):
        DetectionMetrics("abc", masks=True).update([Detections(**{**vars(found), "masks": masks})], [box])
    with pytest.raises(ValueError, match="without masks"):
        DetectionMetrics("abc", masks=True).update([found], [truth])
    with pytest.raises(ValueError, match="pixels"):
        DetectionMetrics("abc", masks=False).update([found], [_objects([], [], [], (20, 21))])


def test_scores_are_printable_as_json() -> None:
    from dataclasses import asdict

    metrics = DetectionMetrics("abc", masks=False)
    metrics.update([_found([(0, 0, 9, 9)], [2], [0.9], (20, 20))], [_objects([(0, 0, 9, 9)], [2], [False], (20, 20))])
    told: DetectionScores = metrics.compute()
    assert json.loads(json.dumps(asdict(told)))["boxes"]["ap"] == pytest.approx(1.0)
