"""Intervals by the bootstrap, and correlations of ranks, with NumPy alone.

A bootstrap draws seeds (or rows) with replacement. A draw is stored as weights: how often each of
them was drawn. Intervals are percentiles of the draws, for 95%. The draws are the same in every
call, so an interval is the same each time. With few seeds the intervals of a mean are a little too
narrow: with 20 seeds they hold the truth in about 92 of 100 cases, with 5 seeds in about 83.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
SEED = 0
LARGEST = 1 - 1e-6  # correlation of which atanh is taken


class Interval(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    @property
    def is_above(self) -> bool:
        """Return whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_below(self) -> bool:
        """Return whether the whole interval is below 0."""
        return self.high < 0

    def scaled(self, factor: float) -> "Interval":
        """Return the interval of the number times a positive factor."""
        return Interval(*(factor * number for number in self))


@functools.lru_cache(maxsize=32)
def weights_of(count: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """Return the weights [draws, count] of resamples of so many things: how often each is drawn."""
    drawn = np.random.default_rng(seed).integers(count, size=(draws, count))
    places = drawn + count * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * count).reshape(draws, count) * 1.0


def interval_of(value: float, drawn: np.ndarray) -> Interval:
    """Return a number with the percentile interval of what the draws gave; NaN counts as none."""
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or not len(drawn):
        return Interval(float(value), np.nan, np.nan)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def mean_interval(values: Sequence[float] | np.ndarray, draws: int = DRAWS) -> Interval:
    """Return the mean over seeds and its interval; differences that are paired by seed go in too.

    A mean that is not finite has no interval, and a single seed has none.
    """
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else np.nan
    if len(values) < 2 or not np.isfinite(mean):
        return Interval(mean, np.nan, np.nan)
    return interval_of(mean, weights_of(len(values), draws) @ values / len(values))


# Correlations of ranks. `values` is [..., n]; `weights` is [..., k, n]; what comes out is [..., k].


def signs_of(values: np.ndarray) -> np.ndarray:
    """Return the signs [..., n, n] of all differences of two values."""
    return np.sign(values[..., :, None] - values[..., None, :])


def ranks_of(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the ranks [..., k, n] of values of which each counts as often as its weight says.

    The weighted mean of these ranks is 0. Equal values get the mean of their ranks.
    """
    return weights @ np.swapaxes(signs_of(values), -1, -2) / 2


def correlation(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted correlation of two ranks that `ranks_of` gave; NaN if one is constant."""
    above = (weights * one * other).sum(-1)
    below = (weights * one**2).sum(-1) * (weights * other**2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / np.sqrt(below), np.nan)


def partial(one_other: np.ndarray, one_third: np.ndarray, other_third: np.ndarray) -> np.ndarray:
    """Return the correlation of two things without what a third one explains, from all three.

    It is NaN where the third one explains everything.
    """
    left = (1 - one_third**2) * (1 - other_third**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (one_other - one_third * other_third) / np.sqrt(left)
    return np.where(left > 1e-9, np.clip(found, -1, 1), np.nan)


def only_finite(weights: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return weights that are 0 where a value is not finite, and values that are 0 there."""
    finite = np.logical_and.reduce([np.isfinite(each) for each in values])
    kept = weights * finite[..., None, :]
    return kept, *(np.where(finite, each, 0.0) for each in values)


def spearman(
    one: np.ndarray, other: np.ndarray, weights: np.ndarray, third: np.ndarray | None = None
) -> np.ndarray:
    """Return Spearman's rank correlation; with `third`, the partial one, controlled for it.

    The partial correlation is that of the ranks: what is left of both ranks after a linear fit
    on the ranks of the third. Places at which a number is not finite are left out.

    Args:
        one: Numbers [..., n].
        other: Numbers of the same shape.
        weights: How often each of them counts [..., k, n], such as resamples; ones for the
            correlation itself.
        third: Numbers of the same shape, for which the correlation is controlled.

    Returns:
        Correlations [..., k].
    """
    given = [one, other] if third is None else [one, other, third]
    weights, *values = only_finite(weights, *given)
    ranks = [ranks_of(each, weights) for each in values]
    plain = correlation(ranks[0], ranks[1], weights)
    if third is None:
        return plain
    return partial(plain, *(correlation(rank, ranks[2], weights) for rank in ranks[:2]))


def kendall(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Kendall's tau-b; the arguments are those of `spearman`."""
    weights, one, other = only_finite(weights, one, other)
    signs = signs_of(one), signs_of(other)

    def total(matrix):
        return ((weights @ matrix) * weights).sum(-1)

    below = total(signs[0] ** 2) * total(signs[1] ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, total(signs[0] * signs[1]) / np.sqrt(below), np.nan)


def correlation_interval(value: float, drawn: np.ndarray) -> Interval:
    """Return a correlation with its interval: the draws' spread, around the correlation itself.

    Means over drawn seeds have the noise of the seeds twice, so the draws are nearer to 0 than the
    correlation is. The spread is taken after Fisher's transformation, atanh. In simulations with 30
    methods and 20 seeds these intervals hold the truth in about 97 of 100 cases.
    """
    z = np.arctanh(np.clip(drawn[np.isfinite(drawn)], -LARGEST, LARGEST))
    center = np.arctanh(np.clip(value, -LARGEST, LARGEST))
    _, low, high = interval_of(value, z - z.mean() if len(z) else z)
    return Interval(float(value), float(np.tanh(center + low)), float(np.tanh(center + high)))


# Average ranks


def places_of(scores: np.ndarray) -> np.ndarray:
    """Return the place of each score along the last axis: 1 is the highest, equals share a place.

    What is not a number is the lowest.
    """
    lows = -np.where(np.isnan(scores), -np.inf, scores)
    order = lows.argsort(axis=-1)
    ascending = np.take_along_axis(lows, order, -1)
    number = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    is_new = np.ones(scores.shape, bool)  # the first of equal scores
    is_new[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    is_last = np.roll(is_new, -1, axis=-1)
    first = np.maximum.accumulate(np.where(is_new, number, 0), axis=-1)
    backwards = np.where(is_last, number, scores.shape[-1])[..., ::-1]
    last = np.minimum.accumulate(backwards, axis=-1)[..., ::-1]
    places = np.empty(scores.shape)
    np.put_along_axis(places, order, 1 + (first + last) / 2, -1)
    return places


def average_ranks(scores: Sequence[np.ndarray], draws: int = DRAWS) -> list[Interval]:
    """Return the average rank of each row over tasks, with its interval; 1 is the best.

    A rank is that of the row's mean score in a task. A draw resamples the seeds of each task, the
    same seeds for all rows. Rows that are alike have ranks near the middle in the draws.

    Args:
        scores: For each task the scores [rows, seeds], in the same order of rows; higher is better.
        draws: Number of draws.
    """
    value = np.mean([places_of(each.mean(axis=1)) for each in scores], axis=0)
    drawn = np.zeros((draws, len(value)))
    for number, each in enumerate(scores):
        weights = weights_of(each.shape[1], draws, SEED + 1 + number)  # every task has its own
        means = weights @ each.T / each.shape[1]
        drawn += places_of(means) / len(scores)
    return [interval_of(*pair) for pair in zip(value, drawn.T, strict=True)]
