"""AsyncSAM: one device, two devices and one program for both take the same steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from jax.sharding import PartitionSpec as P

import samx
from samx.asynchronous import pipelined

pytestmark = pytest.mark.usefixtures("fast_compilation", "float64")

STEPS = 20
BASES = {"momentum": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(0.01)}


def loss(params, batch):
    return problem.losses_fn(params, batch).mean()


def batches(ascent_size, steps=STEPS):
    data, _ = problem.make()
    whole = [problem.batch_at(data, t) for t in range(steps)]
    return [(batch, jax.tree.map(lambda x: x[:ascent_size], batch)) for batch in whole]


def make_step(tx):
    """One program that takes both gradients, the incoming one for the losses of the whole batch."""

    def step(params, state, batch, ascent_batch):
        updates, state = tx.update(
            optax.tree.zeros_like(params),  # nothing reads it
            state,
            params,
            value_fn=lambda p: loss(p, batch),
            ascent_fn=lambda p: loss(p, ascent_batch),
        )
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def sequential(base, first, ascent_size):
    tx = optax.chain(samx.async_sam(0.1, first=first), BASES[base])
    params, step = problem.make()[1], jax.jit(make_step(tx))
    state, history = tx.init(params), []
    for batch, ascent_batch in batches(ascent_size):
        params, state = step(params, state, batch, ascent_batch)
        history.append((params, state))
    return history


def assert_same(history, expected):
    for step, tolerance in ((0, 1e-12), (-1, 1e-10)):
        found, wanted = (jax.tree.map(np.asarray, h[step]) for h in (history, expected))
        chex.assert_trees_all_close(without_losses(found), without_losses(wanted), atol=tolerance)


def without_losses(result):
    """Without an `ascent_fn`, `loss` is what the caller says."""
    params, state = result
    return params, optax.tree.set(state, loss=0.0)


def on_two_devices(base, first, ascent_size, params=None, state=None, skip=0):
    tx = optax.chain(samx.async_sam(0.1, first=first), BASES[base])
    if params is None:
        params = problem.make()[1]
        state = tx.init(params)

    def descend(params, state, batch, ascent_grad):
        updates, state = tx.update(ascent_grad, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state, optax.tree.get(state, "sharp_loss")

    one, other = jax.devices()[:2]
    return pipelined(
        descend,
        jax.grad(loss),
        params,
        state,
        batches(ascent_size)[skip:],
        descent_device=one,
        ascent_device=other,
    )


def copied(step):
    return jax.tree.map(np.asarray, (step.params, step.opt_state))


FORMS = [("momentum", "plain", 16), ("momentum", "sam", 4), ("adamw", "plain", 8)]


@pytest.mark.parametrize("form", FORMS)
def test_two_devices_take_the_steps_of_one(form):
    history = [copied(step) for step in on_two_devices(*form)]
    assert_same(history, sequential(*form))


@pytest.mark.parametrize("first", ["plain", "sam"])
def test_two_devices_go_on_from_a_checkpoint(first):
    for number, step in enumerate(on_two_devices("momentum", first, 4)):
        if number == 6:
            kept = copied(step)
            break
    history = [copied(s) for s in on_two_devices("momentum", first, 4, *kept, skip=7)]
    assert_same(history[-1:], sequential("momentum", first, 4)[-1:])


def test_two_devices_leave_the_callers_arrays_alone():
    params = problem.make()[1]
    tx = optax.chain(samx.async_sam(0.1), BASES["momentum"])
    state = tx.init(params)
    before = jax.tree.map(np.array, (params, state))
    for _ in on_two_devices("momentum", "plain", 4, params, state):
        pass
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, (params, state)), before)


def test_each_device_does_its_own_part():
    steps = on_two_devices("momentum", "plain", 4)
    step = next(steps)
    assert {x.device for x in jax.tree.leaves((step.params, step.out))} == {jax.devices()[0]}


def mapped(regime, base, first, ascent_size, shape=(2,), names=("role",)):
    """One program, devices along "role"; the examples over "data", if there is such an axis."""
    tx = optax.chain(samx.async_sam(0.1, first=first, role_axis="role"), BASES[base])
    has_data = "data" in names
    tx = samx.data_parallel(tx, "data") if has_data else tx
    step, params = make_step(tx), problem.make()[1]
    state, history = tx.init(params), []
    spec = P("data") if has_data else P()
    if regime == "pmap":
        return mapped_by_pmap(step, params, state, ascent_size)
    mesh = regimes.mesh_of(shape, names)
    step = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P(), spec, spec),
            out_specs=(P(), P()),
            check_vma=regime == "shard_map",
        )
    )
    for batch, ascent_batch in batches(ascent_size):
        params, state = step(params, state, batch, ascent_batch)
        history.append((params, state))
    regimes.check_replicas(history[-1], (P(), P()))
    return history


def mapped_by_pmap(step, params, state, ascent_size):
    twice = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
    step, history = jax.pmap(step, axis_name="role"), []
    params, state = twice(params), twice(state)
    for pair in batches(ascent_size):
        params, state = step(params, state, *twice(pair))
        first, second = (jax.tree.map(lambda x, i=i: x[i], (params, state)) for i in (0, 1))
        chex.assert_trees_all_equal(first, second)
        history.append(first)
    return history


REGIMES = ["shard_map", "shard_map, check_vma=False", "pmap"]


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1]])
@pytest.mark.parametrize("regime", REGIMES)
def test_one_program_takes_the_steps_of_one_device(regime, form):
    assert_same(mapped(regime, *form), sequential(*form))


@pytest.mark.parametrize("regime", REGIMES[:2])
@pytest.mark.parametrize("first", ["plain", "sam"])
def test_one_program_with_an_axis_of_data(regime, first):
    history = mapped(regime, "momentum", first, 16, shape=(2, 4), names=("role", "data"))
    assert_same(history, sequential("momentum", first, 16))
