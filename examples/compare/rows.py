"""The rows of the comparison: the two baselines, and every variant that fits a task."""

import numpy as np

import samx
from examples.common.registry import RADIUS, VARIANTS, Variant, in_front, of
from examples.compare.task import Task

BASELINES = ("base", "base2x")
SAME = ("sampa-separate",)  # a row of the registry that is another row, computed in another way
TAIL = 20  # ImbSAM's tail: classes with at most so many training examples

# Rows of the comparison alone.
MORE = {
    # its paper's value for vision transformers
    "looksam-0.7": Variant(of("looksam", alpha=0.7), RADIUS, 1.2, 0.05, cycle=5),
}
WITH_NORMALIZATION = {"sam-on": Variant(of("sam_on"), 0.5, 2, 0.5)}


def tail_of(counts: tuple[int, ...]) -> np.ndarray:
    """Return ImbSAM's tail."""
    return np.flatnonzero(np.asarray(counts) <= TAIL)


def with_rare_classes(counts: tuple[int, ...]) -> dict[str, Variant]:
    """Return the rows for training classes of these sizes."""
    tail = tail_of(counts)
    return {
        "focal-sam": Variant(
            in_front(lambda rho: samx.focal_sam(counts, rho)), RADIUS, 2 + 2 / 3, 0.1
        ),
        "imb-sam": Variant(
            in_front(lambda rho: samx.imbalanced_sam(tail, rho)), RADIUS, 2 + 2 / 3, 0.05
        ),
    }


def variants_of(task: Task) -> dict[str, Variant]:
    """Return the variants of all rows of a task, the baselines first."""
    found = dict.fromkeys(BASELINES, VARIANTS["base"])
    found |= {name: variant for name, variant in VARIANTS.items() if name not in SAME}
    found |= MORE
    if task.has_normalization:
        found |= WITH_NORMALIZATION
    if task.counts:
        found |= with_rare_classes(task.counts)
    return found
