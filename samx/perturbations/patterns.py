"""Mask patterns: which entries of the parameters are chosen together."""

from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.hyperparams import Default
from samx.perturbations.top_entries import top_entries

Pattern: TypeAlias = Literal["unstructured", "structured"] | tuple[int, int]


def check_pattern(name: str, pattern: Any, sparsity: Any) -> None:
    """Require a known pattern; raise if `sparsity` is given together with a pattern (n, m)."""
    if pattern in ("unstructured", "structured"):
        return
    is_pair = isinstance(pattern, tuple) and len(pattern) == 2
    if not (is_pair and all(is_integer(x) for x in pattern) and 0 < pattern[0] <= pattern[1]):
        raise ValueError(
            f"{name}: `pattern` must be 'unstructured', 'structured' or two integers (n, m) with "
            f"0 < n <= m, got {pattern!r}"
        )
    if not isinstance(sparsity, Default):
        raise ValueError(
            f"{name}: got `sparsity` together with `pattern` {pattern}, which says how many of "
            "each are perturbed; leave one of them out (under optax.inject_hyperparams, which "
            "fills in defaults, also pass static_args=('sparsity',))"
        )


def is_integer(x: Any) -> bool:
    """Return whether this is an integer of Python or NumPy."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def chosen(name: str, pattern: Pattern, scores: Any, num_kept: Any) -> Any:
    """Return the mask of the largest scores; (n, m) sets its own count in place of `num_kept`."""
    if pattern == "unstructured":
        return top_entries(scores, num_kept)
    if pattern == "structured":
        return _whole_leaves(scores, num_kept)
    return jax.tree_util.tree_map_with_path(partial(_n_of_m, name, *pattern), scores)


def _whole_leaves(scores: Any, num_kept: Any) -> Any:
    """Choose whole leaves in the order of their means, until `num_kept` entries are reached."""
    leaves, structure = jax.tree.flatten(scores)
    floating = [tree.is_inexact(leaf) for leaf in leaves]
    means = jnp.stack(
        [jnp.mean(x) if ok else jnp.float32(-1) for x, ok in zip(leaves, floating, strict=True)]
    )
    sizes = jnp.array([x.size * ok for x, ok in zip(leaves, floating, strict=True)], jnp.int32)
    order = jnp.argsort(-means, stable=True)
    before = jnp.cumsum(sizes[order]) - sizes[order]
    is_kept = jnp.zeros(len(leaves), bool).at[order].set(before < num_kept)
    masks = [
        jnp.broadcast_to(is_kept[i] & ok, x.shape)
        for i, (x, ok) in enumerate(zip(leaves, floating, strict=True))
    ]
    return jax.tree.unflatten(structure, masks)


def _n_of_m(name: str, n: int, m: int, path: Any, scores: jax.Array) -> jax.Array:
    """Choose the n largest of each m consecutive entries, and all entries of a vector."""
    if not tree.is_inexact(scores):
        return jnp.zeros_like(scores, bool)
    if scores.ndim < 2:
        return jnp.ones_like(scores, bool)
    if scores.size % m:
        raise ValueError(
            f"{name}: `pattern` {(n, m)} needs leaves whose size is a multiple of {m}, got "
            f"{jax.tree_util.keystr(path)} of shape {scores.shape}"
        )
    order = jnp.argsort(-scores.reshape(-1, m), axis=1, stable=True)
    return (jnp.argsort(order, axis=1) < n).reshape(scores.shape)
