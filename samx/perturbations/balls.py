"""Balls: steps up the loss of a given radius. Public as `samx.perturbations.<name>`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Radius, Transformation
from samx.core.hyperparams import at_step, check_number, next_step
from samx.perturbations.metrics import Metric, identity


class BallState(NamedTuple):
    """State of a ball.

    Attributes:
        step: int32, optimizer steps so far; the schedule of `rho` runs on it.
    """

    step: jax.Array


def metric_ball(
    rho: Radius, metric: Metric | None = None, *, norm_eps: float = 1e-12
) -> Transformation:
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
        scaled = jax.tree.map(lambda g, t: jnp.conj(tree.widen(g)) * t, g, scales)
        factor = radius / (tree.norm(scaled) + norm_eps)
        return jax.tree.map(lambda s, t: s * t * jnp.asarray(factor, s.real.dtype), scaled, scales)

    return with_radius(rho, climb)


def linf_ball(rho: Radius, metric: Metric | None = None) -> Transformation:
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
            scaled = jnp.conj(tree.widen(g)) * t
            sign = jnp.sign(scaled) + 0 * scaled  # an overflow is no direction: inf gives NaN
            return sign * t * jnp.asarray(radius, sign.real.dtype)

        return jax.tree.map(corner, g, metric(params))

    return with_radius(rho, climb)


def unnormalized_step(rho: Radius, metric: Metric | None = None) -> Transformation:
    """A step along the gradient that is not normalized: the longer the gradient, the longer it is.

        T = metric(w)
        ε = ρ T² g

    Args:
        rho: Factor ρ ≥ 0, a number or a schedule over the optimizer's steps: a learning rate of the
            ascent, no radius.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is not a number, array or schedule.

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
        It depends on the scale of the loss: mean or sum, weights of further terms. The gradient is
        taken as it comes, so anything that scales gradients may stand in front of it in a chain.
        `static_args`: `metric`. Cost: elementwise work.
    """
    metric = identity() if metric is None else metric

    def climb(g, params, radius):
        def step(g, t):
            scaled = jnp.conj(tree.widen(g)) * t * t
            return scaled * jnp.asarray(radius, scaled.real.dtype)

        return jax.tree.map(step, g, metric(params))

    return with_radius(rho, climb)


def monge_ball(rho: Radius, *, norm_eps: float = 1e-12) -> Transformation:
    """The step to the edge of a ball on the graph of the loss: short where the loss is steep.

        ε = ρ g / ((‖g‖ + norm_eps) √(1 + ‖g‖²))       so that  ε·(I + g gᵀ) ε = ρ²

    Args:
        rho: Radius ρ ≥ 0 on the surface of the loss, a number or a schedule over the optimizer's
            steps.
        norm_eps: Added to the norm; default 1e-12. A zero gradient gives a zero step.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is not a number, array or schedule.

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
        Between SAM's ball (short gradients) and a step that falls with the length of the gradient
        (long ones): it depends on the scale of the loss, mean or sum. Cost: one norm, elementwise
        work.
    """

    def climb(g, params, radius):
        del params
        length = tree.norm(g)
        factor = radius / ((length + norm_eps) * jnp.sqrt(1 + length**2))

        def step(g):
            g = jnp.conj(tree.widen(g))
            return g * jnp.asarray(factor, g.real.dtype)

        return jax.tree.map(step, g)

    return with_radius(rho, climb)


def with_radius(rho: Any, climb: Callable[..., Any]) -> Transformation:
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
