"""Figures of the examples: one layout, one resolution, and no window."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from examples.common import files


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure; its size is in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, title: str = "") -> None:
    """Write the figure, with a title over all panels if there is one.

    Raises:
        SaveError: If the file cannot be written.
    """
    if title:
        figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format=path.suffix[1:])
    files.write(path, picture.getvalue())
