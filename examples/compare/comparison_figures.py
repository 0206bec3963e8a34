"""Figures of the comparison: gain over training time in each task, and the ranking of methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.common import figures
from examples.common.intervals import places_of
from examples.compare.cells import Cells, better_baseline, scores_of
from examples.compare.rows import BASELINES
from examples.compare.tasks import TASKS

COLUMNS = 2  # panels side by side
BEST = 4  # of the best methods have a name
TICKS = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20)
UNITS = {"accuracy": ("points of test accuracy", 1), "loss": ("test loss", 3)}  # and digits

GAINS = (
    "Gain over the better baseline at equal gradients, and the time that the training takes; "
    "bars: 95% intervals, paired by seed"
)


def title_of(task: str) -> str:
    """Return what a task is about; its name, if it is not one of `tasks.TASKS`."""
    return TASKS[task].title if task in TASKS else task


def places_by_task(tasks: Mapping[str, Cells], rows: Sequence[str]) -> list[np.ndarray]:
    """Return the rank of each row in each task, by mean score; 1 is the best."""
    return [places_of(scores.mean(axis=1)) for scores in scores_of(tasks, rows)]


# Gain over time


def draw_comparison(tasks: Mapping[str, Cells], summaries: Mapping[str, Any], path: Path) -> None:
    """Draw one panel for each task: the gain of each method over the time of its training."""
    lines = -(-len(tasks) // COLUMNS)
    columns = min(COLUMNS, len(tasks))
    figure = figures.make_figure(1.3 * columns, [figures.height_of(11)] * lines)
    panels = np.ravel(figure.subplots(lines, columns, squeeze=False))
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    figure.suptitle(GAINS, x=0.01, ha="left")  # names are placed when all else has its place
    points = [
        draw_gains(axes, task, cells, summaries[task])
        for axes, (task, cells) in zip(panels, tasks.items(), strict=False)
    ]
    for axes, mine in zip(panels, points, strict=False):
        figures.label_points(axes, mine)
    figures.save(figure, path, GAINS)


def draw_gains(
    axes: Any, task: str, cells: Cells, summaries: Sequence[Any]
) -> list[tuple[float, float, str, str]]:
    """Draw the gains of a task's rows; return the points that get a name."""
    better = better_baseline(cells)
    drawn = [each for each in summaries if np.isfinite([each.time, each.result.value]).all()]
    names, low = named(drawn), lowest(drawn)
    unit, digits = UNITS[next(iter(cells.values())).main]
    points = []
    for each in sorted(drawn, key=lambda each: each.row in names):
        is_named = each.row in names
        x, y, *ends = each.time, *(each.gain if each.row != better else (0.0, 0.0, 0.0))
        color = figures.RED if each.row in BASELINES else figures.BLUE
        style = {"color": color, "alpha": 1.0 if is_named else 0.3, "zorder": 2 + is_named}
        label = each.row
        if y < low:  # what is far below stays at the edge
            label, y = f"{each.row}: {y:+.{digits}f}", low
            axes.plot(x, y, "v", ms=5, **style)
        else:
            bars = np.nan_to_num([[y - max(ends[0], low)], [ends[1] - y]])
            axes.errorbar(x, y, np.maximum(bars, 0), fmt="o", ms=4, lw=1, **style)
        if is_named:
            points.append((x, y, label, color))
    axes.axhline(0, color=figures.RED, linewidth=0.8, linestyle=":")
    axes.margins(x=0.15, y=0.12)
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    ticks = [tick for tick in TICKS if left <= tick <= right]
    axes.set_xticks(ticks, map("{:g}".format, ticks))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="time of the training (base2x: 1)", ylabel=f"gain, {unit}")
    axes.grid(alpha=0.25)
    axes.set_title(claim(task, summaries, better))
    return points


def named(summaries: Sequence[Any]) -> list[str]:
    """Choose the rows that get a name: the baselines, SAM, and the best ones."""
    rows = [each.row for each in summaries]  # the baselines, then the best first
    best = [row for row in rows if row not in BASELINES][:BEST]
    return [row for row in rows if row in (*BASELINES, "sam", *best)]


def lowest(summaries: Sequence[Any]) -> float:
    """Return the lowest gain that is drawn in its place."""
    gains = [each.gain for each in summaries if np.isfinite(each.gain.value)]
    widths = [each.high - each.low for each in gains if np.isfinite(each.low)]
    best = max((each.value for each in gains), default=0.0)
    return -2 * max(best, 1.5 * float(np.median(widths)) if widths else 0.0, 1e-9)


def claim(task: str, summaries: Sequence[Any], better: str) -> str:
    """State how many methods are better than the better baseline in a task."""
    methods = [each for each in summaries if each.row not in BASELINES]
    ahead = sum(each.gain.is_above for each in methods)
    behind = sum(each.gain.is_below for each in methods)
    over = f" than {better}" if better else ""
    return f"{title_of(task)}: {ahead} of {len(methods)} methods better{over}, {behind} worse"


# The ranking


def draw_ranking(rankings: Sequence[Any], path: Path) -> None:
    """Draw average ranks with intervals, one panel for each ranking, the most tasks first."""
    drawn = [each for each in reversed(rankings) if each.rows]
    heights = [figures.height_of(len(each.rows) + 1) for each in drawn]
    figure = figures.make_figure(1.6, heights or None)
    panels = figure.subplots(max(len(drawn), 1), 1, squeeze=False, height_ratios=heights or [1])
    for axes, each in zip(panels[:, 0], drawn, strict=False):
        draw_ranks(axes, each)
    title = "Average rank over tasks, with 95% intervals over seeds; pale: the rank in each task"
    figures.save(figure, path, title)


def draw_ranks(axes: Any, ranking: Any) -> None:
    """Draw one ranking, the best row at the top."""
    rows = [*ranking.rows]
    places = np.stack(places_by_task(ranking.tasks, rows))
    for number, (row, found) in enumerate(ranking.rows.items()):
        color = figures.RED if row in BASELINES else figures.INK if row == "sam" else figures.BLUE
        own = places[:, number]
        axes.plot(own, [number] * len(own), "o", ms=4, color=color, alpha=0.2, mew=0)
        bars = [[found.value - found.low], [found.high - found.value]]
        bars = np.maximum(np.nan_to_num(bars), 0)
        axes.errorbar(found.value, number, xerr=bars, fmt="o", ms=5, color=color, capsize=2)
    axes.set_yticks(range(len(rows)), rows)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(figures.RED if row in BASELINES else figures.INK)
        label.set_weight("bold" if row in (*BASELINES, "sam") else "normal")
    axes.set_ylim(len(rows) - 0.3, -0.7)
    axes.set_xlabel("average rank (1: the best in every task)")
    axes.grid(axis="x", alpha=0.3)
    best = rows[0]
    told = [
        f"{row} {ranking.rows[row].value:.1f}"
        for row in dict.fromkeys([best, "sam"])
        if row in ranking.rows
    ]
    axes.set_title(f"{ranking.title}: {', '.join(told)}")
