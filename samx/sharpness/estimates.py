"""Means over random draws, with their standard errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import as_count, check_key, is_typed_key
from samx.sharpness.coordinates import Coordinates, Vector, sharded_like


class Estimate(NamedTuple):
    """A mean over random draws.

    Attributes:
        mean: The mean, a number or a tree of them.
        stderr: Its standard error, the standard deviation of one draw divided by √draws; the true
            value lies within two of them in about 95% of the cases, if the draws are many.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> mean, stderr = samx.sharpness.trace(lambda w: w @ w, jnp.ones(3), draws=4)
        >>> float(mean), float(stderr)
        (6.0, 0.0)
    """

    mean: Any
    stderr: Any


def random_key(key: Any) -> jax.Array:
    """Return a key from a seed or a key."""
    check_key(key)
    return key if is_typed_key(key) else jax.random.key(key)


def vectors_of(
    name: str,
    space: Coordinates,
    draws: Any,
    key: Any,
    sample: Callable[..., jax.Array],
) -> tuple[int, Callable[[jax.Array], Vector]]:
    """Return the number of draws, and the function from a draw's index to its vector.

    `draws` is their number, or the draws themselves: a tree like the parameters with one more axis
    in front.
    """
    start = random_key(key)
    is_leaf = jax.tree.structure(draws) == jax.tree.structure(0)
    if is_leaf and not (tree.is_array(draws) and jnp.ndim(draws)):
        count = as_count("draws", draws, 2)
        return count, lambda i: space.random(jax.random.fold_in(start, i), sample)
    given = space.stack("draws", draws)
    count = len(given[0])
    if count < 2:
        raise ValueError(f"{name}: `draws` must be at least 2, got {count}")
    return count, lambda i: [x[i] for x in given]


def mean_over(count: int, fn: Callable[[jax.Array], Any]) -> Estimate:
    """Return the mean and the standard error of `fn(0), ..., fn(count - 1)`.

    One draw at a time, by Welford's update: squares of large means do not cancel. No rounding error
    makes a sum of squares negative.
    """

    def add(sums, i):
        mean, squares = sums
        d = jax.tree.map(lambda x, m: tree.widen(x) - m, fn(i), mean)
        part = jax.tree.map(lambda d: d / (i + 1).astype(d.dtype), d)
        mean = jax.tree.map(jnp.add, mean, part)
        squares = jax.tree.map(lambda s, d, p: s + d * (d - p), squares, d, part)
        return (mean, squares), None

    shape = jax.eval_shape(lambda: jax.tree.map(tree.widen, fn(jnp.zeros((), jnp.int32))))
    zeros = jax.tree.map(lambda x: sharded_like(x, jnp.zeros(x.shape, x.dtype)), shape)
    (mean, squares), _ = fast_convolutions(jax.lax.scan)(
        add, (zeros, zeros), jnp.arange(count, dtype=jnp.int32)
    )
    stderr = jax.tree.map(lambda s: jnp.sqrt(s / (count * (count - 1))), squares)
    return Estimate(mean, stderr)
