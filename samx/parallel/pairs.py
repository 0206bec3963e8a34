"""Two independent evaluations of one function.

They run in one vectorized call, in two calls, or one on each of two groups of devices. The groups
lie along a mesh axis of size 2. The results are selected and summed along this axis, never stacked
or sliced: for a stack or a slice, XLA would have to send parameters between the groups.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.devices import Devices, is_mapped


def check_pair_sharding(name: str, sharding: Any) -> None:
    """Require a sharding over one named axis, or `None`."""
    if sharding is None:
        return
    if not isinstance(sharding, NamedSharding | PartitionSpec):
        kind = type(sharding).__name__
        raise TypeError(
            f"{name}: `pair_sharding` must be a PartitionSpec or NamedSharding, got {kind}"
        )
    spec = _spec(sharding)
    if len(spec) != 1 or not isinstance(spec[0], str):
        raise ValueError(
            f"{name}: `pair_sharding` must name one axis, such as P('pair'), got {spec}"
        )


def with_pair_axis(devices: Devices, pair_sharding: Any) -> Devices:
    """Return the devices of both groups if the axis of the groups is mapped, else `devices`."""
    if pair_sharding is None or not is_mapped(_spec(pair_sharding)[0]):
        return devices
    return with_axis("sampa", "pair_sharding", devices, _spec(pair_sharding)[0])


def with_axis(name: str, keyword: str, devices: Devices, axis: str) -> Devices:
    """Return the devices of two groups along a mapped axis."""
    if not is_mapped(axis):
        raise ValueError(
            f"{name}: `{keyword}` names the axis {axis!r}, which is not mapped here; call the step "
            "inside jax.shard_map or jax.pmap with that axis"
        )
    _check_two(name, keyword, axis, jax.lax.axis_size(axis))
    return Devices((*devices.axes, axis))


def evaluate_roles(
    first: Callable[[], Any],
    second: Callable[[], Any],
    shares: Sequence[Any],
    *,
    devices: Devices,
    axis: str,
) -> list[Any]:
    """Evaluate two functions, one on each group along a mapped axis; return their means.

    They return `(values, gradients)`, as in `evaluate_pair`. A group has zeros in place of the
    results of the other function, with share 0.
    """
    role = jax.lax.axis_index(axis)
    shapes = [jax.eval_shape(fn) for fn in (first, second)]

    def only(i, fn):
        def branch():
            results = [optax.tree.zeros_like(shape) for shape in shapes]
            results[i] = fn()
            return devices.pcast_all(results)

        return branch

    results = fast_convolutions(jax.lax.cond)(role == 0, only(0, first), only(1, second))
    shares = [jnp.where(role == i, share, 0.0) for i, share in enumerate(shares)]
    return _means(devices, results, shares)


def _means(devices: Devices, results: Sequence[Any], shares: Sequence[Any]) -> list[Any]:
    """Return the means of values and the sums of gradients, `(values, gradients)` in each result.

    Values are weighted by the shares. Gradients are parts of a mean already.
    """
    return [
        (devices.mean(values, share), devices.sum(grads))
        for (values, grads), share in zip(results, shares, strict=True)
    ]


def evaluate_pair(
    fn: Callable[..., Any],
    pair: tuple[Any, Any],
    shares: Sequence[Any],
    *,
    devices: Devices,
    how: Literal["vmap", "separate"],
    pair_sharding: NamedSharding | PartitionSpec | None,
) -> list[Any]:
    """Evaluate `fn` on two argument tuples; return means over the devices of both groups.

    `fn` returns `(values, gradients)`, where the gradients are the device's part of their mean.
    """
    axis = None if pair_sharding is None else _spec(pair_sharding)[0]
    if pair_sharding is None:
        if how == "vmap":
            both = jax.vmap(fn)(*jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair))
            results = [jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1)]
        else:
            results = [fn(*args) for args in pair]
    elif axis not in devices.axes:
        results = _sharded(fn, pair, pair_sharding)
    else:
        side = jax.lax.axis_index(axis)
        values, grads = fn(*tree.where(side == 0, *pair))
        nothing = optax.tree.zeros_like(grads)
        results = [(values, tree.where(side == i, grads, nothing)) for i in (0, 1)]
        shares = [jnp.where(side == i, share, 0.0) for i, share in enumerate(shares)]
    return _means(devices, results, shares)


def _sharded(fn, pair, sharding):
    axis, mesh = _spec(sharding)[0], _mesh(sharding)
    is_explicit = (
        dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis] == AxisType.Explicit
    )

    def along_axis(x):
        if is_explicit:
            return jax.sharding.reshard(x, PartitionSpec(axis, *jax.typeof(x).sharding.spec[1:]))
        spec = PartitionSpec(axis, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def side(x):
        return along_axis(jax.lax.broadcasted_iota(jnp.int32, (2,) + (1,) * (x.ndim - 1), 0))

    def both_sides(x):
        x = jnp.asarray(x)
        return along_axis(jnp.broadcast_to(x, (2, *x.shape)))

    def spread(a, b):
        a, b = both_sides(a), both_sides(b)
        return jnp.where(side(a) == 0, a, b)

    def collect(x, i):
        if not tree.is_inexact(x):
            return x[i]
        return jnp.sum(jnp.where(side(x) == i, x, jnp.zeros_like(x)), axis=0)

    both = jax.vmap(fn, spmd_axis_name=axis)(*jax.tree.map(spread, *pair))
    return [jax.tree.map(lambda x, i=i: collect(x, i), both) for i in (0, 1)]


def _spec(sharding: NamedSharding | PartitionSpec) -> PartitionSpec:
    return sharding.spec if isinstance(sharding, NamedSharding) else sharding


def _mesh(sharding: NamedSharding | PartitionSpec) -> Any:
    mesh = getattr(sharding, "mesh", None) or jax.sharding.get_abstract_mesh()
    axis = _spec(sharding)[0]
    if axis not in mesh.axis_names:
        raise ValueError(
            f"sampa: `pair_sharding` names the axis {axis!r}, which is not mapped here, and the "
            f"mesh has the axes {mesh.axis_names}. Call the step inside jax.shard_map or jax.pmap "
            "with that axis, under jax.set_mesh(mesh), or pass NamedSharding(mesh, P(axis))."
        )
    _check_two("sampa", "pair_sharding", axis, mesh.shape[axis])
    return mesh


def _check_two(name, keyword, axis, size):
    if size != 2:
        raise ValueError(f"{name}: the axis {axis!r} of `{keyword}` must have size 2, got {size}")
