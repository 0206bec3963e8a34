"""Microbatches: gradients accumulated over them, and means of the results of each microbatch."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.devices import Devices, PerExample


def _strided(size: int, x: jax.Array) -> jax.Array:
    """Reshape `[B, ...]` to `[K, size, ...]`; row j holds the examples j, j + K, j + 2K, ...

    With these strides, sharded examples stay on their devices.
    """
    x = jnp.asarray(x)
    sharding, shape = jax.typeof(x).sharding, (size, -1, *x.shape[1:])
    if any(sharding.spec):  # on an Explicit mesh; otherwise XLA infers it
        spec = PartitionSpec(sharding.spec[0], None, *sharding.spec[1:])
        x = jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))
    return jnp.moveaxis(x.reshape(shape), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """Undo `_strided`: reshape `[K, size, ...]` to `[B, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    sharding, shape = jax.typeof(x).sharding, (x.shape[0] * x.shape[1], *x.shape[2:])
    if any(sharding.spec):
        spec = PartitionSpec(sharding.spec[0], *sharding.spec[2:])
        return jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))
    return x.reshape(shape)


def each(fn: Callable[[Any], jax.Array], num_microbatches: int, batch: Any) -> jax.Array:
    """Return one number per example, `fn(batch)`, computed one microbatch at a time."""
    return _joined(fast_convolutions(jax.lax.map)(fn, strided(num_microbatches, batch)))


def strided(num_microbatches: int, tree: Any) -> Any:
    """Split `[B, ...]` into `[K, B / K, ...]`; microbatch j holds examples j, j + K, j + 2K, ..."""
    size = jnp.shape(jax.tree.leaves(tree)[0])[0] // num_microbatches
    return jax.tree.map(partial(_strided, size), tree)


def joined_aux(auxes: Any) -> Any:
    """Combine the aux of all microbatches, `[K, ...]`, into one.

    Floating leaves are averaged. Other leaves come from the last microbatch. `PerExample` values
    are put back into the order of the examples.
    """

    def join(x):
        if is_per_example(x):
            return jax.tree.map(_joined, x)
        return x.mean(0) if tree.is_inexact(x) else x[-1]

    def is_per_example(node):
        return isinstance(node, PerExample)

    return jax.tree.map(join, auxes, is_leaf=is_per_example)


def accumulated(
    losses_and_aux: Callable[[Any, Any], tuple[jax.Array, Any]],
    num_microbatches: int,
    batch: Any,
    weights: jax.Array,
    factor: Any,
    params: Any,
) -> tuple[jax.Array, Any]:
    """Return the mean loss and aux; the gradient is computed one microbatch at a time.

    The gradient is multiplied by `factor`, before the backward pass of each microbatch.
    """
    total = jnp.sum(weights, dtype=float)  # in float64 if JAX uses it
    weights = weights / jnp.where(total == 0, 1, total)
    if weights.shape[0] % num_microbatches:
        raise ValueError(
            f"accumulate: `num_microbatches` must divide the {weights.shape[0]} examples that each "
            f"gradient is taken over, got {num_microbatches}"
        )
    microbatches = strided(num_microbatches, (batch, weights))

    def part(params, microbatch):
        batch, weights = microbatch
        losses, aux = losses_and_aux(params, batch)
        losses = tree.widen(losses)
        return jnp.sum(losses * weights).astype(losses.dtype), aux

    def whole(parts):
        losses, auxes = parts
        return jnp.sum(losses), joined_aux(auxes)

    @jax.custom_vjp
    def loss_and_aux(params, microbatches):
        return whole(fast_convolutions(jax.lax.map)(lambda m: part(params, m), microbatches))

    def forward(params, microbatches):
        def scaled(params, microbatch):
            loss, aux = part(params, microbatch)
            return (loss * factor).astype(loss.dtype), (loss, aux)

        def add(total, microbatch):
            gradient = jax.grad(scaled, has_aux=True, allow_int=True)
            g, result = gradient(params, microbatch)
            g = tree.keep_floating(g, params)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, g), result

        zeros = jax.tree.map(lambda w: jnp.zeros_like(tree.widen(w)), params)
        g, parts = fast_convolutions(jax.lax.scan)(add, zeros, microbatches)
        return whole(parts), jax.tree.map(lambda x, w: x.astype(w.dtype), g, params)

    def backward(g, cotangents):
        return jax.tree.map(
            lambda x: (
                tree.scaled(cotangents[0], x)
                if tree.is_inexact(x)
                else np.zeros(x.shape, jax.dtypes.float0)
            ),
            g,
        ), None

    loss_and_aux.defvjp(forward, backward)
    return loss_and_aux(params, microbatches)


class Parts(NamedTuple):
    """This device's results of one microbatch, or of all.

    Attributes:
        gradients: The device's parts of mean gradients; their sum over the devices is the mean.
        numbers: The device's numbers; they are averaged over the examples of all devices.
        aux: The aux.
    """

    gradients: Any
    numbers: Any
    aux: Any


def sums_over(
    fn: Callable[[Any, Any, jax.Array], Parts],
    num_microbatches: int,
    how: Literal["scan", "vmap"],
    devices: Devices,
    batch: Any,
    weights: Any,
    zeros: Any,
) -> Parts:
    """Sum `fn(batch, weights, j)` over the microbatches j, weighted by the examples in each.

    The gradients stay parts, in float32 or wider: sum them over the devices once. The numbers are
    means over the devices already. "scan" keeps one sum of the gradients, which starts at `zeros`.
    "vmap" keeps the gradients of all microbatches.
    """
    microbatches = (*strided(num_microbatches, (batch, weights)), jnp.arange(num_microbatches))
    shares, own_shares = _shares(num_microbatches, microbatches[1], devices)

    def of_one(microbatch):
        batch, weights, j, share = microbatch
        parts = fn(batch, weights, j)
        gradients = jax.tree.map(tree.widen, parts.gradients)
        return parts._replace(gradients=tree.scaled(share, gradients))

    def add(total, microbatch):
        parts = of_one(microbatch)
        return optax.tree.add(total, parts.gradients), parts._replace(gradients=())

    if how == "scan":
        gradients, parts = fast_convolutions(jax.lax.scan)(add, zeros, (*microbatches, shares))
    else:
        parts = jax.vmap(of_one)((*microbatches, shares))
        gradients = jax.tree.map(lambda g: jnp.sum(g, 0), parts.gradients)

    def mean(x):
        dtype = tree.common_dtype(own_shares.dtype, x.dtype)
        part = own_shares.astype(dtype) * x.astype(dtype)
        part = jnp.where(own_shares == 0, 0, part)  # NaNs of a device without examples
        return devices.psum(jnp.sum(part)).astype(x.dtype)

    return Parts(gradients, jax.tree.map(mean, parts.numbers), joined_aux(parts.aux))


def check_divides(name: str, num_microbatches: int, batch: Any) -> None:
    """Raise a `ValueError` if the microbatches would not be equally large."""
    size = jnp.shape(jax.tree.leaves(batch)[0])[0]
    if size % num_microbatches:
        raise ValueError(
            f"{name}: `num_microbatches` must divide the {size} examples of the batch, got "
            f"{num_microbatches}; pad the batch and pass `weights`"
        )


def _shares(count: int, weights: Any, devices: Devices) -> tuple[jax.Array, jax.Array]:
    """Return the share of each microbatch in the batch, and that of its examples on this device.

    The weights `[K, B / K]` are those of this device; the batch is that of all devices.
    """
    if weights is None:
        return jnp.full(count, 1 / count), jnp.full(count, 1 / (count * devices.count))
    own = jnp.sum(weights, axis=1, dtype=float)
    sums = devices.psum(own)
    total = jnp.sum(sums)
    total = jnp.where(total == 0, 1, total)
    return sums / total, own / total
