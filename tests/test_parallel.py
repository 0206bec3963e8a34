"""Every regime takes the step of one device on the whole batch, or the mean of per-shard steps."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import samx

STEPS = 20
GLOBAL = {
    "jit, auto": functools.partial(regimes.sharded_jit, axis_type=AxisType.Auto),
    "jit, explicit": functools.partial(regimes.sharded_jit, axis_type=AxisType.Explicit),
    "shard_map": functools.partial(regimes.shard_map, check_vma=True),
    "shard_map, check_vma=False": functools.partial(regimes.shard_map, check_vma=False),
    "pmap": regimes.pmap,
}
LOCAL = {name: run for name, run in GLOBAL.items() if not name.startswith("jit")}

every_variant = pytest.mark.parametrize("name", VARIANTS)
pytestmark = pytest.mark.usefixtures("float64")


def batches(steps=STEPS, weights=None):
    data, _ = problem.make()
    extra = () if weights is None else (jnp.asarray(weights, float),)
    return [(problem.batch_at(data, t), *extra) for t in range(steps)]


def build(name, **changes):
    return lambda batch_like: VARIANTS[name].build(batch_like=batch_like, **changes)


def assert_same(history, expected, read=lambda state: state):
    """1e-12 after one step, 1e-10 after all, state included."""
    for step, tolerance in ((0, 1e-12), (-1, 1e-10)):
        found, wanted = (
            jax.tree.map(np.asarray, (params, read(state), value))
            for params, state, value in (history[step], expected[step])
        )
        chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=tolerance)


@functools.cache
def on_one_device(name):
    return regimes.single(build(name), problem.make()[1], batches())


@every_variant
@pytest.mark.parametrize("regime", GLOBAL)
def test_global_is_the_step_of_one_device(name, regime):
    history = GLOBAL[regime](build(name), problem.make()[1], batches())
    assert_same(history, on_one_device(name))


def without_readings(state):
    """Where devices climb on their own, readings are what they are documented to be."""
    empty = jax.tree.map(lambda x: 0, optax.tree.get(state, "readings"))
    return optax.tree.set(state, readings=empty)


@functools.cache
def on_every_shard(name, num_shards=regimes.DEVICES):
    return regimes.per_shard(build(name), problem.make()[1], batches(), num_shards)


@every_variant
@pytest.mark.parametrize("regime", LOCAL)
def test_local_is_the_mean_of_per_shard_steps(name, regime):
    history = LOCAL[regime](build(name), problem.make()[1], batches(), ascent="local")
    assert_same(history, on_every_shard(name), without_readings)


@pytest.mark.parametrize("name", ["sam", "two ascent steps", "sampa"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("ascent", ["global", "groups"])
def test_several_axes(name, check_vma, ascent):
    """Two axes are one, or the second holds the groups that climb together."""
    history = regimes.shard_map(
        build(name),
        problem.make()[1],
        batches(),
        check_vma,
        ascent="global" if ascent == "global" else ("inner",),
        shape=(2, 4),
        names=("outer", "inner"),
        axes=("outer", "inner"),
    )
    if ascent == "global":
        assert_same(history, on_one_device(name))
    else:
        assert_same(history, on_every_shard(name, 2), without_readings)


# Of each device's two examples; the fourth and the last device have none at all.
VALID = [1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0.5, 2, 0, 0]


@pytest.mark.parametrize("name", ["sam", "two ascent steps", "sampa", "sampa, separate"])
@pytest.mark.parametrize("regime", GLOBAL)
def test_weights_count_examples_not_devices(name, regime):
    weighted = batches(3, weights=VALID)
    history = GLOBAL[regime](build(name), problem.make()[1], weighted)
    assert_same(history, regimes.single(build(name), problem.make()[1], weighted))


@pytest.mark.parametrize("regime", LOCAL)
def test_weights_count_examples_in_local_ascent(regime):
    """By hand: each device climbs its own weighted mean, and counts by its weights."""
    (_, params), ((batch, weights),) = problem.make(), batches(1, weights=VALID)
    history = LOCAL[regime](
        build("sam", base=optax.sgd(1.0)), params, [(batch, weights)], ascent="local"
    )
    expected = params
    for start in range(0, len(weights), 2):
        shard = jax.tree.map(lambda x, i=start: x[i : i + 2], batch)
        own = weights[start : start + 2]

        def loss(p, shard=shard, own=own):
            return (own * problem.losses_fn(p, shard)).sum() / jnp.maximum(own.sum(), 1e-30)

        g = jax.grad(loss)(params)
        eps = optax.tree.scale(0.05 / (optax.tree.norm(g) + 1e-12), g)
        g_s = jax.grad(loss)(optax.tree.add(params, eps))
        expected = optax.tree.add_scale(expected, -own.sum() / weights.sum(), g_s)
    chex.assert_trees_all_close(history[0][0], expected, rtol=1e-12, atol=1e-12)


def sampa(**keywords):
    base = optax.sgd(0.1, momentum=0.9)
    return lambda batch_like: samx.sampa(base, 0.1, 0.2, batch_like=batch_like, **keywords)


PAIRED = sampa(pair_sharding=P("pair"))


@pytest.mark.parametrize("weights", [None, VALID])
@pytest.mark.parametrize(
    ("regime", "shape"),
    [
        *itertools.product(["auto", "explicit", "named", "shard_map", "no vma"], [(2,), (2, 4)]),
        ("pmap", (2,)),  # which has one axis only
    ],
)
def test_each_group_computes_one_gradient_of_sampa(regime, shape, weights):
    params, data = problem.make()[1], batches(6, weights)
    names, spec = ("pair", "data")[: len(shape)], P("data") if len(shape) == 2 else P()
    axes = ("data",) if len(shape) == 2 else ()
    if regime in ("shard_map", "no vma"):
        history = regimes.shard_map(
            PAIRED, params, data, regime == "shard_map", shape=shape, names=names, axes=axes
        )
    elif regime == "pmap":
        history = regimes.pmap_pair(PAIRED, params, data)
    elif regime == "named":  # the sharding carries the mesh
        sharding = NamedSharding(regimes.mesh_of(shape, names), P("pair"))
        history = regimes.run_jit(sampa(pair_sharding=sharding), params, data, sharding.mesh, spec)
    else:
        axis_type = AxisType.Auto if regime == "auto" else AxisType.Explicit
        mesh = regimes.mesh_of(shape, names, axis_type)
        with jax.set_mesh(mesh):
            history = regimes.run_jit(PAIRED, params, data, mesh, spec)
    assert_same(history, regimes.single(sampa(), params, data))
