"""Figures of the examples: one layout, one resolution, and no window."""

from pathlib import Path

from matplotlib.figure import Figure


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure; its size is in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, title: str = "") -> None:
    """Write the figure, with a title over all panels if there is one."""
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=120)
