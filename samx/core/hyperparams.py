"""Hyperparameters: numbers or schedules; Python numbers are checked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core.aliases import ScalarOrSchedule


class Default(float):
    """A default value; its type distinguishes it from the same number passed by the caller."""


def next_step(step: jax.Array) -> jax.Array:
    """Return the step count after this step; at its largest value it no longer grows."""
    return jnp.asarray(optax.safe_increment(step))


def at_step(value: ScalarOrSchedule, step: jax.Array) -> Any:
    """Return a hyperparameter at the optimizer's step: the number, or the value of the schedule.

    In 64-bit mode the schedule gets the step as int64: division of an int32 rounds to float32.
    """
    return value(step.astype(int)) if callable(value) else value


def map_schedule(value: ScalarOrSchedule, fn: Callable[[Any], Any]) -> Any:
    """Apply `fn` to a hyperparameter: to the number, or to each value of the schedule."""
    return (lambda step: fn(value(step))) if callable(value) else fn(value)


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Require a Python number to be in `[low, high]`; schedules and arrays are not checked."""
    if isinstance(value, str) or value is None:
        raise TypeError(f"`{name}` must be a number or a schedule, got {value!r}")
    if isinstance(value, int | float) and not low <= value <= high:
        wanted = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Require a Python number to be in `(0, 1]`; schedules and arrays are not checked."""
    check_number(name, value, 0, 1)
    if isinstance(value, int | float) and value == 0:
        raise ValueError(f"`{name}` must be in (0, 1], got {value!r}")


def as_key(name: str, key: Any) -> jax.Array:
    """Return a random key for a state: made from a seed, or a copy of a given key."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.array(key, copy=True)
    is_seed = isinstance(key, int) or (isinstance(key, jax.Array) and key.ndim == 0)
    if isinstance(key, bool) or not (is_seed and jnp.issubdtype(jnp.result_type(key), jnp.integer)):
        raise TypeError(f"{name}: `key` must be a seed or a key from jax.random.key, got {key!r}")
    return jax.random.key(key)


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Require a Python integer of at least `low`; it fixes the compiled program."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"`{name}` must be a Python int, got {type(value).__name__}; under "
            f"optax.inject_hyperparams pass static_args=({name!r},)"
        )
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}")
