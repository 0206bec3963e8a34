"""The figure of sharpness.py: all measures relative to the first checkpoint, and the curves."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from examples.common import figures
from examples.measure.sharpness_measures import ALPHAS, Row, number_of

COLORS = (figures.RED, figures.BLUE, figures.GREEN, figures.PINK, figures.ORANGE, figures.SKY)
PALE = "0.8"  # checkpoints beyond the colours
LEAST = 1e-5  # of the largest density: smaller ones are not drawn
WIDE = 1.45  # the width of the panel of all measures, in columns
PLANES = 4  # side by side
TEST_ERROR = "for comparison: test error"

Checkpoint = Mapping[str, Any]  # "name", and "measured": the results by program
Panel = Callable[[Axes], None]


def draw(
    checkpoints: Sequence[Checkpoint],
    pairs: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    path: Path,
    title: str,
    caption: str,
) -> None:
    """Draw a point for each measure and checkpoint, and a panel for each kind of curve."""
    colors = colors_of(checkpoints)
    points = points_of(checkpoints, rows)
    panels = panels_of(checkpoints, pairs, colors)
    planes = [c for c in checkpoints[: len(COLORS)] if "plane" in c["measured"]]
    beside, below = min(2, len(panels)), -(-len(panels) // 2)
    heights = {}
    if points or panels:
        tall = figures.height_of(len(points)) if points else 0.0
        heights["measures"] = max(tall, below * figures.height_of(8))
    if planes:
        heights["planes"] = -(-len(planes) // PLANES) * figures.height_of(7)
    columns = max(WIDE * bool(points) + beside, min(PLANES, len(planes)) * 0.8)
    figure = figures.make_figure(columns, [*heights.values(), 1.1])
    places = figure.add_gridspec(len(heights), 1, height_ratios=[*heights.values()])
    parts = {name: places[row] for row, name in enumerate(heights)}
    if "measures" in parts:
        widths = [WIDE] * bool(points) + [1] * beside
        grid = parts["measures"].subgridspec(max(1, below), len(widths), width_ratios=widths)
        if points:
            draw_points(figure.add_subplot(grid[:, 0]), points, colors)
        for place, panel in enumerate(panels):
            row, column = divmod(place, 2)
            panel(figure.add_subplot(grid[row, bool(points) + column]))
    if planes:
        draw_planes(figure, parts["planes"], planes)
    add_legend(figure, colors, caption)
    figures.save(figure, path, title)


def is_empty(checkpoints: Sequence[Checkpoint], pairs: Sequence[Any], rows: Sequence[Row]) -> bool:
    """Return whether there is nothing to draw, as for a few numbers of one checkpoint."""
    has_planes = "plane" in checkpoints[0]["measured"]
    has_curves = has_planes or panels_of(checkpoints, pairs, colors_of(checkpoints))
    return not (has_curves or points_of(checkpoints, rows))


def colors_of(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the colours of the checkpoints; the first is that with which others are compared."""
    names = [checkpoint["name"] for checkpoint in checkpoints]
    return dict(zip(names, [*COLORS, *[PALE] * len(names)], strict=False))


def points_of(
    checkpoints: Sequence[Checkpoint], rows: Sequence[Row]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return, by titles of rows, each checkpoint's value and error relative to the first value."""
    found = {}
    if len(checkpoints) < 2:
        return found
    for row in rows:
        values = {c["name"]: number_of(c["measured"], row) for c in checkpoints}
        if row.value == "test_accuracy":
            values = {name: (100 - value, error) for name, (value, error) in values.items()}
        elif not row.is_flatness:
            continue
        first, _ = values[checkpoints[0]["name"]]
        if all(np.isfinite(value) and value > 0 for value, _ in values.values()):
            title = TEST_ERROR if row.value == "test_accuracy" else row.title
            found[title] = {name: (v / first, e / first) for name, (v, e) in values.items()}
    return {} if [*found] == [TEST_ERROR] else found


def draw_points(
    axes: Axes, points: dict[str, dict[str, tuple[float, float]]], colors: dict[str, str]
) -> None:
    """Draw a line of points per measure; to the left of the line at 1 is flatter."""
    first, titles = next(iter(colors)), [*reversed(points)]
    for position, title in enumerate(titles):
        axes.axhline(position, color="0.93", linewidth=1, zorder=0)
        for name, (value, error) in reversed(points[title].items()):
            if name != first:
                bar = {"xerr": [[min(error, 0.9 * value)], [error]], "elinewidth": 1.5}
                axes.errorbar(
                    value, position, fmt="o", ms=5.5, color=colors[name], **bar, zorder=2.5
                )
    axes.axvline(1, color=colors[first], linewidth=1.5, zorder=1)
    if TEST_ERROR in points:
        axes.axhline(len(titles) - 1.5, color=figures.GREY, linewidth=0.8)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(-0.7, len(titles) - 0.3)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2.0))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"← flatter      relative to {first}      sharper →")
    axes.set_title("the same checkpoints by every measure")


def panels_of(
    checkpoints: Sequence[Checkpoint], pairs: Sequence[Mapping[str, Any]], colors: dict[str, str]
) -> list[Panel]:
    """Return the functions that draw the curves there are."""
    found: list[Panel] = []
    names = [*checkpoints[0]["measured"]]
    if "density" in names:
        found.append(partial(draw_density, checkpoints, colors))
    if sum(name.startswith("m-sharpness") for name in names) > 1:
        found.append(partial(draw_shards, checkpoints, colors))
    if "slice" in names:
        found.append(partial(draw_slices, checkpoints, colors))
    if pairs:
        found.append(partial(draw_barriers, checkpoints, pairs, colors))
    return found


def curves(
    checkpoints: Sequence[Checkpoint], colors: dict[str, str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return what was measured of each checkpoint and the style of its curve; pale ones first."""
    found = [
        (c["measured"], {"color": colors[c["name"]], "linewidth": 1.8})
        for c in reversed(checkpoints)
    ]
    return sorted(found, key=lambda item: item[1]["color"] != PALE)


def draw_density(checkpoints: Sequence[Checkpoint], colors: dict[str, str], axes: Axes) -> None:
    top = 0.0
    for measured, style in curves(checkpoints, colors):
        found = measured["density"]
        axes.plot(found["grid"], np.maximum(found["density"], 1e-30), **style)
        top = max(top, *found["density"])
    axes.set(yscale="log", ylim=(LEAST * top, 3 * top))
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.set_title("how far the eigenvalues reach")


def draw_shards(checkpoints: Sequence[Checkpoint], colors: dict[str, str], axes: Axes) -> None:
    for measured, style in curves(checkpoints, colors):
        sizes = {
            int(name.split(", ")[1]): found["value"]
            for name, found in measured.items()
            if name.startswith("m-sharpness")
        }
        axes.plot([*sizes], [*sizes.values()], marker="o", markersize=4, **style)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="examples that a step sees", ylabel="rise of their loss")
    axes.set_title("one step of SAM (m-sharpness)")
    plain_ticks(axes)


def draw_slices(checkpoints: Sequence[Checkpoint], colors: dict[str, str], axes: Axes) -> None:
    for measured, style in curves(checkpoints, colors):
        axes.plot(ALPHAS, measured["slice"]["losses"], **style)
    axes.set(xlabel="step, in lengths of the columns of w", ylabel="training loss")
    axes.set_title("along a random direction")


def draw_barriers(
    checkpoints: Sequence[Checkpoint],
    pairs: Sequence[Mapping[str, Any]],
    colors: dict[str, str],
    axes: Axes,
) -> None:
    """Draw the loss on the lines from the first checkpoint; a few between others are grey."""
    first, *others = [checkpoint["name"] for checkpoint in checkpoints]
    lines = []
    for pair in pairs:
        start, end = pair["names"]
        if start == first:
            lines.append((pair["losses"], {"color": colors[end], "linewidth": 1.8}))
        elif len(others) < len(COLORS):
            lines.append((pair["losses"], {"color": PALE, "linewidth": 1.0}))
    for losses, style in sorted(lines, key=lambda line: line[1]["color"] != PALE):
        axes.plot(np.linspace(0, 1, len(losses)), losses, **style)
    target = others[0] if len(others) == 1 else "the others"
    axes.set(ylabel="training loss", xlabel=f"from {first} (0) to {target} (1)")
    title, has_grey = "on the straight line between two", len(lines) > len(others)
    axes.set_title(f"{title}; grey: other pairs" if has_grey else title)


def draw_planes(figure: Figure, place: SubplotSpec, checkpoints: Sequence[Checkpoint]) -> None:
    """Draw the loss in a plane around each checkpoint that has a colour, with the same levels."""
    columns = min(PLANES, len(checkpoints))
    grid = place.subgridspec(-(-len(checkpoints) // columns), columns)
    losses = [np.array(c["measured"]["plane"]["losses"]) for c in checkpoints]
    levels = np.geomspace(min(map(np.min, losses)), max(map(np.max, losses)), 10)
    for number, (checkpoint, values) in enumerate(zip(checkpoints, losses, strict=True)):
        axes = figure.add_subplot(grid[divmod(number, columns)])
        lines = axes.contour(ALPHAS, ALPHAS, values.T, levels=levels, cmap="viridis", linewidths=1)
        axes.clabel(lines, levels[1::3], fmt="%.1f", fontsize=8)
        axes.set_aspect("equal")
        axes.set_title(f"{checkpoint['name']}: loss in a random plane")


def plain_ticks(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, colors: dict[str, str], caption: str) -> None:
    handles = [
        Line2D([], [], color=color, marker="o", markersize=5, label=name)
        for name, color in colors.items()
        if color != PALE
    ]
    if PALE in colors.values():
        handles.append(Line2D([], [], color=PALE, marker="o", markersize=5, label="others"))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        title=textwrap.fill(caption, int(11.5 * figure.get_figwidth())),
        alignment="left",
    )
