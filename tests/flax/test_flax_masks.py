"""Every pass of a step has the same dropout masks, or the sharp pass has fresh ones.

If the loss is linear in the parameters, its gradient is the mask.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regimes
from flax import nnx
from flax_runs import KEY, Masked, batches, keep, linen_training, variant
from jax.sharding import PartitionSpec as P

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")


def masked_linen(tx, masks):
    state = samx.flax.TrainState.create(
        apply_fn=nn.Dropout(0.5, deterministic=False).apply,
        params={"w": jnp.ones(64)},
        key=jax.random.key(KEY),
        tx=tx,
    )

    def step(state, batch):
        def losses_fn(params, batch):
            rngs = state.rngs("dropout", masks=masks)
            return batch * state.apply_fn({}, params["w"], rngs=rngs).sum()

        own = state.apply_fn({}, jnp.ones(64), rngs=state.rngs("dropout"))
        grads = jax.grad(lambda params: losses_fn(params, batch).mean())(state.params)
        state = state.apply_gradients(grads=grads, losses_fn=losses_fn, batch=batch)
        return state, (own, state.opt_state[0]["w"], state.opt_state[2]["w"])

    return step, state


def masked_nnx(tx, masks):
    model = Masked()
    graph, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state, copy=True)

        def losses(model, batch):
            return batch * model.dropout(model.w[...]).sum()

        own = nnx.clone(model).dropout(jnp.ones(64))
        losses_fn = samx.flax.closure(model, losses, masks=masks)
        grads = nnx.grad(lambda model: losses(model, batch).mean())(model)
        optimizer.update(model, grads, losses_fn=losses_fn, batch=batch)
        seen = nnx.as_pure(optimizer.opt_state)
        return nnx.as_pure(nnx.state((model, optimizer))), (own, seen[0]["w"], seen[2]["w"])

    return step, nnx.as_pure(state)


def mapped_over_devices(step):
    spec = P("data")
    return jax.shard_map(step, mesh=regimes.mesh_of(), in_specs=(P(), spec), out_specs=P())


every_api = pytest.mark.parametrize("api", ["linen", "nnx"])
PLACES = {
    "eager": (lambda tx: tx, lambda step: step),
    "jit": (lambda tx: tx, jax.jit),
    "data_parallel": (
        lambda tx: samx.data_parallel(samx.accumulate(tx, 2), "data"),
        lambda step: jax.jit(mapped_over_devices(step)),
    ),
}


@functools.cache
def masks_seen(api, masks, place):
    """Return the masks of the caller's pass, the clean pass and the sharp pass: [3 steps, 3]."""
    wrap, compiled = PLACES[place]
    tx = wrap(optax.chain(keep(), samx.sam(0.1), keep(), optax.sgd(0.1)))
    step, state = {"linen": masked_linen, "nnx": masked_nnx}[api](tx, masks)
    if place == "data_parallel":
        state = regimes.place(state, regimes.mesh_of(), P())
    step, seen = compiled(step), []
    for _ in range(3):
        state, three = step(state, jnp.ones(16))
        seen.append(three)
    return np.round(np.asarray(seen), 6)


@every_api
@pytest.mark.parametrize("place", PLACES)
def test_every_pass_of_a_step_has_the_same_mask(api, place):
    own, clean, sharp = np.moveaxis(masks_seen(api, "same", place), 1, 0)
    np.testing.assert_array_equal(clean, own)
    np.testing.assert_array_equal(sharp, own)
    assert len(np.unique(own, axis=0)) == 3
    assert set(own.flat) == {0.0, 2.0}


@every_api
@pytest.mark.parametrize("place", ["jit", "data_parallel"])
def test_fresh_masks_are_those_of_the_sharp_pass_alone(api, place):
    own, clean, sharp = np.moveaxis(masks_seen(api, "fresh", place), 1, 0)
    np.testing.assert_array_equal(clean, own)
    assert len(np.unique([*own, *sharp], axis=0)) == 6
    np.testing.assert_array_equal(own, masks_seen(api, "same", place)[:, 0])
    np.testing.assert_array_equal(sharp, masks_seen(api, "fresh", "jit")[:, 2])


@nnx.split_rngs(splits=2)
@nnx.vmap
def two_dropouts(rngs):
    return nnx.Dropout(0.5, rngs=rngs)


class Streams(nnx.Module):
    """Several streams of random numbers, one of them with two keys."""

    def __init__(self):
        self.w, self.rngs = nnx.Param(jnp.ones(4)), nnx.Rngs(dropout=1, noise=1)
        self.two = two_dropouts(nnx.Rngs(2))

    def numbers(self):
        many = nnx.vmap(lambda dropout: dropout.rngs.uniform(()))(self.two)
        return jnp.stack([self.rngs.dropout.uniform(()), self.rngs.noise.normal(()), *many])


@pytest.mark.parametrize("masks", ["same", "fresh"])
def test_nnx_streams_and_split_keys(masks):
    model = Streams()
    value_fn = samx.flax.closure(model, lambda m: m.w @ m.numbers(), masks=masks)
    params, expected = nnx.as_pure(nnx.state(model, nnx.Param)), model.numbers()
    clean = jax.grad(value_fn, has_aux=True)(params)[0]["w"]
    _, sharp = samx.value_and_grad_at(value_fn, params, optax.tree.zeros_like(params))
    np.testing.assert_allclose(clean, expected, rtol=1e-6)
    assert np.all(np.isclose(sharp["w"], expected, rtol=1e-6) == (masks == "same"))
    assert len(np.unique(sharp["w"])) == 4


def test_linen_keys_differ_between_names_and_steps():
    state = linen_training(variant("sam"), batches(1)[0])[1]
    keys = [state.replace(step=t).rngs("dropout", "noise") for t in range(3)]
    assert len({str(jax.random.key_data(key)) for step in keys for key in step.values()}) == 6
    assert state.rngs("noise")["noise"] == keys[0]["noise"]  # the same alone or with other names
    with pytest.raises(ValueError, match="the state has no `key`"):
        state.replace(key=None).rngs("dropout")


def test_masks_must_be_same_or_fresh():
    state = linen_training(variant("sam"), batches(1)[0])[1]
    for wrong in (
        lambda: state.rngs("dropout", masks="new"),
        lambda: samx.flax.closure(Masked(), lambda model: 0.0, masks=None),
    ):
        with pytest.raises(ValueError, match="`masks` must be 'same' or 'fresh', got"):
            wrong()
