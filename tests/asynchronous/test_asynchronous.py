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
import test_cost
from communication import communicated_bytes
from jax.sharding import PartitionSpec as P

import samx
from samx import perturbations as geometry
from samx.asynchronous import calibrate_ascent_batch, pipelined

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 20
BASES = {"momentum": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(0.01)}


def loss(params, batch):
    return problem.losses_fn(params, batch).mean()


gradient = jax.jit(jax.grad(loss))


def batches(ascent_size, steps=STEPS):
    data, _ = problem.make()
    whole = [problem.batch_at(data, t) for t in range(steps)]
    return [(batch, jax.tree.map(lambda x: x[:ascent_size], batch)) for batch in whole]


def make_step(tx):
    """Make one step that computes both gradients; the incoming gradient is not read."""

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


# ---- What runs where, and when.


def test_each_role_takes_one_gradient():
    """Counted while the program runs: one gradient of the whole batch, one of a quarter of it."""
    counter = test_cost.Counter()
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
    params, batch = test_cost.wide_problem()

    def step(params, state, batch):
        updates, state = tx.update(
            params, state, params, losses_fn=test_cost.wide_losses, batch=batch
        )
        return optax.apply_updates(params, updates), state

    mesh = regimes.mesh_of((2,), ("role",))
    step = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=check_vma)
    program = jax.jit(step).lower(params, tx.init(params), batch).compile()
    assert "conditional(" in program.as_text()
    one = test_cost.flops(test_cost.compiled("gradient"))
    assert test_cost.flops(program) == pytest.approx(one, rel=0.05)
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


def test_the_next_batch_is_on_its_way_when_a_step_is_handed_out():
    fetched, data = [], batches(4, steps=3)

    def counted():
        for number, pair in enumerate(data):
            fetched.append(number)
            yield pair

    steps, numbers = tiny_pipeline(counted()), []
    assert fetched == []
    for _ in steps:
        numbers.append(len(fetched))
    assert numbers == [2, 3, 3]


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


# ---- What is climbed, and what is kept.


@pytest.mark.parametrize("value", [0.0, jnp.nan, jnp.inf])
def test_nothing_known_is_not_climbed(value):
    """A zero or non-finite ascent gradient is not climbed; the next step climbs again."""
    tx, params = optax.chain(samx.async_sam(0.1), optax.sgd(1.0)), problem.make()[1]
    state = optax.tree.set(tx.init(params), step=jnp.int32(5))
    broken = params | {"b1": params["b1"].at[0].set(value)}
    if value == 0:
        broken = optax.tree.zeros_like(params)
    state = optax.tree.set(state, ascent_grad=broken)
    step, (pair, other) = jax.jit(make_step(tx)), batches(4, steps=2)
    moved, state = step(params, state, *pair)
    g = gradient(params, pair[0])
    chex.assert_trees_all_close(moved, optax.tree.sub(params, g), atol=1e-14)
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
    np.testing.assert_allclose(optax.tree.get(state, "aux"), expected, atol=1e-12)


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
    chex.assert_trees_all_close(optax.tree.get(state, "ascent_grad"), fresh, atol=1e-12)


def test_one_program_with_random_keys_and_integers():
    """A key in the perturbation's state, another in the loss, an integer table as a parameter."""
    draws = geometry.random_leaves(geometry.metric_ball(0.1), 0.5)
    params, pairs = problem.make()[1] | {"table": jnp.arange(3)}, batches(8, steps=2)

    def masked_loss(params, batch, key):
        kept = jax.random.bernoulli(key, 0.8, batch["x"].shape)
        return loss(params, batch | {"x": kept * batch["x"]}) * params["table"].sum()

    def take(role_axis, check_vma=True):
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
            keywords = {"in_specs": P(), "out_specs": P(), "check_vma": check_vma}
            step = jax.shard_map(step, mesh=mesh, **keywords)
        step, carry = jax.jit(step), (params, tx.init(params))
        for t, pair in enumerate(pairs):
            carry = step(*carry, jax.random.key(t), *pair)
        return jax.tree.map(np.asarray, problem.as_numbers(carry))

    expected = take(None)
    for check_vma in (True, False):
        chex.assert_trees_all_close(take("role", check_vma), expected, atol=1e-12)


# ---- The ascent batch.


def calibrated(monkeypatch, seconds_of, size=36, **keywords):
    """Calibrate with a fake clock: 10 s for the descent, 1 s for the copies, `seconds_of(size)`."""
    one, other = jax.devices()[:2]
    seen = []

    def grad_fn(params, batch):
        seen.append((len(batch["y"]), {x.device for x in jax.tree.leaves((params, batch))}))
        return params

    def median_seconds(fn, repeats):
        assert repeats == 5
        seen.clear()
        fn()
        if not seen:
            return 1.0
        [(size_there, devices)] = seen
        if devices == {one}:
            assert size_there == size
            return 10.0
        assert devices == {other}
        return seconds_of(size_there)

    monkeypatch.setattr(jax, "jit", lambda fn: fn)
    monkeypatch.setattr(samx.asynchronous, "_median_seconds", median_seconds)
    batch = {"x": np.zeros((size, 2), np.float32), "y": np.zeros(size, np.int32)}
    return calibrate_ascent_batch(
        grad_fn, jnp.ones(3), batch, descent_device=one, ascent_device=other, **keywords
    )


@pytest.mark.parametrize(
    ("seconds", "size", "is_hidden"),
    [(0.1, 36, True), (0.3, 32, True), (0.4, 24, True), (1.2, 8, True), (1.3, 8, False)],
)
def test_the_largest_ascent_batch_that_is_hidden(seconds, size, is_hidden, monkeypatch):
    found = calibrated(monkeypatch, lambda examples: seconds * examples)
    assert found[:3] == (size, is_hidden, 10.0)
    assert found.copy_seconds == 1.0
    assert len(found.ascent_seconds) <= 3
    assert found.ascent_seconds == {k: seconds * k for k in found.ascent_seconds}
    assert size in found.ascent_seconds
    assert list(found.ascent_seconds) == sorted(found.ascent_seconds)


def test_few_sizes_are_tried(monkeypatch):
    found = calibrated(monkeypatch, lambda examples: examples / 50, size=2000, multiple=4)
    assert found.size == 500
    assert len(found.ascent_seconds) <= 9


# ---- Wrong use.


def test_the_role_axis_must_be_mapped_and_have_size_2():
    params, (pair,) = problem.make()[1], batches(4, steps=1)
    tx = optax.chain(samx.async_sam(0.1, role_axis="role"), optax.sgd(0.1))
    step, state = make_step(tx), tx.init(params)
    with pytest.raises(ValueError, match=r"async_sam: `role_axis`.*'role'.*not mapped.*shard_map"):
        jax.eval_shape(step, params, state, *pair)
    mesh = regimes.mesh_of((4,), ("role",))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"'role' of `role_axis` must have size 2, got 4"):
        jax.eval_shape(mapped, params, state, *pair)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (samx.sam(), "must hold one state of async_sam, found 0"),
        (optax.chain(samx.async_sam(), samx.async_sam()), "one state of async_sam, found 2"),
        (
            samx.perturb_if(samx.policies.every(2), samx.async_sam()),
            "async_sam is inside another transformation of samx.*one step old",
        ),
    ],
)
def test_two_devices_need_one_async_sam_in_a_chain(tx, message):
    params, device = problem.make()[1], jax.devices()[0]
    with pytest.raises(ValueError, match=f"pipelined: .*{message}"):
        pipelined(
            lambda *args: args[:3],
            jax.grad(loss),
            params,
            tx.init(params),
            [],
            descent_device=device,
            ascent_device=device,
        )


@pytest.mark.parametrize(
    ("size", "keywords", "error", "message"),
    [
        (3, {}, ValueError, r"calibrate_ascent_batch: every leaf of `batch`.*\(4, 2\).*\(3,\)"),
        (4, {"multiple": 0}, ValueError, "`multiple` must be at least 1, got 0"),
        (4, {"repeats": 0.5}, TypeError, "`repeats` must be a Python int, got float"),
    ],
)
def test_calibration_of_nonsense(size, keywords, error, message):
    batch, device = {"x": np.ones((4, 2)), "y": np.ones(size)}, jax.devices()[0]
    devices = {"descent_device": device, "ascent_device": device}
    with pytest.raises(error, match=message):
        calibrate_ascent_batch(jax.grad(loss), {}, batch, **devices, **keywords)
