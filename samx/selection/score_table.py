"""A score for each example of a data set: AUSAM's table of how much their losses have risen."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from samx.core.hyperparams import at_step


def weight_range(low: Any, high: Any, step: jax.Array, ramp_steps: int) -> tuple[Any, Any]:
    """The weights of the lowest and of the highest score at a step."""
    low, high = at_step(low, step), at_step(high, step)
    ramp = jnp.minimum(step / ramp_steps, 1) if ramp_steps else 1
    return low, low + (high - low) * ramp


def probabilities(
    scores: jax.Array, is_there: jax.Array, num_groups: int, low: Any, high: Any
) -> jax.Array:
    """Scores `[B]`, in each group scaled to `[low, high]`, and to the sum 1."""
    scores, is_there = (x.reshape(num_groups, -1) for x in (scores, is_there))
    smallest = jnp.min(scores, axis=1, keepdims=True, where=is_there, initial=jnp.inf)
    largest = jnp.max(scores, axis=1, keepdims=True, where=is_there, initial=-jnp.inf)
    spread = largest - smallest
    scaled = (scores - smallest) / jnp.where(spread > 0, spread, 1)
    weights = jnp.where(is_there & (spread > 0), low + scaled * (high - low), is_there)
    return (weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)).reshape(-1)


def places_of(index: Any, size: int, num_examples: int, weights: Any) -> jax.Array:
    """Places in the table; `num_examples` for padding, one more for what lies outside of it."""
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"ausam: `index` must be of integers, got {index.dtype}")
    if index.shape != (size,):
        raise ValueError(
            f"ausam: `index` must have one position per example, shape ({size},), got {index.shape}"
        )
    is_padding = jnp.zeros(size, bool) if weights is None else weights == 0
    is_outside = ~is_padding & ((index < 0) | (index >= num_examples))
    if not isinstance(is_outside, Tracer) and jnp.any(is_outside):
        raise ValueError(
            f"ausam: `index` must be in [0, {num_examples}), the positions of `num_examples` "
            f"examples, got {index[is_outside][0]}"
        )
    place = jnp.where(is_padding, num_examples, index)
    return jnp.where(is_outside, num_examples + 1, place).astype(jnp.int32)


def recorded(
    tables: tuple[jax.Array, jax.Array], place: jax.Array, rise: jax.Array, starts_anew: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum and count of each example with another rise; one that comes twice counts twice."""

    def grown(table, more):
        old = jnp.where(starts_anew, 0, table.at[place].get(mode="clip"))
        return table.at[place].set(old, mode="drop").at[place].add(more, mode="drop")

    total, count = tables
    return grown(total, rise), grown(count, 1)
