"""The devices that a step is mapped over: how to average over them; on a single one, nothing to do.

Inside `jax.pmap` and `jax.shard_map` each device sees its own examples. Gradients come out right in
both, with `check_vma` on and off, along one path only: cast the parameters to varying, take the
device's own gradient, average it. Two conjugate operators hide that path inside a loss closure:

    spread   parameters → devices     forward: cast       backward: mean of the cotangents
    gather   devices → one number     forward: mean       backward: cast
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from samx.core import tree


class Own(NamedTuple):
    """In an aux: what belongs to the device's own examples, so that no mean is taken of it."""

    examples: Any


class Devices(NamedTuple):
    """The devices along some named axes; without axes, one device.

    Attributes:
        axes: The axes over which means are taken.
        own_axes: The axes along which devices, or groups of them, climb on their own.
    """

    axes: tuple[str, ...] = ()
    own_axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many there are."""
        return jax.lax.axis_size(self.axes) if self.axes else 1

    @property
    def ascent(self) -> "Devices":
        """The devices that climb together."""
        return self._replace(axes=tuple(axis for axis in self.axes if axis not in self.own_axes))

    def share(self, weights: jax.Array | None) -> Any:
        """This device's share of the examples, by weight; the shares of all sum to 1."""
        if not self.axes:
            return 1.0
        equal = 1 / self.count
        if weights is None:
            return equal
        own = _vary(self.axes, jnp.sum(weights, dtype=float))
        total = jax.lax.psum(own, self.axes)
        return jnp.where(total == 0, equal, own / jnp.where(total == 0, 1, total))

    def vary(self, tree: Any) -> Any:
        """The floating leaves as each device's own, so that gradients at them are its own too."""
        return _on_floating(partial(_vary, self.axes), tree)

    def vary_all(self, tree: Any) -> Any:
        """Every leaf as each device's own, integers too."""
        return jax.tree.map(partial(_vary, self.axes), tree)

    def vary_left_out(self, tree: Any) -> Any:
        """The same along the axes that this mean leaves out."""
        left_out = tuple(axis for axis in self.own_axes if axis not in self.axes)
        return _on_floating(partial(_vary, left_out), tree)

    def spread(self, params: Any, share: Any) -> Any:
        """Parameters on their way into the device's own loss."""
        if not self.axes:
            return params
        return _on_floating(lambda x: _spread(self.axes, x, share), params)

    def gather(self, loss: jax.Array, share: Any) -> jax.Array:
        """The mean loss, from the device's own."""
        return _gather(self.axes, loss, share) if self.axes else loss

    def mean(self, tree: Any, share: Any) -> Any:
        """The mean over the devices by their shares; what has a share of 0 is not looked at.

        Integers must agree between the devices that have a share; what is no number, or the
        device's `Own`, passes as is.
        """
        if not self.axes:
            return tree

        def is_own(node):
            return isinstance(node, Own)

        return jax.tree.map(
            lambda x: x if is_own(x) else _mean(self.axes, x, share), tree, is_leaf=is_own
        )

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over the devices."""
        return jax.lax.psum(_vary(self.axes, x), self.axes) if self.axes else x

    def gathered(self, x: jax.Array) -> jax.Array:
        """`[b, ...]` of each device as `[B, ...]` of all, the same everywhere."""
        if not self.axes:
            is_spread = any(jax.typeof(x).sharding.spec)  # on an Explicit mesh
            return jax.sharding.reshard(x, PartitionSpec()) if is_spread else x
        whole = _vary(self.axes, jnp.zeros((self.count, *x.shape), x.dtype))
        whole = jax.lax.dynamic_update_index_in_dim(whole, x, jax.lax.axis_index(self.axes), 0)
        return jax.lax.psum(whole, self.axes).reshape(-1, *x.shape[1:])

    def part(self, x: jax.Array) -> jax.Array:
        """The device's own `[b, ...]` of `[B, ...]`."""
        if not self.axes:
            return x
        parts = _vary(self.axes, x.reshape(self.count, -1, *x.shape[1:]))
        return jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(self.axes), keepdims=False)


ONE_DEVICE = Devices()


def is_mapped(axis: str) -> bool:
    """Whether we are inside a `jax.pmap` or `jax.shard_map` over this axis."""
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def _on_floating(fn, x):
    return jax.tree.map(lambda leaf: fn(leaf) if tree.is_inexact(leaf) else leaf, x)


def _vary(axes, x):
    """Cast to varying, one axis at a time; an axis that varies already refuses the cast."""
    for axis in axes:
        try:
            x = jax.lax.pcast(x, axis, to="varying")
        except ValueError as error:
            if "from=varying" not in str(error):
                raise
    return x


def _mean(axes, x, share):
    if tree.is_inexact(x):
        part = (share * tree.widen(x)).astype(x.dtype)  # a share in half precision is inexact
        return jax.lax.psum(_vary(axes, jnp.where(share == 0, jnp.zeros_like(x), part)), axes)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.pmax(_vary(axes, jnp.where(share == 0, jnp.iinfo(x.dtype).min, x)), axes)
    if x.dtype == bool:
        return _mean(axes, x.astype(jnp.int32), share).astype(bool)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(axes, x, share):
    del share
    return _vary(axes, x)


_spread.defvjp(
    lambda axes, x, share: (_vary(axes, x), share),
    lambda axes, share, cotangent: (_mean(axes, cotangent, share), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axes, x, share):
    return _mean(axes, x, share)


_gather.defvjp(
    lambda axes, x, share: (_mean(axes, x, share), None),
    lambda axes, _, cotangent: (_vary(axes, cotangent), None),
)
