"""Perturbations: optax transformations from an ascent gradient `g` to a step `ε` up the loss.

A ball has a radius `rho` and a metric. A metric is a function `params -> T`, a tree like `params`
of elementwise scales (a leaf may be a scalar): parameters with a large `T` may move further.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx import _tree
from samx._hyper import at_step, check_number, next_step
from samx._leaves import on_leaves, random_leaves
from samx._metrics import (
    Metric,
    constants,
    identity,
    is_not_bias,
    layerwise,
    magnitude,
)

__all__ = [
    "constants",
    "identity",
    "is_not_bias",
    "layer_steps",
    "layerwise",
    "linf_ball",
    "magnitude",
    "metric_ball",
    "on_leaves",
    "random_leaves",
    "trust_ratio",
]

LayerScaling: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], Any]


class BallState(NamedTuple):
    """State of a ball.

    Attributes:
        step: int32, optimizer steps so far; the schedule of `rho` runs on it.
    """

    step: jax.Array


def metric_ball(
    rho: optax.ScalarOrSchedule, metric: Metric | None = None, *, norm_eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    """The step to the edge of an L2 ball, in the geometry of a metric.

        T = metric(w)
        ε = ρ T² g / (‖T g‖ + norm_eps)          so that  ‖ε / T‖ = ρ

    `metric=identity()` is SAM, `magnitude(eta)` is ASAM, `layerwise()` the layer-wise ASAM,
    `constants(scales)` µP²: one formula.

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`.
        norm_eps: Added to the norm; default 1e-12. A zero gradient gives a zero step.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is not a number, array or schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import metric_ball
        >>> ball = metric_ball(rho=0.5)
        >>> g = jnp.array([3.0, 4.0])
        >>> eps, _ = ball.update(g, ball.init(g), g)
        >>> [round(float(e), 3) for e in eps]
        [0.3, 0.4]

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412 (p = 2);
        Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600 (the form with T).

    Notes:
        One norm over all leaves, accumulated in float32 or wider. A complex leaf climbs along the
        conjugate of JAX's gradient. `static_args`: `metric`. Cost: one norm, elementwise work.
    """
    metric = identity() if metric is None else metric

    def climb(g, params, radius):
        scales = metric(params)
        scaled = jax.tree.map(lambda g, t: jnp.conj(_tree.widen(g)) * t, g, scales)
        factor = radius / (_tree.norm(scaled) + norm_eps)
        return jax.tree.map(lambda s, t: s * t * jnp.asarray(factor, s.real.dtype), scaled, scales)

    return _ball(rho, climb)


def linf_ball(
    rho: optax.ScalarOrSchedule, metric: Metric | None = None
) -> optax.GradientTransformationExtraArgs:
    """The step to the corner of an L∞ ball: every parameter moves by the same radius.

        T = metric(w)
        ε = ρ T sign(T g)                        so that  max |ε / T| = ρ

    Args:
        rho: Radius ρ ≥ 0 of one element, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is not a number, array or schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import linf_ball
        >>> ball = linf_ball(rho=0.5)
        >>> g = jnp.array([3.0, -0.1, 0.0])
        >>> ball.update(g, ball.init(g), g)[0].tolist()
        [0.5, -0.5, 0.0]

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412 (p = ∞); with a metric as in
        Müller et al., NeurIPS 2023, https://arxiv.org/abs/2306.04226

    Notes:
        Radii are per element: far smaller than for an L2 ball, by √(number of parameters).
        `static_args`: `metric`. Cost: elementwise work.
    """
    metric = identity() if metric is None else metric

    def climb(g, params, radius):
        def corner(g, t):
            scaled = jnp.conj(_tree.widen(g)) * t
            sign = jnp.sign(scaled) + 0 * scaled  # an overflow is no direction: inf gives NaN
            return sign * t * jnp.asarray(radius, sign.real.dtype)

        return jax.tree.map(corner, g, metric(params))

    return _ball(rho, climb)


def trust_ratio(w_norm: jax.Array, g_norm: jax.Array, total: jax.Array) -> jax.Array:
    """The default scaling of `layer_steps`: SAM's step, times the trust ratio of each tensor.

        (‖w_l‖ / ‖g_l‖) / ‖g‖

    Args:
        w_norm: ‖w_l‖ of the tensor's parameters.
        g_norm: ‖g_l‖ of its gradient.
        total: ‖g‖ over all tensors.

    Returns:
        The factor of `g_l`.

    Raises:
        Nothing.

    Example:
        >>> from samx.perturbations import trust_ratio
        >>> trust_ratio(6.0, 2.0, 3.0)
        1.0

    References:
        Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714; You, Gitman, Ginsburg, "Large
        Batch Training of Convolutional Networks", 2017, https://arxiv.org/abs/1708.03888 (LARS).

    Notes:
        Cost: none. Recalled as LookSAM's rule, not read in the paper.
    """
    return w_norm / (g_norm * total)


def layer_steps(
    rho: optax.ScalarOrSchedule, scaling: LayerScaling = trust_ratio, *, norm_eps: float = 1e-12
) -> optax.GradientTransformationExtraArgs:
    """A step whose length is chosen tensor by tensor; no ball holds them together.

        ε_l = ρ · scaling(‖w_l‖, ‖g_l‖ + norm_eps, ‖g‖ + norm_eps) · g_l     for each tensor l

    Args:
        rho: Factor ρ ≥ 0, a number or a schedule over the optimizer's steps.
        scaling: `(‖w_l‖, ‖g_l‖, ‖g‖) -> factor`; default `trust_ratio`. Others in use:
            `lambda w, g, total: w / g` (every tensor moves by ρ times its own norm),
            `lambda w, g, total: 1 / g` (every tensor moves by ρ), and
            `lambda w, g, total: w / g**2` (a port that divides twice).
        norm_eps: Added to the norms of gradients; default 1e-12.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is not a number, array or schedule, or `scaling` no function.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import layer_steps
        >>> steps = layer_steps(0.1, lambda w, g, total: w / g)
        >>> w, g = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([0.0, 2.0])}
        >>> eps, _ = steps.update(g, steps.init(w), w)
        >>> [round(float(x), 3) for x in eps["a"]]
        [0.0, 0.5]

    References:
        Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022,
        https://arxiv.org/abs/2203.02714 (Look-LayerSAM)

    Notes:
        Of parameters that are all zero, such as new biases, a rule with ‖w_l‖ moves none. Cost: two
        norms per tensor, elementwise work. `static_args`: `scaling`.
    """
    if not callable(scaling):
        raise TypeError(f"layer_steps: `scaling` must be a function, got {scaling!r}")

    def climb(g, params, radius):
        total = _tree.norm(g) + norm_eps

        def step(g, w):
            if not _tree.is_inexact(w):
                return g
            factor = radius * scaling(_tree.norm(w), _tree.norm(g) + norm_eps, total)
            g = jnp.conj(_tree.widen(g))
            return g * jnp.asarray(factor, g.real.dtype)

        return jax.tree.map(step, g, params)

    return _ball(rho, climb)


def _ball(rho: Any, climb: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """`ε = climb(g, params, ρ)`, with ρ on its schedule: what every ball shares."""
    check_number("rho", rho, 0)

    def init_fn(params):
        del params
        return BallState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra):
        del extra
        eps = climb(updates, params, at_step(rho, state.step))
        return eps, BallState(next_step(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
