"""Which measure of sharpness predicts the test result? Correlations over the comparison's results.

    python examples/compare/sharpness_and_accuracy.py
    python examples/compare/sharpness_and_accuracy.py --results runs/compare-001

Nothing is trained. compare.py has measured the sharpness of the training loss of every network, a
method on a task with a seed. Here these measures are correlated with the score on the test split:
the accuracy, or the loss times -1. Flatter is better if a correlation is negative. All correlations
are of ranks (Spearman; Kendall's tau-b beside it), at three levels:

    methods   over the means of the methods: does a method that finds flatter minima score better?
    networks  over all networks of a task, methods and seeds together
    seeds     over the seeds of one method, then the mean over methods

Every seed has other training and test data, and what these change, they change for all methods.
Therefore the third level takes the ranks of a method's seeds, minus the mean of these ranks over
all methods: is a network that is flatter than others on its data better than others on its data?

A network that fits its training data better is often flatter too. So every correlation is also
taken without what the training loss explains (the partial correlation of ranks). Training loss and
test loss under noise on the inputs are no measures of sharpness. They stand beside them as
references: what predicts no better than the training loss adds nothing.

Over tasks, the mean of the correlations is given, and in how many tasks the sign is the expected
one. Intervals are bootstrap intervals of 95% over methods and seeds, not over tasks. They treat
methods as independent, though many are close relatives.

The script prints two tables and what they say, and writes results.json and
sharpness_and_accuracy.png to --out. It takes about a minute.
"""

import argparse

from examples.compare.options import parse_results

NAME = "sharpness_and_accuracy"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parse_results(__doc__, NAME, argv)


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.common import figures, files
from examples.common.intervals import (
    SEED,
    Interval,
    correlation_interval,
    kendall,
    ranks_of,
    spearman,
    weights_of,
)
from examples.common.output import choose_folder
from examples.common.report import Report, aligned
from examples.compare.cells import Cells, read_or_refuse

SHARPNESS = {
    "top_eigenvalue": "top eigenvalue",
    "trace": "trace",
    "worst_case": "worst case",
    "adaptive_worst_case": "adaptive worst case",
    "m_sharpness": "m-sharpness",
}
REFERENCES = {
    "train_loss": "(training loss)",
    "test_loss_input_noise": "(loss, noisy inputs)",
}
MEASURES = SHARPNESS | REFERENCES  # in brackets: no measure of sharpness
CONTROL = "train_loss"
LEVELS = ("methods", "networks", "seeds")
KINDS = ("raw", "controlled")
DRAWS = 1000
COLUMNS = 4  # panels side by side
ALL = "mean of tasks"

Key = tuple[str, str, str]  # measure, level, kind
Grid = list[list[str]]


class Found(NamedTuple):
    """A correlation, and what the draws of the bootstrap gave."""

    value: float
    drawn: np.ndarray

    @property
    def interval(self) -> Interval:
        """Return the correlation with its interval."""
        return correlation_interval(self.value, self.drawn)


class Resample(NamedTuple):
    """How often each method and each seed of a task counts: [draws, methods], [draws, seeds]."""

    methods: np.ndarray
    seeds: np.ndarray


# Correlations in one task. Numbers are [methods, seeds]; what comes out is [draws].

Correlate = Callable[..., np.ndarray]  # one, other, weights, and maybe the third


def over_methods(correlate: Correlate, drawn: Resample, *numbers: np.ndarray) -> np.ndarray:
    """Correlate the means over seeds."""
    one, other, *third = (
        drawn.seeds @ each.T / drawn.seeds.sum(1, keepdims=True) for each in numbers
    )
    return correlate(one, other, drawn.methods[:, None, :], *third)[:, 0]


def over_networks(correlate: Correlate, drawn: Resample, *numbers: np.ndarray) -> np.ndarray:
    """Correlate over all networks."""
    weights = drawn.methods[:, :, None] * drawn.seeds[:, None, :]
    one, other, *third = (each.ravel() for each in numbers)
    return correlate(one, other, weights.reshape(len(weights), -1), *third)


def over_seeds(correlate: Correlate, drawn: Resample, *numbers: np.ndarray) -> np.ndarray:
    """Correlate over the seeds of each method, and return the mean over the methods."""
    one, other, *third = map(beside_other_methods, numbers)
    found = correlate(one, other, drawn.seeds, *third).T  # [draws, methods]
    weights = drawn.methods * np.isfinite(found)
    with np.errstate(invalid="ignore"):
        return (weights * np.nan_to_num(found)).sum(1) / weights.sum(1)


def beside_other_methods(numbers: np.ndarray) -> np.ndarray:
    """Return ranks over the seeds of each method, minus their mean over all methods."""
    is_known = np.isfinite(numbers)
    ranks = ranks_of(np.where(is_known, numbers, 1e300), is_known[:, None, :] * 1.0)[:, 0]
    means = (ranks * is_known).sum(0) / np.maximum(is_known.sum(0), 1)
    return np.where(is_known, ranks - means, np.nan)


OVER: dict[str, Correlate] = dict(
    zip(LEVELS, (over_methods, over_networks, over_seeds), strict=True)
)


def numbers_of(cells: Cells) -> dict[str, np.ndarray]:
    """Return the scores and all measures of a task's networks [methods, seeds]."""
    seeds = min(cell.seeds for cell in cells.values())
    found = {
        name: np.stack([cell.measure(name)[:seeds] for cell in cells.values()]) for name in MEASURES
    }
    return found | {"score": np.stack([cell.scores[:seeds] for cell in cells.values()])}


def over_all(
    tasks: Mapping[str, Cells], levels: Sequence[str] = LEVELS, draws: int = DRAWS
) -> dict[str, dict[Key, Found]]:
    """Return the correlations in every task; a draw has the same methods in all tasks."""
    rows = list(dict.fromkeys(row for cells in tasks.values() for row in cells))
    drawn = weights_of(len(rows), draws, SEED)
    return {
        task: correlations_of(
            cells, drawn[:, [rows.index(row) for row in cells]], SEED + 1 + number, levels
        )
        for number, (task, cells) in enumerate(tasks.items())
    }


def correlations_of(
    cells: Cells, weights: np.ndarray, seed: int, levels: Sequence[str] = LEVELS
) -> dict[Key, Found]:
    """Return the correlations of each measure with the score in one task.

    Args:
        cells: The cells of the task.
        weights: How often each method counts [draws, methods].
        seed: Of the draws of the task's seeds.
        levels: The levels.
    """
    numbers = numbers_of(cells)
    methods, seeds = numbers["score"].shape
    drawn = Resample(weights, weights_of(seeds, len(weights), seed))
    plain = Resample(np.ones((1, methods)), np.ones((1, seeds)))
    found = {}
    for measure in MEASURES:
        pair = numbers[measure], numbers["score"]
        for level in levels:
            ways: dict[str, tuple[Correlate, tuple[np.ndarray, ...]]] = {"raw": (spearman, pair)}
            if measure != CONTROL:
                ways["controlled"] = spearman, (*pair, numbers[CONTROL])
            if level == "methods":
                ways["kendall"] = kendall, pair
            for kind, (correlate, given) in ways.items():
                value = OVER[level](correlate, plain, *given)[0]
                found[measure, level, kind] = Found(
                    float(value), OVER[level](correlate, drawn, *given)
                )
    return found


# Over all tasks


class OverTasks(NamedTuple):
    """The mean of a correlation over tasks, and how often its sign is the expected one, minus."""

    mean: Interval
    expected: int
    tasks: int

    def __str__(self) -> str:
        return f"{shown(self.mean)}, {self.expected}/{self.tasks}" if self.tasks else ""


def over_tasks(found: Sequence[Found]) -> OverTasks:
    """Return the mean over the tasks in which there is such a correlation."""
    found = [each for each in found if np.isfinite(each.value)]
    if not found:
        return OverTasks(Interval(np.nan, np.nan, np.nan), 0, 0)
    values = [each.value for each in found]
    drawn = np.mean([each.drawn for each in found], axis=0)
    mean = correlation_interval(float(np.mean(values)), drawn)
    return OverTasks(mean, sum(value < 0 for value in values), len(values))


def summarize(found: Mapping[str, Mapping[Key, Found]]) -> dict[Key, OverTasks]:
    """Return each correlation over all tasks."""
    keys = dict.fromkeys(key for mine in found.values() for key in mine)
    return {key: over_tasks([mine[key] for mine in found.values() if key in mine]) for key in keys}


def summary_of(report: Mapping[str, Any]) -> dict[Key, OverTasks]:
    """Return what results.json says of each correlation over all tasks."""
    found = {}
    for row in report["over_tasks"]:
        value, low, high = (np.nan if x is None else x for x in row["mean"])
        key = row["measure"], row["level"], row["kind"]
        found[key] = OverTasks(Interval(value, low, high), row["expected"], row["tasks"])
    return found


def shown(found: Interval) -> str:
    """Format a correlation with its interval; nothing where there is none."""
    if not np.isfinite(found.value):
        return ""
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def grid_of(summary: Mapping[Key, OverTasks], columns: Sequence[tuple[str, str]]) -> Grid:
    """Return the table of some levels and kinds: means over tasks, and expected signs."""
    grid = [["measure", *(f"{level}, {kind}" for level, kind in columns)]]
    for measure, title in MEASURES.items():
        cells = [summary.get((measure, *column)) for column in columns]
        grid.append([title, *(str(cell) if cell else "" for cell in cells)])
    return grid


def columns_of(level: str) -> list[tuple[str, str]]:
    """Return the columns of the table of a level."""
    kinds = ("raw", "kendall", "controlled") if level == "methods" else KINDS
    return [(level, kind) for kind in kinds]


def grid_of_tasks(found: Mapping[str, Mapping[Key, Found]], kind: str) -> Grid:
    """Return the table of the correlations over methods in each task."""
    grid = [[f"methods, {kind}", *MEASURES.values()]]
    for task, mine in found.items():
        known = [mine.get((measure, "methods", kind)) for measure in MEASURES]
        grid.append([task, *(shown(each.interval) if each else "" for each in known)])
    return grid


def strongest(summary: Mapping[Key, OverTasks], level: str, kind: str) -> str | None:
    """Return the measure of sharpness with the most negative mean correlation."""
    keys = [key for key in summary if key[0] in SHARPNESS and key[1:] == (level, kind)]
    known = [key for key in keys if summary[key].tasks]
    return min(known, key=lambda key: summary[key].mean.value)[0] if known else None


def sentences_of(summary: Mapping[Key, OverTasks]) -> list[str]:
    """State which measure predicts the score best, with and without what the training loss says."""
    lines = []
    for level in LEVELS:
        for kind in KINDS:
            if best := strongest(summary, level, kind):
                given = " at equal training loss" if kind == "controlled" else ""
                lines.append(
                    f"Over {level}{given}, {SHARPNESS[best]} has the lowest correlation with the "
                    f"score: {told(summary[best, level, kind])}."
                )
    for name, title in REFERENCES.items():
        if (other := summary.get((name, "methods", "raw"))) and other.tasks:
            lines.append(f"Reference over methods, {title}: {told(other)}.")
    return lines


def told(found: OverTasks) -> str:
    """Return a correlation as a part of a sentence."""
    count = f"{found.expected} of {found.tasks} task{'s' * (found.tasks != 1)}"
    return f"mean over tasks {shown(found.mean)}, sign as expected in {count}"


# The figure


def draw(found: Mapping[str, Mapping[Key, Found]], path: Path) -> None:
    """Draw the correlations over methods: one panel for each measure, one line for each task."""
    summary = summarize(found)
    names = [*found, ALL] if len(found) > 1 else [*found]
    lines = -(-len(MEASURES) // COLUMNS)
    heights = [figures.height_of(len(names) + 1)] * lines
    figure = figures.make_figure(2.6, heights)
    panels = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes in panels.ravel()[len(MEASURES) :]:
        axes.set_axis_off()
    for axes, (measure, title) in zip(panels.ravel(), MEASURES.items(), strict=False):
        draw_measure(axes, measure, found, summary, names)
        axes.set_title(title)
        if axes not in panels[:, 0]:
            axes.tick_params(labelleft=False)
    figures.save(figure, path, claim(summary))


def draw_measure(
    axes: Any,
    measure: str,
    found: Mapping[str, Mapping[Key, Found]],
    summary: Mapping[Key, OverTasks],
    names: Sequence[str],
) -> None:
    """Draw the correlations of one measure, raw and controlled."""
    styles = {"raw": (figures.BLUE, -0.16, "o"), "controlled": (figures.RED, 0.16, "s")}
    for position, name in enumerate(names):
        for kind, (color, shift, marker) in styles.items():
            key = (measure, "methods", kind)
            one = summary.get(key) if name == ALL else found[name].get(key)
            if one is None:
                continue
            value = one.mean if isinstance(one, OverTasks) else one.interval
            if not np.isfinite(value.value):
                continue
            bars = np.nan_to_num([[value.value - value.low], [value.high - value.value]])
            axes.errorbar(
                *(value.value, position + shift),
                xerr=np.maximum(bars, 0),
                fmt=marker,
                color=color,
                ms=6 if name == ALL else 4,
                lw=1.5,
            )
    axes.axvline(0, color=figures.GREY, linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xticks((-1, -0.5, 0, 0.5, 1), ("−1", "", "0", "", "1"))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25)


def claim(summary: Mapping[Key, OverTasks]) -> str:
    """State which measure predicts the score best over methods, and how to read the figure."""
    best = strongest(summary, "methods", "raw")
    text = (
        "Correlation of ranks with the test score, over methods (blue), and at equal training loss "
    )
    text += "(red); 95% intervals; in brackets: no measure of sharpness"
    if best is None:
        return text
    raw, left = (summary[best, "methods", kind].mean.value for kind in KINDS)
    lowest = f"Lowest correlation: {SHARPNESS[best]}, mean {raw:+.2f}"
    return f"{lowest}, at equal training loss {left:+.2f}. {text}"


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[Key, OverTasks]:
    args = parse(argv)
    tasks = read_or_refuse(args.results)
    choose_folder(args, NAME)
    report = Report(args, left_out=["results"])
    found = over_all(tasks, draws=DRAWS)
    summary = summarize(found)
    print("\nMean of the correlations over tasks, and in how many tasks the sign is minus")
    for level in LEVELS:
        print("\n".join(["", *aligned(grid_of(summary, columns_of(level)))]))
    for kind in KINDS:
        print("\n".join(["", *aligned(grid_of_tasks(found, kind))]))
    print("", *sentences_of(summary), sep="\n")
    report.save(
        over_tasks=[
            dict(zip(("measure", "level", "kind"), key, strict=True)) | one._asdict()
            for key, one in summary.items()
        ],
        tasks={
            task: [
                dict(zip(("measure", "level", "kind"), key, strict=True))
                | {"correlation": one.interval}
                for key, one in mine.items()
            ]
            for task, mine in found.items()
        },
    )
    draw(found, args.folder / f"{NAME}.png")
    report.end(f"{NAME}.png")
    return summary


if __name__ == "__main__":
    main()
