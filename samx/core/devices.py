"""The devices that a step is mapped over, and means over them; one device needs no means.

Inside `jax.pmap` and `jax.shard_map`, each device sees its own examples. Only one way gives right
gradients in both, with `check_vma` on and off: cast the parameters to varying, take the local
gradient, average it. Two conjugate operators do this inside a loss closure:

    spread      parameters → devices     forward: pcast     backward: mean of the cotangents
    mean_loss   devices → one number     forward: mean      backward: pcast
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from samx.core import tree


class PerExample(NamedTuple):
    """Marks per-example values in an aux: they stay on their device and are not averaged."""

    examples: Any


class Devices(NamedTuple):
    """The devices along some named axes; without axes, one device.

    Attributes:
        axes: The axes over which means are taken.
        local_axes: The axes along which devices, or groups of devices, climb separately.
    """

    axes: tuple[str, ...] = ()
    local_axes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of devices."""
        return jax.lax.axis_size(self.axes) if self.axes else 1

    @property
    def ascent(self) -> "Devices":
        """The devices that climb together."""
        return self._replace(axes=tuple(axis for axis in self.axes if axis not in self.local_axes))

    def share(self, weights: jax.Array | None) -> Any:
        """Return this device's share of the examples, by weight; the shares sum to 1."""
        if not self.axes:
            return 1.0
        equal = 1 / self.count
        if weights is None:
            return equal
        local = _pcast(self.axes, jnp.sum(weights, dtype=float))
        total = jax.lax.psum(local, self.axes)
        return jnp.where(total == 0, equal, local / jnp.where(total == 0, 1, total))

    def pcast(self, tree: Any) -> Any:
        """Cast the floating leaves to varying, so that gradients at them stay local."""
        return _on_floating(partial(_pcast, self.axes), tree)

    def pcast_all(self, tree: Any) -> Any:
        """Cast every leaf to varying, integers too."""
        return jax.tree.map(partial(_pcast, self.axes), tree)

    def pcast_left_out(self, tree: Any) -> Any:
        """Cast the floating leaves to varying along the `local_axes` that are not in `axes`."""
        left_out = tuple(axis for axis in self.local_axes if axis not in self.axes)
        return _on_floating(partial(_pcast, left_out), tree)

    def spread(self, params: Any, share: Any) -> Any:
        """Pass parameters to the local loss; the backward pass averages the gradient."""
        if not self.axes:
            return params
        return _on_floating(lambda x: _spread(self.axes, x, share), params)

    def mean_loss(self, loss: jax.Array, share: Any) -> jax.Array:
        """Return the mean of the local losses."""
        return _mean_loss(self.axes, loss, share) if self.axes else loss

    def mean(self, tree: Any, share: Any) -> Any:
        """Return the mean over the devices by their shares; a device with share 0 is ignored.

        Integers must be equal on all devices whose share is not 0. `PerExample` values and leaves
        that are not numbers do not change.
        """
        if not self.axes:
            return tree

        def is_per_example(node):
            return isinstance(node, PerExample)

        return jax.tree.map(
            lambda x: x if is_per_example(x) else _mean(self.axes, x, share),
            tree,
            is_leaf=is_per_example,
        )

    def psum(self, x: jax.Array) -> jax.Array:
        """Return the sum over the devices."""
        return jax.lax.psum(_pcast(self.axes, x), self.axes) if self.axes else x

    def all_gather(self, x: jax.Array) -> jax.Array:
        """Concatenate the `[b, ...]` of all devices to `[B, ...]`, equal on every device."""
        if not self.axes:
            is_spread = any(jax.typeof(x).sharding.spec)  # on an Explicit mesh
            return jax.sharding.reshard(x, PartitionSpec()) if is_spread else x
        whole = _pcast(self.axes, jnp.zeros((self.count, *x.shape), x.dtype))
        whole = jax.lax.dynamic_update_index_in_dim(whole, x, jax.lax.axis_index(self.axes), 0)
        return jax.lax.psum(whole, self.axes).reshape(-1, *x.shape[1:])

    def local_slice(self, x: jax.Array) -> jax.Array:
        """Return this device's part `[b, ...]` of `[B, ...]`."""
        if not self.axes:
            return x
        parts = _pcast(self.axes, x.reshape(self.count, -1, *x.shape[1:]))
        return jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index(self.axes), keepdims=False)


ONE_DEVICE = Devices()


def is_mapped(axis: str) -> bool:
    """Return whether this code runs inside a `jax.pmap` or `jax.shard_map` over the axis."""
    try:
        jax.lax.axis_size(axis)
    except NameError:
        return False
    return True


def check_mapped(name: str, keyword: str, axes: tuple[str, ...]) -> None:
    """Raise a `ValueError` if one of the axes is not mapped here."""
    for axis in axes:
        if not is_mapped(axis):
            raise ValueError(
                f"{name}: `{keyword}` must be mapped where the step is called, {axis!r} is not. "
                "Call it inside jax.shard_map or jax.pmap with that axis; under jax.jit with a "
                "sharded batch leave it out: there every mean is over the whole batch."
            )


def _on_floating(fn, x):
    return jax.tree.map(lambda leaf: fn(leaf) if tree.is_inexact(leaf) else leaf, x)


def _pcast(axes, x):
    """Cast to varying, one axis at a time: JAX rejects the cast if an axis already varies."""
    for axis in axes:
        try:
            x = jax.lax.pcast(x, axis, to="varying")
        except ValueError as error:
            if "from=varying" not in str(error):
                raise
    return x


def _mean(axes, x, share):
    if tree.is_inexact(x):
        part = (share * tree.widen(x)).astype(x.dtype)  # half precision would round the share
        return jax.lax.psum(_pcast(axes, jnp.where(share == 0, jnp.zeros_like(x), part)), axes)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.pmax(_pcast(axes, jnp.where(share == 0, jnp.iinfo(x.dtype).min, x)), axes)
    if x.dtype == bool:
        return _mean(axes, x.astype(jnp.int32), share).astype(bool)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(axes, x, share):
    del share
    return _pcast(axes, x)


_spread.defvjp(
    lambda axes, x, share: (_pcast(axes, x), share),
    lambda axes, share, cotangent: (_mean(axes, cotangent, share), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(axes, x, share):
    return _mean(axes, x, share)


_mean_loss.defvjp(
    lambda axes, x, share: (_mean(axes, x, share), None),
    lambda axes, _, cotangent: (_pcast(axes, cotangent), None),
)
