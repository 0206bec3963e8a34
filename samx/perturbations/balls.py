"""Balls: from a gradient to a step of radius ρ. Public as `samx.perturbations.<name>`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import at_step, check_function, check_hyperparam, check_number, next_step
from samx.core.transformation import checked_transformation
from samx.perturbations.metrics import Metric, checked_metric, identity


class BallState(NamedTuple):
    """State of a ball.

    Attributes:
        step: int32, optimizer steps so far; schedules of the radius run on it.
    """

    step: jax.Array


def ball(rho: Radius, climb: Callable[[Any, Any, Any], Any]) -> Transformation:
    """Any geometry: a perturbation that depends on the gradient, the parameters and the radius.

        ε = climb(g, w, ρ)

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        climb: `(g, params, radius) -> ε`, trees like `params`. `g` is at least float32, and
            `w + t g` climbs. Add a small number to a norm before you divide by it: a zero gradient
            must give a zero step.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is neither a number nor a schedule, or `climb` is not a function.

    Example:
        Fisher SAM's ball, whose metric sees the gradient:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> def climb(g, params, rho, eta=1.0):
        ...     f = jax.tree.map(lambda g: g / (1 + eta * jnp.abs(g) ** 2), g)
        ...     length = jnp.sqrt(optax.tree.vdot(g, f).real) + 1e-30
        ...     return jax.tree.map(lambda f: rho * f / length, f)
        >>> tx = samx.sharpness_aware(samx.perturbations.ball(0.1, climb))
        >>> w = jnp.array([0.6, 0.8])
        >>> g_s, _ = tx.update(w, tx.init(w), w, value_fn=lambda w: 0.5 * w @ w)
        >>> [round(float(x), 3) for x in g_s]
        [0.655, 0.86]

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, equation 2, is one climb; Kim et
        al., ICML 2022, https://arxiv.org/abs/2206.04920 another.

    Notes:
        Cost: that of `climb`. A geometry of the parameters alone is a metric, see `metric_ball`.
        A perturbation that keeps a state is an optax transformation, see `subtract_ema`.
        `static_args`: `climb`.
    """
    check_function("climb", climb, 3)
    check_hyperparam("rho", rho, 0)
    return climbing(lambda g, *rest: climb(jax.tree.map(tree.widen, g), *rest), rho)


def climbing(climb: Callable[..., Any], *hyperparams: ScalarOrSchedule) -> Transformation:
    """Return the perturbation `climb(g, params, *numbers)`; schedules count the optimizer's steps.

    `climb` gets half-precision gradients as they are. `tree.length` reads them in a loop, before
    which XLA would store wider ones.
    """

    def init_fn(params):
        del params
        return BallState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra):
        del extra
        g = jax.tree.map(jnp.asarray, updates)
        eps = climb(g, params, *(at_step(x, state.step) for x in hyperparams))
        tree.check_like("climb(g, params, rho)", eps, "g", g)
        eps = jax.tree.map(lambda e, g: e.astype(tree.wide_dtype(g.dtype)), eps, g)
        return eps, BallState(next_step(state.step))

    return checked_transformation("ball", init_fn, update_fn)


def metric_ball(
    rho: Radius, metric: Metric | None = None, *, norm_eps: float = 0.0
) -> Transformation:
    """Climb to the edge of an L2 ball, in the geometry of a metric.

        T = metric(w)
        ε = ρ T² g / (‖T g‖ + norm_eps)          so that  ‖ε / T‖ = ρ

    `metric=identity()` is SAM, `magnitude(eta)` is ASAM, `layerwise()` the layer-wise ASAM,
    `constants(scales)` µP²: one formula.

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`.
        norm_eps: Added to the norm; default 0. A zero gradient gives a zero step.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is neither a number nor a schedule.

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
        One norm over all leaves, accumulated in float32 or wider. Cost: one norm, elementwise
        work. `static_args`: `metric`.
    """
    metric = checked_metric("metric_ball", metric)
    check_number("norm_eps", norm_eps, 0)
    check_hyperparam("rho", rho, 0)

    def climb(g, params, radius):
        return along(g, metric(params), radius, norm_eps)

    return climbing(climb, rho)


def along(
    g: Any, scales: Any, new_norm: Any, norm_eps: float = 0.0, *, measured: Any = None
) -> Any:
    """Return the step `ε` along `T² g` with `‖ε / T‖ = new_norm`; a zero gradient stays.

    `new_norm` is a number, or a function of the norm `‖T g‖`. The norm is that of `T measured` if
    another gradient is given.
    """
    scaled = jax.tree.map(times, g, scales)
    length = tree.length(scaled if measured is None else jax.tree.map(times, measured, scales))
    found = new_norm(length.norm / length.scale) if callable(new_norm) else new_norm
    step = tree.with_length(scaled, found, length, norm_eps)
    return jax.tree.map(times, step, scales)


def linf_ball(rho: Radius, metric: Metric | None = None) -> Transformation:
    """Climb to the corner of a cube: every element moves by the radius (the L-infinity ball).

        T = metric(w)
        ε = ρ T sign(T g)                      so that  max |ε / T| = ρ

    Args:
        rho: Radius ρ ≥ 0 of each element, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import linf_ball
        >>> ball = linf_ball(rho=0.5)
        >>> g = jnp.array([3.0, -4.0, 0.0])
        >>> ball.update(g, ball.init(g), g)[0].tolist()
        [0.5, -0.5, 0.0]

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412 (p = ∞); with a metric as in
        Müller et al., NeurIPS 2023, https://arxiv.org/abs/2306.04226

    Notes:
        Radii are per element: smaller than those of an L2 ball by a factor of about √(number of
        parameters). Cost: elementwise work. `static_args`: `metric`.
    """
    metric = checked_metric("linf_ball", metric)

    def climb(g, params, radius):
        def corner(g, t):
            sign = jnp.sign(g) + 0 * g  # an overflow has no direction: inf gives NaN
            return sign * t * _as_real(radius, sign)

        return jax.tree.map(corner, g, metric(params))

    return ball(rho, climb)


def unnormalized_step(rho: Radius, metric: Metric | None = None) -> Transformation:
    """Step along the gradient without normalization: a longer gradient gives a longer step.

        T = metric(w)
        ε = ρ T² g

    Args:
        rho: Factor ρ ≥ 0, a number or a schedule over the optimizer's steps: a learning rate of the
            ascent, not a radius.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import unnormalized_step
        >>> step = unnormalized_step(rho=0.5)
        >>> g = jnp.array([3.0, 4.0])
        >>> step.update(g, step.init(g), g)[0].tolist()
        [1.5, 2.0]

    References:
        Andriushchenko, Flammarion, "Towards Understanding Sharpness-Aware Minimization", ICML 2022,
        https://arxiv.org/abs/2206.06232 (un-normalized SAM);
        Tan et al., JMLR 2025, https://arxiv.org/abs/2401.07250 (cltan023/stablesam2024, usam.py).

    Notes:
        The step depends on the scale of the loss: mean or sum, weights of further terms. The
        gradient is used as it comes, so anything that scales gradients may stand before it in a
        chain. Cost: elementwise work. `static_args`: `metric`.
    """
    metric = checked_metric("unnormalized_step", metric)

    def climb(g, params, radius):
        return jax.tree.map(lambda g, t: g * t * t * _as_real(radius, g), g, metric(params))

    return ball(rho, climb)


def monge_ball(rho: Radius, *, norm_eps: float = 0.0) -> Transformation:
    """Climb to the edge of a ball on the graph of the loss: a short step where the loss is steep.

        ε = ρ g / ((‖g‖ + norm_eps) √(1 + ‖g‖²))       so that  ε·(I + g gᵀ) ε = ρ²

    Args:
        rho: Radius ρ ≥ 0 on the surface of the loss, a number or a schedule over the optimizer's
            steps.
        norm_eps: Added to the norm; default 0. A zero gradient gives a zero step.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import monge_ball
        >>> ball = monge_ball(rho=1.0)
        >>> for length in (0.1, 1.0, 10.0):
        ...     g = jnp.array([length])
        ...     print(round(float(ball.update(g, ball.init(g), g)[0][0]), 3))
        0.995
        0.707
        0.1

    References:
        Jacobsen, Arvanitidis, "Monge SAM: Robust Reparameterization-Invariant Sharpness-Aware
        Minimization Based on Loss Geometry", 2025, https://arxiv.org/abs/2502.08448

    Notes:
        For short gradients it is SAM's ball; for long ones the step shrinks with the length of the
        gradient. So it depends on the scale of the loss, mean or sum. Cost: one norm, elementwise
        work.
    """
    check_number("norm_eps", norm_eps, 0)
    check_hyperparam("rho", rho, 0)

    def climb(g, params, radius):
        del params
        return along(g, identity()(g), lambda norm: radius / jnp.hypot(1.0, norm), norm_eps)

    return climbing(climb, rho)


def times(x: jax.Array, scale: Any) -> jax.Array:
    """Return `scale * x`, and `x` itself for the scale 1 of `identity`."""
    is_one = isinstance(scale, float) and scale == 1.0
    return x if is_one else tree.widen(x) * scale


def _as_real(x: Any, like: jax.Array) -> jax.Array:
    """Return a number in the precision of a leaf, which may be complex."""
    return jnp.asarray(x, like.real.dtype)
