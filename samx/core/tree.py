"""Tree arithmetic that `optax.tree` lacks: inner products accumulated in float32 or wider.

`optax.tree.norm` accumulates a bfloat16 tree in bfloat16. `optax.tree.vdot` ravels its leaves,
which is an error for explicitly sharded arrays. The sums of products here do neither. Integer
leaves have no gradient and are ignored.
"""

from typing import Any

import jax
import jax.numpy as jnp


def is_inexact(leaf: Any) -> bool:
    """Return whether a leaf is floating or complex.

    Other leaves have no gradient: integers, booleans, random keys and float0.
    """
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array, the shape of one, or a number."""
    dtype = getattr(leaf, "dtype", None)
    if isinstance(leaf, int):
        return -(2**63) <= leaf < 2**63
    if isinstance(leaf, type) or dtype is None:
        return isinstance(leaf, float | complex)
    return hasattr(leaf, "shape") and getattr(dtype, "kind", "V") not in "OSUMm"


def check_arrays(name: str, tree: Any, *, has_shapes: bool = False) -> None:
    """Raise a `TypeError` if a leaf is not an array, a number or, if allowed, a shape."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        if not is_array(leaf) or (is_shape and not has_shapes):
            where = f"`{name}`{jax.tree_util.keystr(path)}"
            raise TypeError(f"{where} must be an array, got a {type(leaf).__name__}")


def check_like(name: str, tree: Any, like_name: str, like: Any) -> None:
    """Require a tree like another one: in structure, in the shapes of floating leaves, and real."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    try:
        others = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must have the structure of `{like_name}`, {structure}, "
            f"got {jax.tree.structure(tree)}"
        ) from error
    for (path, w), x in zip(leaves, others, strict=True):
        where = f"`{name}`{jax.tree_util.keystr(path)}"
        if not is_inexact(w) and (x is None or jax.tree_util.all_leaves([x])):
            continue
        if not is_array(x):
            raise TypeError(f"{where} must be an array, got a {type(x).__name__}")
        if jnp.shape(x) != jnp.shape(w):
            wanted = f"the shape of `{like_name}`, {jnp.shape(w)}"
            raise ValueError(f"{where} must have {wanted}, got {jnp.shape(x)}")
        if jnp.iscomplexobj(x) and not jnp.iscomplexobj(w):
            raise TypeError(f"{where} must be real as `{like_name}` is, got complex numbers")


def common_dtype(*dtypes: Any) -> Any:
    """Return the dtype that holds all of these, also if the user has made promotion strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def real_dtype(*leaves: Any) -> Any:
    """Return the dtype of norms, losses and readings: float32, or float64 if a leaf is so wide."""
    wide = [jnp.finfo(jnp.result_type(leaf)).dtype for leaf in leaves if is_inexact(leaf)]
    return common_dtype(jnp.float32, *wide)


def coarsest_eps(tree: Any) -> float:
    """Return the largest machine epsilon of the leaves."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree) if is_inexact(x))


def widen(leaf: Any) -> jax.Array:
    """Return a half-precision leaf as float32, and every other leaf unchanged."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(common_dtype(leaf.dtype, jnp.float32))


def conj(tree: Any) -> Any:
    """Return the complex conjugate; real leaves stay as they are, without an operation."""
    return jax.tree.map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, tree)


def dot(a: Any, b: Any) -> jax.Array:
    """Return the real inner product `Re Σ conj(a)·b` of two trees, one scalar."""

    def product(x, y):
        z = conj(widen(x)) * widen(y)
        return jnp.sum(z.real if jnp.iscomplexobj(z) else z, dtype=real_dtype(x, y))

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = [product(x, y) for x, y in pairs if is_inexact(x)]
    return sum(products, start=jnp.zeros((), real_dtype(*jax.tree.leaves(a))))


def sqrt(x: jax.Array) -> jax.Array:
    """Return the square root; its derivative at 0 is 0, since a zero gradient gives no step."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def norm(tree: Any) -> jax.Array:
    """Return the global L2 norm over all leaves, one scalar."""
    return sqrt(dot(tree, tree))


def subtract(a: Any, b: Any) -> Any:
    """Return `a − b`; half-precision leaves become float32."""
    return jax.tree.map(lambda x, y: widen(x) - widen(y), a, b)


def scaled(scale: Any, tree: Any) -> Any:
    """Return `scale·tree` in the dtypes of the tree; integers do not change."""
    return jax.tree.map(lambda x: (scale * widen(x)).astype(x.dtype) if is_inexact(x) else x, tree)


def add_scaled(a: Any, scale: Any, b: Any) -> Any:
    """Return `a + scale·b` in the dtypes of `a`; half precision is computed in float32."""
    return jax.tree.map(lambda x, y: (widen(x) + scale * widen(y)).astype(x.dtype), a, b)


def reject(a: Any, b: Any) -> Any:
    """Return the component of `a` orthogonal to `b`, `a − (⟨b, a⟩ / ‖b‖²) b`, in `a`'s dtypes."""
    square = dot(b, b)
    return add_scaled(a, -dot(b, a) / jnp.where(square == 0, 1, square), b)


def on_line(a: Any, b: Any, weight: Any) -> Any:
    """Return `a + weight·(b − a)` in the dtypes of `b`; exactly `b` if the weight is 1."""
    return add_scaled(b, weight - 1, subtract(b, a))


def cast_like(tree: Any, like: Any) -> Any:
    """Return `tree` in the dtypes of `like`."""
    return jax.tree.map(lambda x, w: x.astype(jnp.result_type(w)), tree, like)


def where(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Select between two trees of any dtype (integers and random keys too) by a scalar."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def if_finite(new: Any, old: Any) -> Any:
    """Return `new` if all its numbers are finite, else `old`: what a state keeps of a bad step."""
    is_finite = jnp.asarray(True)
    for x in filter(is_inexact, jax.tree.leaves(new)):
        is_finite &= jnp.all(jnp.isfinite(x))
    return where(is_finite, new, old)


def keep(tree: Any, chosen: Any) -> Any:
    """Return `tree` with zeros in the leaves where the tree of booleans `chosen` is false."""
    return jax.tree.map(lambda x, is_kept: x if is_kept else jnp.zeros_like(x), tree, chosen)


def masked(tree: Any, mask: Any) -> Any:
    """Return `tree` with zeros where the tree of boolean arrays `mask` is false."""
    return jax.tree.map(lambda x, is_kept: jnp.where(is_kept, x, 0), tree, mask)


def keep_floating(tree: Any, like: Any) -> Any:
    """Return `tree`, with zeros like `like` in the leaves where `like` is an integer."""
    return jax.tree.map(lambda x, w: x if is_inexact(w) else jnp.zeros_like(w), tree, like)
