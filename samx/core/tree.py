"""Tree arithmetic that `optax.tree` lacks: inner products and norms in float32 or wider.

`optax.tree.norm` accumulates a bfloat16 tree in bfloat16. `optax.tree.vdot` ravels its leaves,
which is an error for explicitly sharded arrays. The sums of products here do neither. Integer
leaves have no gradient and are ignored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_KNOWN_LENGTH: ContextVar[Any] = ContextVar("known_length", default=None)


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


def check_no_keys(name: str, params: Any, keyword: str = "params") -> None:
    """Raise a `ValueError` if a leaf is a random key."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{name}: `{keyword}` must not hold random keys, which have no gradient, got one "
                f"at {keyword}{jax.tree_util.keystr(path)}. Give it to the loss by another way."
            )


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
    """Return the dtype that holds all of these, also if the user has made promotion strict.

    JAX promotes neither floats of 8 bits or less nor integers below 8 bits. Here float32 holds the
    floats, and int32 the integers.
    """

    def promotable(dtype):
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.float32 if jnp.finfo(dtype).bits < 16 else dtype
        is_low = jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8
        return jnp.int32 if is_low else dtype

    found = {np.dtype(promotable(dtype)) for dtype in dtypes}
    if len(found) == 1:  # most trees: a shorter way to the same dtype
        return found.pop()
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*found)


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
    return leaf.astype(wide_dtype(leaf.dtype))


def wide_dtype(dtype: Any) -> Any:
    """Return the dtype in which `widen` returns a leaf."""
    return common_dtype(dtype, jnp.float32)


def conj(tree: Any) -> Any:
    """Return the complex conjugate; real leaves stay as they are, without an operation."""
    return jax.tree.map(lambda x: jnp.conj(x) if jnp.iscomplexobj(x) else x, tree)


def dot(a: Any, b: Any) -> jax.Array:
    """Return the real inner product `Re Σ conj(a)·b` of two trees, one scalar.

    Take a root of it, or divide it, before it scales a tree. XLA copies cheap operations into the
    program of each leaf that they scale, here the additions over all leaves. So the time to compile
    would grow with the square of the number of leaves.
    """

    def product(x, y):
        x, y = widen(x), widen(y)
        dtype = common_dtype(x.dtype, y.dtype)
        z = conj(x.astype(dtype)) * y.astype(dtype)
        return jnp.sum(z.real if jnp.iscomplexobj(z) else z, dtype=real_dtype(x, y))

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = [product(x, y) for x, y in pairs if is_inexact(x)]
    start = jnp.zeros((), real_dtype(*jax.tree.leaves(a), *products))
    return sum((x.astype(start.dtype) for x in products), start=start)


@jax.custom_jvp
def sqrt(x: jax.Array) -> jax.Array:
    """Return the square root; its derivative at 0 is 0, since a zero gradient gives no step."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _(primals: Any, tangents: Any) -> Any:
    root = sqrt(*primals)
    return root, ratio(tangents[0], 2 * root)


def plain_norm(tree: Any) -> jax.Array:
    """Return the global L2 norm of a tree whose squares are known to be in range."""
    return sqrt(dot(tree, tree))


def ratio(x: Any, y: Any) -> jax.Array:
    """Return `x / y`; where `y` is 0, the ratio and its derivative are 0.

    The division comes last, see `dot`.
    """
    is_zero = y == 0
    return jnp.where(is_zero, 0, x) / jnp.where(is_zero, 1, y)


class Length(NamedTuple):
    """The L2 norm of a tree as a fraction, `norm / scale`.

    The squares of `scale * tree` neither overflow nor underflow. `scale` is 1 for every tree whose
    own squares do neither, else a power of 2.
    """

    scale: jax.Array
    norm: jax.Array


def norm(tree: Any) -> jax.Array:
    """Return the global L2 norm over all leaves, one scalar."""
    scale, norm = length(tree)
    return norm / scale


def length(tree: Any) -> Length:
    """Return the global L2 norm over all leaves; it is measured again if squares are out of range.

    The first and the second measurement are one program, the body of a loop that mostly runs once.
    A branch for the second one would hold all the sums a second time.
    """
    leaves = [x for x in jax.tree.leaves(tree) if is_inexact(x)]
    known, found = _KNOWN_LENGTH.get() or ([], None)
    if found is not None and list(map(id, known)) == list(map(id, leaves)):
        return found
    return Length(*_scale_and_norm(leaves))


@contextmanager
def known_length(tree: Any, found: Length) -> Iterator[None]:
    """Let `length` return what was found for this tree; for a branch, which would measure again."""
    token = _KNOWN_LENGTH.set(([x for x in jax.tree.leaves(tree) if is_inexact(x)], found))
    try:
        yield
    finally:
        _KNOWN_LENGTH.reset(token)


@jax.custom_jvp
def _scale_and_norm(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    one = jnp.ones((), real_dtype(*leaves))
    if any(isinstance(x, Tracer) for x in (one, *leaves)):
        scale, squares = _measured(leaves)
    else:  # a loop would be compiled
        scale, squares, is_done = _measure(leaves, one)
        squares = squares if is_done else _measure(leaves, scale)[1]
    return scale, sqrt(squares)


@jax.jit  # several norms of the same gradient are traced once
def _measured(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    """Return the scale, and the sum of squares in range."""

    def loop(leaves):
        one, zero = (_scalar_like(leaves, number) for number in (1.0, 0.0))
        return jax.lax.while_loop(
            lambda last: ~last[-1],
            lambda last: _measure(leaves, last[0]),
            (one, zero, one == 0),
        )[:2]

    if all(x.dtype == wide_dtype(x.dtype) for x in leaves):
        return loop(leaves)
    wide = partial(jax.tree.map, _stored_wide)
    return jax.lax.platform_dependent(leaves, cpu=lambda leaves: loop(wide(leaves)), default=loop)


def _measure(leaves: list[Any], scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `scale`, or a better one; the sum of |scale·x|²; whether it is in range."""
    limits = jnp.finfo(scale.dtype)
    least = sum(map(jnp.size, leaves)) * float(limits.tiny) / float(limits.eps)
    # XLA may multiply the sum of a constant leaf by the square of `up`, which must be finite.
    up, down = 2.0 ** (limits.maxexp // 2 - 1), 2.0 ** -(limits.maxexp * 45 // 64)
    # One number for each leaf: of a common one XLA would store the broadcast, shaped like a leaf.
    scales = jax.lax.optimization_barrier([scale] * len(leaves))
    squares = sum(map(_sum_of_squares, scales, leaves), start=jnp.zeros_like(scale))
    is_small = squares < least  # lost squares would count
    better = jnp.where(squares < jnp.inf, jnp.where(is_small, up, 1.0), down).astype(scale.dtype)
    is_done = (scale != 1) | (better == 1)
    return jnp.where(is_done, scale, better), squares, is_done


def _sum_of_squares(scale: jax.Array, x: Any) -> jax.Array:
    """Return the sum of |scale·x|²."""
    if jnp.iscomplexobj(x):
        return _sum_of_squares(scale, x.real) + _sum_of_squares(scale, x.imag)
    return jnp.sum(jnp.square(scale * x.astype(scale.dtype)))


def _scalar_like(leaves: list[Any], number: float) -> jax.Array:
    """Return a number that varies over the devices as the leaves do, as a loop's start must."""
    dtype = real_dtype(*leaves)
    start = jnp.full((), number, dtype)
    if jax.sharding.get_abstract_mesh().manual_axes:
        start += sum(jnp.zeros_like(x, dtype, shape=()) for x in leaves)
    return start


def _stored_wide(x: jax.Array) -> jax.Array:
    """Return a half-precision leaf as float32, as the CPU stores it in front of a loop anyway.

    XLA has no half precision on the CPU: it computes a gradient in float32, rounds it and widens it
    again. It drops the rounding outside of a loop only. The default layout saves a copy.
    """
    from jax.experimental.layout import Layout, with_layout_constraint  # a slow import

    is_alone = jax.device_count() == 1  # on several devices the layout would cost an all-gather
    default = Layout(tuple(range(x.ndim)))
    return with_layout_constraint(widen(x), default) if is_alone else widen(x)


@_scale_and_norm.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (leaves,), (moves,) = primals, tangents
    scale, norm = _scale_and_norm(leaves)
    slope = ratio(dot(_times(scale, leaves), _times(scale, moves)), norm)
    return (scale, norm), (jnp.zeros_like(scale), slope)


def scaled_norm(scale: jax.Array, tree: Any) -> jax.Array:
    """Return the global L2 norm of `scale * tree`, in range for trees about as long as a `Length`.

    `scale` is that of the `Length`. So only the gradient needs the loop of `length`.
    """
    return plain_norm(_times(scale, tree))


def stored(tree: Any) -> Any:
    """Return the tree, which the compiler must store as it is.

    Without this, it moves factors of a gradient into matrix products, and stores their results too.
    """
    return jax.lax.optimization_barrier(tree)


def _times(scale: jax.Array, tree: Any) -> Any:
    def times(x):
        if not is_inexact(x):
            return x
        dtype = common_dtype(x.dtype, scale.dtype)
        return scale.astype(dtype) * x.astype(dtype)

    return jax.tree.map(times, tree)


def with_length(tree: Any, new: Any, old: Length, norm_eps: Any = 0.0) -> Any:
    """Return the tree in a new length, in float32 or wider; zeros stay zeros.

    `norm_eps` is added to the old length before the division.
    """
    # The product of both factors may be out of range. A factor that stands in a sum too, as the
    # scale does in `scaled_norm`, would be stored in the shape of a leaf.
    first, second = 2 * old.scale, ratio(0.5 * new, old.norm + old.scale * norm_eps)

    wide = jax.tree.map(lambda x: widen(x) if is_inexact(x) else x, tree)
    return scaled(second, scaled(first, wide))


def subtract(a: Any, b: Any) -> Any:
    """Return `a − b`; half-precision leaves become float32."""
    return jax.tree.map(lambda x, y: widen(x) - widen(y), a, b)


def scaled(scale: Any, tree: Any) -> Any:
    """Return `scale·tree` in the dtypes of the tree; integers do not change.

    The scale of a tree of two precisions may be out of the range of its narrow leaves.
    """
    dtypes = [jnp.result_type(scale)] if hasattr(scale, "dtype") else []  # 32 bits of np.float64

    def of(x):
        wide = widen(x)
        dtype = common_dtype(wide.dtype, *dtypes)
        return (jnp.asarray(scale, dtype) * wide.astype(dtype)).astype(x.dtype)

    return jax.tree.map(lambda x: of(x) if is_inexact(x) else x, tree)


def add_scaled(a: Any, scale: Any, b: Any) -> Any:
    """Return `a + scale·b` in the dtypes of `a`; half precision is computed in float32."""
    dtypes = [jnp.result_type(scale)] if hasattr(scale, "dtype") else []

    def added(x, y):
        dtype = common_dtype(wide_dtype(x.dtype), wide_dtype(y.dtype), *dtypes)
        move = jnp.asarray(scale, dtype) * y.astype(dtype)
        return (x.astype(dtype) + move).astype(x.dtype)

    return jax.tree.map(added, a, b)


def combine(a: Any, x: Any, b: Any, y: Any) -> Any:
    """Return `a·x + b·y` in float32 or wider; integers become zero."""

    def combined(x, y):
        return a * widen(x) + b * widen(y) if is_inexact(x) else jnp.zeros_like(x)

    return jax.tree.map(combined, x, y)


def along(a: Any, b: Any, length: Length) -> jax.Array:
    """Return the component of `a` along `b`, `⟨b, a⟩ / ‖b‖`, where `length` is that of `b`."""
    factor = ratio(length.scale, length.norm)
    return dot(_times(factor, b), a)


def reject(a: Any, b: Any, length: Length) -> Any:
    """Return the component of `a` orthogonal to `b`, `a − (⟨b, a⟩ / ‖b‖²) b`, in `a`'s dtypes.

    `length` is that of `b`.
    """
    return add_scaled(a, -ratio(along(a, b, length) * length.scale, length.norm), b)


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
