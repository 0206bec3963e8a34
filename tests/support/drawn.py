"""Check a figure as it is drawn: no text over text, nothing outside, no text in another panel."""

import contextlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

ALLOWED = 1.0  # pixels; boxes of letters have a little room around them


def texts_of(figure):
    """Return the texts that drawing really draws, ticks included, with their boxes in pixels."""
    drawn, original = {}, Text.draw

    def draw(self, renderer):
        if self.get_visible() and self.get_text().strip():
            drawn[self] = renderer
        original(self, renderer)

    renderer = FigureCanvasAgg(figure).get_renderer()
    for name in ("draw_path", "draw_path_collection", "draw_markers", "draw_image", "draw_text"):
        setattr(renderer, name, lambda *args, **keywords: None)  # only boxes are looked at
    with patched(Text, "draw", draw):
        figure.draw(renderer)
    return {text: Text.get_window_extent(text, renderer) for text, renderer in drawn.items()}


@contextlib.contextmanager
def patched(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def problems_of(figure):
    """Return one line for each text over another text, outside, or in another panel."""
    texts, found = texts_of(figure), []
    assert texts, "a figure without any text"
    boxes = np.stack([box.get_points() for box in texts.values()])  # [text, low and high, x and y]
    low = np.maximum(boxes[:, None, 0], boxes[:, 0])
    high = np.minimum(boxes[:, None, 1], boxes[:, 1])
    names = [text.get_text() for text in texts]
    for one, other in np.argwhere(np.triu((high - low).min(axis=2) > ALLOWED, 1)):
        found.append(f"{names[one]!r} over {names[other]!r}")
    for text, box in texts.items():
        if is_outside(box, figure.bbox):
            found.append(f"{text.get_text()!r} outside")
        for axes in figure.axes:
            is_other = text.axes is not None and axes is not text.axes and axes.axison
            if is_other and overlap(box, axes.get_window_extent()) > ALLOWED:
                found.append(f"{text.get_text()!r} in another panel")
    tight = figure.get_tightbbox(figure.canvas.get_renderer()).transformed(figure.dpi_scale_trans)
    if is_outside(tight, figure.bbox):
        found.append(f"something outside: {tight.extents} in {figure.bbox.extents}")
    for axes in figure.axes:
        extent = axes.get_window_extent()
        is_bar = axes.get_label() == "<colorbar>"
        if min(extent.width, extent.height) < 60 and not is_bar:
            found.append(f"a panel of {extent.width:.0f} x {extent.height:.0f} pixels")
    return found


def overlap(a, b):
    """Return how many pixels two boxes overlap, in the direction in which they do so least."""
    low = np.maximum(a.min, b.min)
    high = np.minimum(a.max, b.max)
    return float((high - low).min())


def is_outside(box, around):
    return bool((box.min < around.min - ALLOWED).any() or (box.max > around.max + ALLOWED).any())
