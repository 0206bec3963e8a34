"""Tables and figures of the comparison, from the committed results of compare.py.

    python examples/compare/tables.py
    python examples/compare/tables.py --results runs/compare-001

Nothing is trained. For every task there are two tables. The first has the test result, the gain
over the better of both baselines (`base` and `base2x`) at equal gradients and at equal time, what a
step costs, and the chosen learning rate and rho. The second has what else was measured. Then come
the ranking of the methods over the tasks, the rows that the next tiers take, what all of it cost,
and what is missing.

All intervals are bootstrap intervals of 95% over seeds. A gain is paired by seed, and positive
where the method is better. At equal time, a method trains as long as `base2x` does.

The script writes results.json, comparison.png (gain over training time, one panel for each task)
and ranking.png to --out. It takes about half a minute.
"""

import argparse

from examples.compare.options import parse_results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_results(__doc__, "tables", argv)


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from examples.common import files
from examples.common.intervals import Interval, mean_interval
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, aligned, marked
from examples.compare import comparison_figures
from examples.compare.cells import (
    MAINS,
    Cell,
    Cells,
    better_baseline,
    common_rows,
    difference,
    of_tiers,
    ranking,
    read_or_refuse,
    relative_time,
    second_tier,
    third_tier,
)
from examples.compare.rows import BASELINES, variants_of
from examples.compare.tasks import TASKS

MORE = {  # what the second table has: its head, and the factor on the number
    "test_loss": ("test loss", 1),
    "train_loss": ("train loss", 1),
    "calibration_error": ("calib., %", 100),
    "test_loss_input_noise": ("input noise", 1),
    "test_loss_4_bits": ("4 bits", 1),
    "test_loss_3_bits": ("3 bits", 1),
}
MORE_MARKS = "< and >: lower and higher than the better baseline, by a paired interval without 0"
COSTS = "step: time, relative to a step of base; state: of the optimizer"
BY_CHANCE = {20: 4, 10: 5, 0: 8}  # of 100 methods without any effect, with at least so many seeds


class Summary(NamedTuple):
    """What the first table says of a row.

    Attributes:
        row: Name of the method.
        result: The main result on the test split, an accuracy in % or a loss.
        gain: How much better it is than the better baseline, in points or as a loss.
        gain_equal_time: The same at equal time; NaN for the baselines.
        gradients: Spent in the training.
        time: Of the training, relative to that of `base2x`.
        cell: All else.
    """

    row: str
    result: Interval
    gain: Interval
    gain_equal_time: Interval
    gradients: float
    time: float
    cell: Cell


def summarize(cells: Cells) -> list[Summary]:
    """Return the summaries of a task's rows: the baselines, then the best result first."""
    better = cells.get(better_baseline(cells))
    found = []
    for row, cell in cells.items():
        result = mean_interval(cell.measure(MAINS[cell.main]))
        gains = [
            Interval(np.nan, np.nan, np.nan)
            if better is None or cell is better
            else mean_interval(difference(cell, better, at_equal_time))
            for at_equal_time in (False, True)
        ]
        result, gain, at_equal_time = (each.scaled(factor_of(cell)) for each in (result, *gains))
        time = relative_time(cell, cells)
        found.append(Summary(row, result, gain, at_equal_time, cell.gradients, time, cell))
    return sorted(found, key=lambda each: (each.row not in BASELINES, -order_of(each)))


def order_of(summary: Summary) -> float:
    """Return the mean score; what is not finite comes last."""
    return float(np.nan_to_num(summary.cell.scores.mean(), nan=-np.inf))


def factor_of(cell: Cell) -> int:
    """Return the factor on results: accuracies are shown in percent."""
    return 100 if cell.main == "accuracy" else 1


# The tables as text


def shown(found: Interval, digits: int, sign: str = "") -> str:
    """Format a number and its interval; nothing where there is no number."""
    if np.isnan(found.value):
        return ""
    text = f"{found.value:{sign}.{digits}f}"
    if np.isnan(found.low):
        return text
    return f"{text} [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"


def size_of(count: float) -> str:
    """Format a number of bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def head_of(cells: Cells) -> tuple[str, str, int]:
    """Return the name of a task's main result, that of a gain, and the digits after the point."""
    main = next(iter(cells.values())).main
    over = f"gain over {better_baseline(cells) or 'baseline'}"
    return ("test accuracy, %", over, 2) if main == "accuracy" else ("test loss", over, 4)


def result_grid(cells: Cells, summaries: Iterable[Summary]) -> list[list[str]]:
    """Return the first table of a task: results, costs, and the chosen numbers."""
    result, gain, digits = head_of(cells)
    grid = [["method", result, gain, "at equal time", "gradients", "step", "state", "lr", "rho"]]
    for each in summaries:
        numbers = each.cell._asdict()
        grid.append(
            [
                each.row,
                shown(each.result, digits),
                shown(each.gain, digits, "+"),
                shown(each.gain_equal_time, digits, "+"),
                f"{each.gradients:.0f}",
                f"{each.cell.time_of_base_step:.2f}",
                size_of(each.cell.bytes),
                *(marked(numbers, name) for name in ("learning_rate", "rho")),
            ]
        )
    return grid


def more_grid(cells: Cells, summaries: Iterable[Summary]) -> list[list[str]]:
    """Return the second table of a task: other measures, compared with the better baseline."""
    names = [name for name in MORE if any(name in cell.measures for cell in cells.values())]
    better = cells.get(better_baseline(cells))
    grid = [["method", *(MORE[name][0] for name in names)]]
    for each in summaries:
        grid.append([each.row, *(compared(each.cell, better, name) for name in names)])
    return grid


def compared(cell: Cell, better: Cell | None, name: str) -> str:
    """Format the mean of a measure, marked where it differs from that of the better baseline."""
    values = cell.measure(name)
    text = f"{MORE[name][1] * values.mean():.3g}"
    if better is None or cell is better:
        return text
    seeds = min(cell.seeds, better.seeds)
    found = mean_interval(values[:seeds] - better.measure(name)[:seeds])
    return text + " <" * found.is_below + " >" * found.is_above


def verdict(cells: Cells, summaries: Iterable[Summary]) -> str:
    """State how many methods are better, and how many are worse, than the better baseline."""
    methods = [each for each in summaries if each.row not in BASELINES]
    better = sum(each.gain.is_above for each in methods)
    worse = sum(each.gain.is_below for each in methods)
    seeds = max(each.cell.seeds for each in summaries)
    chance = next(c for least, c in BY_CHANCE.items() if seeds >= least) * len(methods) / 100
    return (
        f"{better} of {len(methods)} methods are better than {better_baseline(cells)}, "
        f"{worse} worse (intervals without 0; by chance about {chance:.1f} of each)"
    )


# The ranking


class Ranking(NamedTuple):
    """A ranking of the rows that all tasks of some tiers have."""

    tiers: tuple[int, ...]
    tasks: Mapping[str, Cells]
    rows: dict[str, Interval]

    @property
    def title(self) -> str:
        """Return which tasks it is about."""
        tiers = "tier 1" if self.tiers == (1,) else f"tiers 1 to {self.tiers[-1]}"
        count = len(self.tasks)
        return f"{tiers}, {count} task{'s' * (count != 1)}, {len(self.rows)} rows"


def rankings_of(tasks: Mapping[str, Cells]) -> list[Ranking]:
    """Return the rankings of tier 1, of tiers 1 and 2, and of all, where there are such tasks."""
    found: list[Ranking] = []
    for tiers in ((1,), (1, 2), (1, 2, 3)):
        mine = of_tiers(tasks, *tiers)
        if mine and (not found or len(mine) > len(found[-1].tasks)):
            found.append(Ranking(tiers, mine, ranking(mine)))
    return found


def ranking_grid(found: Ranking) -> list[list[str]]:
    """Return the average rank of each row with its interval, and its rank in each task."""
    places = comparison_figures.places_by_task(found.tasks, [*found.rows])
    grid = [["method", "average rank", *found.tasks]]
    for number, (row, interval) in enumerate(found.rows.items()):
        grid.append([row, shown(interval, 1), *(f"{each[number]:g}" for each in places)])
    return grid


# What it cost, and what is missing


def missing_of(tasks: Mapping[str, Cells]) -> list[str]:
    """Return a line for each task without rows that fit it and that others of its tier have."""
    lines = []
    for tier in sorted({next(iter(cells.values())).tier for cells in tasks.values()}):
        mine = of_tiers(tasks, tier)
        every = dict.fromkeys(row for cells in mine.values() for row in cells)
        for task, cells in mine.items():
            if lacking := [row for row in every if row not in cells and fits(row, task)]:
                lines.append(f"{task} lacks {', '.join(lacking)}")
    if {*tasks} <= {*TASKS}:
        lines += [f"{task} has no cells" for task in TASKS if task not in tasks]
    return lines


def fits(row: str, task: str) -> bool:
    """Return whether a method can be used on a task: SAM-ON needs normalization, for example."""
    return task not in TASKS or row in variants_of(TASKS[task])


def notes_of(tasks: Mapping[str, Cells]) -> list[str]:
    """Return what all cells cost, what is missing, and what is not as it should be."""
    every = [cell for cells in tasks.values() for cell in cells.values()]
    hours = sum(cell.seconds for cell in every) / 3600
    lines = [f"{len(every)} cells (tasks times rows) took {hours:.1f} hours"]
    names = {
        "a number at an edge of what was tried": [cell for cell in every if cell.edges],
        "a number that is not finite": [
            cell for cell in every if not np.isfinite([*cell.measures.values()]).all()
        ],
        "a number of seeds that is not the largest of its task": [
            cell
            for cells in tasks.values()
            for cell in cells.values()
            if cell.seeds < max(other.seeds for other in cells.values())
        ],
    }
    for text, found in names.items():
        if found:
            listed = ", ".join(f"{cell.row} on {cell.task}" for cell in found)
            lines.append(f"{len(found)} with {text}: {listed}")
    return [*lines, *missing_of(tasks)]


# The script


def print_tables(tasks: Mapping[str, Cells], summaries: Mapping[str, list[Summary]]) -> None:
    """Print both tables of each task."""
    for task, cells in tasks.items():
        mine = summaries[task]
        seeds = max(cell.seeds for cell in cells.values())
        print(f"\n{comparison_figures.title_of(task)} ({task}), {seeds} seeds")
        print("\n".join(aligned(result_grid(cells, mine))))
        print(f"{COSTS}\n{verdict(cells, mine)}")
        if any(cell.edges for cell in cells.values()):
            print(MARK)
        print("\n".join(["", *aligned(more_grid(cells, mine)), MORE_MARKS]))


def print_rankings(tasks: Mapping[str, Cells], found: Iterable[Ranking]) -> None:
    """Print the rankings, and the rows that the next tiers take."""
    for each in found:
        print(f"\nAverage rank, {each.title} (interval: over seeds, not over tasks)")
        print("\n".join(aligned(ranking_grid(each))))
    if {*BASELINES, "sam"} <= {*common_rows(tasks)}:
        for name, choose, tiers in (("second", second_tier, (1,)), ("third", third_tier, (1, 2))):
            count = len(of_tiers(tasks, *tiers))
            print(f"\n{name} tier, chosen from {count} tasks: {', '.join(choose(tasks))}")


def as_json(summary: Summary) -> dict[str, Any]:
    """Return what a summary says, without the numbers of single seeds."""
    found = {name: value for name, value in summary._asdict().items() if name != "cell"}
    return found | {name: getattr(summary.cell, name) for name in ("learning_rate", "rho")}


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, list[Summary]]:
    args = parse(argv)
    tasks = read_or_refuse(args.results)
    choose_folder(args, "tables")
    report = Report(args, left_out=["results"])
    summaries = {task: summarize(cells) for task, cells in tasks.items()}
    rankings = rankings_of(tasks)
    print_tables(tasks, summaries)
    print_rankings(tasks, rankings)
    print("", *notes_of(tasks), sep="\n")
    report.save(
        tasks={task: [as_json(each) for each in mine] for task, mine in summaries.items()},
        rankings=[{"tiers": each.tiers, "rows": each.rows} for each in rankings],
    )
    comparison_figures.draw_comparison(tasks, summaries, args.folder / "comparison.png")
    comparison_figures.draw_ranking(rankings, args.folder / "ranking.png")
    report.end("comparison.png", "ranking.png")
    return summaries


if __name__ == "__main__":
    main()
