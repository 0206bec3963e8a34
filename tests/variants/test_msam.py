"""mSAM by hand: means over microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import assert_same, batch_like

import samx

pytestmark = pytest.mark.usefixtures("float64")


def first_update(tx, losses_fn=problem.losses_fn, **keywords):
    """Take the first update on the first batch."""
    params, update = problem.make()[1], functools.partial(tx.update, losses_fn=losses_fn)
    return jax.jit(update)(params, tx.init(params), params, batch=batch_like(), **keywords)


@jax.jit
def sam_of(batch, weights):
    """Return loss, sharp gradient and readings of SAM on these examples."""
    params, sam = problem.make()[1], samx.sam(0.3)

    def value_fn(p):
        return jnp.average(problem.losses_fn(p, batch), weights=weights)

    value, g = jax.value_and_grad(value_fn)(params)
    g_s, state = sam.update(g, sam.init(params), params, value=value, value_fn=value_fn)
    return value, g_s, state.readings


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_msam_weighs_microbatches_by_their_examples(how):
    """The microbatches have different amounts of padding, and one has only padding."""
    batch, params = batch_like(), problem.make()[1]
    weights = jnp.array([1, 1, 0, 0, 1, 0, 0, 0, 2, 1, 0, 1, 1, 0, 0, 0.5])
    expected, loss = optax.tree.zeros_like(params), 0.0
    step, state = first_update(samx.msam(0.3, 4, how=how), weights=weights)
    for j in (0, 1, 3):  # the third one is all padding
        part, own = jax.tree.map(lambda x, j=j: x[j::4], (batch, weights))
        value, g_s, _ = sam_of(part, own)
        share = own.sum() / weights.sum()
        expected = optax.tree.add_scale(expected, share, g_s)
        loss += share * value
    assert_same(step, expected, atol=1e-12)
    np.testing.assert_allclose(state.readings.loss, loss, rtol=1e-12)


def test_msam_keeps_the_aux_of_its_clean_passes():
    def with_aux(params, batch):
        aux = {"mean": batch["x"].mean(0), "W1": params["W1"][0], "count": jnp.int32(len(batch))}
        return problem.losses_fn(params, batch), aux

    expected = with_aux(problem.make()[1], batch_like())[1]
    for how in ("scan", "vmap"):
        tx = samx.msam(0.3, 4, how=how, aux_like=expected)
        _, state = first_update(tx, losses_fn=with_aux)
        assert_same(state.aux, expected)


def test_readings_of_msam_are_means_over_the_microbatches():
    _, state = first_update(samx.msam(0.3, 4))
    parts = [jax.tree.map(lambda x, j=j: x[j::4], batch_like()) for j in range(4)]
    sams = [sam_of(part, jnp.ones(4))[2] for part in parts]
    expected = jax.tree.map(lambda *x: sum(x) / 4, *sams)._replace(gradients_spent=2.0)
    assert_same(jax.tree.map(float, state.readings), jax.tree.map(float, expected), atol=1e-12)
