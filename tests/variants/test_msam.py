"""mSAM by hand: means over microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import assert_same, trained

import samx

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_msam_forms_are_the_same(num_microbatches):
    one, other = (
        trained(lambda how=how: samx.msam(0.2, num_microbatches, how=how))
        for how in ("scan", "vmap")
    )
    assert_same(one, other)


def test_msam_of_every_example_is_the_mean_of_their_steps():
    data, params = problem.make()
    batch, tx, sams = problem.batch_at(data, 0), samx.msam(0.3, 16), samx.sam(0.3)
    step, _ = tx.update(params, tx.init(params), params, losses_fn=problem.losses_fn, batch=batch)

    def alone(example):
        def value_fn(p):
            return problem.losses_fn(p, jax.tree.map(lambda x: x[None], example))[0]

        return sams.update(jax.grad(value_fn)(params), sams.init(params), params, value_fn=value_fn)

    each, _ = jax.vmap(alone)(batch)
    assert_same(step, jax.tree.map(lambda x: x.mean(0), each))


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_msam_weighs_microbatches_by_their_examples(how):
    """The microbatches have different amounts of padding, and one has only padding."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    weights = jnp.array([1, 1, 0, 0, 1, 0, 0, 0, 2, 1, 0, 1, 1, 0, 0, 0.5])
    closures = {"losses_fn": problem.losses_fn, "batch": batch, "weights": weights}
    tx, expected = samx.msam(0.3, 4, how=how), optax.tree.zeros_like(params)
    step, state = tx.update(params, tx.init(params), params, **closures)
    loss = 0.0
    for j in range(3):
        part, own = jax.tree.map(lambda x, j=j: x[j::4], (batch, weights))
        if j == 2:  # this one is all padding: take the fourth instead
            part, own = jax.tree.map(lambda x: x[3::4], (batch, weights))

        def value_fn(p, part=part, own=own):
            return jnp.average(problem.losses_fn(p, part), weights=own)

        value, g = jax.value_and_grad(value_fn)(params)
        g_s, _ = samx.sam(0.3).update(g, samx.sam(0.3).init(params), params, value_fn=value_fn)
        share = own.sum() / weights.sum()
        expected = jax.tree.map(lambda e, x, share=share: e + share * x, expected, g_s)
        loss += share * value
    assert_same(step, expected)
    np.testing.assert_allclose(state.readings.loss, loss, rtol=1e-12)


def test_msam_keeps_the_aux_of_its_clean_passes():
    def with_aux(params, batch):
        aux = {"mean": batch["x"].mean(0), "W1": params["W1"][0], "count": jnp.int32(len(batch))}
        return problem.losses_fn(params, batch), aux

    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    expected = with_aux(params, batch)[1]
    for how in ("scan", "vmap"):
        tx = samx.msam(0.3, 4, how=how, aux_like=expected)
        _, state = tx.update(params, tx.init(params), params, losses_fn=with_aux, batch=batch)
        assert_same(state.aux, expected)


def test_readings_of_msam_are_means_over_the_microbatches():
    data, params = problem.make()
    batch, tx = problem.batch_at(data, 0), samx.msam(0.3, 4)
    closures = {"losses_fn": problem.losses_fn, "batch": batch}
    _, state = tx.update(params, tx.init(params), params, **closures)
    sams = []
    for j in range(4):
        part, sam = jax.tree.map(lambda x, j=j: x[j::4], batch), samx.sam(0.3)

        def value_fn(p, part=part):
            return problem.losses_fn(p, part).mean()

        value, g = jax.value_and_grad(value_fn)(params)
        _, own = sam.update(g, sam.init(params), params, value=value, value_fn=value_fn)
        sams.append(own.readings)
    expected = jax.tree.map(lambda *x: sum(x) / 4, *sams)._replace(gradients_spent=2.0)
    assert_same(jax.tree.map(float, state.readings), jax.tree.map(float, expected))
