"""Steps along the gradient whose length depends on its norm. Public in `samx.perturbations`."""

import jax.numpy as jnp

from samx.core.aliases import Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import check_hyperparam
from samx.perturbations.balls import along, climbing
from samx.perturbations.metrics import Metric, checked_metric

_SMALLEST = 1e-6  # the root of LE-SAM's epsilon inside the norm


def partly_normalized_step(
    rho: Radius, lam: ScalarOrSchedule, metric: Metric | None = None
) -> Transformation:
    """Step between the un-normalized step and the L2 ball: the ascent of Unified SAM.

        T = metric(w)
        ε = ρ (1 − λ + λ / ‖T g‖) T² g

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        lam: λ in [0, 1], a number or a schedule. 1 is `metric_ball`, 0 is `unnormalized_step`.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number, or `lam` is outside [0, 1].
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import partly_normalized_step
        >>> g = jnp.array([3.0, 4.0])
        >>> for lam in (0.0, 0.5, 1.0):
        ...     step = partly_normalized_step(0.5, lam)
        ...     print([round(float(x), 3) for x in step.update(g, step.init(g), g)[0]])
        [1.5, 2.0]
        [0.9, 1.2]
        [0.3, 0.4]

    References:
        Oikonomou, Loizou, "Sharpness-Aware Minimization: General Analysis and Improved Rates", ICLR
        2025, https://arxiv.org/abs/2503.02225

    Notes:
        Below λ = 1 the step depends on the scale of the loss. Cost: one norm, elementwise work.
        `static_args`: `metric`.
    """
    metric = checked_metric("partly_normalized_step", metric)
    check_hyperparam("rho", rho, 0)
    check_hyperparam("lam", lam, 0, 1)

    def climb(g, params, radius, lam):
        return along(g, metric(params), lambda norm: radius * ((1 - lam) * norm + lam))

    return climbing(climb, rho, lam)


def gradient_matching_step(
    rho: Radius, alpha: ScalarOrSchedule, metric: Metric | None = None
) -> Transformation:
    """Climb, and step back along the gradient: the ascent of SAGM.

        T = metric(w)
        ε = (ρ / ‖T g‖ − α) T² g

    Where `‖T g‖ > ρ / α`, the step goes down the loss.

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        alpha: Rate α ≥ 0 of the step back, a number or a schedule. 0 is `metric_ball`.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If a hyperparameter is a negative number.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import gradient_matching_step
        >>> step = gradient_matching_step(rho=1.0, alpha=0.1)
        >>> for length in (1.0, 10.0, 20.0):
        ...     g = jnp.array([length])
        ...     print(round(float(step.update(g, step.init(g), g)[0][0]), 3))
        0.9
        0.0
        -1.0

    References:
        Wang, Zhang, Lei, Zhang, "Sharpness-Aware Gradient Matching for Domain Generalization", CVPR
        2023, https://arxiv.org/abs/2303.10353 (Wang-pengfei/SAGM)

    Notes:
        The authors' `adaptive` is `magnitude(0.0, is_scaled=lambda path, leaf: True)` as `metric`.
        Cost: one norm, elementwise work. `static_args`: `metric`.
    """
    metric = checked_metric("gradient_matching_step", metric)
    check_hyperparam("rho", rho, 0)
    check_hyperparam("alpha", alpha, 0)

    def climb(g, params, radius, alpha):
        return along(g, metric(params), lambda norm: radius - alpha * norm)

    return climbing(climb, rho, alpha)


def loss_rise_ball(
    sigma: ScalarOrSchedule, rho_max: ScalarOrSchedule | None = 0.3, metric: Metric | None = None
) -> Transformation:
    """Climb until the loss has risen by a given amount, to first order: the ascent of LE-SAM.

        T = metric(w)
        n = √(‖T g‖² + 1e-12)
        ε = min(σ / n, ρ_max) T² g / n           so that  ⟨g, ε⟩ = σ  below the largest radius

    Args:
        sigma: Rise σ ≥ 0 of the loss, a number or a schedule over the optimizer's steps.
        rho_max: Largest radius ρ_max ≥ 0, a number or a schedule; default 0.3. `None`: no limit.
        metric: `params -> T`; default `identity()`.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If a hyperparameter is a negative number.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import loss_rise_ball
        >>> ball = loss_rise_ball(sigma=0.1, rho_max=1.0)
        >>> for length in (0.01, 0.1, 1.0, 10.0):
        ...     g = jnp.array([length])
        ...     print(round(float(ball.update(g, ball.init(g), g)[0][0]), 3))
        1.0
        1.0
        0.1
        0.01

    References:
        Wang, Liu, Xie, Gao, "Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation
        of Sharpness-Aware Minimization", ICML 2026, https://arxiv.org/abs/2605.10183
        (smithgun2005/LE-SAM-ICML2026)

    Notes:
        The authors' `adaptive` multiplies the gradient by |w| once, and then takes the step along
        the product; with a metric the step is multiplied by T again. For theirs, chain
        `optax.stateless(lambda g, w: jax.tree.map(lambda g, w: abs(w) * g, g, w))` in front.
        The rise σ is in units of the loss, mean or sum. Cost: one norm, elementwise work.
        `static_args`: `metric`, and `rho_max` if it is `None`.
    """
    metric = checked_metric("loss_rise_ball", metric)
    check_hyperparam("sigma", sigma, 0)
    rho_max = jnp.inf if rho_max is None else rho_max
    if rho_max is not jnp.inf:
        check_hyperparam("rho_max", rho_max, 0)

    def climb(g, params, sigma, rho_max):
        def new_norm(norm):
            n = jnp.hypot(norm, _SMALLEST)
            return jnp.minimum(sigma / n, rho_max) * (norm / n)

        return along(g, metric(params), new_norm)

    return climbing(climb, sigma, rho_max)
