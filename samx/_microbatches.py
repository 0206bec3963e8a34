"""The mean loss of a batch whose gradient is taken over microbatches, one after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from samx import _tree
from samx._devices import Own


def _strided(size: int, x: jax.Array) -> jax.Array:
    """`[B, ...]` as `[K, size, ...]`, row j holds j, j + K, ...: what is sharded stays in place."""
    x = jnp.asarray(x)
    sharding, shape = jax.typeof(x).sharding, (size, -1, *x.shape[1:])
    if any(sharding.spec):  # on an Explicit mesh; elsewhere the compiler knows
        spec = PartitionSpec(sharding.spec[0], None, *sharding.spec[1:])
        x = jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))
    return jnp.moveaxis(x.reshape(shape), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """`[K, size, ...]` as the `[B, ...]` that it was."""
    x = jnp.moveaxis(x, 0, 1)
    sharding, shape = jax.typeof(x).sharding, (x.shape[0] * x.shape[1], *x.shape[2:])
    if any(sharding.spec):
        spec = PartitionSpec(sharding.spec[0], *sharding.spec[2:])
        return jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))
    return x.reshape(shape)


def each(fn: Callable[[Any], jax.Array], num_microbatches: int, batch: Any) -> jax.Array:
    """One number per example, `fn(batch)`, one microbatch at a time."""
    return _joined(jax.lax.map(fn, strided(num_microbatches, batch)))


def strided(num_microbatches: int, tree: Any) -> Any:
    """`[B, ...]` as `[K, B / K, ...]`: microbatch j holds the examples j, j + K, j + 2K, ..."""
    size = jnp.shape(jax.tree.leaves(tree)[0])[0] // num_microbatches
    return jax.tree.map(partial(_strided, size), tree)


def joined_aux(auxes: Any) -> Any:
    """The aux of a batch of those of its microbatches, `[K, ...]`.

    Means of floating leaves, the last one of others; `Own` back in the order of the examples.
    """

    def join(x):
        if is_own(x):
            return jax.tree.map(_joined, x)
        return x.mean(0) if _tree.is_inexact(x) else x[-1]

    def is_own(node):
        return isinstance(node, Own)

    return jax.tree.map(join, auxes, is_leaf=is_own)


def accumulated(
    losses_and_aux: Callable[[Any, Any], tuple[jax.Array, Any]],
    num_microbatches: int,
    batch: Any,
    weights: jax.Array,
    params: Any,
) -> tuple[jax.Array, Any]:
    """The mean loss and aux, their gradient taken one microbatch at a time."""
    total = jnp.sum(weights)
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
        return jnp.sum(_tree.widen(losses) * weights), aux

    def whole(parts):
        losses, auxes = parts
        return jnp.sum(losses), joined_aux(auxes)

    @jax.custom_vjp
    def loss_and_aux(params, microbatches):
        return whole(jax.lax.map(lambda m: part(params, m), microbatches))

    def forward(params, microbatches):
        def add(total, microbatch):
            result, g = jax.value_and_grad(part, has_aux=True, allow_int=True)(params, microbatch)
            g = _tree.keep_floating(g, params)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, g), result

        zeros = jax.tree.map(lambda w: jnp.zeros_like(_tree.widen(w)), params)
        g, parts = jax.lax.scan(add, zeros, microbatches)
        return whole(parts), jax.tree.map(lambda x, w: x.astype(w.dtype), g, params)

    def backward(g, cotangents):
        return jax.tree.map(
            lambda x: (
                (cotangents[0] * x).astype(x.dtype)
                if _tree.is_inexact(x)
                else np.zeros(x.shape, jax.dtypes.float0)
            ),
            g,
        ), None

    loss_and_aux.defvjp(forward, backward)
    return loss_and_aux(params, microbatches)
