"""Which of two computations comes first, where the compiler is free to choose.

Simulated devices of the CPU wait for each other in every message. If two parts of a program that
send messages do not depend on each other, the devices may begin with different ones, and wait for
ever. On one device, two parts at the same time take more memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree


def after(x: Any, other: Any) -> Any:
    """Return the tree `x`, in a way that it is known only when `other` is."""
    return tree.where(never_after(other), jax.tree.map(jnp.zeros_like, x), x)


def never_after(x: Any) -> jax.Array:
    """Return False, in a way that the compiler knows only when it knows the tree `x`."""
    leaves = [leaf for leaf in jax.tree.leaves(x) if tree.is_inexact(leaf)]
    dtype = tree.real_dtype(*leaves)
    total = sum((jnp.sum(jnp.abs(y), dtype=dtype) for y in leaves), start=jnp.zeros((), dtype))
    return _is_impossible(jax.lax.stop_gradient(total))


@jax.custom_batching.custom_vmap
def _is_impossible(number: jax.Array) -> jax.Array:
    return number < -1  # XLA knows that no |x| is below 0, and would leave the comparison out


@_is_impossible.def_vmap
def _(axis_size: int, in_batched: Any, number: jax.Array) -> tuple[jax.Array, bool]:
    """Return one answer for all lanes of `jax.vmap`, so that a branch on it stays a real one."""
    del axis_size, in_batched
    return _is_impossible(jnp.sum(number)), False
