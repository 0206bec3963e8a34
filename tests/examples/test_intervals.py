"""Intervals by the bootstrap and correlations of ranks: numbers by hand, intervals that cover."""

import numpy as np
import pytest

from examples.common import intervals

ONES = np.ones((1, 5))
LINE = np.arange(5.0)


def test_weights_count_the_draws():
    weights = intervals.weights_of(7, 300)
    assert weights.shape == (300, 7)
    assert (weights.sum(axis=1) == 7).all()
    drawn = np.random.default_rng(intervals.SEED).integers(7, size=(300, 7))
    assert weights[5].tolist() == [(drawn[5] == place).sum() for place in range(7)]


def test_the_interval_of_a_mean():
    """Two seeds: the mean of a draw is 0, 1 or 2, with probabilities 1/4, 1/2 and 1/4."""
    assert intervals.mean_interval([0.0, 2.0]) == (1.0, 0.0, 2.0)
    values = np.random.default_rng(0).normal(size=400)
    found = intervals.mean_interval(values, 2000)
    error = values.std() / 20
    assert found == pytest.approx([values.mean() + k * error for k in (0, -1.96, 1.96)], abs=0.012)
    assert found.scaled(100).high == pytest.approx(100 * found.high)


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan], [np.inf, 1.0], []])
def test_what_has_no_interval(values):
    found = intervals.mean_interval(values, 2000)
    assert np.isnan(found.low)
    assert not found.is_above
    assert not found.is_below


def test_intervals_hold_the_truth_as_often_as_the_docstring_says():
    rng = np.random.default_rng(3)
    for seeds, share in ((20, 0.92), (5, 0.83)):
        found = [intervals.mean_interval(rng.normal(size=seeds), 500) for _ in range(600)]
        covered = np.mean([each.low < 0 < each.high for each in found])
        assert covered == pytest.approx(share, abs=0.04)


def test_correlations_of_ranks_by_hand():
    """Of the ten pairs two are turned, as in 0 1 2 4 3 with one more; ties by their formula."""
    other = np.array([0.0, 2.0, 1.0, 4.0, 3.0])
    assert intervals.kendall(LINE, other, ONES) == pytest.approx([(8 - 2) / 10])
    assert intervals.spearman(LINE, other, ONES) == pytest.approx([1 - 6 * 4 / (5 * 24)])
    assert intervals.spearman(np.exp(LINE), -other, ONES) == pytest.approx([-0.8])
    tied = np.array([0.0, 0.0, 1.0, 2.0, 3.0])  # one pair of ten is a tie
    assert intervals.kendall(LINE, tied, ONES) == pytest.approx([9 / np.sqrt(10 * 9)])
    ranks = np.array([-1.5, -1.5, 0, 1, 2])
    expected = [np.corrcoef(LINE, ranks)[0, 1]]
    assert intervals.spearman(LINE, tied, ONES) == pytest.approx(expected)
    assert np.isnan(intervals.spearman(LINE, np.ones(5), ONES)).all()
    assert np.isnan(intervals.kendall(LINE, np.ones(5), ONES)).all()


def test_a_weight_is_a_repetition():
    rng = np.random.default_rng(1)
    one, other, third = rng.integers(0, 9, (3, 12)) * 1.0
    drawn = rng.integers(12, size=12)
    weights = np.bincount(drawn, minlength=12)[None] * 1.0
    repeated, ones = (one[drawn], other[drawn]), np.ones((1, 12))
    assert intervals.kendall(one, other, weights) == pytest.approx(
        intervals.kendall(*repeated, ones)
    )
    for kept in (None, third):
        expected = intervals.spearman(*repeated, ones, None if kept is None else kept[drawn])
        assert intervals.spearman(one, other, weights, kept) == pytest.approx(expected)


def test_the_partial_correlation_is_that_of_what_is_left_of_the_ranks():
    rng = np.random.default_rng(2)
    third = rng.permutation(50) * 1.0
    one, other = third + rng.normal(0, 9, (2, 50))
    ranks = [np.argsort(np.argsort(each)) for each in (one, other)]
    left = [rank - np.polyval(np.polyfit(third, rank, 1), third) for rank in ranks]
    found = intervals.spearman(one, other, np.ones((1, 50)), third)
    assert found == pytest.approx([np.corrcoef(*left)[0, 1]])
    assert abs(found[0]) < 0.3 < 0.7 < intervals.spearman(one, other, np.ones((1, 50)))[0]
    assert np.isnan(intervals.spearman(one, other, np.ones((1, 50)), one)).all()


def test_what_is_not_finite_is_left_out():
    one, other = np.array([0, 1, np.nan, 2, 3.0]), np.array([0, 1, 5, np.inf, -2.0])
    expected = intervals.spearman(np.array([0, 1, 3.0]), np.array([0, 1, -2.0]), np.ones((1, 3)))
    assert intervals.spearman(one, other, ONES) == pytest.approx(expected)
    expected = intervals.kendall(np.array([0, 1, 3.0]), np.array([0, 1, -2.0]), np.ones((1, 3)))
    assert intervals.kendall(one, other, ONES) == pytest.approx(expected)


def test_the_interval_of_a_correlation_is_around_it():
    """The draws are nearer to 0 than the correlation; only their spread is taken."""
    drawn = np.tanh(np.linspace(-0.5, -0.1, 401))
    found = intervals.correlation_interval(np.tanh(-0.8), drawn)
    assert found == pytest.approx(np.tanh([-0.8, -0.99, -0.61]))
    assert intervals.correlation_interval(-1.0, -np.ones(9)) == pytest.approx(
        (-1, -1, -1), abs=1e-5
    )
    assert np.isnan(intervals.correlation_interval(np.nan, drawn).low)
    assert np.isnan(intervals.correlation_interval(0.5, np.full(3, np.nan)).low)


def test_average_ranks():
    """The second row is the best in one task, and shares the last place in the other."""
    first = np.array([[1.0, 2.0], [5.0, 6.0], [3.0, np.nan]])
    second = np.array([[9.0, 9.0], [4.0, 5.0], [4.0, 5.0]])
    found = intervals.average_ranks([first, second], 200)
    assert [each.value for each in found] == [1.5, 1.75, 2.75]
    assert found[1] == (1.75, 1.75, 1.75)  # the same in every draw, as seeds are paired
    assert intervals.places_of(np.array([1.0, 3, 3, np.nan])).tolist() == [3, 1.5, 1.5, 4]


def test_average_ranks_of_rows_that_are_alike_are_uncertain():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(4, 20)) + np.array([0, 0, 0, 5.0])[:, None]
    found = intervals.average_ranks([scores], 400)
    assert found[3] == (1, 1, 1)
    assert all(each.low <= 2.5 and each.high >= 3.5 for each in found[:3])
