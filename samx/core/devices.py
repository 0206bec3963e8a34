"""The devices that a step is mapped over, and means over them; one device needs no means.

Inside `jax.pmap` and `jax.shard_map`, each device sees its own examples. Only one way gives right
gradients in both, with `check_vma` on and off: cast the parameters to varying, take the local
gradient, average it. Two conjugate operators do this inside a loss closure:

    spread      parameters → devices     forward: pcast     backward: mean of the cotangents
    mean_loss   devices → one number     forward: mean      backward: pcast, times `weight`

The weight of a device stands before its backward pass, not behind it. So the gradient is also right
where the losses of the devices depend on one another, as with synchronized BatchNorm.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from samx.core import tree


class PerExample(NamedTuple):
    """Marks per-example values in an aux: they stay on their device and are not averaged."""

    examples: Any


class Devices(NamedTuple):
    """The devices along some named axes; without axes, one device.

    Attributes:
        axes: The axes over which means are taken.
        local_axes: The axes along which devices, or groups of devices, climb separately.
        is_alone: Whether no mean is taken: losses are the device's own, and gradients its own times
            `weight`.
    """

    axes: tuple[str, ...] = ()
    local_axes: tuple[str, ...] = ()
    is_alone: bool = False

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

    def weight(self, weights: jax.Array | None) -> Any:
        """Return this device's share times the number of devices; 1 where shares are equal."""
        return 1.0 if weights is None or not self.axes else self.share(weights) * self.count

    def mean_grad(self, grads: Any, weights: jax.Array | None) -> Any:
        """Return the mean over the devices of gradients that are already scaled by `weight`."""
        return self.sum(self.part_of_mean_grad(grads, weights))

    def mean_ascent_grad(self, grads: Any, weights: jax.Array | None) -> Any:
        """Return the mean gradient of the devices that climb together; as `mean_grad`."""
        mean, weight = self.ascent.mean_grad(grads, weights), self.weight(weights)
        if isinstance(weight, float):
            return mean
        weight = self.ascent.psum(weight) / self.ascent.count
        return tree.scaled(1 / jnp.where(weight == 0, 1, weight), mean)

    def part_of_mean_grad(self, grads: Any, weights: jax.Array | None) -> Any:
        """Return this device's part of `mean_grad`. NaNs of a device without examples are 0."""
        if not self.axes:
            return grads
        weight = self.weight(weights)

        def part(g):
            own = (tree.widen(g) / self.count).astype(g.dtype)
            if isinstance(weight, float):
                return own
            return jnp.where((weight == 0) & ~jnp.isfinite(own), jnp.zeros_like(own), own)

        return _on_floating(part, grads)

    def sum(self, tree: Any) -> Any:
        """Return the sum over the devices; gradients of integers (float0) do not change."""

        def is_number(x):
            return jnp.issubdtype(x.dtype, jnp.number)

        return jax.tree.map(lambda x: self.psum(x) if is_number(x) else x, tree)

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

    def spread(self, params: Any, weights: jax.Array | None) -> Any:
        """Pass parameters to the local loss; the backward pass averages the gradient."""
        if not self.axes or self.is_alone:
            return params
        return _on_floating(lambda x: _spread(self, x, weights), params)

    def mean_loss(self, loss: jax.Array, weights: jax.Array | None, factor: Any = 1.0) -> jax.Array:
        """Return the mean of the local losses; their gradients have `factor` already."""
        if not self.axes:  # the device's own loss: the factor is taken out again
            own = isinstance(factor, float)
            return loss if own else _scale_cotangent(loss, tree.ratio(1.0, factor))
        weight = self.weight(weights)
        if not isinstance(weight, float) and factor is not weight:
            weight = weight if isinstance(factor, float) else tree.ratio(weight, factor)
            loss = _scale_cotangent(loss, weight)
        return loss if self.is_alone else _mean_loss(self.axes, loss, self.share(weights))

    def mean(self, tree: Any, share: Any) -> Any:
        """Return the mean over the devices by their shares; a device with share 0 is ignored.

        Integers must be equal on all devices whose share is not 0. `PerExample` values and leaves
        that are not numbers do not change.
        """
        if not self.axes or self.is_alone:
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
            sharding = jax.typeof(x).sharding
            if not any(sharding.spec):  # it does not show, or there is nothing to gather
                return x
            return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
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


def as_axes(name: str, keyword: str, axes: Any) -> tuple[str, ...]:
    """Return one axis name, or a sequence of names, as a tuple."""
    axes = (axes,) if isinstance(axes, str) else axes
    if not isinstance(axes, Sequence) or not all(isinstance(axis, str) for axis in axes):
        raise TypeError(f"{name}: `{keyword}` must be the name of an axis, or several, got {axes}")
    if not axes:
        raise ValueError(f"{name}: `{keyword}` must name at least one axis, got {axes}")
    return tuple(axes)


def is_mapped(axis: str) -> bool:
    """Return whether a `jax.shard_map`, `jax.pmap` or `jax.vmap` maps this code over the axis."""
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
    """Cast to varying, one axis at a time: JAX rejects the cast if an axis already varies.

    Only axes of `jax.shard_map` need it. Under `jax.vmap`, a gradient is that of one lane anyway.
    """
    manual_axes = jax.sharding.get_abstract_mesh().manual_axes
    for axis in axes:
        if axis not in manual_axes:
            continue
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
def _spread(devices, x, weights):
    del weights
    return _pcast(devices.axes, x)


_spread.defvjp(
    lambda devices, x, weights: (_pcast(devices.axes, x), weights),
    lambda devices, weights, cotangent: (devices.mean_grad(cotangent, weights), None),
)


@jax.custom_vjp
def _scale_cotangent(x, scale):
    del scale
    return x


_scale_cotangent.defvjp(
    lambda x, scale: (x, scale),
    lambda scale, cotangent: ((scale * cotangent).astype(cotangent.dtype), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(axes, x, share):
    return _mean(axes, x, share)


_mean_loss.defvjp(
    lambda axes, x, share: (_mean(axes, x, share), None),
    lambda axes, _, cotangent: (_pcast(axes, cotangent), None),
)
