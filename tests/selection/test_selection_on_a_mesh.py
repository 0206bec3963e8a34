"""Positions in a batch that is spread over devices, and what is sent for them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from costs import flops, wide_problem
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import samx
from examples.common.programs import communicated_bytes
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


CHOOSING = {  # by default, and where 8 devices do not divide the chosen, after AUSAM's warm-up
    "ksam": samx.ksam,
    "esam": samx.esam,
    "ausam": samx.ausam,
    "ksam, odd": lambda: samx.ksam(0.1, 1001),
    "esam, odd": lambda: samx.esam(selected_fraction=0.45),
    "ausam, odd": lambda: samx.ausam(fraction=0.45, warmup_steps=0),
}


def losses_fn(params, batch):
    hidden = jax.nn.relu(jax.nn.relu(batch["x"] @ params["W1"]) @ params["W2"])
    return jnp.square(hidden @ params["W3"]).sum(1)


def sam_with_gradient(_, state, params, *, losses_fn, batch, **extra):
    def value_fn(params):
        return losses_fn(params, batch).mean()

    return samx.sam().update(jax.grad(value_fn)(params), state, params, value_fn=value_fn)


SAM = optax.GradientTransformationExtraArgs(samx.sam().init, sam_with_gradient)


@functools.cache
def flops_of(name, regime):
    """Flops of a step on one of 8 devices, or on one device alone; no mesh is set."""
    tx = SAM if name == "sam" else CHOOSING[name]()
    params, batch = wide_problem()
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 8), batch)
    axis_type = AxisType.Explicit if regime == "explicit" else AxisType.Auto
    mesh = regimes.mesh_of(axis_type=axis_type)
    specs = (P(), P(), P("data"))
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    args = (params, tx.init(params), batch)
    if regime in ("auto", "explicit"):
        args = tuple(regimes.place(arg, mesh, spec) for arg, spec in zip(args, specs, strict=True))

    def step(params, state, batch):
        index = jnp.arange(len(batch["y"]))
        return tx.update(params, state, params, losses_fn=losses_fn, batch=batch, index=index)

    keywords = {"in_shardings": shardings} if regime == "in_shardings" else {}
    return flops(jax.jit(step, **keywords).lower(*args).compile())


def by_turns(names, one, other):
    """Pair every name with both. By turns, the pair with one of them is fast, the other slow."""
    return [
        pytest.param(name, it, marks=[] if it == (one, other)[i % 2] else pytest.mark.slow)
        for i, name in enumerate(names)
        for it in (one, other)
    ]


@pytest.mark.parametrize(
    ("name", "regime"), [*by_turns(CHOOSING, "auto", "explicit"), ("ksam", "in_shardings")]
)
def test_a_device_computes_at_most_its_share_of_sam(name, regime, monkeypatch):
    """The chosen examples, and so the work on them, are spread over the devices by default."""
    if name.startswith("ausam,"):
        monkeypatch.setattr(jax.lax, "cond", lambda _, *sides: sides[1]())
    found = flops_of(name, regime)
    assert found <= 1.002 * flops_of("sam", regime)  # AUSAM's table, beside its warm-up
    assert found == pytest.approx(flops_of(name, "alone") / 8, rel=0.05)


@pytest.mark.parametrize(
    ("name", "axis_type"),
    by_turns(["ksam", "esam", "ausam"], AxisType.Explicit, AxisType.Auto),
)
def test_examples_that_fill_up_the_shards_count_for_nothing(name, axis_type, float64):
    """5 of 16 examples on 8 devices, without a mesh that is set, are those of one device."""
    tx = {
        "ksam": samx.ksam(0.1, 5),
        "esam": samx.esam(0.1, 1.0, 0.35, select="strict"),
        "ausam": samx.ausam(0.1, 0.35, 64, warmup_steps=0),
    }[name]
    batch, params = problem.batch_at(*problem.make()[:1], 0), problem.make()[1]
    mesh = regimes.mesh_of(axis_type=axis_type)

    def step(params, batch, weights):
        closures = {"losses_fn": problem.losses_fn, "batch": batch, "index": jnp.arange(16)}
        return tx.update(params, tx.init(params), params, weights=weights, **closures)

    for weights in (None, jnp.ones(16).at[3:5].set(0)):
        expected = jax.jit(step)(params, batch, weights)
        args = regimes.place((batch, weights), mesh, P("data"))
        found = jax.jit(step)(regimes.place(params, mesh, P()), *args)
        found, expected = (problem.as_numbers(x) for x in (found, expected))
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


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
