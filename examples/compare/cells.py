"""Read the results of compare.py, and take differences, the ranking and the next tiers from them.

compare.py writes one JSON file for each cell, a method (row) on a task: `TASK/ROW.json`. Nothing
is trained here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.common import arguments, files
from examples.common.intervals import Interval, average_ranks, places_of
from examples.compare.rows import BASELINES
from samx.catalog.cards import FAMILIES

MAINS = {"accuracy": "test_accuracy", "loss": "test_loss"}
MOST_SEEDS = 1000
SECOND, THIRD = 12, 6  # rows of a tier, SAM among them; the baselines come on top
COUNTS = ("tier", "seeds", "trials", "budget", "steps")
AMOUNTS = (
    *("learning_rate", "rho", "gradients", "milliseconds_per_step", "time_of_base_step"),
    *("bytes", "seconds"),
)


class Cell(NamedTuple):
    """What compare.py found for one method on one task.

    Attributes:
        task: Name of the task.
        row: Name of the method.
        main: The main result, "accuracy" or "loss".
        edges: Numbers that were chosen at an edge of what was tried.
        tier: Of the task.
        seeds: How many seeds are reported: 0, 1, ...
        trials: Candidates that were tried.
        budget: Gradients that every method may spend.
        steps: Of the training.
        learning_rate: The chosen one.
        rho: The chosen one; 0 for a method without.
        gradients: Spent in the training.
        milliseconds_per_step: Measured.
        time_of_base_step: Time of a step, relative to one of the base optimizer.
        bytes: Of the optimizer's state.
        seconds: That this cell took.
        measures: For each measure its numbers, one for each seed; NaN where one was not finite.
        equal_time: Main measures when the training takes as long as that of `base2x`; empty for the
            baselines.
    """

    task: str
    row: str
    main: str
    edges: tuple[str, ...]
    tier: int
    seeds: int
    trials: int
    budget: int
    steps: int
    learning_rate: float
    rho: float
    gradients: float
    milliseconds_per_step: float
    time_of_base_step: float
    bytes: float
    seconds: float
    measures: dict[str, np.ndarray]
    equal_time: dict[str, np.ndarray]

    @property
    def scores(self) -> np.ndarray:
        """Return the score of each seed: the accuracy, or the loss times −1. Higher is better."""
        return score_of(self.main, self.measures)

    @property
    def gradients_per_step(self) -> float:
        """Return the gradients of a step, on average."""
        return self.gradients / self.steps

    def measure(self, name: str) -> np.ndarray:
        """Return the numbers of a measure, NaNs if this task has none."""
        return self.measures.get(name, np.full(self.seeds, np.nan))


Cells = Mapping[str, Cell]  # of one task, by row


def score_of(main: str, measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the scores of a main result: higher is better."""
    values = measures[MAINS[main]]
    return values if main == "accuracy" else -values


# Reading


def read_cells(folder: Path) -> dict[str, dict[str, Cell]]:
    """Return all cells in the subfolders of a folder, by task and row; tasks of tier 1 first.

    Raises:
        OSError: If a file cannot be opened.
        ValueError: If there is no cell, or if a file does not hold one; the message names it.
    """
    found: dict[str, dict[str, Cell]] = {}
    for path in sorted(folder.glob("*/*.json")):
        cell = read_cell(path)
        found.setdefault(cell.task, {})[cell.row] = cell
    if not found:
        raise ValueError(f"{folder} holds no results of compare.py (TASK/ROW.json)")
    for task, cells in found.items():
        if len({(cell.main, cell.tier) for cell in cells.values()}) > 1:
            raise ValueError(f"{folder / task}: rows differ in their main result or tier")
    return dict(sorted(found.items(), key=lambda item: next(iter(item[1].values())).tier))


def read_or_refuse(folder: Path) -> dict[str, dict[str, Cell]]:
    """Return the cells in the folder `--results`, or end the script with one line."""
    try:
        return read_cells(folder)
    except (OSError, ValueError) as error:
        arguments.refuse(f"--results {folder}: {files.reason(error)}")


def read_cell(path: Path) -> Cell:
    """Read and check one file.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it does not hold a cell; the message names the file.
    """
    found = files.read_json(path)
    try:
        return as_cell(found, path.parent.name, path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def as_cell(found: dict[str, Any], task: str, row: str) -> Cell:
    """Return the cell in a JSON object of this task and row.

    Raises:
        ValueError: If something is missing, or is not what it should be.
    """
    missing = {"task", "row", "main", "edges", "measures", *COUNTS, *AMOUNTS} - found.keys()
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))}")
    if (found["task"], found["row"]) != (task, row):
        raise ValueError(f"holds row {found['row']!r:.40} of task {found['task']!r:.40}")
    if found["main"] not in [*MAINS]:
        raise ValueError(f"main must be accuracy or loss, got {found['main']!r:.40}")
    for name in COUNTS:
        if type(found[name]) is not int or found[name] < 1:
            raise ValueError(f"{name} must be a count, got {found[name]!r:.40}")
    seeds = found["seeds"]
    if seeds > MOST_SEEDS:
        raise ValueError(f"seeds must be at most {MOST_SEEDS}, got {seeds}")
    edges = found["edges"]
    if not isinstance(edges, list) or not all(isinstance(edge, str) for edge in edges):
        raise ValueError(f"edges must be a list of names, got {edges!r:.40}")
    measures = as_measures(found["measures"], seeds, "measures")
    if MAINS[found["main"]] not in measures:
        raise ValueError(f"measures has no {MAINS[found['main']]}")
    equal = found.get("equal_time") or {}
    if not isinstance(equal, dict):
        raise ValueError(f"equal_time must be an object, got {equal!r:.40}")
    equal = {name: equal[name] for name in MAINS.values() if name in equal}
    parts: dict[str, Any] = {name: found[name] for name in ("task", "row", "main", *COUNTS)}
    parts |= {name: as_number(found[name], name) for name in AMOUNTS}
    return Cell(
        **parts,
        edges=tuple(edges),
        measures=measures,
        equal_time=as_measures(equal, seeds, "equal_time"),
    )


def as_measures(found: Any, seeds: int, name: str) -> dict[str, np.ndarray]:
    """Return measures as arrays with a number for each seed."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be an object, got {found!r:.40}")
    for measure, values in found.items():
        if not isinstance(values, list) or len(values) != seeds:
            raise ValueError(f"{name}: {measure} must have {seeds} numbers")
    return {
        measure: np.array([as_number(value, measure) for value in values])
        for measure, values in found.items()
    }


def as_number(value: Any, name: str) -> float:
    """Return a number, NaN for null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r:.40}")
    return float(value)


# Differences


def better_baseline(cells: Cells) -> str:
    """Return the baseline with the better mean test score, "" if there is none.

    The baselines compete on the test split itself. If that favours anybody, it favours them.
    """
    means = {row: cells[row].scores.mean() for row in BASELINES if row in cells}
    return max(means, key=lambda row: np.nan_to_num(means[row], nan=-np.inf), default="")


def difference(cell: Cell, other: Cell, at_equal_time: bool = False) -> np.ndarray:
    """Return how much better a cell is than another one, for each seed: the scores are paired.

    Args:
        cell: The one.
        other: The other, a baseline for example.
        at_equal_time: Whether the first cell trains as long as `base2x` does; without such a result
            there is no difference.
    """
    scores = cell.scores
    if at_equal_time:
        if MAINS[cell.main] not in cell.equal_time:
            return np.zeros(0)
        scores = score_of(cell.main, cell.equal_time)
    seeds = min(cell.seeds, other.seeds)  # 0, 1, ... in both
    return scores[:seeds] - other.scores[:seeds]


def relative_time(cell: Cell, cells: Cells) -> float:
    """Return the time of a training relative to that of `base2x`; a step of a baseline takes 1."""
    if "base2x" not in cells:
        return math.nan
    step = 1.0 if cell.row in BASELINES else cell.time_of_base_step
    return cell.steps * step / cells["base2x"].steps


# The ranking, and the rows of the next tiers


def common_rows(tasks: Mapping[str, Cells]) -> list[str]:
    """Return the rows that every task has, in the order of the first task."""
    first, *others = tasks.values()
    return [row for row in first if all(row in cells for cells in others)]


def scores_of(tasks: Mapping[str, Cells], rows: Sequence[str]) -> list[np.ndarray]:
    """Return the scores [rows, seeds] in each task, for the seeds that all of these rows have."""
    found = []
    for cells in tasks.values():
        seeds = min((cells[row].seeds for row in rows), default=0)
        found.append(np.stack([cells[row].scores[:seeds] for row in rows]))
    return found


def ranking(tasks: Mapping[str, Cells], rows: Sequence[str] | None = None) -> dict[str, Interval]:
    """Return the average rank over tasks with its interval, the best row first.

    Args:
        tasks: The cells of some tasks.
        rows: The rows that are ranked, which all tasks must have; by default all of those.
    """
    rows = common_rows(tasks) if rows is None else rows
    if not rows:
        return {}
    found = dict(zip(rows, average_ranks(scores_of(tasks, rows)), strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1].value))


def mean_ranks(tasks: Mapping[str, Cells], rows: Sequence[str]) -> dict[str, float]:
    """Return the average ranks over tasks, the best row first."""
    if not rows:
        return {}
    places = [places_of(scores.mean(axis=1)) for scores in scores_of(tasks, rows)]
    found = dict(zip(rows, map(float, np.mean(places, axis=0)), strict=True))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def of_tiers(tasks: Mapping[str, Cells], *tiers: int) -> dict[str, Cells]:
    """Return the tasks of these tiers."""
    return {
        task: cells for task, cells in tasks.items() if next(iter(cells.values())).tier in tiers
    }


def family_of(row: str) -> str | None:
    """Return the family of a row in the catalog; `looksam-0.7` is `looksam` with a setting."""
    names = (row.replace("-", "_"), row.rpartition("-")[0].replace("-", "_"))
    by_name = {name: family for family, members in FAMILIES.items() for name in members}
    return next((by_name[name] for name in names if name in by_name), None)


def best_of_families(tasks: Mapping[str, Cells]) -> list[str]:
    """Return the best row of each family by average rank, the best family first.

    Rows that some task lacks are not eligible, such as those for rare classes.
    """
    rows = [row for row in common_rows(tasks) if row not in BASELINES and family_of(row)]
    best: dict[str | None, str] = {}
    for row in mean_ranks(tasks, rows):
        best.setdefault(family_of(row), row)
    return [*best.values()]


def second_tier(tasks: Mapping[str, Cells]) -> list[str]:
    """Choose the rows of the second tier by a rule that was stated before the first results.

    They are the baselines, SAM, and the best row of each family in the first tier, by the average
    rank over its tasks, the best families first, until there are 12 rows beside the baselines.
    """
    return with_sam(best_of_families(of_tiers(tasks, 1)), SECOND)


def third_tier(tasks: Mapping[str, Cells]) -> list[str]:
    """Choose the rows of the third tier by a rule that was stated before the first results.

    They are the baselines, SAM, and the five other rows of the second tier with the best average
    rank over all tasks of the first two tiers. Only rows of the second tier are ranked.
    """
    both = of_tiers(tasks, 1, 2)
    chosen = {*second_tier(tasks)} - {*BASELINES}
    rows = [row for row in common_rows(both) if row in chosen]
    return with_sam([*mean_ranks(both, rows)], THIRD)


def with_sam(rows: Sequence[str], count: int) -> list[str]:
    """Return the baselines, SAM and the first other rows; so many without the baselines."""
    return [*BASELINES, *dict.fromkeys(["sam", *rows])][: count + len(BASELINES)]
