"""The statistics of a comparison: known answers, properties, and how often chance is taken for a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chiasm.paired import compare_paired, holm, over_seeds

NAN = float("nan")


def test_interval_over_seeds_is_students() -> None:
    found = over_seeds([0.70, 0.72, 0.77])
    expected = stats.ttest_1samp([0.70, 0.72, 0.77], 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.73)
    assert found.half == pytest.approx(expected.high - 0.73)
    assert over_seeds([0.7]).half is None


def test_one_seed_is_the_paired_test_over_images() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (rng.random((1, 300)) < share for share in (0.8, 0.7))
    found = compare_paired(ours, theirs)
    expected = stats.ttest_rel(ours[0].astype(float), theirs[0].astype(float))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.half == pytest.approx(expected.confidence_interval(0.95).high - found.mean)


def test_unreadable_images_count_neither_way() -> None:
    whole = compare_paired([[1, 0, 1, 1], [1, 1, 0, 1]], [[0, 0, 1, 0], [1, 0, 0, 1]])
    holed = compare_paired([[1, 0, 1, 1, NAN], [1, 1, 0, 1, NAN]], [[0, 0, 1, 0, NAN], [1, 0, 0, 1, NAN]])
    assert holed == whole


@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 99))
def test_the_other_way_round_is_the_negative(seeds: int, images: int, number: int) -> None:
    rng = np.random.default_rng(number)
    ours, theirs = rng.integers(0, 2, (2, seeds, images))
    there, back = compare_paired(ours, theirs), compare_paired(theirs, ours)
    assert there.mean == pytest.approx(-back.mean)
    assert (there.half, there.p) == (pytest.approx(back.half), pytest.approx(back.p))
    assert 0 <= there.p <= 1
    assert compare_paired(ours, ours).p == 1


@pytest.mark.parametrize("seed_spread", [0.0, 0.03])
def test_chance_is_seldom_taken_for_a_difference(seed_spread: float) -> None:
    """Two candidates equally good on the whole, whose accuracy moves with the seed and the image: p below 0.05 comes
    in no more than about 5 of 100 studies."""
    rng = np.random.default_rng(1)
    studies, seeds, images = 600, 3, 200
    false_alarms = 0
    for _ in range(studies):
        hardness = rng.normal(0, 0.15, images)
        votes = []
        for _ in range(2):
            chance = 0.75 + rng.normal(0, seed_spread, (seeds, 1)) + hardness
            votes.append(rng.random((seeds, images)) < chance)
        false_alarms += compare_paired(*votes).p < 0.05
    assert false_alarms / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = (rng.random((3, 2000)) < share for share in (0.80, 0.75))
    found = compare_paired(ours, theirs)
    assert found.p < 0.01
    assert abs(found.mean - 0.05) < found.half


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_none_and_bonferroni(p_values: list[float]) -> None:
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        assert p <= corrected <= 1
    by_size = [corrected for _, corrected in sorted(zip(p_values, holm(p_values), strict=True))]
    assert by_size == sorted(by_size)
    smallest = int(np.argmin(p_values))
    assert holm(p_values)[smallest] == pytest.approx(min(1, len(p_values) * p_values[smallest]))
