"""Bases and numbers of the tests that compare a variant with an independent loop."""

import numpy as np
import optax
import reference
from recorded import ADAMW, MOMENTUM, decayed

from samx.perturbations import magnitude

# Configurations without a recorded run: the optax base, its reference.
STEPS = 30

BASES = {
    "nesterov": (
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        lambda: reference.SGD(0.1, 0.9, nesterov=True),
    ),
    "adam": (optax.adam(0.01), lambda: reference.Adam(0.01)),
    "adamw": (ADAMW, lambda: reference.Adam(0.01, weight_decay=0.01)),
    "momentum and decay": (
        decayed(MOMENTUM),
        lambda: reference.SGD(0.1, 0.9, weight_decay=5e-4),
    ),
    "sgd, decay and cosine": (
        decayed(optax.sgd(optax.cosine_decay_schedule(0.1, STEPS))),
        lambda: reference.SGD(lambda t: 0.05 * (1 + np.cos(np.pi * t / STEPS)), weight_decay=5e-4),
    ),
}

WEIGHTS = {"W1", "W2"}


def every(period, first=0):
    return reference.listed([t >= first and (t - first) % period == 0 for t in range(STEPS)])


def linear(start, stop, steps):
    """A schedule, and its values."""
    values = np.linspace(start, stop, steps, endpoint=False).tolist()
    return optax.linear_schedule(start, stop, steps), values


EVERYWHERE = magnitude(0.0, is_scaled=lambda path, leaf: True)

ALL = {"W1", "b1", "W2", "b2"}
