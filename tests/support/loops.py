"""Bases and numbers of the tests that compare a variant with an independent loop."""

import jax
import jax.numpy as jnp
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


def in_turn(rows, all_of):
    """Pair one row with every base, and each other row with one base."""
    return [
        (row, base)
        for i, row in enumerate(rows)
        for j, base in enumerate(BASES)
        if row == all_of or j == i % len(BASES)
    ]


def every(period, first=0):
    return reference.listed([t >= first and (t - first) % period == 0 for t in range(STEPS)])


def drawn(probability, key):
    """The draws of `policies.random`, from its definition."""
    steps = jnp.arange(STEPS)
    draws = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(jax.random.key(key), t)))(
        steps
    )
    return reference.listed(draws < probability)


def linear(start, stop, steps):
    """A schedule, and its values."""
    values = np.linspace(start, stop, steps, endpoint=False).tolist()
    return optax.linear_schedule(start, stop, steps), values


ALPHA, ALPHAS = linear(0.0, 1.0, STEPS)

EVERYWHERE = magnitude(0.0, is_scaled=lambda path, leaf: True)

ALL = {"W1", "b1", "W2", "b2"}
