"""Draws differ between keys, steps, microbatches and leaves, and repeat with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from regimes import mesh_of, place

from samx.core import draws

LIKE = {"a": jnp.zeros((8, 3)), "b": jnp.zeros((8, 3), jnp.bfloat16), "n": jnp.arange(2)}


@jax.jit
def drawn(seed, step, draw):
    return draws.normal_like(jax.random.key(seed), step, LIKE, draw)


def test_each_number_is_drawn_once():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)]
    seen = [x for place in places for k, x in drawn(*place).items() if k != "n"]
    assert len({np.asarray(x).tobytes() for x in seen}) == 2 * len(places)
    jax.tree.map(np.testing.assert_array_equal, drawn(1, 2, 3), drawn(1, 2, 3))
    initial = draws.normal_like(jax.random.key(1), 2, LIKE, 3)  # without the branch of a step
    jax.tree.map(np.testing.assert_array_equal, initial, drawn(1, 2, 3))


def test_dtypes_and_integers():
    found = drawn(0, 0, 0)
    assert {k: x.dtype for k, x in found.items()} == {"a": "float32", "b": "float32", "n": "int32"}
    np.testing.assert_array_equal(found["n"], 0)


def test_a_complex_leaf_has_variance_one():
    x = draws.normal_like(jax.random.key(0), 0, jnp.zeros(10_000, jnp.complex64))
    assert x.dtype == jnp.complex64
    np.testing.assert_allclose([jnp.var(x.real), jnp.var(x.imag)], 0.5, rtol=0.05)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_they_are_sharded_like_the_leaf_and_do_not_depend_on_it(axis_type):
    mesh = mesh_of(axis_type=axis_type)
    with jax.set_mesh(mesh):
        like = place(LIKE, mesh, {"a": P("data"), "b": P(), "n": P()})
        found = jax.jit(lambda like: draws.normal_like(jax.random.key(0), 0, like))(like)
        if axis_type == AxisType.Explicit:
            assert found["a"].sharding.is_equivalent_to(like["a"].sharding, 2)
    np.testing.assert_array_equal(found["a"], drawn(0, 0, 0)["a"])
