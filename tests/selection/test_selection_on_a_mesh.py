"""Positions in a batch that is spread over devices, and what is sent for them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
import regimes
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import samx
from examples.devices.communication import communicated_bytes
from samx.selection import largest, put, take
from samx.selection.examples import weights_of


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("num_groups", "axes"),
    [(1, ("data",)), (8, ("pod", "data")), (16, ("data",)), (1, ("pod", "data"))],
)
def test_on_a_mesh(axis_type, num_groups, axes):
    """The same rows are chosen; if each device has its own groups, no example is sent."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=64))
    batch = {"x": jnp.arange(128.0).reshape(64, 2), "key": jax.random.split(jax.random.key(0), 64)}
    weights = jnp.ones(64).at[3].set(0)

    def choose(scores, batch, weights):
        position = largest(scores, 16, num_groups=num_groups, weights=weights)
        chosen = take(batch, position)
        return chosen, put(chosen["x"].sum(1), position, 64)

    expected = jax.jit(choose)(scores, batch, weights)
    mesh = regimes.mesh_of((8,) if len(axes) == 1 else (2, 4), axes, axis_type)
    with jax.set_mesh(mesh):
        args = regimes.place((scores, batch, weights), mesh, P(axes))
        program = jax.jit(choose).lower(*args).compile()
        found = program(*args)
    chex.assert_trees_all_equal(*map(problem.as_numbers, (found, expected)))
    assert bool(communicated_bytes(program)) == (num_groups == 1)


def test_what_is_chosen_is_spread_if_the_shards_divide_it():
    """16 of 64 examples in one group, on 8 devices: examples and their weights."""
    mesh = regimes.mesh_of(axis_type=AxisType.Explicit)

    def choose(x, weights):
        position = largest(x, 16)
        return take(x, position), weights_of(position, weights)

    with jax.set_mesh(mesh):
        x = regimes.place(jnp.arange(64.0), mesh, P("data"))
        chosen = jax.eval_shape(jax.jit(choose), x, x)
    assert [leaf.sharding.spec for leaf in chosen] == [P("data"), P("data")]


def test_few_examples_on_many_devices_are_not_spread():
    mesh = regimes.mesh_of(axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = regimes.place(jnp.arange(16.0), mesh, P("data"))
        chosen = jax.jit(lambda x: take(x, largest(x, 3)))(x)
    assert chosen.tolist() == [15.0, 14.0, 13.0]
    assert jax.typeof(chosen).sharding.spec == P(None)


def test_integer_weights_are_not_rounded_on_three_devices(float64):
    """Their mean over the devices is 79 / 3, which float32 would round."""
    x, weights = np.sin(np.arange(36.0)).reshape(12, 3), np.array([2, *range(2, 13)])
    esam = samx.esam(0.3, 1.0, 0.5, num_groups=3, sharp_pass="whole")

    def step_of(tx):
        def step(w, x, weights):
            closures = {"losses_fn": lambda w, x: (x @ w - 1) ** 2, "batch": x, "weights": weights}
            return tx.update(w, tx.init(w), w, **closures)[0]

        return step

    w = jnp.array([0.1, 0.2, -0.3])
    on_devices = jax.shard_map(
        step_of(samx.data_parallel(esam, "data")),
        mesh=regimes.mesh_of((3,)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    found, expected = (jax.jit(step)(w, x, weights) for step in (on_devices, step_of(esam)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
