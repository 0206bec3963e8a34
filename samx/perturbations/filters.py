"""Filters: the weights of one output of a layer. Public in `samx.perturbations`.

A filter of a kernel is one index of its output axis, the last one in Flax: `[in, out]`, and
`[h, w, in, out]` for convolutions. A leaf with one axis, such as a bias, is one filter.
"""

import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samx.core import tree
from samx.core.aliases import Radius, Transformation
from samx.core.hyperparams import check_choice, check_hyperparam
from samx.core.transformation import checked_transformation
from samx.perturbations.balls import along, climbing
from samx.perturbations.metrics import Metric, checked_metric


def filterwise(scale: Literal["norm", "rms"] = "norm", *, filter_axis: int = -1) -> Metric:
    """Return the filter-wise metric: each filter may move in proportion to its norm.

        T = ‖w_j‖                   for each filter j: one index of a kernel's output axis
        T = ‖w_j‖ / √size           with "rms"

    Args:
        scale: "norm", the default, or "rms": the norm divided by the square root of the number of
            weights in the filter.
        filter_axis: The output axis of kernels; default -1, Flax's. A leaf with fewer than two axes
            is one filter.

    Returns:
        A metric, `params -> T`; a kernel's T has axes of length 1 but for its output axis.

    Raises:
        ValueError: If `scale` is unknown; when used, if a kernel has no axis `filter_axis`.
        TypeError: If `filter_axis` is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import filterwise
        >>> T = filterwise()({"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(4)})
        >>> T["kernel"].tolist(), T["bias"].tolist()
        ([[5.0, 1.0]], [2.0])

    References:
        Bisla, Wang, Choromanska, "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep
        Learning Optimization Landscape", AISTATS 2022, https://arxiv.org/abs/2201.08025; Li et al.,
        "Efficient Generalization Improvement Guided by Random Weight Perturbation", 2022,
        https://arxiv.org/abs/2211.11489

    Notes:
        A filter of zeros does not move. PyTorch's first axis is the output axis; here it is the
        last. Filter-wise ASAM, or what comes close to it: see `samx.asam`. For kernels that
        `nnx.scan` stacks, `[layers, in, out]`, use `per_layer`. Cost: one norm per filter.
    """
    check_choice("scale", scale, ("norm", "rms"))
    axis = as_filter_axis(filter_axis)

    def of(path, w):
        if not tree.is_inexact(w):
            return 1.0
        w = tree.widen(w)
        norms = filter_norms(w, axis_of("filterwise", path, w, axis))
        return norms if scale == "norm" else norms / np.sqrt(max(w.size // max(norms.size, 1), 1))

    return lambda params: jax.tree_util.tree_map_with_path(of, params)


def centralize(*, filter_axis: int = -1) -> Transformation:
    """Subtract from the gradient of each kernel its mean over the inputs: gradient centralization.

        g_j = g_j − mean(g_j)       for each filter j of a kernel; leaves with one axis pass through

    Args:
        filter_axis: The output axis of kernels; default -1, Flax's.

    Returns:
        An optax transformation `g -> g`. Half-precision gradients give float32.

    Raises:
        ValueError: In `update`, if a kernel has no axis `filter_axis`.
        TypeError: If `filter_axis` is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import centralize
        >>> gc, g = centralize(), jnp.array([[1.0, 4.0], [3.0, 0.0]])
        >>> gc.update(g, gc.init(g))[0].tolist()
        [[-1.0, 2.0], [1.0, -2.0]]

    References:
        Yong, Huang, Hua, Zhang, "Gradient Centralization: A New Optimization Technique for Deep
        Neural Networks", ECCV 2020, https://arxiv.org/abs/2004.01461

    Notes:
        `optax.centralize` averages over all axes but the first, which is right for PyTorch's
        `[out, in]`, and wrong for Flax's `[in, out]`. For kernels that `nnx.scan` stacks, `[layers,
        in, out]`, use `per_layer`. Cost: elementwise work, no state.
    """
    axis = as_filter_axis(filter_axis)

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        return centralized("centralize", updates, axis), state

    return checked_transformation("centralize", optax.init_empty_state, update_fn)


def centralized_ball(
    rho: Radius,
    metric: Metric | None = None,
    *,
    norm: Literal["raw", "centralized"] = "raw",
    filter_axis: int = -1,
) -> Transformation:
    """Climb along the centralized gradient: the ascent of GCSAM.

        T = metric(w);  GC: see `centralize`
        ε = ρ T² GC(g) / ‖T g‖              "raw", as the code: the step is shorter than ρ
        ε = ρ T² GC(g) / ‖T GC(g)‖          "centralized", as a third party transcribes the paper

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`.
        norm: Which gradient is as long as ρ; default "raw".
        filter_axis: The output axis of kernels; default -1, Flax's.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number, or `norm` is unknown; in `update`, if a kernel
            has no axis `filter_axis`.
        TypeError: If `rho` is neither a number nor a schedule, or `filter_axis` is not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import centralized_ball
        >>> g = jnp.array([[3.0], [0.0], [0.0], [4.0]])
        >>> for norm in ("raw", "centralized"):
        ...     ball = centralized_ball(1.0, norm=norm)
        ...     eps, _ = ball.update(g, ball.init(g), g)
        ...     print([round(float(x), 2) for x in eps.ravel()])
        [0.25, -0.35, -0.35, 0.45]
        [0.35, -0.49, -0.49, 0.63]

    References:
        Hassan, Vakanski, Zhang, Xian, "GCSAM: Gradient Centralized Sharpness Aware Minimization",
        2025, https://arxiv.org/abs/2501.11584 (Mohamed-Hassan22/GCSAM)

    Notes:
        Cost: one norm, elementwise work. `static_args`: `metric`, `norm`, `filter_axis`.
    """
    metric = checked_metric("centralized_ball", metric)
    check_hyperparam("rho", rho, 0)
    check_choice("norm", norm, ("raw", "centralized"))
    axis = as_filter_axis(filter_axis)

    def climb(g, params, radius):
        of_filters = centralized("centralized_ball", g, axis)
        measured = g if norm == "raw" else of_filters
        return along(of_filters, metric(params), radius, measured=measured)

    return climbing(climb, rho)


def centralized(name: str, g: Any, filter_axis: int) -> Any:
    """Return the tree, each filter of a kernel without its mean; half precision becomes float32."""

    def of(path, g):
        if not tree.is_inexact(g) or jnp.ndim(g) < 2:
            return g
        others = _others(g, axis_of(name, path, g, filter_axis))
        g = tree.widen(g)
        return g - jnp.mean(g, axis=others, keepdims=True)

    return jax.tree_util.tree_map_with_path(of, g)


def as_filter_axis(axis: Any) -> int:
    """Return the output axis of kernels; a `TypeError` if it is not an integer."""
    try:
        found = operator.index(axis)
    except TypeError:
        found = None
    if found is None or isinstance(axis, bool | np.bool_ | jax.Array) or np.ndim(axis):
        raise TypeError(f"`filter_axis` must be a Python int, got {axis!r}")
    return found


def axis_of(name: str, path: Any, w: Any, filter_axis: int) -> int | None:
    """Return the output axis of a leaf, `None` if the leaf is one filter."""
    if jnp.ndim(w) < 2:
        return None
    if not -jnp.ndim(w) <= filter_axis < jnp.ndim(w):
        raise ValueError(
            f"{name}: `filter_axis` must be an axis of every kernel, but "
            f"params{jax.tree_util.keystr(path)} has the shape {jnp.shape(w)}, got {filter_axis}"
        )
    return filter_axis % jnp.ndim(w)


def filter_norms(w: jax.Array, axis: int | None) -> jax.Array:
    """Return the norm of each filter, with axes of length 1; squares do not leave their range."""
    others = _others(w, axis)
    largest = jnp.max(jnp.abs(w), axis=others, keepdims=True, initial=0)
    parts = jnp.abs(tree.ratio(w, largest))
    return largest * tree.sqrt(jnp.sum(parts * parts, axis=others, keepdims=True))


def _others(w: jax.Array, axis: int | None) -> tuple[int, ...]:
    return tuple(i for i in range(jnp.ndim(w)) if i != axis)


def filter_sums(x: jax.Array, filter_axis: int = -1) -> jax.Array:
    """Return the sum over each filter of a kernel, with axes of length 1; vectors stay."""
    return jnp.sum(x, axis=_others(x, filter_axis % x.ndim), keepdims=True) if x.ndim > 1 else x
