"""The worst case from batches, with weights, and on eight devices, whatever maps the code."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from measured import in_regime, on_a_mesh, small_loss, small_problem
from regimes import mesh_of

from samx import sharpness
from samx.perturbations import magnitude, metric_ball

pytestmark = pytest.mark.usefixtures("float64")


def worst(w, x, y, weights=None, **how):
    f = small_loss(x, y, weights, **how)
    return sharpness.worst_case(f, w, metric_ball(0.3, magnitude(0.1)), restarts=3)


@cache
def expected(has_weights=True):
    """On one device; examples without weight are left out."""
    with jax.enable_x64(True):
        w, *examples = small_problem()
        kept = examples[2] > 0 if has_weights else np.full(32, True)
        examples = [x[kept] for x in examples]
        return jax.jit(worst)(w, *examples[: 3 if has_weights else 2])


def assert_expected(found, has_weights=True):
    for x, y in zip(*map(jax.tree.leaves, (found, expected(has_weights))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_seven_batches_and_weights():
    """Without the weights, the value would be another one."""
    assert_expected(jax.jit(lambda *args: worst(*args, num_batches=7))(*small_problem()))
    assert abs(expected(False).value / expected().value - 1) > 0.1


@pytest.mark.parametrize(
    ("axis_type", "is_sharded"),
    [
        pytest.param(AxisType.Auto, True, marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, False, marks=pytest.mark.slow),
        (AxisType.Explicit, True),
    ],
)
def test_a_sharded_batch_and_sharded_parameters(axis_type, is_sharded):
    assert_expected(on_a_mesh(worst, axis_type, is_sharded))


@pytest.mark.parametrize(
    ("regime", "num_batches", "has_weights"),
    [
        ("shard_map", 1, True),
        pytest.param("shard_map", 3, False, marks=pytest.mark.slow),
        pytest.param("shard_map_unchecked", 3, True, marks=pytest.mark.slow),
        pytest.param("shard_map_unchecked", 1, False, marks=pytest.mark.slow),
        pytest.param("pmap", 3, True, marks=pytest.mark.slow),
    ],
)
def test_mapped_functions(regime, num_batches, has_weights):
    """All devices climb the mean loss together."""
    assert_expected(in_regime(worst, regime, num_batches, has_weights), has_weights)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_other_parameters_on_each_device(check_vma):
    """Eight seeds of a study, one on each device, in loops of different lengths."""
    w, x, y, _ = small_problem()
    factors = jnp.linspace(0.2, 1.0, 8)

    def one(factor):
        found = worst(jax.tree.map(lambda w: factor * w, w), x, y)
        return found.value, found.stationarity

    def part(factors):
        return jax.tree.map(lambda x: x[None], one(factors[0]))

    spec = P("data")
    on_devices = jax.shard_map(
        part, mesh=mesh_of(), in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    found, wanted = jax.jit(on_devices)(factors), jax.jit(jax.vmap(one))(factors)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    assert np.abs(found[1]).max() < 1e-4
