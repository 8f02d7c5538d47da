"""The scores against computations written straight from the textbook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from chiasm.results import Classification
from chiasm.tasks.classify_metrics import BINS, ClassificationMetrics, ClassificationScores, Share


def _draw(count: int, classes: int, seed: int, *, sharpness: float = 2.0, branches: int = 2):
    """Probabilities of the model and its branches, and true classes that they know something of."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    hint = 1.5 * torch.nn.functional.one_hot(targets, classes)
    logits = {
        f"branch{i}": sharpness * (hint + torch.randn(count, classes, generator=generator)) for i in range(branches)
    }
    probabilities = {name: values.softmax(-1).numpy() for name, values in logits.items()}
    return torch.stack(list(logits.values())).mean(0).softmax(-1).numpy(), probabilities, targets.numpy()


def _score(model: np.ndarray, branches: dict[str, np.ndarray], targets: np.ndarray) -> ClassificationScores:
    labels = tuple(f"class {i}" for i in range(model.shape[1]))
    metrics = ClassificationMetrics(labels)
    for start in range(0, len(targets), 7):  # in uneven batches
        part = range(start, min(start + 7, len(targets)))
        results = [
            Classification(
                source=str(i),
                labels=labels,
                probabilities=model[i],
                branches={name: values[i] for name, values in branches.items()},
            )
            for i in part
        ]
        metrics.update(results, [int(targets[i]) for i in part])
    assert len(metrics) == len(targets)
    return metrics.compute()


def _textbook_ece(probabilities: np.ndarray, targets: np.ndarray) -> float:
    error = 0.0
    stated, right = probabilities.max(1).astype(float), probabilities.argmax(1) == targets
    for i in range(BINS):
        inside = (stated >= i / BINS) & ((stated < (i + 1) / BINS) | (i == BINS - 1))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - stated[inside].mean())
    return error


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 120), classes=st.integers(2, 9), seed=st.integers(0, 10_000), sharpness=st.floats(0.1, 40))
def test_scores_equal_the_textbook(count: int, classes: int, seed: int, sharpness: float) -> None:
    model, branches, targets = _draw(count, classes, seed, sharpness=sharpness)
    scores = _score(model, branches, targets)
    predicted = model.argmax(1)

    assert scores.top1 == Share(right=int((predicted == targets).sum()), count=count)
    assert scores.k == max(1, min(5, classes - 1))
    ranks = [list(np.argsort(-row, kind="stable")).index(target) for row, target in zip(model, targets, strict=True)]
    assert scores.topk.right == sum(rank < scores.k for rank in ranks)
    assert scores.calibration.ece == pytest.approx(_textbook_ece(model, targets), abs=1e-6)
    for i, score in enumerate(scores.classes):
        hit = int(((predicted == i) & (targets == i)).sum())
        given_it, of_it = int((predicted == i).sum()), int((targets == i).sum())
        assert score.count == of_it
        assert score.precision == (hit / given_it if given_it else None)
        assert score.recall == (hit / of_it if of_it else None)
        assert [scores.confusion[i][j] for j in range(classes)] == [
            int(((targets == i) & (predicted == j)).sum()) for j in range(classes)
        ]
    recalls = [(predicted[targets == i] == i).mean() for i in set(targets.tolist())]
    assert scores.balanced_accuracy == pytest.approx(np.mean(recalls))


def test_scores_equal_torchmetrics() -> None:
    model, branches, targets = _draw(700, 6, seed=3)
    scores = _score(model, branches, targets)
    expected = multiclass_calibration_error(torch.tensor(model), torch.tensor(targets), 6, n_bins=BINS)
    assert scores.calibration.ece == pytest.approx(float(expected), abs=1e-6)
    f1 = multiclass_f1_score(torch.tensor(model), torch.tensor(targets), 6, average=None)
    assert [score.f1 for score in scores.classes] == pytest.approx(f1.tolist(), abs=1e-6)
    assert scores.macro_f1 == pytest.approx(float(f1.mean()), abs=1e-6)


def test_the_reliability_curve_adds_up_to_the_calibration_error() -> None:
    model, branches, targets = _draw(500, 4, seed=1, sharpness=6)
    calibration = _score(model, branches, targets).calibration
    bins = zip(calibration.counts, calibration.confidence, calibration.accuracy, strict=True)
    error = sum(n * abs(c - a) for n, c, a in bins if c is not None and a is not None) / 500
    assert sum(calibration.counts) == 500
    assert error == pytest.approx(calibration.ece, abs=1e-9)


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    model = np.array([[1, 0], [1, 0], [0.97, 0.03]], dtype=np.float32)
    scores = _score(model, {}, np.array([0, 1, 0]))
    assert scores.calibration.counts[-1] == 3
    assert scores.calibration.ece == pytest.approx(abs(2 / 3 - 2.97 / 3), abs=1e-6)


@pytest.mark.parametrize("branches", [2, 3])
def test_agreement_of_the_branches(branches: int) -> None:
    model, parts, targets = _draw(300, 5, seed=2, branches=branches)
    scores = _score(model, parts, targets)
    agreement = scores.agreement
    assert agreement is not None
    votes = np.stack([values.argmax(1) for values in parts.values()])
    agreed = np.array([len(set(column)) == 1 for column in votes.T])
    right = model.argmax(1) == targets
    assert agreement.share == Share(right=int(agreed.sum()), count=300)
    assert agreement.when_agreed == Share(right=int(right[agreed].sum()), count=int(agreed.sum()))
    assert agreement.when_not == Share(right=int(right[~agreed].sum()), count=int((~agreed).sum()))
    for name, values in parts.items():
        assert agreement.right_alone[name] == int((values.argmax(1) == targets)[~agreed].sum())
    some = (votes == targets).any(0)
    assert agreement.none_right == int((~some & ~agreed).sum())
    assert agreement.either_right.right == int(some.sum())
    if branches == 2:  # of two that disagree one at most is right
        assert sum(agreement.right_alone.values()) + agreement.none_right == agreement.when_not.count
    for branch in scores.branches:
        assert branch.top1.right == int((parts[branch.name].argmax(1) == targets).sum())
        assert branch.calibration.ece == pytest.approx(_textbook_ece(parts[branch.name], targets), abs=1e-6)


def test_a_model_of_one_branch_has_no_agreement() -> None:
    model, _, targets = _draw(20, 3, seed=0)
    scores = _score(model, {}, targets)
    assert (scores.branches, scores.agreement) == ((), None)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (500, 1000, 0.4691, 0.5309)],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    """Published values, as in Newcombe (1998)."""
    assert Share(right=right, count=count).interval == pytest.approx((low, high), abs=1e-4)


def test_no_images_have_no_share() -> None:
    assert Share(right=0, count=0).to_dict() == {"value": None, "right": 0, "count": 0, "interval": None}


def test_the_most_frequent_mistakes_come_first() -> None:
    model = np.eye(3, dtype=np.float32)[[1, 1, 2, 0, 0]]
    scores = _score(model, {}, np.array([0, 0, 0, 0, 1]))
    assert scores.confusions() == [("class 0", "class 1", 2), ("class 0", "class 2", 1), ("class 1", "class 0", 1)]
    assert scores.confusions(1) == [("class 0", "class 1", 2)]
