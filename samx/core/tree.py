"""Tree arithmetic that `optax.tree` lacks: inner products accumulated in float32 or wider.

`optax.tree.norm` accumulates a bfloat16 tree in bfloat16, and `optax.tree.vdot` ravels its leaves,
which explicitly sharded arrays refuse; a sum of products does neither. Integer leaves carry no
gradient and count nowhere.
"""

from typing import Any

import jax
import jax.numpy as jnp


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf has a gradient: floating or complex, not integer, boolean, key or float0."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def real_dtype(*leaves: Any) -> Any:
    """float32, or float64 if a leaf is that wide: the dtype of norms, losses and readings."""
    wide = [jnp.finfo(jnp.result_type(leaf)).dtype for leaf in leaves if is_inexact(leaf)]
    return jnp.result_type(jnp.float32, *wide)


def coarsest_eps(tree: Any) -> float:
    """The largest machine epsilon of the leaves."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree) if is_inexact(x))


def widen(leaf: Any) -> jax.Array:
    """A half-precision leaf as float32; every other leaf as it is."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def dot(a: Any, b: Any) -> jax.Array:
    """The real inner product `Re Σ conj(a)·b` of two trees, one scalar."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = [
        jnp.sum(jnp.real(jnp.conj(widen(x)) * widen(y)), dtype=real_dtype(x, y))
        for x, y in pairs
        if is_inexact(x)
    ]
    return sum(products, start=jnp.zeros((), real_dtype(*jax.tree.leaves(a))))


def norm(tree: Any) -> jax.Array:
    """The global L2 norm over all leaves, one scalar."""
    return jnp.sqrt(dot(tree, tree))


def subtract(a: Any, b: Any) -> Any:
    """`a − b`, half precision in float32."""
    return jax.tree.map(lambda x, y: widen(x) - widen(y), a, b)


def scaled(scale: Any, tree: Any) -> Any:
    """`scale·tree` in the dtypes of the tree, integers as they are."""
    return jax.tree.map(lambda x: (scale * widen(x)).astype(x.dtype) if is_inexact(x) else x, tree)


def add_scaled(a: Any, scale: Any, b: Any) -> Any:
    """`a + scale·b` in the dtypes of `a`, half precision computed in float32."""
    return jax.tree.map(lambda x, y: (widen(x) + scale * widen(y)).astype(x.dtype), a, b)


def reject(a: Any, b: Any) -> Any:
    """The part of `a` across `b`, `a − (⟨b, a⟩ / ‖b‖²) b`, in the dtypes of `a`."""
    square = dot(b, b)
    return add_scaled(a, -dot(b, a) / jnp.where(square == 0, 1, square), b)


def on_line(a: Any, b: Any, weight: Any) -> Any:
    """`a + weight·(b − a)` in the dtypes of `b`; `b` to the last bit where the weight is 1."""
    return add_scaled(b, weight - 1, subtract(b, a))


def cast_like(tree: Any, like: Any) -> Any:
    """`tree` in the dtypes of `like`."""
    return jax.tree.map(lambda x, w: x.astype(jnp.result_type(w)), tree, like)


def where(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Select between two trees of any dtype (integers and random keys too) by a scalar."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def keep(tree: Any, chosen: Any) -> Any:
    """`tree` on the leaves where the tree of booleans `chosen` is true, zeros on the others."""
    return jax.tree.map(lambda x, is_kept: x if is_kept else jnp.zeros_like(x), tree, chosen)


def masked(tree: Any, mask: Any) -> Any:
    """`tree` where the tree of boolean arrays `mask` is true, zeros elsewhere."""
    return jax.tree.map(lambda x, is_kept: jnp.where(is_kept, x, 0), tree, mask)


def keep_floating(tree: Any, like: Any) -> Any:
    """`tree` where `like` is floating, zeros of `like` where it is an integer."""
    return jax.tree.map(lambda x, w: x if is_inexact(w) else jnp.zeros_like(w), tree, like)
