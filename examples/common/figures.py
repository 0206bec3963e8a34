"""Figures of examples and notebooks: one style, one resolution, no window, no text over text."""

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.common import files

# Okabe and Ito's colours, which colour-blind readers can tell apart. Grey is for what is compared
# with, ink for text.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, INK, GREY = "#E69F00", "#56B4E9", "#222222", "#8A8A8A"
COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, INK)

STYLE = {
    "figure.dpi": 144,
    "savefig.dpi": 144,
    "figure.figsize": (9.5, 3.9),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "figure.titlesize": 13,
    "lines.linewidth": 2,
    "legend.frameon": False,
}


def use_style() -> None:
    """Set matplotlib's defaults to the style of all figures."""
    matplotlib.rcParams.update(STYLE)


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure; its size is in inches."""
    use_style()
    return Figure(figsize=(width, height))


def label_ends(axis: Axes) -> None:
    """Write the label of each line at its right end, in the colour of the line.

    Call it last, when the limits of the axes are final. Labels that would overlap are moved apart.
    """
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    if not lines:
        return
    figure = axis.get_figure()
    height = 1.25 * matplotlib.rcParams["font.size"] * figure.dpi / 72  # of a line of text
    ends = []
    for line in lines:
        x, y = line.get_xydata()[-1]
        ends.append((axis.transData.transform((x, y))[1], x, y, line))
    ends.sort(key=lambda end: end[0])
    places = [end[0] for end in ends]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + height)
    shift = sum(place - end[0] for place, end in zip(places, ends, strict=True)) / len(places)
    for place, (pixel, x, y, line) in zip(places, ends, strict=True):
        axis.annotate(
            line.get_label(),
            (x, y),
            xytext=(6, (place - shift - pixel) * 72 / figure.dpi),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )


def save(figure: Figure, path: Path, title: str = "") -> None:
    """Write the figure, with a title over all panels if there is one.

    Raises:
        SaveError: If the file cannot be written.
    """
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    files.write(path, picture.getvalue())
