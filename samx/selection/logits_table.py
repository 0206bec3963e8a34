"""SAF's table: the logits of every example in the last epochs, a ring of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from samx.core import tree
from samx.core.closures import LossesClosure


def as_logits_like(logits_like: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of the logits of one example."""
    if not isinstance(logits_like, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        raise TypeError(
            "`logits_like` must be an array or a jax.ShapeDtypeStruct, got a "
            f"{type(logits_like).__name__}"
        )
    shape, dtype = logits_like.shape, logits_like.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`logits_like` must be real floating numbers, got {dtype}")
    if not shape or 0 in shape:
        raise ValueError(
            "`logits_like` must be shaped like the logits of one example, [..., classes], got "
            f"shape {shape}"
        )
    stored = jax.eval_shape(lambda: jnp.asarray(np.zeros((), dtype)))  # 32 bits of np.float64
    return jax.ShapeDtypeStruct(shape, stored.dtype)


def first_table(num_epochs: int, num_examples: int, logits_like: Any) -> jax.Array:
    """Return the table `[num_epochs, num_examples, ...]` before the first step: zeros."""
    return jnp.zeros((num_epochs, num_examples, *logits_like.shape), logits_like.dtype)


def logits_at(losses_fn: LossesClosure, table: jax.Array, epoch: Any, place: jax.Array) -> Any:
    """Return the logits that the device's examples had in an epoch; zeros if nothing was written.

    `place` has the rows of the examples on all devices, as from `places_of`.
    """

    def read(table, row, place):
        return table.at[row, place].get(mode="clip")

    logits = _on_auto_axes(read, PartitionSpec(), table, epoch % len(table), place)
    return losses_fn.evaluation.devices.local_slice(logits)


def with_logits(
    losses_fn: LossesClosure, table: jax.Array, epoch: Any, place: jax.Array, logits: jax.Array
) -> jax.Array:
    """Return the table with the logits of the device's examples, and of those of other devices.

    Rows with a NaN or +∞ are not written: they would be a teacher for as many epochs as the table
    has. The others are brought into the range of the table's dtype. Nothing is written for padding,
    nor on a step that a policy skips.
    """
    if losses_fn.evaluation.is_skipped_step:
        return table
    devices, limits = losses_fn.evaluation.devices, jnp.finfo(table.dtype)
    logits, axes = tree.widen(logits), tuple(range(1, logits.ndim))
    is_known = jnp.all(logits < jnp.inf, axis=axes, keepdims=True)
    logits = jnp.clip(logits, float(limits.min), float(limits.max))
    logits = devices.all_gather(jnp.where(is_known, logits, jnp.nan).astype(table.dtype))
    place = jnp.where(jnp.any(jnp.isnan(logits), axis=axes), table.shape[1], place)

    def write(table, row, place, logits):
        return table.at[row, place].set(logits, mode="drop")

    spec = jax.typeof(table).sharding.spec
    return _on_auto_axes(write, spec, table, epoch % len(table), place, logits)


def _on_auto_axes(fn: Any, spec: PartitionSpec, table: jax.Array, *args: Any) -> Any:
    """Call `fn(table, *args)`; for a table that an Explicit mesh shards, the compiler shards it."""
    sharding = jax.typeof(table).sharding
    if not any(sharding.spec):
        return fn(table, *args)
    out_sharding = NamedSharding(sharding.mesh, spec)
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding)(table, *args)
