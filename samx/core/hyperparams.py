"""Arguments of factories: each kind has one rule, which checks a value before anything is built.

Python and NumPy numbers and arrays of rank 0 are all numbers. A traced number is checked for its
rank and dtype only. A schedule is checked when it is evaluated.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from samx.core.aliases import ScalarOrSchedule

INFINITY = float("inf")


class Default(float):
    """A default value; its type distinguishes it from the same number passed by the caller."""


def next_step(step: jax.Array) -> jax.Array:
    """Return the step count after this step; at its largest value it no longer grows."""
    return jnp.asarray(optax.safe_increment(step))


def at_step(value: ScalarOrSchedule, step: jax.Array) -> Any:
    """Return a hyperparameter at the optimizer's step: the number, or the value of the schedule.

    Raises a `TypeError` or a `ValueError` if a schedule does not return one number.

    In 64-bit mode the schedule gets the step as int64: division of an int32 rounds to float32.
    """
    if not callable(value):
        return value
    found = value(step.astype(int))
    _known("schedule(step)", found, "a number")
    return found


def map_schedule(value: ScalarOrSchedule, fn: Callable[[Any], Any]) -> Any:
    """Apply `fn` to a hyperparameter: to the number, or to each value of the schedule."""
    return (lambda step: fn(value(step))) if callable(value) else fn(value)


def check_number(
    name: str, value: Any, low: float, high: float = INFINITY, *, excluded: float | None = None
) -> None:
    """Require a number in `[low, high]`, without the end that is `excluded`.

    It must be finite, unless `low` is minus infinity.
    """
    _check_range(name, _known(name, value, "a number"), low, high, excluded, value)


def check_hyperparam(
    name: str, value: Any, low: float, high: float = INFINITY, *, excluded: float | None = None
) -> None:
    """Require a schedule, or a number as `check_number` does."""
    if not callable(value):
        known = _known(name, value, "a number or a schedule")
        _check_range(name, known, low, high, excluded, value)


def as_bound(value: ScalarOrSchedule, otherwise: float) -> float:
    """Return a checked hyperparameter as a bound of another one, if it is a number now."""
    known = None if callable(value) else _known("bound", value, "a number")
    return otherwise if known is None else known


def check_static_number(
    name: str, value: Any, low: float, high: float = INFINITY, *, excluded: float | None = None
) -> None:
    """Require a number of Python or NumPy, which is known while tracing."""
    if isinstance(value, jax.Array):
        raise TypeError(_is_an_array(name, "a Python number"))
    check_number(name, value, low, high, excluded=excluded)


def as_count(name: str, value: Any, low: int = 1) -> int:
    """Return a whole number of at least `low` as a Python int; it fixes the compiled program."""
    if isinstance(value, jax.Array):
        raise TypeError(_is_an_array(name, "a Python int"))
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool | np.bool_) or jnp.ndim(value):
        raise TypeError(f"`{name}` must be a Python int, got {_shown(value)}")
    if count < low:
        raise ValueError(f"`{name}` must be at least {low}, got {count}")
    return count


class RandomKey:
    """The argument `key` of a factory: a seed of 64 bits, or one key from `jax.random.key`.

    A state holds only the data of the key, an ordinary array that every checkpointer keeps. The
    factory keeps the implementation of the key; that of a seed is JAX's default at this time.
    """

    def __init__(self, key: Any):
        check_key(key)
        self._key = key
        default = jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
        self._impl = jax.random.key_impl(key) if is_typed_key(key) else default

    def data(self) -> jax.Array:
        """Return the data of the key, for a state: uint32, in a buffer of its own."""
        key = self._key if is_typed_key(self._key) else jax.random.key(self._key, impl=self._impl)
        return jnp.array(jax.random.key_data(key), copy=True)

    def of(self, data: jax.Array) -> jax.Array:
        """Return the random key whose data a state holds."""
        return jax.random.wrap_key_data(data, impl=self._impl)


def is_typed_key(x: Any) -> TypeGuard[jax.Array]:
    """Return whether this is an array of keys from `jax.random.key`."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check_key(key: Any) -> None:
    """Require a seed of 64 bits, or one key from `jax.random.key`."""
    is_array = isinstance(key, jax.Array | np.ndarray | np.generic)
    if is_typed_key(key):
        if key.shape:
            raise ValueError(f"`key` must be one key, got keys of shape {key.shape}")
        return
    is_number = is_array or isinstance(key, int)
    is_seed = is_number and jnp.ndim(key) == 0 and not isinstance(key, bool | np.bool_)
    if not (is_seed and (isinstance(key, int) or jnp.issubdtype(key.dtype, jnp.integer))):
        is_raw = is_array and key.dtype == np.uint32
        hint = "; for a raw key pass jax.random.wrap_key_data(key)" if is_raw else ""
        raise TypeError(
            f"`key` must be a seed or a key from jax.random.key, got {_shown(key)}{hint}"
        )
    if isinstance(key, int) and not -(2**63) <= key < 2**63:
        raise ValueError(f"`key` must be a seed of 64 bits, got {key}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Require one of these strings."""
    if not isinstance(value, str) or value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"`{name}` must be {', '.join(most)} or {last}, got {_shown(value)}")


def check_function(name: str, value: Any) -> None:
    """Require a function."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {_shown(value)}")


def check_floating(name: str, dtype: Any) -> None:
    """Require a floating dtype, its name, or `None`."""
    try:
        is_floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise TypeError(f"`{name}` must be a floating dtype or None, got {_shown(dtype)}")


def _known(name: str, value: Any, wanted: str) -> float | None:
    """Return the value of a real number, or `None` while it is traced; raise for anything else."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating)):
            raise TypeError(f"`{name}` must be {wanted}, got {_shown(value)}")
        if value.shape:
            raise ValueError(f"`{name}` must be one number, got an array of shape {value.shape}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be {wanted}, got {_shown(value)}")
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None  # its value is on other processes
    try:
        return float(value)
    except OverflowError:
        return INFINITY


def _check_range(
    name: str, known: float | None, low: float, high: float, excluded: float | None, value: Any
) -> None:
    is_free = low == -INFINITY
    if known is None or (
        low <= known <= high and known != excluded and (is_free or abs(known) < INFINITY)
    ):
        return
    if is_free:
        wanted = "a number that is not NaN"
    elif high == INFINITY:
        wanted = f"{'above' if excluded == low else 'at least'} {low:g}"
        wanted += " and finite" if known == INFINITY else ""
    else:
        brackets = "(" if excluded == low else "[", ")" if excluded == high else "]"
        wanted = f"in {brackets[0]}{low:g}, {high:g}{brackets[1]}"
    raise ValueError(f"`{name}` must be {wanted}, got {value!r}")


def _is_an_array(name: str, wanted: str) -> str:
    return (
        f"`{name}` must be {wanted}, since it fixes the compiled program, got an array of JAX; "
        f"under optax.inject_hyperparams pass static_args=({name!r},)"
    )


def _shown(value: Any) -> str:
    """Return an argument in a message: a short one as it is, of a long one the type."""
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
