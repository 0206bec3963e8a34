"""Flax loops take the steps of loops written by hand, on one device and on several."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regimes
from flax import nnx
from flax_runs import (
    PASSES,
    TRAININGS,
    Nnx,
    assert_same,
    batches,
    by_hand,
    hand_pass,
    hand_run,
    leaves,
    losses_of,
    run,
    samx_run,
    variant,
)
from jax.sharding import PartitionSpec as P

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")

every_api = pytest.mark.parametrize("api", TRAININGS)


@pytest.mark.parametrize(
    ("api", "name"),
    [
        ("linen", "sam"),
        ("linen", "sampa"),
        ("nnx", "sam"),
        ("nnx", "momentum_sam"),
        ("nnx", "two ascent steps"),
    ],
)
def test_losses_parameters_and_statistics_are_those_of_a_loop_by_hand(api, name):
    assert_same(samx_run(api, name), hand_run(api, name, 0.5))


@pytest.mark.parametrize(
    ("api", "name", "changes"),
    [("linen", "ausam", {"fraction": 1.0, "num_groups": 1}), ("nnx", "sl_sam", {"groups": 1})],
)
def test_on_everything_they_keep_what_sam_is_given(api, name, changes):
    """They equal SAM, including the statistics, which they take from their own clean pass."""
    step, state, read = TRAININGS[api](variant(name, **changes), batches(1)[0])
    assert_same(run(jax.jit(step), state, read, batches()), samx_run(api, "sam"))


@every_api
def test_statistics_are_those_of_plain_training_at_the_same_parameters(api):
    one_pass, params, memory = hand_pass(api, 0.5)
    for t, (batch, (new_params, statistics, loss)) in enumerate(
        zip(batches(), samx_run(api, "sam"), strict=True)
    ):
        plain_loss, _, memory = one_pass(params, memory, t, batch)
        found, expected = leaves((statistics, loss)), leaves((memory[0], plain_loss))
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)
        params = jax.tree.map(np.asarray, new_params)


# ---- On several devices.


def by_path(tree):
    """Return the specs of a state: the examples that SAMPa holds are sharded over the devices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P("data") if "previous" in jax.tree_util.keystr(path) else P(), tree
    )


def run_mapped(training, regime, build, **model):
    """Run the training in one regime on 8 devices, and check the replicas."""
    is_mapped = regime != "jit"
    data = batches(4)
    like = data[0] if regime != "pmap" else jax.tree.map(lambda x: x[:2], data[0])
    step, state, read = training(build, like, is_mapped=is_mapped, **model)
    if regime == "pmap":
        data = jax.tree.map(lambda x: np.reshape(x, (8, -1, *x.shape[1:])), data)
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), state)
        state, data = regimes.place((state, data), regimes.mesh_of(), P("data"))
        history = run(jax.pmap(step, axis_name="data"), state, read, data)
        history = jax.tree.map(np.asarray, history)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * 8)), history)
        return jax.tree.map(lambda x: x[0], history)
    mesh, specs = regimes.mesh_of(), by_path(state)
    if is_mapped:
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=(specs, P()),
            check_vma=regime == "shard_map",
        )
    history = run(
        jax.jit(step),
        regimes.place(state, mesh, specs),
        read,
        regimes.place(data, mesh, P("data")),
    )
    regimes.check_replicas(history, [P()] * len(history))
    return history


def data_parallel(tx):
    return samx.data_parallel(tx, "data")


@pytest.mark.parametrize(
    ("regime", "api", "name"),
    [
        ("shard_map", "nnx", "sampa"),
        ("pmap", "linen", "sam"),
    ],
)
def test_synchronized_statistics_give_the_run_of_one_device(regime, api, name):
    history = run_mapped(
        TRAININGS[api], regime, variant(name, data_parallel), rate=0.0, axis_name="data"
    )
    assert_same(history, hand_run(api, name, 0.0)[:4])


@pytest.mark.parametrize(("api", "name"), [("linen", "sam"), ("nnx", "sampa")])
def test_under_jit_statistics_and_masks_are_those_of_the_whole_batch(api, name):
    history = run_mapped(TRAININGS[api], "jit", variant(name))
    assert_same(history, hand_run(api, name, 0.5)[:4])


@functools.cache
def mapped_hand_pass(api):
    """Each device has its own statistics and, in linen, masks; results of a pass are averaged."""
    one_pass, params, memory = PASSES[api](0.5, is_mapped=True)
    mesh = regimes.mesh_of()

    def mean(x):
        return jax.lax.pmean(x, "data") if jnp.issubdtype(x.dtype, jnp.floating) else x

    fn = jax.shard_map(
        lambda *args: jax.tree.map(mean, one_pass(*args)),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(fn), jax.tree.map(np.asarray, params), regimes.place(memory, mesh, P())


@functools.cache
def mapped_hand_run(api, name):
    return by_hand(name, *mapped_hand_pass(api), batches(4))


@pytest.mark.parametrize(
    ("regime", "api", "name"),
    [
        ("shard_map", "linen", "sampa"),
        ("shard_map, no vma", "nnx", "sam"),
        ("shard_map", "nnx", "momentum_sam"),
        ("pmap", "nnx", "sampa"),
    ],
)
def test_statistics_and_masks_of_each_device(regime, api, name):
    history = run_mapped(TRAININGS[api], regime, variant(name, data_parallel))
    assert_same(history, mapped_hand_run(api, name))


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("sam", True),
        ("sampa", False),
        pytest.param("momentum_sam", True, marks=pytest.mark.slow),  # as in the test above
    ],
)
def test_nnx_shard_map_as_in_the_readme(name, check_vma):
    """The statistics of the caller's own pass are averaged; those of a variant are means."""
    mesh, model = regimes.mesh_of(), Nnx()
    tx = variant(name, data_parallel)(batches(1)[0], samx.flax.statistics(model))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    specs = nnx.StateSharding({nnx.PathContains("previous"): P("data"), ...: P()})

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=P(), check_vma=check_vma)
    def train_step(model, optimizer, batch):
        losses_fn = samx.flax.closure(model, losses_of)
        value, grads = nnx.value_and_grad(lambda model: losses_of(model, batch).mean())(model)
        nnx.update(model, samx.axis_mean(samx.flax.statistics(model), "data"))
        optimizer.update(model, grads, losses_fn=losses_fn, batch=batch)
        samx.flax.keep_aux(model, optimizer)
        return samx.axis_mean(value, "data")

    history = []
    for batch in batches(4):
        value = train_step(model, optimizer, regimes.place(batch, mesh, P("data")))
        _, params, statistics, _ = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        loss = optax.tree.get(nnx.as_pure(optimizer.opt_state), "loss")
        history.append((nnx.as_pure(params), nnx.as_pure(statistics), loss))
    regimes.check_replicas(history, [P()] * len(history))
    assert value.shape == ()
    assert_same(history, mapped_hand_run("nnx", name))
