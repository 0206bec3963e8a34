"""Every regime takes the step of one device on the whole batch, or the mean of per-shard steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS
from jax.sharding import AxisType

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


def assert_same(history, expected, is_read=lambda state: state):
    """1e-12 after one step, 1e-10 after all, state included."""
    for step, tolerance in ((0, 1e-12), (-1, 1e-10)):
        found, wanted = (
            (params, is_read(state), value)
            for params, state, value in (history[step], expected[step])
        )
        chex.assert_trees_all_equal_structs(found, wanted)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
            ),
            found,
            wanted,
        )


@functools.cache
def on_one_device(name):
    return regimes.single(build(name), problem.make()[1], batches())


@every_variant
@pytest.mark.parametrize("regime", GLOBAL)
def test_global_is_the_step_of_one_device(name, regime):
    history = GLOBAL[regime](build(name), problem.make()[1], batches())
    assert_same(history, on_one_device(name))
