"""The ascent direction of Friendly SAM. Public in `samx.perturbations`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.hyperparams import at_step, check_hyperparam, next_step
from samx.core.transformation import checked_transformation


class SubtractEMAState(NamedTuple):
    """State of `subtract_ema`.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        average: Moving average of the gradient, float32 or wider; zeros before the first step.
    """

    step: jax.Array
    average: Any


def subtract_ema(sigma: ScalarOrSchedule = 1.0, decay: ScalarOrSchedule = 0.9) -> Transformation:
    """Subtract an exponential moving average of past gradients.

        d = g − σ m                 (m = 0 on the first step)
        m = λ m + (1 − λ) g         (m = g on the first step)
        return d

    What remains, d, is the batch-specific part of the gradient. Chain it with a perturbation that
    sets its length: `optax.chain(subtract_ema(), metric_ball(0.05))`.

    Args:
        sigma: Fraction σ ≥ 0 of the average that is subtracted, a number or a schedule; default 1.
            With 0, d = g.
        decay: λ in [0, 1] of the moving average, a number or a schedule; default 0.9.

    Returns:
        An optax transformation `g -> d`. Half-precision gradients give float32.

    Raises:
        ValueError: If `sigma` is negative, or `decay` is outside [0, 1].
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import subtract_ema
        >>> direction = subtract_ema(sigma=1.0, decay=0.5)
        >>> state = direction.init(jnp.zeros(()))
        >>> for g in (1.0, 3.0, 2.0):
        ...     d, state = direction.update(jnp.asarray(g), state)
        ...     print(float(d), float(state.average))
        1.0 1.0
        2.0 2.0
        0.0 2.0

    References:
        Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", CVPR 2024,
        https://arxiv.org/abs/2403.12350 (nblt/F-SAM)

    Notes:
        With `sigma=1` and a constant gradient, d is only rounding error, which a ball then scales
        to its full radius. A gradient that is not finite does not enter the average. Cost:
        elementwise work, one copy of the parameters.
    """
    check_hyperparam("sigma", sigma, 0)
    check_hyperparam("decay", decay, 0, 1)

    def init_fn(params):
        wide = jax.tree.map(tree.widen, params)
        return SubtractEMAState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(wide))

    def update_fn(updates, state, params=None, **extra):
        del params, extra
        # The order saves two copies of the parameters: the norm of g, then d, then m from d.
        is_finite, m = jnp.isfinite(tree.length(updates).norm), state.average
        sigma_t = jnp.where(is_finite, at_step(sigma, state.step), 0)
        d = tree.add_scaled(jax.tree.map(tree.widen, updates), -1 * sigma_t, m)
        decay_t = jnp.where(state.step == 0, 0, at_step(decay, state.step))
        rate = jnp.where(is_finite, 1 - decay_t, 0)
        average = tree.add_scaled(m, rate, tree.add_scaled(d, sigma_t - 1, m))
        average = tree.where(is_finite, average, m)
        return d, SubtractEMAState(next_step(state.step), average)

    return checked_transformation("subtract_ema", init_fn, update_fn)
