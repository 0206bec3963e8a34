"""The same numbers from batches, with weights, and on eight devices, whatever maps the code."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from measured import in_regime, on_a_mesh, small_loss, small_problem
from regimes import mesh_of, place

from samx import sharpness
from samx.perturbations import magnitude, metric_ball

pytestmark = pytest.mark.usefixtures("float64")


def is_kernel(path, leaf):
    return leaf.ndim == 2


def measures(w, x, y, weights=None, **how):
    """All of them on one small network; the shards are of two examples."""
    f = small_loss(x, y, weights, **how)
    ball = metric_ball(0.3, magnitude(0.1))

    def moved(w):
        return jax.tree.map(lambda w: jnp.sin(7 * w) + w, w)

    def stack(w):
        return jax.tree.map(lambda x: jnp.stack([x, x * x]), moved(w))

    def average_case(w):
        return sharpness.average_case(f, w, 0.1, metric=magnitude(0.1), draws=2)

    fns = {
        "average_case": average_case,
        "smoothed": lambda w: sharpness.smoothed(f, w, 0.1, draws=2),
        "first_order": lambda w: sharpness.first_order(f, w, ball),
        "m_sharpness": lambda w: sharpness.m_sharpness(f, w, ball, shard_size=2),
        "exact_sam_gradient": lambda w: sharpness.exact_sam_gradient(f, w, ball),
        "directional": lambda w: sharpness.directional(f, w, moved(w)),
        "alignment": lambda w: sharpness.alignment(stack(w), w),
        "relative_flatness": lambda w: sharpness.relative_flatness(f, w, is_kernel, draws=2),
        "exact_flatness": lambda w: sharpness.relative_flatness(f, w, is_kernel),
        "filter_normalize": lambda w: sharpness.filter_normalize(moved(w), w),
        "slice_2d": lambda w: sharpness.slice_2d(f, w, stack(w), [0.0, 0.1], [0.2]),
        "barrier": lambda w: sharpness.barrier(f, w, moved(w), points=3),
    }
    return in_turn(fns, w)


def in_turn(fns, w):
    """Return the results of all functions; each one starts after the one before has ended.

    A program for the CPU that JAX has read from its cache may start independent collectives in
    another order on each device, and then hangs.
    """
    found = {}
    for name, fn in fns.items():
        found[name] = fn(w)
        zero = 0 * sum(jnp.sum(x) for x in jax.tree.leaves(found[name]))
        w = jax.tree.map(lambda x, zero=zero: x + zero, w)
    return found


@cache
def expected(has_weights):
    with jax.enable_x64(True):
        return jax.jit(measures)(*small_problem()[: 4 if has_weights else 3])


def assert_expected(found, has_weights):
    for name, value in expected(has_weights).items():
        for x, y in zip(*map(jax.tree.leaves, (found[name], value)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.slow
def test_seven_batches():
    """They divide neither the examples nor the shards."""
    found = jax.jit(lambda *args: measures(*args, num_batches=7))(*small_problem())
    assert_expected(found, True)


def test_explicit_shardings_are_right():
    """JAX checks them while it traces."""
    on_a_mesh(measures, AxisType.Explicit, transform=lambda fn: partial(jax.eval_shape, fn))


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_and_sharded_parameters(axis_type, is_sharded):
    assert_expected(on_a_mesh(measures, axis_type, is_sharded), True)


def test_a_shard_is_spread_over_the_devices():
    """If they divide it; a loop cannot run over an axis that devices share."""
    mesh, seen = mesh_of(axis_type=AxisType.Explicit), []

    def losses(w, x):
        seen.append(jax.typeof(x).sharding.spec[0])
        return x @ w

    def measure(w, x, size):
        f = sharpness.objective(losses_fn=losses, batch=x)
        return sharpness.m_sharpness(f, w, metric_ball(0.1), shard_size=size)

    with jax.set_mesh(mesh):
        w, x = place(jnp.ones(3), mesh, P()), place(jnp.ones((32, 3)), mesh, P("data"))
        for size, axis in ((16, "data"), (4, None)):
            jax.eval_shape(lambda w, x, size=size: measure(w, x, size), w, x)
            assert set(seen) == {axis}
            seen.clear()


@pytest.mark.parametrize(
    ("regime", "num_batches", "has_weights"),
    [
        ("shard_map", 3, True),
        pytest.param("shard_map", 1, False, marks=pytest.mark.slow),
        pytest.param("shard_map_unchecked", 3, True, marks=pytest.mark.slow),
        pytest.param("shard_map_unchecked", 1, False, marks=pytest.mark.slow),
        pytest.param("pmap", 3, True, marks=pytest.mark.slow),
    ],
)
def test_mapped_functions(regime, num_batches, has_weights):
    """Each device has its own shards, and its own sum of weights."""
    assert_expected(in_regime(measures, regime, num_batches, has_weights), has_weights)
