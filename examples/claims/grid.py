"""Choose learning rate and rho from a fixed grid, the same for all methods, and train the seeds."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.common.intervals import mean_interval
from examples.common.report import aligned, mean_and_error
from examples.common.training import map_runs
from examples.common.tuning import TUNING_SEEDS, best_of, runs_of, scores_of

SEARCH_SEEDS = range(TUNING_SEEDS.start, TUNING_SEEDS.start + 2 * len(TUNING_SEEDS))


class Run(NamedTuple):
    """What a training depends on, beside its method; or that of many, as vectors."""

    seed: Any
    learning_rate: Any
    rho: Any


class Outcome(NamedTuple):
    """What a training gives, or all seeds of it, [seeds, ...].

    Attributes:
        validation: What learning rate and rho are chosen by; higher is better.
        test: The same on examples that nothing was chosen by.
        share: Share of the steps with a sharp gradient.
        more: Other numbers.
    """

    validation: Any
    test: Any
    share: Any
    more: dict[str, Any]


Train = Callable[[Run], Outcome]
Grid = Sequence[tuple[float, float]]


def grid_of(rates: Sequence[float], rhos: Sequence[float]) -> Grid:
    """Return all pairs of a learning rate and a rho."""
    return list(itertools.product(rates, rhos))


def train_seeds(
    train: Train, pair: tuple[float, float], seeds: Sequence[int], advance: Callable[[int], Any]
) -> Outcome:
    """Train all seeds with one learning rate and one rho."""
    return map_runs(train, Run(*runs_of(seeds, [pair])), advance=advance)


def choose(
    train: Train, grid: Grid, advance: Callable[[int], Any], seeds: Sequence[int] = SEARCH_SEEDS
) -> dict[str, Any]:
    """Return the pair with the best mean validation score, over seeds that are not reported.

    A single pair is not tried.
    """
    if len(grid) == 1:
        return {"learning_rate": grid[0][0], "rho": grid[0][1]}
    found = map_runs(train, Run(*runs_of(seeds, grid)), advance=advance)
    tried = dict(zip(grid, scores_of(found.validation, grid).tolist(), strict=True))
    learning_rate, rho = best_of(tried)
    return {"learning_rate": learning_rate, "rho": rho}


def as_row(name: str, chosen: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Return what a report keeps of a method."""
    return {
        "row": name,
        **chosen,
        "test": np.asarray(outcome.test, float).tolist(),
        "share": np.asarray(outcome.share, float).tolist(),
        **{key: np.asarray(value, float).tolist() for key, value in outcome.more.items()},
    }


def only_if_gained(gain: Sequence[float], lead: Sequence[float]) -> list[float]:
    """Return a lead over SAM; nothing where SAM itself has no clear gain over the base."""
    return list(lead) if mean_interval(gain).is_above else []


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each row."""
    table = [["row", "test, %", "sampled steps", "learning rate", "rho"]]
    for row in rows:
        accuracy, error = mean_and_error(row["test"])
        numbers = f"{accuracy:.2f} ± {error:.2f}", f"{np.mean(row['share']):.1%}"
        table.append([row["row"], *numbers, f"{row['learning_rate']:g}", f"{row['rho']:g}"])
    print("\n".join(["", *aligned(table)]))
