"""Bases and the training loop of variants that need further closures or a state of their own."""

import jax
import numpy as np
import optax
import problem
import reference

from samx.perturbations import magnitude, metric_ball

STEPS = 24

NAMES = ("W1", "b1", "W2", "b2")

BASES = {
    "sgd": (optax.sgd(0.1), lambda: reference.SGD(0.1)),
    "momentum and decay": (
        optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9)),
        lambda: reference.SGD(0.1, 0.9, weight_decay=0.01),
    ),
    "adam": (optax.adam(0.01), lambda: reference.Adam(0.01)),
    "adamw": (
        optax.adamw(0.01, weight_decay=0.01),
        lambda: reference.Adam(0.01, weight_decay=0.01),
    ),
}

EVERY_LEAF = metric_ball(0.5, magnitude(0.0, is_scaled=lambda path, leaf: True))

EVERY_LEAF_BY_HAND = reference.adaptive_ball(0.5, 0.0, set(NAMES))


def train(tx, further=lambda data, batch, t: {}, *fields, losses_fn=problem.losses_fn, state=None):
    """Return the parameters after every step, and fields of the state."""
    data, params = problem.make()
    state, history = tx.init(params) if state is None else state, []

    @jax.jit
    def step(params, state, batch, t):
        keywords = further(data, batch, t)
        return problem.make_step(tx, losses_fn, **keywords)(params, state, batch)

    for t in range(STEPS):
        params, state = step(params, state, problem.batch_at(data, t), t)
        history.append((params, *(optax.tree.get(state, field) for field in fields)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *history)
