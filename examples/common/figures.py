"""Figures of examples and notebooks: one style, one rule for sizes, labels instead of legends.

A figure's title states the result; a script computes it from the results that it draws. Lines and
points carry their names (`label_ends`, `label_points`), in their own colours.
"""

import io
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from examples.common import files

# Okabe and Ito's colours, which colour-blind readers can tell apart. Grey is for what is compared
# with, ink for text.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, INK, GREY = "#E69F00", "#56B4E9", "#222222", "#8A8A8A"
COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, INK)

STYLE: dict[Any, Any] = {
    "figure.dpi": 144,
    "savefig.dpi": 144,
    "figure.figsize": (9.5, 3.9),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.prop_cycle": cycler(color=COLORS),
    "figure.titlesize": 13,
    "lines.linewidth": 2,
    "legend.frameon": False,
}

COLUMN = 5.2  # inches, the width of a panel
FRAME, ROW = 1.2, 0.28  # inches, the height of a panel without its rows, and that of a row
ROWS = 9  # how many rows a panel without rows is worth

RADII = (8, 14, 22, 32, 44, 58, 74, 92)  # points between a name and its point; the nearest wins
FAR = 20  # a name that is further away gets a line to its point
END = "label at the end of a line"  # the gid of such a label


def use_style() -> None:
    """Set matplotlib's defaults to the style of all figures."""
    matplotlib.rcParams.update(STYLE)


def height_of(rows: int = ROWS) -> float:
    """Return the height in inches of a panel with so many rows (names, bars): the only rule."""
    return FRAME + ROW * rows


def make_figure(columns: float = 2, heights: Sequence[float] | None = None) -> Figure:
    """Return an empty figure.

    Args:
        columns: The number of panels side by side.
        heights: The heights of the panels one below the other, from `height_of`; by default one
            panel without rows.
    """
    use_style()
    heights = [height_of()] if heights is None else heights
    return Figure(figsize=(max(7.0, COLUMN * columns), sum(heights) + 0.3))


def scale_of(values: Any) -> str:
    """Return "log" for positive numbers of several sizes, otherwise "linear"."""
    numbers = np.ravel(np.asarray(values, float))
    numbers = numbers[np.isfinite(numbers)]
    return "log" if len(numbers) and 0 < 10 * numbers.min() < numbers.max() else "linear"


def label_ends(axis: Axes) -> None:
    """Write the label of each line at its right end, in the colour of the line.

    Labels that would overlap are moved apart. The label of a line that ends before the others do is
    written where it covers no line; that of a line that leaves the axes is at their border. Call it
    when the limits of the axes are final.
    """
    for line in axis.get_lines():
        points = np.asarray(line.get_xydata(), float)
        points = points[np.isfinite(points).all(axis=1)]
        label = str(line.get_label())
        if label.startswith("_") or not len(points):
            continue
        limits = np.sort([axis.get_xlim(), axis.get_ylim()])
        axis.annotate(
            label,
            np.clip(points[-1], *limits.T),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
            gid=END,
        )
    figure = _figure_of(axis)
    if figure.canvas.manager is not None:  # a notebook shows it; `save` does it for a script
        _lay_out(figure)
        _place_ends(axis)


def label_points(axis: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write a name beside each point where it covers neither a name nor another point.

    Call it when the limits of the axes and all titles are final. Error bars and lines count as
    points.

    Args:
        axis: The axes.
        points: For each point x, y, its name and the colour of the name.
    """
    figure = _figure_of(axis)
    _lay_out(figure)
    if _wrap_titles(figure, next(iter(figure.texts), None)):
        _lay_out(figure)  # titles of more lines take more room
    labels = [
        axis.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", color=color)
        for x, y, name, color in points
    ]
    _place_freely(axis, labels)


def _figure_of(axis: Axes) -> Figure:
    """Return the whole figure that the axes belong to."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    return figure


def _lay_out(figure: Figure) -> None:
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)


def _place_ends(axis: Axes) -> None:
    """Place the labels of `label_ends`."""
    labels = [text for text in axis.texts if isinstance(text, Annotation) and text.get_gid() == END]
    if not labels:
        return
    scale = 72 / _figure_of(axis).dpi
    ends = {label: axis.transData.transform(label.xy) for label in labels}
    last = max(x for x, _ in ends.values())
    low, high = axis.get_window_extent().intervaly
    at_end = [label for label in labels if ends[label][0] > last - 30]
    at_end.sort(key=lambda label: ends[label][1])
    heights = [label.get_window_extent().height for label in at_end]
    wanted = [np.clip(ends[label][1], low, high) for label in at_end]
    for label, middle in zip(at_end, _apart(wanted, heights, low, high), strict=True):
        label.set_position((6, (middle - ends[label][1]) * scale))
    if others := [label for label in labels if label not in at_end]:
        for label in others:
            label.set(va="baseline", position=(0, 0))
        _place_freely(axis, others)


def _apart(
    wanted: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Return middles near the wanted ones (ascending) for spans that may not overlap.

    Spans that touch move together, so that none is further from its place than it must be.
    """
    groups: list[tuple[float, list[float]]] = []  # the lower end of a group, and its heights
    for middle, height in zip(wanted, heights, strict=True):
        start, group = middle - height / 2, [height]
        start = max(low, min(start, high - height))
        while groups and groups[-1][0] + sum(groups[-1][1]) > start:
            other_start, other = groups.pop()
            weight = len(other) / (len(other) + len(group))
            start = weight * other_start + (1 - weight) * (start - sum(other))
            group = other + group
            start = max(low, min(start, high - sum(group)))
        groups.append((start, group))
    ends = [start + total for start, group in groups for total in itertools.accumulate(group)]
    return [end - height / 2 for end, height in zip(ends, heights, strict=True)]


def _place_freely(axis: Axes, labels: Sequence[Annotation]) -> None:
    """Move each label to the nearest place where it covers neither text nor points nor lines."""
    figure = _figure_of(axis)
    scale, inside = 72 / figure.dpi, np.array(axis.get_window_extent().extents)
    others = [text.get_window_extent().extents for text in axis.texts if text not in labels]
    points = _pixels_of(axis)
    taken = np.concatenate([np.reshape(others, (-1, 4)), np.hstack([points - 4, points + 4])])
    for label in labels:
        size, point = label.get_window_extent(), axis.transData.transform(label.xy)
        radius, turn = map(np.ravel, np.meshgrid(RADII, np.deg2rad(np.arange(0, 360, 15))))
        x = point[0] + radius / scale * np.cos(turn) - size.width * (1 - np.cos(turn)) / 2
        y = point[1] + radius / scale * np.sin(turn) - size.height * (1 - np.sin(turn)) / 2
        boxes = np.stack([x, y, x + size.width, y + size.height], axis=1)
        is_outside = (boxes[:, :2] < inside[:2]).any(1) | (boxes[:, 2:] > inside[2:]).any(1)
        low = np.maximum(boxes[:, None, :2], taken[None, :, :2])
        high = np.minimum(boxes[:, None, 2:], taken[None, :, 2:])
        covered = (low < high).all(axis=2).sum(axis=1)
        best = np.argmin(radius + 100 * covered + 10_000 * is_outside)
        label.set_position(((x[best] - point[0]) * scale, (y[best] - point[1]) * scale))
        taken = np.concatenate([taken, boxes[best : best + 1]])
        if radius[best] > FAR:
            axis.annotate(
                "",
                label.xy,
                xytext=(radius[best] * np.cos(turn[best]), radius[best] * np.sin(turn[best])),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": label.get_color(), "linewidth": 0.7},
            )


def _pixels_of(axis: Axes) -> np.ndarray:
    """Return the pixels of all lines, points and error bars of the axes, densely."""
    paths = [(line.get_xydata(), line.get_transform()) for line in axis.get_lines()]
    for collection in axis.collections:
        paths += [(path.vertices, axis.transData) for path in collection.get_paths()]
    found = [np.zeros((0, 2))]
    for path, transform in paths:
        pixels = transform.transform(np.asarray(path, float))
        pixels = pixels[np.isfinite(pixels).all(axis=1)]
        for start, end in itertools.pairwise(pixels):
            found.append(np.linspace(start, end, 2 + int(min(np.hypot(*(end - start)), 5000) // 8)))
        found.append(pixels)
    return np.concatenate(found)


def _wrap_titles(figure: Figure, over_all: Text | None) -> bool:
    """Break titles that are wider than their panel, or the figure, into several lines.

    Returns:
        Whether a title has changed.
    """
    changed = []
    if over_all is not None:
        changed.append(_wrap(over_all, figure.bbox.width * 0.98))
    for axis in figure.axes:
        for side in ("left", "center", "right"):
            if title := axis.get_title(side):
                text = axis.set_title(title, loc=side)
                changed.append(_wrap(text, axis.get_window_extent().width))
    return any(changed)


def _wrap(text: Text, width: float) -> bool:
    """Break a text into lines of at most so many pixels; what stands around ± stays together.

    Returns:
        Whether the text has changed.
    """
    before = text.get_text()
    content = " ".join(before.split()).replace(" ± ", "\u00a0±\u00a0")
    longest = len(content)
    while longest > 10 and text.get_window_extent().width > width:
        longest = int(0.9 * longest)
        text.set_text(textwrap.fill(content, longest))
    return text.get_text() != before


def save(figure: Figure, path: Path, title: str = "") -> None:
    """Write the figure, with a title over all panels if there is one.

    Raises:
        SaveError: If the file cannot be written.
    """
    over_all = figure.suptitle(title, x=0.01, ha="left") if title else None
    _lay_out(figure)
    has_changed = _wrap_titles(figure, over_all)
    axes = [axis for axis in figure.axes if any(text.get_gid() == END for text in axis.texts)]
    if axes and has_changed:
        _lay_out(figure)  # otherwise `savefig` is the next to do it
    for axis in axes:
        _place_ends(axis)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    files.write(path, picture.getvalue())
