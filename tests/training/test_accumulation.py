"""`accumulate` takes the step of the whole batch; `optax.MultiSteps` takes a different step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from regimes import GLOBAL, VALID, assert_same, batches, build, mean_loss, on_one_device

import samx

pytestmark = pytest.mark.usefixtures("float64")


def accumulated(name, num_microbatches=4):
    return lambda like: samx.accumulate(build(name)(like), num_microbatches)


@pytest.mark.parametrize("name", ["sam", "sampa", "looksam", "bisam", "fisher_sparse_sam"])
def test_it_is_the_step_of_the_whole_batch(name):
    history = regimes.single(accumulated(name), problem.make()[1], batches())
    assert_same(history, on_one_device(name))


@functools.cache
def with_weights(name):
    return regimes.single(build(name), problem.make()[1], batches(4, weights=VALID))


@pytest.mark.parametrize(
    ("name", "num_microbatches"),
    [("sam", 1), ("sam", 16), ("sampa", 2)],
)
def test_weights_and_any_number_of_microbatches(name, num_microbatches):
    """Some microbatches hold no valid example."""
    data = batches(3, weights=VALID)
    history = regimes.single(accumulated(name, num_microbatches), problem.make()[1], data)
    assert_same(history, with_weights(name)[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "regime"),
    [*(("sam", regime) for regime in GLOBAL), ("sampa", "jit, explicit"), ("sampa", "shard_map")],
)
def test_on_several_devices(name, regime):
    params, data = problem.make()[1], batches(4, weights=VALID)
    history = GLOBAL[regime](accumulated(name, 2), params, data)
    assert_same(history, with_weights(name))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["sam", "two ascent steps"])
def test_with_local_ascent(name, check_vma):
    """Each device climbs the gradient of all of its microbatches."""
    arguments = problem.make()[1], batches(4)
    history = regimes.shard_map(accumulated(name, 2), *arguments, check_vma, "local")
    assert_same(history, regimes.shard_map(build(name), *arguments, check_vma, "local"))


@pytest.mark.parametrize("name", ["sam", "ksam", "esam"])
def test_no_pass_sees_more_than_a_microbatch(name):
    """Also where a variant asks for the losses of examples, without a gradient."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0)

    def largest_pass(tx):
        sizes = []

        def losses_fn(params, batch):
            sizes.append(len(batch["y"]))
            return problem.losses_fn(params, batch)

        closures = {"losses_fn": losses_fn, "batch": batch}
        jax.eval_shape(lambda: tx.update(params, tx.init(params), params, **closures))
        return max(sizes)

    assert largest_pass(accumulated(name)(batch)) == 4
    assert largest_pass(build(name)(batch)) == 16


def test_microbatches_are_strided():
    seen = []

    def losses_fn(w, batch):
        jax.debug.callback(lambda x: seen.append(x.tolist()), batch)
        return w * batch

    tx, w, batch = samx.accumulate(optax.sgd(0.1), 3), jnp.ones(()), jnp.arange(6.0)
    tx.update(w, tx.init(w), w, losses_fn=losses_fn, batch=batch)
    jax.effects_barrier()
    assert seen == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def test_memory_is_that_of_a_microbatch():
    """Wide activations, few parameters: temporary memory falls with the number of microbatches."""
    params = {"W": jnp.ones((64, 64), jnp.float32)}
    batch = jnp.ones((512, 64), jnp.float32)

    def losses_fn(params, x):
        for _ in range(8):
            x = jnp.tanh(x @ params["W"])
        return x.sum(axis=1)

    def temporary(num_microbatches):
        tx = samx.accumulate(optax.chain(samx.sam(0.05), optax.sgd(0.1)), num_microbatches)

        def step(params, state):
            return tx.update(params, state, params, losses_fn=losses_fn, batch=batch)

        program = jax.jit(step).lower(params, tx.init(params)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.4 * temporary(1)


def test_half_precision_gradients_add_up_in_float32():
    """4096 gradients of 1/4096: a sum in bfloat16 would stop growing at 1/16."""
    tx, w = samx.accumulate(optax.sgd(1.0), 4096), jnp.ones((), jnp.bfloat16)
    batch = jnp.ones(4096, jnp.bfloat16)
    updates, _ = tx.update(w, tx.init(w), w, losses_fn=lambda w, x: w * x, batch=batch)
    assert updates.dtype == jnp.bfloat16
    assert float(updates) == -1.0


def step_with(tx, losses_fn):
    """Make a step for a variant that does not read the incoming gradient."""

    def step(params, state, batch):
        updates, state = tx.update(params, state, params, losses_fn=losses_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def test_integers_keys_and_aux():
    """Integer parameters, keys as examples, and an aux in the state of SAMPa."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0) | {"key": jax.random.split(jax.random.key(0), 16)}
    params["table"] = jnp.arange(3)

    def losses_fn(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(batch["key"])
        losses = problem.losses_fn(params, batch | {"x": batch["x"] + 0.1 * noise})
        return losses * params["table"].sum(), {"mean": batch["x"].mean(0), "count": 5}

    aux_like = {"mean": jnp.ones(10), "count": 0}
    whole = samx.sampa(optax.sgd(0.1), batch_like=batch, aux_like=aux_like)
    results = []
    for tx in (whole, samx.accumulate(whole, 4)):
        step, carry = jax.jit(step_with(tx, losses_fn)), (params, tx.init(params))
        for _ in range(2):
            carry = step(*carry, batch)
        results.append((carry[0], carry[1].aux, carry[1].readings))
    chex.assert_trees_all_close(*results, rtol=1e-12, atol=1e-12)


def with_statistics(params, batch):
    losses = problem.losses_fn(params, batch)
    return losses, {"mean": batch["x"].mean(0), "bias": params["b2"], "count": jnp.ones((), int)}


def test_aux_of_the_clean_pass_is_kept():
    """The aux is computed at the clean parameters, and is the mean over the microbatches."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    start = {"mean": jnp.ones(10), "bias": jnp.ones(3), "count": jnp.zeros((), int)}
    whole = optax.chain(samx.sam(0.5), optax.sgd(0.1))
    tx = samx.accumulate(whole, 4, aux_like=start)
    state = tx.init(params)
    chex.assert_trees_all_equal(state.aux, start)
    shapes = jax.eval_shape(lambda: start)
    zeros = samx.accumulate(whole, 4, aux_like=shapes).init(params).aux
    chex.assert_trees_all_equal(zeros, optax.tree.zeros_like(start))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params, losses_fn=with_statistics, batch=batch)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        before = params
        params, state = step(params, state)
    chex.assert_trees_all_close(
        state.aux, {"mean": batch["x"].mean(0), "bias": before["b2"], "count": 1}, rtol=1e-6
    )
    assert step._cache_size() == 1
    plain = samx.accumulate(whole, 4)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        *(jax.eval_shape(wrapped.init, params) for wrapped in (plain, whole))
    )

    tx = samx.accumulate(whole, 4, aux_like={"mean": jnp.ones(9)})
    with pytest.raises(ValueError, match="accumulate: `aux` must have the shapes"):
        jax.eval_shape(step_with(tx, with_statistics), params, tx.init(params), batch)


def test_wrong_use():
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    arguments = {"losses_fn": problem.losses_fn, "batch": batch}
    for wrong, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`num_microbatches` must be"):
            samx.accumulate(samx.sam(), wrong)
    tx = samx.accumulate(samx.sam(), 3)
    with pytest.raises(ValueError, match="must divide the batch of 16 examples, got 3; pad"):
        tx.update(params, tx.init(params), params, **arguments)
    with pytest.raises(ValueError, match="accumulate: `losses_fn` is missing"):
        tx.update(params, tx.init(params), params, value_fn=lambda p: 0.0)
    inside = samx.accumulate(samx.data_parallel(samx.sam(), "data"), 2)
    step = jax.shard_map(
        lambda p, b: inside.update(p, inside.init(p), p, losses_fn=problem.losses_fn, batch=b)[0],
        mesh=regimes.mesh_of(),
        in_specs=(regimes.P(), regimes.P("data")),
        out_specs=regimes.P(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="data_parallel: stands inside accumulate; put it around"):
        jax.eval_shape(step, params, batch)


def microbatches():
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    return params, batch, [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]


def run_in_pieces(tx):
    """Call `update` once per microbatch, as `optax.MultiSteps` expects."""
    params, _, pieces = microbatches()
    step, carry = jax.jit(problem.make_step(tx)), (params, tx.init(params))
    for piece in pieces:
        carry = step(*carry, piece)
    return optax.tree.sub(params, carry[0])  # the gradient, because the learning rate is 1


gradient = jax.jit(jax.grad(mean_loss))


@jax.jit
def both_gradients(params, *batches):
    return [jax.grad(mean_loss)(params, batch) for batch in batches]


@jax.jit
def point_of(params, batch):
    """Return the parameters at which SAM takes the sharp gradient of a batch."""
    g = jax.grad(mean_loss)(params, batch)
    return optax.tree.add(params, optax.tree.scale(0.05 / (optax.tree.norm(g) + 1e-12), g))


def test_multi_steps_around_the_optimizer_is_another_algorithm():
    """`MultiSteps` climbs the mean gradient, but descends on the last microbatch alone."""
    params, batch, pieces = microbatches()
    found = run_in_pieces(optax.MultiSteps(optax.chain(samx.sam(0.05), optax.sgd(1.0)), 4))
    point = point_of(params, batch)
    sharp, exact = both_gradients(point, pieces[-1], batch)
    chex.assert_trees_all_close(found, sharp, rtol=1e-6)
    assert max(np.abs(found[k] - exact[k]).max() for k in exact) > 0.1


def test_multi_steps_around_the_base_is_micro_batch_sam():
    params, _, pieces = microbatches()
    base = optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()
    found = run_in_pieces(optax.chain(samx.sam(0.05), base))
    sharp = [gradient(point_of(params, piece), piece) for piece in pieces]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 4, *sharp)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)
