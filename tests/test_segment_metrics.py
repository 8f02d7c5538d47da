"""Scores of class maps equal torchmetrics and a slow textbook twin."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from chiasm.data import open_data
from chiasm.data.annotated import IGNORE
from chiasm.results import Segmentation
from chiasm.tasks.segment_metrics import TOLERANCE, SegmentationMetrics, boundary_scores

LABELS = ("road", "tree", "sky", "car")


def _maps(seed: int, classes: int, size: tuple[int, int], *, agree: float, unknown: float) -> tuple[np.ndarray, ...]:
    """A truth of blocks, and a prediction that agrees with it in a share of the pixels."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, classes, (-(-size[0] // 6), -(-size[1] // 6)), dtype=np.uint8)
    truth = np.kron(coarse, np.ones((6, 6), np.uint8))[: size[0], : size[1]]
    other = random.integers(0, classes, size, dtype=np.uint8)
    predicted = np.where(random.random(size) < agree, truth, other)
    return predicted, np.where(random.random(size) < unknown, IGNORE, truth).astype(np.uint8)


def _result(classes: np.ndarray) -> Segmentation:
    return Segmentation(source="a.png", labels=LABELS, classes=classes)


def _border(classes: np.ndarray, k: int) -> list[tuple[int, int]]:
    height, width = classes.shape
    found = []
    for y in range(height):
        for x in range(width):
            beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            values = {classes[i, j] for i, j in beside if 0 <= i < height and 0 <= j < width}
            if classes[y, x] == k and values - {k, IGNORE}:
                found.append((y, x))
    return found


def _textbook_boundary(predicted: np.ndarray, truth: np.ndarray) -> dict[int, float]:
    """The same as `boundary_scores`, pixel by pixel."""
    reach, scores = TOLERANCE * math.hypot(*truth.shape), {}
    predicted = np.where(truth == IGNORE, IGNORE, predicted)
    for k in range(len(LABELS)):
        ours, theirs = _border(predicted, k), _border(truth, k)
        if not ours and not theirs:
            continue

        def near(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
            hits = sum(any(math.dist(point, other) < reach for other in others) for point in points)
            return hits / len(points) if points else 0.0

        precision, recall = near(ours, theirs), near(theirs, ours)
        scores[k] = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return scores


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 4),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    agree=st.floats(0, 1),
    unknown=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_scores_equal_torchmetrics_and_the_textbook(
    seed: int, classes: int, height: int, width: int, agree: float, unknown: float
) -> None:
    drawn = [_maps(seed + i, classes, (height + i, width), agree=agree, unknown=unknown) for i in range(3)]
    parts = [SegmentationMetrics(LABELS) for _ in range(2)]
    parts[0].update([_result(predicted) for predicted, _ in drawn[:2]], [truth for _, truth in drawn[:2]])
    parts[1].update([_result(drawn[2][0])], [torch.from_numpy(drawn[2][1])])
    metrics = SegmentationMetrics(LABELS)
    for part in parts:
        metrics.merge(pickle.loads(pickle.dumps(part.state())))
    assert len(metrics) == 3
    scores = metrics.compute()

    predicted, truth = (torch.from_numpy(np.concatenate([pair[i].ravel() for pair in drawn])).long() for i in (0, 1))
    known = truth != IGNORE
    assert scores.pixels == int(known.sum()) == int(np.sum(scores.confusion))
    if not scores.pixels:
        assert (scores.miou, scores.pixel_accuracy, scores.mean_accuracy, scores.boundary) == (None,) * 4
        assert scores.image_miou == (None,) * 3
        return
    expected = multiclass_jaccard_index(predicted, truth, len(LABELS), ignore_index=IGNORE)
    assert scores.miou == pytest.approx(float(expected), abs=1e-6)
    accuracy = multiclass_accuracy(predicted[known], truth[known], len(LABELS), average="micro")
    assert scores.pixel_accuracy == pytest.approx(float(accuracy), abs=1e-6)
    recalls = [float((predicted[truth == k] == k).double().mean()) for k in truth[known].unique().tolist()]
    assert scores.mean_accuracy == pytest.approx(np.mean(recalls))
    for (one, other), miou in zip(drawn, scores.image_miou, strict=True):
        if (other != IGNORE).any():
            single = multiclass_jaccard_index(
                torch.from_numpy(one).long(), torch.from_numpy(other).long(), len(LABELS), ignore_index=IGNORE
            )
            assert miou == pytest.approx(float(single), abs=1e-6)

    borders = [_textbook_boundary(one, other) for one, other in drawn]
    for k, score in enumerate(scores.classes):
        of_class = [border[k] for border in borders if k in border]
        assert score.boundary == (pytest.approx(np.mean(of_class)) if of_class else None)
    of_images = [np.mean(list(border.values())) for border in borders if border]
    assert scores.boundary == (pytest.approx(np.mean(of_images)) if of_images else None)


def test_borders_may_lie_within_the_tolerance() -> None:
    """1000 pixels across: 7.5 may lie between."""
    truth = np.zeros((600, 800), dtype=np.uint8)
    truth[:, 400:] = 1
    for shift, expected in ((0, 1.0), (7, 1.0), (8, 0.0)):
        moved = np.zeros_like(truth)
        moved[:, 400 + shift :] = 1
        assert boundary_scores(moved, truth) == {0: expected, 1: expected}
    # A class that only one of the two has is wrong altogether; one that fills both images has no border.
    assert boundary_scores(np.zeros_like(truth), truth) == {0: 0.0, 1: 0.0}
    assert boundary_scores(np.zeros_like(truth), np.zeros_like(truth)) == {}


def test_a_class_that_neither_occurs_nor_is_given_has_no_scores() -> None:
    truth = np.array([[0, 0, 1, IGNORE]], dtype=np.uint8)
    metrics = SegmentationMetrics(LABELS, boundary=False)
    metrics.update([_result(np.array([[0, 2, 1, 3]], dtype=np.uint8))], [truth])
    scores = metrics.compute()
    assert [score.iou for score in scores.classes] == [0.5, 1.0, 0.0, None]
    assert [score.accuracy for score in scores.classes] == [0.5, 1.0, None, None]
    assert [score.precision for score in scores.classes] == [1.0, 1.0, 0.0, None]
    assert (scores.miou, scores.mean_accuracy, scores.boundary) == (0.5, 0.75, None)
    assert json.loads(json.dumps(asdict(scores)))["confusion"][0] == [1, 0, 1, 0]
    assert SegmentationMetrics(LABELS).compute().miou is None


def test_maps_that_do_not_fit_are_refused() -> None:
    metrics, result = SegmentationMetrics(LABELS), _result(np.zeros((4, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match="its truth has"):
        metrics.update([result], [np.zeros((5, 4), dtype=np.uint8)])
    with pytest.raises(ValueError, match="4 classes"):
        metrics.update([result], [np.full((4, 5), 4, dtype=np.uint8)])
    assert len(metrics) == 0


def test_the_truth_as_result_is_all_right(shared_data: Path) -> None:
    data = open_data(str(shared_data / "camvid"), task="segment")
    metrics = SegmentationMetrics(data.classes)
    for i in range(3):
        truth = data.maps("val").sample(i)[1].numpy()
        result = Segmentation(source="", labels=data.classes, classes=np.where(truth == IGNORE, 0, truth))
        metrics.update([result], [truth])
    scores = metrics.compute()
    assert (scores.miou, scores.pixel_accuracy, scores.mean_accuracy, scores.boundary) == (1.0,) * 4
