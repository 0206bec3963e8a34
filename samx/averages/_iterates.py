"""The arithmetic of averages: iterates, a mean that moves, and stacks of copies."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.transformation import no_params


def check_params(name: str, params: Any) -> None:
    """Require parameters, which hold no random keys."""
    if params is None:
        raise ValueError(no_params(name))
    tree.check_no_keys(name, params)


def first_mean(params: Any) -> Any:
    """Return the mean before the first iterate: the parameters, in buffers of its own."""
    return jax.tree.map(lambda w: jnp.array(wide(w), copy=True), params)


def iterate_after(name: str, params: Any, updates: Any) -> Any:
    """Return the parameters after the step; half precision as float32."""
    if params is None:
        raise ValueError(no_params(name))
    return jax.tree.map(wide, optax.apply_updates(params, updates))


def moved(mean: Any, to: Any, share: jax.Array) -> Any:
    """Return `mean + share·(to − mean)`; exactly `to` if the share is 1, and `mean` if it is 0.

    Entries of `to` that are not finite do not move the mean. Integers are those of `to`.
    """

    def of(m, x):
        if not tree.is_inexact(m):
            return x
        is_new, is_old = jnp.isfinite(x), jnp.isfinite(m)
        old = jnp.where(is_old, m, 0)
        step = old + share.astype(m.dtype) * (jnp.where(is_new, x, 0) - old)
        step = jnp.where((share == 1) | ~is_old, x, step)
        return jnp.where(is_new & (share != 0), step, m)

    return jax.tree.map(of, mean, to)


def empty_stack(params: Any, size: int) -> Any:
    """Return zeros for `size` copies of the parameters, on a leading axis; integers have none."""

    def of(w):
        w = wide(w)
        if not tree.is_inexact(w):
            return jnp.array(w, copy=True)
        return jnp.zeros_like(jnp.broadcast_to(w, (size, *w.shape)))

    return jax.tree.map(of, params)


def size_of(stack: Any) -> int:
    """Return the number of copies; 1 if there are integers only."""
    return max((s.shape[0] for s in jax.tree.leaves(stack) if tree.is_inexact(s)), default=1)


def put(stack: Any, copy: Any, place: jax.Array, is_due: jax.Array) -> Any:
    """Return the stack with a copy at this place, if it is due."""

    def of(s, x):
        if not tree.is_inexact(x):
            return x
        old = jax.lax.dynamic_index_in_dim(s, place, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(s, jnp.where(is_due, x, old), place, 0)

    return jax.tree.map(of, stack, copy)


def append(stack: Any, copy: Any) -> Any:
    """Return the stack without its first copy, and with a new last one."""

    def of(s, x):
        return jnp.concatenate([s[1:], x[None]]) if tree.is_inexact(x) else x

    return jax.tree.map(of, stack, copy)


def at(stack: Any, place: int) -> Any:
    """Return the copy at this place."""
    return jax.tree.map(lambda s: s[place] if tree.is_inexact(s) else s, stack)


def mean_of(stack: Any, is_chosen: jax.Array, otherwise: Any) -> Any:
    """Return the mean of the chosen copies, entry by entry of those that are finite.

    An entry of which there is none, and an integer, is that of `otherwise`.
    """

    def of(s, x):
        if not tree.is_inexact(s):
            return x
        is_in = jnp.isfinite(s) & jnp.expand_dims(is_chosen, tuple(range(1, s.ndim)))
        count = jnp.sum(is_in, axis=0)
        total = jnp.sum(jnp.where(is_in, s, 0), axis=0)
        return jnp.where(count == 0, x, total / jnp.maximum(count, 1).astype(s.dtype))

    return jax.tree.map(of, stack, otherwise)


def wide(w: Any) -> jax.Array:
    """Return a half-precision leaf as float32, and every other one unchanged."""
    return tree.widen(w) if tree.is_inexact(w) else jnp.asarray(w)
