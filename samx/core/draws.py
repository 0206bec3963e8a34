"""Random numbers in the shapes and shardings of a tree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree


def normal_like(key: jax.Array, step: Any, like: Any, draw: Any = 0) -> Any:
    """Draw standard normal numbers, float32 or wider; `draw` counts the draws of one step."""

    def sample(key, leaf):
        return jax.random.normal(key, leaf.shape, tree.wide_dtype(leaf.dtype))

    return drawn_like(sample, jax.random.fold_in(key, draw), step, like)


def signs_like(key: jax.Array, step: Any, like: Any, draw: Any = 0) -> Any:
    """Draw random signs, float32 or wider; at complex leaves for both parts."""

    def sample(key, leaf):
        dtype = tree.wide_dtype(leaf.dtype)
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            return jax.random.rademacher(key, leaf.shape, dtype)
        parts = jax.random.rademacher(key, (2, *leaf.shape), leaf.real.dtype)
        return jax.lax.complex(parts[0], parts[1])

    return drawn_like(sample, jax.random.fold_in(key, draw), step, like)


def drawn_like(
    sample: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, step: Any, like: Any
) -> Any:
    """Draw `sample(key, leaf)` for each floating leaf, and zeros for the others.

    In a step each leaf is drawn in a branch, which is always taken: otherwise XLA would draw all
    leaves at once, and hold the bits of all of them.
    """
    leaves, structure = jax.tree.flatten(like)
    key = jax.random.fold_in(key, step)

    def draw(i, leaf):
        if not tree.is_inexact(leaf):
            return jnp.zeros_like(leaf)
        dtype = jax.eval_shape(sample, key, leaf).dtype
        zeros = jnp.zeros_like(leaf, dtype)  # sharded like the leaf

        def drawn():
            return sample(jax.random.fold_in(key, i), leaf) + zeros

        is_initial = isinstance(step, int)
        return drawn() if is_initial else jax.lax.cond(step >= 0, drawn, lambda: zeros)

    return jax.tree.unflatten(structure, [draw(i, leaf) for i, leaf in enumerate(leaves)])
