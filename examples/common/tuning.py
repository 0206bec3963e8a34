"""How the scripts choose hyperparameters: on a validation split, with seeds that are not reported.

Every candidate trains with every tuning seed. The candidate with the best mean validation accuracy
is chosen. The test split is used once, with the chosen values and with the reported seeds 0, 1, ...
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

TUNING_SEEDS = range(1000, 1004)  # none of them is a reported seed


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
