"""AsyncSAM takes the same steps on one device, on two, and in one program for two devices."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from async_runs import BASES, STEPS, batches, loss, make_step
from costs import Counter, compiled, flops, wide_losses, wide_problem
from jax.sharding import PartitionSpec as P

import samx
from examples.common.programs import communicated_bytes
from samx.asynchronous import pipelined

pytestmark = pytest.mark.usefixtures("float64")


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
        found, wanted = without_losses(found), without_losses(wanted)
        chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=tolerance)


def without_losses(result):
    """Clear the reading `loss`: without an `ascent_fn`, it is the `value` of the caller."""
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


FORMS = [("adamw", "plain", 16), ("momentum", "sam", 4)]


@pytest.mark.parametrize("form", FORMS)
def test_two_devices_take_the_steps_of_one(form):
    history = [copied(step) for step in on_two_devices(*form)]
    assert_same(history, sequential(*form))


def test_two_devices_go_on_from_a_checkpoint():
    for number, step in enumerate(on_two_devices(*FORMS[1])):
        if number == 2:
            kept = copied(step)
            break
    history = [copied(s) for s in on_two_devices(*FORMS[1], *kept, skip=3)]
    assert_same(history[-1:], sequential(*FORMS[1])[-1:])


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
    """Run one program with devices along "role", and examples over "data" if that axis exists."""
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
    twice = functools.partial(jax.tree.map, lambda x: np.stack([x, x]))
    step, history = jax.pmap(step, axis_name="role"), []
    params, state = twice(params), twice(state)
    for pair in batches(ascent_size):
        params, state = step(params, state, *twice(pair))
        both = jax.tree.map(np.asarray, (params, state))
        first, second = (jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))
        chex.assert_trees_all_equal(first, second)
        history.append(first)
    return history


@pytest.mark.parametrize(
    ("regime", "form"),
    [("shard_map, check_vma=False", FORMS[0]), ("pmap", FORMS[1])],
)
def test_one_program_takes_the_steps_of_one_device(regime, form):
    assert_same(mapped(regime, *form), sequential(*form))


def test_one_program_with_an_axis_of_data():
    history = mapped("shard_map", "momentum", "sam", 16, shape=(2, 4), names=("role", "data"))
    assert_same(history, sequential("momentum", "sam", 16))


# ---- What runs where, and when.


def test_each_role_takes_one_gradient():
    """Counted while the program runs: one gradient of the whole batch, one of a quarter of it."""
    counter = Counter()
    tx = optax.chain(samx.async_sam(0.1, role_axis="role"), BASES["momentum"])

    def counted(params, batch):
        losses = problem.losses_fn(params, batch)
        return losses.mean() + 0.0 * counter.watch(losses)

    def step(params, state, batch, ascent_batch):
        closures = {
            "value_fn": lambda p: counted(p, batch),
            "ascent_fn": lambda p: counted(p, ascent_batch),
        }
        updates, state = tx.update(params, state, params, **closures)
        return optax.apply_updates(params, updates), state

    mesh, (pair,) = regimes.mesh_of((2,), ("role",)), batches(4, steps=1)
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P()))
    params = problem.make()[1]
    jax.block_until_ready(step(params, tx.init(params), *pair))
    jax.effects_barrier()
    assert counter.passes == {"forward": 1.25, "backward": 1.25}


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_device_of_one_program_computes_one_gradient_and_sends_two(check_vma):
    """XLA counts only the more expensive side of a branch."""
    tx = optax.chain(samx.async_sam(0.1, role_axis="role"), BASES["momentum"])
    params, batch = wide_problem()

    def step(params, state, batch):
        updates, state = tx.update(params, state, params, losses_fn=wide_losses, batch=batch)
        return optax.apply_updates(params, updates), state

    mesh = regimes.mesh_of((2,), ("role",))
    step = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma)
    program = jax.jit(step).lower(params, tx.init(params), batch).compile()
    assert "conditional(" in program.as_text()
    one = flops(compiled("gradient"))
    assert flops(program) == pytest.approx(one, rel=0.05)
    (operation, size), *others = communicated_bytes(program).items()
    assert (operation, others) == ("all-reduce", [])
    assert 0 <= size - 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= 64


def test_each_device_takes_its_own_part_the_ascent_first(monkeypatch):
    calls, jit = [], jax.jit

    def watching(fn, **keywords):
        compiled = jit(fn, **keywords)

        def call(*args):
            calls.append((fn, {leaf.device for leaf in jax.tree.leaves(args)}))
            return compiled(*args)

        return call

    one, other = jax.devices()[:2]
    ascend = jax.grad(loss)
    monkeypatch.setattr(jax, "jit", watching)
    monkeypatch.setattr(jax, "grad", lambda fn: ascend)
    list(on_two_devices("momentum", "plain", 4, skip=STEPS - 2))
    is_ascent = [fn is ascend for fn, _ in calls]
    assert is_ascent == [True, False] * 2
    assert [devices for _, devices in calls] == [{other}, {one}] * 2


def test_a_pair_is_fetched_after_the_step_before_it_was_handed_out():
    fetched, data = [], batches(4, steps=3)

    def counted():
        for number, pair in enumerate(data):
            fetched.append(number)
            yield pair

    steps, numbers = tiny_pipeline(counted()), []
    assert fetched == []
    for _ in steps:
        numbers.append(len(fetched))
    assert numbers == [1, 2, 3]


def tiny_pipeline(pairs, work=lambda x: 0.0):
    """Pipeline the tiny problem, with extra `work` in both programs."""
    tx = optax.chain(samx.async_sam(0.1), BASES["momentum"])

    def descend(params, state, batch, ascent_grad):
        updates, state = tx.update(ascent_grad, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state, work(batch["x"])

    def ascend(params, batch):
        idle = work(batch["x"])
        return jax.tree.map(lambda x: x + 0.0 * idle, jax.grad(loss)(params, batch))

    (one, other), params = jax.devices()[:2], problem.make()[1]
    return pipelined(
        descend,
        ascend,
        params,
        tx.init(params),
        pairs,
        descent_device=one,
        ascent_device=other,
    )


def test_a_step_is_handed_out_long_before_it_is_done():
    """Waiting for one of the two gradients would take at least half of the step."""

    def work(x):
        x = jnp.tile(x[:4], (16, 16))
        return jax.lax.fori_loop(0, 2500, lambda _, x: jnp.sin(x + 0.1), x).sum()

    steps = tiny_pipeline(batches(16, steps=3), work)
    jax.block_until_ready(next(steps))  # compiles
    start = time.perf_counter()
    step = next(steps)
    handed_out = time.perf_counter() - start
    jax.block_until_ready(step)
    done = time.perf_counter() - start
    assert handed_out < done / 4
