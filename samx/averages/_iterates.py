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
    return jax.tree.map(lambda w: jnp.array(_wide(w), copy=True), params)


def iterate_after(name: str, params: Any, updates: Any) -> Any:
    """Return the parameters after the step; half precision as float32."""
    if params is None:
        raise ValueError(no_params(name))
    return jax.tree.map(_wide, optax.apply_updates(params, updates))


def moved(mean: Any, to: Any, share: jax.Array) -> Any:
    """Return `mean + share·(to − mean)`; exactly `to` if the share is 1, and `mean` if it is 0.

    Entries of `to` that are not finite do not move the mean. Integers are those of `to`.
    """

    def of(m, x):
        if not tree.is_inexact(m):
            return x
        step = jnp.where(share == 1, x, m + share.astype(m.dtype) * (x - m))
        return jnp.where(jnp.isfinite(x) & (share != 0), step, m)

    return jax.tree.map(of, mean, to)


def empty_stack(params: Any, size: int) -> Any:
    """Return zeros for `size` copies of the parameters, on a leading axis; integers have none."""

    def of(w):
        w = _wide(w)
        if not tree.is_inexact(w):
            return jnp.array(w, copy=True)
        return jnp.zeros_like(jnp.broadcast_to(w, (size, *w.shape)))

    return jax.tree.map(of, params)


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


def mean_of(stack: Any, is_chosen: jax.Array) -> Any:
    """Return the mean of the chosen copies, entry by entry of those that are finite; else NaN."""

    def of(s):
        if not tree.is_inexact(s):
            return s
        is_in = jnp.isfinite(s) & jnp.expand_dims(is_chosen, tuple(range(1, s.ndim)))
        return jnp.sum(jnp.where(is_in, s, 0), axis=0) / jnp.sum(is_in, axis=0).astype(s.dtype)

    return jax.tree.map(of, stack)


def _wide(w: Any) -> jax.Array:
    return tree.widen(w) if tree.is_inexact(w) else jnp.asarray(w)
