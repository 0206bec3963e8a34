"""How the scripts choose hyperparameters: on a validation split, with seeds that are not reported.

Every candidate trains with every tuning seed. The candidate with the best mean validation accuracy
is chosen. The test split is used once, with the chosen values and with the reported seeds 0, 1, ...

A grid that ends beside the chosen value is too small: a better value may lie beyond. `search`
therefore moves its grid until the best candidate is in its interior. `edges` says where it is not.
It also goes on where the scores rise towards the end of the grid: a second, better peak may follow.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TUNING_SEEDS = range(1000, 1004)  # none of them is a reported seed
TOGETHER = 5  # candidates that a search tries at a time, at most

THIRDS = (1.0, 2.0, 5.0)  # the values of a decade, if two numbers are tuned
SIXTHS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # if it is one; every second of them is one of the thirds


class Runs(NamedTuple):
    """Seed, learning rate and rho of the runs that train together: vectors of equal length."""

    seed: np.ndarray
    learning_rate: np.ndarray
    rho: np.ndarray


def runs_of(seeds: Iterable[int], candidates: Sequence[tuple[float, ...]]) -> list[np.ndarray]:
    """Return every candidate with every seed, as one vector per number; the seed varies fastest."""
    runs = [(seed, *candidate) for candidate in candidates for seed in seeds]
    seed, *numbers = zip(*runs, strict=True)
    return [np.asarray(seed, np.int32), *(np.asarray(column, np.float32) for column in numbers)]


def scores_of(accuracies: Any, candidates: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Return the mean accuracy of each candidate; the accuracies are in the order of `runs_of`."""
    return np.reshape(accuracies, (len(candidates), -1)).mean(axis=1)


class Axis(NamedTuple):
    """The values that one number may take.

    Attributes:
        values: Ascending.
        start: Index of the value with which a search begins.
        reach: Number of values on each side of the best one that must have been tried.
    """

    values: tuple[float, ...]
    start: int
    reach: int


def fixed(values: Iterable[float]) -> Axis:
    """Return an axis with a few given values, all of which are tried."""
    values = tuple(sorted(set(values)))
    return Axis(values, len(values) // 2, len(values))


def around(start: float, decade: Sequence[float] = THIRDS, decades: int = 3) -> Axis:
    """Return the logarithmic axis of a number; all values up to twice or 2.5 times away are tried.

    Args:
        start: Where the search begins; one of the values, such as 0.05.
        decade: The values from 1 to 10.
        decades: How far the axis goes in each direction.
    """
    low = math.floor(math.log10(start)) - decades
    values = [
        float(f"{mantissa:g}e{exponent}")
        for exponent in range(low, low + 2 * decades + 2)
        for mantissa in decade
    ]
    return Axis(tuple(values), values.index(start), len(decade) // len(THIRDS))


def from_zero(axis: Axis) -> Axis:
    """Return the axis with 0 below its lowest value: a radius of 0 is the base optimizer."""
    return axis._replace(values=(0.0, *axis.values), start=axis.start + 1)


def search(
    axes: Sequence[Axis],
    evaluate: Callable[[list[tuple[float, ...]]], Sequence[float]],
    least: int = 0,
) -> dict[tuple[float, ...], float]:
    """Try candidates, always those nearest to the best one so far, until its neighbours are worse.

    At most `TOGETHER` candidates are tried at a time, all within the reach of the best one on all
    axes. When none of them is left, the search looks at the lines through the best one: where the
    last three scores of a line rise outwards, it goes on there. It ends when they rise nowhere, and
    `least` candidates have been tried: until then it goes on with those that are nearest. Of equal
    candidates the one that was tried first stays the best.

    Args:
        axes: One axis for each number of a candidate.
        evaluate: `candidates -> scores`, for at most `TOGETHER` candidates.
        least: How many candidates are tried at least, so that methods with one number get as many
            trials as those with two; default 0.

    Returns:
        The score of every candidate that was tried, in the order in which they were tried.
    """
    grid = [*itertools.product(*(range(len(axis.values)) for axis in axes))]
    values = [[axis.values[i] for axis, i in zip(axes, place, strict=True)] for place in grid]
    places = dict(zip(map(tuple, values), grid, strict=True))
    best, tried = tuple(axis.start for axis in axes), {}
    while True:
        order = {
            candidate: distance(axes, place, best)
            for candidate, place in places.items()
            if candidate not in tried
        }
        near = [candidate for candidate, (is_beyond, _) in order.items() if not is_beyond]
        if not near:
            beyond = beyond_rising_ends({places[one]: tried[one] for one in tried}, best)
            near = [candidate for candidate in order if places[candidate] in beyond]
        missing = min(least - len(tried), len(order))
        if not near and missing <= 0:
            return tried
        count = TOGETHER if near else min(TOGETHER, missing)
        candidates = sorted(near or order, key=lambda candidate: order[candidate])[:count]
        tried |= zip(candidates, map(float, evaluate(candidates)), strict=True)
        best = places[best_of(tried)]


def beyond_rising_ends(
    scores: Mapping[tuple[int, ...], float], best: tuple[int, ...]
) -> set[tuple[int, ...]]:
    """Return the places that continue a line through the best one whose last three scores rise."""
    found = set()
    for axis, outwards in itertools.product(range(len(best)), (-1, 1)):
        line = {
            place[axis]: score
            for place, score in scores.items()
            if outwards * (place[axis] - best[axis]) > 0
            and place[:axis] + place[axis + 1 :] == best[:axis] + best[axis + 1 :]
        }
        last = sorted(line, key=lambda index: outwards * index)[-3:]
        if len(last) == 3 and line[last[0]] < line[last[1]] < line[last[2]]:
            found.add((*best[:axis], last[2] + outwards, *best[axis + 1 :]))
    return found


def distance(axes: Sequence[Axis], place: Sequence[int], best: Sequence[int]) -> tuple[bool, int]:
    """Return whether a place is beyond the reach of the best one, and its distance from it."""
    steps = [abs(i - j) for i, j in zip(place, best, strict=True)]
    return any(step > axis.reach for step, axis in zip(steps, axes, strict=True)), sum(steps)


def best_of(tried: Mapping[tuple[float, ...], float]) -> tuple[float, ...]:
    """Return the candidate with the best score, the first one of equals."""
    return max(tried, key=lambda candidate: tried[candidate])


def edges(
    chosen: Sequence[float],
    tried: Iterable[Sequence[float]],
    names: Sequence[str] = ("learning_rate", "rho"),
) -> list[str]:
    """Return the names of the numbers that were chosen at an edge of what was tried.

    A number is at an edge if only smaller or only larger values were tried together with the other
    chosen numbers. A single value is not a grid and has no edge. Neither has a radius of 0, the
    natural end of its axis.
    """
    found = []
    for position, name in enumerate(names):
        value = chosen[position]
        line = {
            candidate[position]
            for candidate in tried
            if all(i == position or candidate[i] == chosen[i] for i in range(len(names)))
        }
        if len(line) > 1 and value != 0 and value in (min(line), max(line)):
            found.append(name)
    return found
