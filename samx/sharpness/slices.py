"""The loss along lines and planes through the parameters. Public in `samx.sharpness`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.closures import Closure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import as_array, check_choice
from samx.perturbations.filters import as_filter_axis, axis_of, filter_norms
from samx.sharpness.coordinates import Coordinates, Vector
from samx.sharpness.objective import as_objective

_NORM_EPS = 1e-10  # of the authors' code


def filter_normalize(
    direction: Any,
    params: Any,
    *,
    filter_axis: int = -1,
    vectors: Literal["zero", "keep"] = "zero",
) -> Any:
    """Scale a direction so that each of its filters is as long as that of the parameters.

        d_j ‖w_j‖ / (‖d_j‖ + 1e-10)      for each filter j: one index of a kernel's output axis

    Slices of networks whose filters differ only in scale then look the same.

    Args:
        direction: The direction d, a tree like `params`, for example random normal numbers.
        params: The parameters w, any pytree.
        filter_axis: The output axis of kernels, -1 in JAX: [in, out], and [h, w, in, out] for
            convolutions; default -1.
        vectors: What becomes of leaves with at most one axis, biases and scales of normalization:
            "zero", the default, or "keep", unchanged.

    Returns:
        A tree like `params`, in float32 or wider, with zeros at the integers.

    Raises:
        ValueError: If `direction` is not a tree like `params`, a kernel has no axis `filter_axis`,
            or `vectors` is neither of the two.
        TypeError: If a tree holds something other than arrays, or `filter_axis` is not an integer.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
        >>> d = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
        >>> d = samx.sharpness.filter_normalize(d, params)
        >>> [[round(float(x), 3) for x in row] for row in d["kernel"]], d["bias"].tolist()
        ([[3.536, 1.414], [3.536, 1.414]], [0.0, 0.0])

    References:
        Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
        NeurIPS 2018, https://arxiv.org/abs/1712.09913 (tomgoldstein/loss-landscape).

    Notes:
        "zero" is the authors' `ignore="biasbn"`. Their other setting copies the parameters into the
        direction. Cost: two norms of each filter.
    """
    check_choice("vectors", vectors, ("zero", "keep"))
    space = Coordinates("filter_normalize", params)
    filter_axis = as_filter_axis(filter_axis)

    def of_leaf(path, d, w):
        if not tree.is_inexact(w) or (d.ndim < 2 and vectors == "zero"):
            return jnp.zeros_like(d)
        if d.ndim < 2:
            return d
        axis = axis_of("filter_normalize", path, w, filter_axis)
        return d / (filter_norms(d, axis) + _NORM_EPS) * filter_norms(tree.widen(w), axis)

    d = space.vector(space.of("direction", direction))
    return jax.tree_util.tree_map_with_path(of_leaf, d, params)


def slice_1d(f: Any, params: Any, direction: Any, alphas: Any) -> jax.Array:
    """Evaluate the loss along a line.

        L(w + α d)

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        direction: The direction d, a tree like `params`; see `samx.sharpness.filter_normalize`.
        alphas: The steps α, `[n]`.

    Returns:
        The losses, `[n]`.

    Raises:
        ValueError: If `direction` is not a tree like `params`, or `alphas` is not `[n]`.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> w, d = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> samx.sharpness.slice_1d(lambda w: w @ w, w, d, [-1.0, 0.0, 2.0]).tolist()
        [2.0, 1.0, 5.0]

    References:
        Li et al., NeurIPS 2018, https://arxiv.org/abs/1712.09913

    Notes:
        Cost: n forward passes, one at a time, and one copy of the parameters.
    """
    space = Coordinates("slice_1d", params)
    loss = as_objective("slice_1d", f).closure("slice_1d").compose(space.point)
    steps, d = _as_steps("alphas", alphas, space), space.of("direction", direction)
    return losses_at(loss, lambda a: _moved(space.start, a, d), steps)


def slice_2d(f: Any, params: Any, directions: Any, alphas: Any, betas: Any) -> jax.Array:
    """Evaluate the loss on a grid in a plane.

        L(w + α d₁ + β d₂)

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        directions: The pair of trees (d₁, d₂), each like `params`; or one tree like `params` with
            an axis of length 2 in front, as `samx.sharpness.eigenvalues` returns its vectors.
        alphas: The steps α, `[n]`.
        betas: The steps β, `[m]`.

    Returns:
        The losses, `[n, m]`.

    Raises:
        ValueError: If `directions` are not two trees like `params`, or steps are not a vector.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> def loss(w):
        ...     return w[0] + 10 * w[1]
        >>> w, directions = jnp.zeros(2), jnp.eye(2)
        >>> samx.sharpness.slice_2d(loss, w, directions, [0.0, 1.0], [-1.0, 1.0]).tolist()
        [[-10.0, 10.0], [-9.0, 11.0]]

    References:
        Li et al., NeurIPS 2018, https://arxiv.org/abs/1712.09913

    Notes:
        Cost: n · m forward passes, one at a time, and one copy of the parameters.
    """
    space = Coordinates("slice_2d", params)
    loss = as_objective("slice_2d", f).closure("slice_2d").compose(space.point)
    a, b = _as_steps("alphas", alphas, space), _as_steps("betas", betas, space)
    d, e = _pair(directions, space)

    def point(steps):
        return _moved(_moved(space.start, steps[0], d), steps[1], e)

    grid = jnp.repeat(a, b.size), jnp.tile(b, a.size)
    return losses_at(loss, point, grid).reshape(a.size, b.size)


def losses_at(loss: Closure, point: Callable[[Any], Vector], steps: Any) -> jax.Array:
    """Return the losses at `point(step)` for each step, one at a time, in float32 or wider."""
    return fast_convolutions(jax.lax.map)(lambda step: tree.widen(loss(point(step))), steps)


def _moved(x: Vector, step: jax.Array, d: Vector) -> Vector:
    return [a + scaled(step, b) for a, b in zip(x, d, strict=True)]


def scaled(step: jax.Array, x: jax.Array) -> jax.Array:
    """Return `step * x` in the dtype of x."""
    return step.astype(x.dtype) * x


def _as_steps(keyword: str, steps: Any, space: Coordinates) -> jax.Array:
    found = as_array(keyword, steps, "a vector of real numbers")
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{space.name}: `{keyword}` must have the shape [n], got {found.shape}")
    return found.astype(space.dtype)


def _pair(directions: Any, space: Coordinates) -> list[Vector]:
    """Return two vectors, from a pair of trees like `params` or from a stack of two vectors."""
    if jax.tree.structure(directions) == jax.tree.structure(space.params):
        stack = space.stack("directions", directions)
        if len(stack[0]) != 2:
            raise ValueError(f"slice_2d: `directions` must be two directions, got {len(stack[0])}")
        return [[x[i] for x in stack] for i in range(2)]
    if not isinstance(directions, tuple | list) or len(directions) != 2:
        raise ValueError(
            "slice_2d: `directions` must be a pair of trees like `params`, or one tree with an "
            f"axis of length 2 in front, got {jax.tree.structure(directions)}"
        )
    return [space.of("directions", direction) for direction in directions]
