"""One training step in every parallel regime, on global arrays, and on one device."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
from cases import VARIANTS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import samx

DEVICES = 8
STEPS = 4  # rows that decide take both kinds of steps; policies, masks and draws have begun


def mesh_of(shape=(DEVICES,), names=("data",), axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


def place(tree, mesh, specs):
    """Place a pytree as global arrays, with one spec or a tree of specs."""
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def make_step(tx, losses_fn=problem.losses_fn, axes=None):
    """Make the contract's step; inside a mapped function, the loss is the mean over `axes`."""

    def step(params, state, batch, weights=None):
        def value_fn(params):
            losses = losses_fn(params, batch)
            losses = losses[0] if isinstance(losses, tuple) else losses
            if weights is None:
                return losses.mean()
            return (losses * weights).sum() / weights.sum()  # 0/0 on a device without examples

        value_and_grad = jax.value_and_grad(value_fn, allow_int=True)
        if axes:
            value_and_grad = samx.value_and_grad(value_fn, axes, weights=weights)
        value, grads = value_and_grad(params)
        further = problem.further(batch, losses_fn, weights)
        further["index"] += 0 * batch["y"]  # gives the index the sharding of the batch
        if axes:
            further["index"] += jax.lax.axis_index(axes) * len(batch["y"])
        updates, state = tx.update(
            grads,
            state,
            params,
            value=value,
            value_fn=value_fn,
            losses_fn=losses_fn,
            batch=batch,
            weights=weights,
            **further,
        )
        return optax.apply_updates(params, updates), state, value

    return step


def run(step, params, state, batches):
    """Return `(params, state, value)` after every step."""
    carry, history = (params, state), []
    for batch in batches:
        *carry, value = step(*carry, *batch)
        history.append((*carry, value))
    return history


def single(build, params, batches, losses_fn=problem.losses_fn):
    """Run on one device, on the whole batch."""
    tx = build(batches[0][0])
    return run(jax.jit(make_step(tx, losses_fn)), params, tx.init(params), batches)


def run_jit(build, params, batches, mesh, spec):
    """Run under `jax.jit` with sharded arrays; this needs nothing from samx."""
    params, batches = place(params, mesh, P()), place(batches, mesh, spec)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batches[0][0]
    )
    tx = build(like)
    return run(jax.jit(make_step(tx)), params, tx.init(params), batches)


def sharded_jit(build, params, batches, axis_type):
    """Run under `jax.jit` on a mesh with one data axis."""
    mesh = mesh_of(axis_type=axis_type)
    with jax.set_mesh(mesh):
        return run_jit(build, params, batches, mesh, P("data"))


def shard_map(
    build,
    params,
    batches,
    check_vma,
    ascent="global",
    shape=(DEVICES,),
    names=("data",),
    axes=("data",),
    losses_fn=problem.losses_fn,
):
    """Run under `jax.shard_map` on a mesh, with the examples split over some of its axes."""
    mesh, spec = mesh_of(shape, names), P(axes) if axes else P()
    tx = build(batches[0][0])
    tx = samx.data_parallel(tx, axes, ascent) if axes else tx
    specs = samx.state_specs(tx, params, batch_specs=spec)
    step = jax.shard_map(
        make_step(tx, losses_fn, axes),
        mesh=mesh,
        in_specs=(P(), specs, *[spec] * len(batches[0])),
        out_specs=(P(), specs, P()),
        check_vma=check_vma,
    )
    params, state = place(params, mesh, P()), place(tx.init(params), mesh, specs)
    history = run(jax.jit(step), params, state, place(batches, mesh, spec))
    check_replicas(history[-1], (P(), specs, P()))
    return history


def pmap(build, params, batches, ascent="global", losses_fn=problem.losses_fn):
    """Run under `jax.pmap`, with the examples split over its axis; return global arrays."""
    batches = jax.tree.map(lambda x: np.asarray(x).reshape(DEVICES, -1, *x.shape[1:]), batches)
    tx = build(jax.tree.map(lambda x: x[0], batches[0][0]))
    tx = samx.data_parallel(tx, "data", ascent)
    return run_pmap(tx, params, batches, "data", DEVICES, make_step(tx, losses_fn, "data"))


def pmap_pair(build, params, batches):
    """Run under `jax.pmap` on two devices, each with the whole batch."""
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), batches)
    tx = build(jax.tree.map(lambda x: x[0], batches[0][0]))
    history = run_pmap(tx, params, batches, "pair", 2, make_step(tx))
    return jax.tree.map(
        lambda node: jax.tree.map(lambda x: x[: len(x) // 2], node) if is_held(node) else node,
        history,
        is_leaf=is_held,
    )


def run_pmap(tx, params, batches, name, num_devices, step):
    """Run `step` under `jax.pmap`; all arrays begin where the step leaves them."""
    mesh = mesh_of((num_devices,), (name,))
    carry = jax.tree.map(partial(copies, num_devices), (params, tx.init(params)))
    (params, state), batches = place((carry, batches), mesh, P(name))
    step = jax.pmap(step, axis_name=name)

    def whole(node):
        if is_held(node):
            return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), node)
        if jnp.issubdtype(node.dtype, jax.dtypes.prng_key):
            return node[0]
        node = np.asarray(node)
        np.testing.assert_array_equal(*np.broadcast_arrays(node, node[:1]))
        return node[0]

    return jax.tree.map(whole, run(step, params, state, batches), is_leaf=is_held)


def copies(num_devices, x):
    """Repeat an array on a leading axis; in NumPy, where nothing is compiled."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(x, (num_devices, *x.shape))
    return np.broadcast_to(np.asarray(x), (num_devices, *x.shape))


def is_held(node):
    return isinstance(node, samx.HeldBatch)


def check_replicas(tree, specs):
    """Check that what the specs call replicated is equal on every device, to the last bit."""
    specs = [
        jax.tree.broadcast(spec, part, is_leaf=lambda x: isinstance(x, P))
        for part, spec in zip(tree, specs, strict=True)
    ]

    def check(leaf, spec):
        if spec == P():
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
            for other in others:
                np.testing.assert_array_equal(other, first)

    jax.tree.map(check, list(tree), specs)


def per_shard(build, params, batches, num_shards=DEVICES):
    """Return the mean of the steps that the shards of the batch would take from the same state."""
    tx = build(jax.tree.map(lambda x: x[: len(x) // num_shards], batches[0][0]))

    def split(x):
        return x.reshape(num_shards, -1, *x.shape[1:])

    def local(node):
        """Copy a leaf for every shard; held examples already have an axis of shards."""
        if is_held(node):
            return node
        return jnp.broadcast_to(node, (num_shards, *node.shape))

    def common(node):
        if is_held(node):
            return node
        return jnp.mean(node, 0) if jnp.issubdtype(node.dtype, jnp.floating) else node[0]

    @jax.jit
    def step(params, state, *batch):
        state = jax.tree.map(local, state, is_leaf=is_held)
        result = jax.vmap(make_step(tx), in_axes=(None, 0, 0))(
            params, state, *map(partial(jax.tree.map, split), batch)
        )
        return jax.tree.map(common, result, is_leaf=is_held)

    state = jax.tree.map(
        lambda node: jax.tree.map(local, node) if is_held(node) else node,
        tx.init(params),
        is_leaf=is_held,
    )
    history = run(step, params, state, batches)

    def whole(node):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), node) if is_held(node) else node

    return jax.tree.map(whole, history, is_leaf=is_held)


GLOBAL = {
    "jit, auto": partial(sharded_jit, axis_type=AxisType.Auto),
    "jit, explicit": partial(sharded_jit, axis_type=AxisType.Explicit),
    "shard_map": partial(shard_map, check_vma=True),
    "shard_map, check_vma=False": partial(shard_map, check_vma=False),
    "pmap": pmap,
}
LOCAL = {name: run for name, run in GLOBAL.items() if not name.startswith("jit")}
# Weights of each device's two examples; those of the fourth and the last device are all 0.
VALID = [1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0.5, 2, 0, 0]


def batches(steps=STEPS, weights=None):
    data, _ = problem.make()
    extra = () if weights is None else (jnp.asarray(weights, float),)
    return [(problem.batch_at(data, t), *extra) for t in range(steps)]


def build(name, **changes):
    return lambda batch_like: VARIANTS[name].build(batch_like=batch_like, **changes)


def assert_same(history, expected, read=lambda state: state):
    """Compare to 1e-12 after one step and to 1e-10 after all steps, including the state."""
    for step, tolerance in ((0, 1e-12), (-1, 1e-10)):
        found, wanted = (
            jax.tree.map(np.asarray, problem.as_numbers((params, read(state), value)))
            for params, state, value in (history[step], expected[step])
        )
        chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=tolerance)


@cache
def on_one_device(name):
    return single(build(name), problem.make()[1], batches())


def assert_close(found, expected, tolerance=1e-12):
    chex.assert_trees_all_close(found, expected, rtol=tolerance, atol=tolerance)


def first_batch():
    (batch,) = batches(1)[0]
    return problem.make()[1], batch


def mean_loss(params, batch):
    return problem.losses_fn(params, batch).mean()


def as_batch(x, y):
    return {"x": x, "y": y}


gradient = jax.jit(jax.grad(mean_loss))


def sampa(**keywords):
    base = optax.sgd(0.1, momentum=0.9)
    return lambda batch_like: samx.sampa(base, 0.1, 0.2, batch_like=batch_like, **keywords)


PAIRED = sampa(pair_sharding=P("pair"))
REPLICATED = P()


def mapped(fn, regime, num_args, out_specs=REPLICATED):
    """Map `fn(params, *examples)` in a regime; return the first result, since all are equal."""
    if regime == "pmap":

        def call(params, *examples):
            split = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in examples]
            result = jax.pmap(fn, axis_name="data", in_axes=(None, *[0] * num_args))(params, *split)
            return jax.tree.map(lambda x: x[0], result)

        return call
    return jax.jit(
        jax.shard_map(
            fn,
            mesh=mesh_of(),
            in_specs=(P(), *[P("data")] * num_args),
            out_specs=out_specs,
            check_vma=regime == "shard_map",
        )
    )
