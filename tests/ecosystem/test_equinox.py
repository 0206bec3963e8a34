"""An Equinox model with BatchNorm: statistics move once in a step, and the step is that by hand."""

import equinox as eqx
import hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx

pytestmark = pytest.mark.usefixtures("float64")

STEPS, EPS = 4, 1e-5


class Model(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear
    classes: jax.Array  # a leaf that is not trained
    activation: object  # a leaf that is no array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(10, 6, key=keys[0])
        self.norm = eqx.nn.BatchNorm(6, "batch", eps=EPS, momentum=0.9, mode="batch")
        self.last = eqx.nn.Linear(6, 3, key=keys[1])
        self.classes, self.activation = jnp.arange(3), jnp.tanh

    def __call__(self, x, statistics):
        x, statistics = self.norm(self.first(x), statistics)
        return self.last(self.activation(x)), statistics


def losses_of(model, statistics, batch):
    model = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, statistics = model(batch["x"], statistics)
    return problem.cross_entropy(logits, batch["y"]), statistics


def step_with(tx):
    """Make Equinox's usual step; only the arguments of `update` are samx's."""

    @eqx.filter_jit
    def step(model, statistics, opt_state, batch):
        def loss(model):
            losses, moved = losses_of(model, statistics, batch)
            return losses.mean(), moved

        def losses_fn(params, batch):
            return losses_of(eqx.combine(params, static), statistics, batch)

        (value, moved), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(
            grads, opt_state, params, value=value, losses_fn=losses_fn, batch=batch
        )
        kept = optax.tree.get(opt_state, "aux")
        model = eqx.apply_updates(model, updates)
        return model, moved if kept is None else kept, opt_state

    return step


@jax.jit
def one_pass(w, statistics, batch):
    """Return the gradient, and the moved statistics: their mean and their variance."""

    def loss(w):
        x = batch["x"] @ w[0].T + w[1][None]
        mean, variance = x.mean(0), x.var(0)
        x = (x - mean[None]) / jnp.sqrt(variance + EPS)[None] * w[2][None] + w[3][None]
        logits = jnp.tanh(x) @ w[4].T + w[5][None]
        return problem.cross_entropy(logits, batch["y"]).mean(), [mean, variance]

    g, seen = jax.grad(loss, has_aux=True)(w)
    return g, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, statistics, seen)


BASE = optax.sgd(0.3, momentum=0.9)
TRACE = [(0.9, 1.0)] * 6
VARIANTS = {
    "sam": (
        lambda **_: optax.chain(samx.sam(0.1), BASE),
        lambda *args: hand.sam(one_pass, BASE, 0.1, *args),
    ),
    "sampa": (
        lambda **like: samx.sampa(BASE, 0.2, 0.3, **like),
        lambda *args: hand.sampa(one_pass, BASE, 0.2, 0.3, *args),
    ),
    "momentum_sam": (
        lambda aux_like, **_: samx.momentum_sam(BASE, 0.5, aux_like=aux_like),
        lambda *args: hand.momentum_sam(one_pass, BASE, 0.5, TRACE, *args),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_with_batch_norm(name):
    build, by_hand = VARIANTS[name]
    batches = [problem.batch_at(problem.make()[0], t) for t in range(STEPS)]
    model, statistics = eqx.nn.make_with_state(Model)(jax.random.key(0))
    tx = build(batch_like=batches[0], aux_like=statistics)
    step, opt_state = step_with(tx), tx.init(eqx.filter(model, eqx.is_inexact_array))
    w = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    expected = by_hand(w, [np.zeros(6), np.ones(6)], batches)
    history = []
    for batch in batches:
        model, statistics, opt_state = step(model, statistics, opt_state, batch)
        params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        history.append((params, statistics.get(model.norm.batch_state_index)))
    hand.assert_same(history, expected)
    assert int(statistics.get(model.norm.batch_counter)) == STEPS
    assert (model.activation, model.classes.tolist()) == (jnp.tanh, [0, 1, 2])
