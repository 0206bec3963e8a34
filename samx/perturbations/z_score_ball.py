"""The filtered gradient of ZSharp. Public in `samx.perturbations`."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import Radius, ScalarOrSchedule, Transformation
from samx.core.devices import ONE_DEVICE
from samx.core.hyperparams import check_choice, check_hyperparam
from samx.perturbations.balls import along, climbing
from samx.perturbations.metrics import identity


def z_score_ball(
    rho: Radius,
    quantile: ScalarOrSchedule = 0.95,
    *,
    norm: Literal["leaf", "global"] = "leaf",
) -> Transformation:
    """Climb along the outliers of each kernel's gradient: the ascent of ZSharp.

        z = (g_l − mean(g_l)) / std(g_l)        for each leaf l with two axes or more
        kept_l = g_l  where  |z| > the quantile of |z| in l,  else 0
        kept_l = g_l                            for the other leaves, and where nothing is kept
        ε_l = ρ kept_l / ‖kept_l‖               "leaf", as the code; the other leaves: ρ g_l / ‖g‖
        ε   = ρ kept / ‖kept‖                   "global", as a third party transcribes the paper

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        quantile: Share in [0, 1] of each kernel's entries that do not move, a number or a schedule;
            default 0.95.
        norm: "leaf", the default: every kernel moves by ρ. "global": all of them together.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number, `quantile` is outside [0, 1], or `norm` is
            unknown.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import z_score_ball
        >>> ball, g = z_score_ball(1.0, quantile=0.5), jnp.array([[3.0, 0.0], [0.1, -4.0]])
        >>> eps, _ = ball.update(g, ball.init(g), g)
        >>> [round(float(x), 2) for x in eps.ravel()]
        [0.6, 0.0, 0.0, -0.8]

    References:
        Yun, "Sharpness-Aware Minimization with Z-Score Gradient Filtering", 2025,
        https://arxiv.org/abs/2505.02369
        (YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering)

    Notes:
        With "leaf" the whole step is about ρ √(number of kernels) long. Ties at the quantile are
        not kept. The standard deviation scales all |z| of a leaf alike, so it does not change what
        is kept. Cost: one sort and two norms per kernel; the sort needs the whole kernel on
        each device. `static_args`: `norm`.
    """
    check_hyperparam("rho", rho, 0)
    check_hyperparam("quantile", quantile, 0, 1)
    check_choice("norm", norm, ("leaf", "global"))

    def climb(g, params, radius, quantile):
        del params

        def ball(g):
            return along(g, identity()(g), radius)

        def of_leaf(g, whole_step):
            if not _has_outliers(g):
                return whole_step
            is_kept = _is_outlier(g, quantile)
            return jnp.where(jnp.any(is_kept), ball(jnp.where(is_kept, g, 0)), whole_step)

        if norm == "leaf":
            return jax.tree.map(of_leaf, g, ball(g))
        return ball(jax.tree.map(lambda g: _kept(g, quantile), g))

    return climbing(climb, rho, quantile)


def _has_outliers(g: jax.Array) -> bool:
    return tree.is_inexact(g) and g.ndim > 1 and g.size > 0


def _kept(g: jax.Array, quantile: Any) -> jax.Array:
    """Return the outliers of a kernel; the whole leaf if it has none, or is no kernel."""
    if not _has_outliers(g):
        return g
    is_kept = _is_outlier(g, quantile)
    return jnp.where(is_kept | ~jnp.any(is_kept), g, 0)


def _is_outlier(g: jax.Array, quantile: Any) -> jax.Array:
    """Return where |z| is above its quantile. The standard deviation is the same on both sides."""
    g = tree.widen(g)
    distance = jnp.abs(g - jnp.mean(g))
    sorted_whole = ONE_DEVICE.all_gather(distance)
    return distance > jnp.quantile(sorted_whole, jnp.asarray(quantile, distance.dtype))
