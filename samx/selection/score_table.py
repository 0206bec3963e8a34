"""AUSAM's score table: for each example, the mean |sharp loss − loss| so far."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from samx.core import tree
from samx.core.closures import LossesClosure
from samx.core.hyperparams import as_array, at_step


def steps_per_epoch(losses_fn: LossesClosure, num_examples: int, size: int) -> int:
    """Return the number of steps per epoch if each device takes `size` examples per step."""
    return -(-num_examples // (size * losses_fn.evaluation.devices.count))


def weight_range(low: Any, high: Any, step: jax.Array, ramp_steps: int) -> tuple[Any, Any]:
    """Return the drawing weights of the lowest and the highest score at a step."""
    low, high = at_step(low, step), at_step(high, step)
    ramp = jnp.minimum(step / ramp_steps, 1) if ramp_steps else 1
    return low, low + (high - low) * ramp


def probabilities(
    scores: jax.Array, is_there: jax.Array, num_groups: int, low: Any, high: Any
) -> jax.Array:
    """Rescale scores `[B]` in each group: first to `[low, high]`, then to the sum 1."""
    scores, is_there = (x.reshape(num_groups, -1) for x in (scores, is_there))
    smallest = jnp.min(scores, axis=1, keepdims=True, where=is_there, initial=jnp.inf)
    largest = jnp.max(scores, axis=1, keepdims=True, where=is_there, initial=-jnp.inf)
    spread = largest - smallest
    scaled = (scores - smallest) / jnp.where(spread > 0, spread, 1)
    equal = is_there.astype(scores.dtype)
    weights = jnp.where(is_there & (spread > 0), low + scaled * (high - low), equal)
    return (weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-30)).reshape(-1)


def places_of(
    name: str, losses_fn: LossesClosure, index: Any, size: int, num_examples: int, weights: Any
) -> jax.Array:
    """Return the table rows of the examples on all devices.

    Padding gets the row `num_examples`. An index outside the table gets the row `num_examples + 1`.
    """
    index = as_array("index", index, "integers")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{name}: `index` must be of integers, got {index.dtype}")
    if index.shape != (size,):
        raise ValueError(
            f"{name}: `index` must have one position per example, shape ({size},), "
            f"got {index.shape}"
        )
    is_padding = jnp.zeros(size, bool) if weights is None else weights == 0
    is_outside = ~is_padding & ((index < 0) | (index >= num_examples))
    if not isinstance(is_outside, Tracer) and jnp.any(is_outside):
        raise ValueError(
            f"{name}: `index` must be in [0, {num_examples}), the positions of `num_examples` "
            f"examples, got {index[is_outside][0]}"
        )
    place = jnp.where(is_padding, num_examples, index)
    place = jnp.where(is_outside, num_examples + 1, place).astype(jnp.int32)
    return losses_fn.evaluation.devices.all_gather(place)


def odds(
    losses_fn: LossesClosure,
    state: Any,
    key: jax.Array,
    place: jax.Array,
    num_groups: int,
    low: Any,
    high: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the probabilities and the Gumbel noise of this device's examples, `[B]` each.

    `state` has the field `step`, and the table in the fields `total` and `count`.
    """
    devices = losses_fn.evaluation.devices
    noise = jax.random.gumbel(jax.random.fold_in(key, state.step), place.shape)
    total, count = (x.at[place].get(mode="clip") for x in (state.total, state.count))
    is_there = devices.local_slice(place) < len(state.total)
    p = probabilities(devices.local_slice(total / count), is_there, num_groups, low, high)
    return p, devices.local_slice(noise)


def recorded(
    losses_fn: LossesClosure,
    state: Any,
    place: jax.Array,
    rise: jax.Array,
    is_drawn: jax.Array,
    restarts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Add the rises of the drawn examples on all devices to the table's sums and counts.

    An example that occurs twice counts twice. If `restarts`, the sums and counts of these examples
    restart at 0.
    """
    devices = losses_fn.evaluation.devices
    rise, is_drawn = devices.all_gather(rise), devices.all_gather(is_drawn)
    is_known = (is_drawn != 0) & jnp.isfinite(rise)
    place = jnp.where(is_known, place, len(state.total))

    def grown(table, more):
        old = jnp.where(restarts, 0, table.at[place].get(mode="clip"))
        return table.at[place].set(old, mode="drop").at[place].add(more, mode="drop")

    return grown(state.total, rise), grown(state.count, 1)


def nan_if_outside(updates: Any, place: jax.Array, num_examples: int) -> Any:
    """Return the updates, or NaN everywhere if an index is outside the table."""
    is_outside = jnp.any(place > num_examples)
    return jax.tree.map(
        lambda u: jnp.where(is_outside, jnp.nan, u).astype(u.dtype) if tree.is_inexact(u) else u,
        updates,
    )
