"""Radii that `examples/digits.py` chose on validation data, by variant and base.

Of each pair, the first is for the share of wrong labels of that script, the second for clean
labels. `python notebooks/_pages/measured.py RESULTS.json` writes this file from its results.
"""

DIGITS: dict[str, dict[str, tuple[float, float]]] = {
    "momentum_sam": {"momentum": (1.0, 1.0)},
    "sam": {"momentum": (0.2, 0.2)},
    "sampa": {"momentum": (0.5, 0.5)},
}
