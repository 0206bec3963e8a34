"""What AsyncSAM climbs, and what it keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from async_runs import batches, gradient, loss, make_step
from jax.sharding import PartitionSpec as P

import samx
from samx import perturbations as geometry

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_nothing_known_is_not_climbed(value):
    """A zero or non-finite ascent gradient is not climbed; the next step climbs again."""
    tx, params = optax.chain(samx.async_sam(0.1), optax.sgd(1.0)), problem.make()[1]
    tx = samx.all_readings(tx)
    state = optax.tree.set(tx.init(params), step=jnp.int32(5))
    broken = params | {"b1": params["b1"].at[0].set(value)}
    if value == 0:
        broken = optax.tree.zeros_like(params)
    state = optax.tree.set(state, ascent_grad=broken)
    step, (pair, other) = jax.jit(make_step(tx)), batches(4, steps=2)
    moved, state = step(params, state, *pair)
    g = gradient(params, pair[0])
    chex.assert_trees_all_close(moved, optax.tree.sub(params, g), rtol=1e-12, atol=1e-12)
    assert optax.tree.get(state, "perturbation_norm") == 0
    _, state = step(moved, state, *other)
    np.testing.assert_allclose(optax.tree.get(state, "perturbation_norm"), 0.1)


def with_statistics(params, batch):
    """Return the loss, and statistics as BatchNorm would keep them."""
    return loss(params, batch), (batch["x"] @ params["W1"]).mean(axis=0)


def climbed(params, a, rho=0.1):
    params, a = jax.tree.map(np.asarray, (params, a))
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in a.values()))
    return {name: w + rho * a[name] / length for name, w in params.items()}


@pytest.mark.parametrize("role_axis", [None, "role"])
def test_aux_of_the_descent_is_kept(role_axis):
    tx = optax.chain(
        samx.async_sam(0.1, first="sam", role_axis=role_axis, aux_like=jnp.ones(16)),
        optax.sgd(0.1),
    )
    params, ((batch, ascent_batch),) = problem.make()[1], batches(4, steps=1)

    def step(params, state, batch, ascent_batch):
        return tx.update(
            params,
            state,
            params,
            value_fn=lambda p: with_statistics(p, batch),
            ascent_fn=lambda p: with_statistics(p, ascent_batch),
        )[1]

    if role_axis:
        mesh = regimes.mesh_of((2,), ("role",))
        step = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
    state = tx.init(params)
    np.testing.assert_array_equal(optax.tree.get(state, "aux"), np.ones(16))
    state = jax.jit(step)(params, state, batch, ascent_batch)
    point = climbed(params, gradient(params, ascent_batch))
    expected = (np.asarray(batch["x"]) @ point["W1"]).mean(axis=0)
    np.testing.assert_allclose(optax.tree.get(state, "aux"), expected, rtol=1e-12, atol=1e-12)


def test_readings_are_those_of_the_step():
    """`loss` is the loss of the ascent batch; `grad_norm` is the norm of the climbed gradient."""
    tx = optax.chain(samx.async_sam(0.1, ascent_share=0.25), optax.sgd(0.1))
    step, data, params = jax.jit(make_step(tx)), batches(4, steps=2), problem.make()[1]
    state = tx.init(params)
    before = params
    for pair in data:
        before, (params, state) = params, step(params, state, *pair)
    readings = optax.tree.get(state, "readings")
    start = problem.make()[1]
    stale = gradient(start, data[0][1])
    point = climbed(before, stale)
    losses = [jax.jit(loss)(p, batch) for p, batch in ((before, data[1][1]), (point, data[1][0]))]
    wanted = [*losses, optax.tree.norm(stale), 2.5]
    found = [readings.loss, readings.sharp_loss, readings.grad_norm, readings.gradients_spent]
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    fresh = gradient(before, data[1][1])
    chex.assert_trees_all_close(optax.tree.get(state, "ascent_grad"), fresh, rtol=1e-12, atol=1e-12)


def test_one_program_with_random_keys_and_integers():
    """A key in the perturbation's state, another in the loss, an integer table as a parameter."""
    draws = geometry.random_leaves(geometry.metric_ball(0.1), 0.5)
    params, pairs = problem.make()[1] | {"table": jnp.arange(3)}, batches(8, steps=2)

    def masked_loss(params, batch, key):
        kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
        return loss(params, batch | {"x": kept * batch["x"]}) * params["table"].sum()

    def take(role_axis):
        tx = samx.async_sam(first="sam", role_axis=role_axis, perturbation=draws)
        tx = optax.chain(tx, optax.sgd(0.1))

        def step(params, state, key, batch, ascent_batch):
            updates, state = tx.update(
                params,
                state,
                params,
                value_fn=lambda p: masked_loss(p, batch, key),
                ascent_fn=lambda p: masked_loss(p, ascent_batch, key),
            )
            return optax.apply_updates(params, updates), state

        if role_axis:
            mesh = regimes.mesh_of((2,), ("role",))
            step = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
        step, carry = jax.jit(step), (params, tx.init(params))
        for t, pair in enumerate(pairs):
            carry = step(*carry, jax.random.key(t), *pair)
        return jax.tree.map(np.asarray, problem.as_numbers(carry))

    chex.assert_trees_all_close(take("role"), take(None), rtol=1e-12, atol=1e-12)
