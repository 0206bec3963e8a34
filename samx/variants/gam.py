"""GAM: descend the largest gradient norm near w, in two forms.

Zhang, Xu, Yu, Zou, Cui. "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves
Generalization", CVPR 2023. https://arxiv.org/abs/2303.03108
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.closures import Closure
from samx.core.hyperparams import Default, at_step, check_hyperparam
from samx.core.readings import UNKNOWN, take_readings
from samx.core.sharp import ascend, climbed_from, evaluate_at, perturbed
from samx.core.transformation import closure_transformation
from samx.perturbations.balls import metric_ball
from samx.sharpness import hvp
from samx.variants._ball import ball_of
from samx.variants._eigenvector import HESSIAN_PRODUCT, unit
from samx.variants._states import first_state, next_state


def gam(
    rho: Radius = Default(0.2),
    rho_prime: Radius = Default(0.02),
    *,
    beta0: ScalarOrSchedule = 0.5,
    beta1: ScalarOrSchedule = 0.6,
    gamma: ScalarOrSchedule = 0.03,
    outer: Perturbation = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Gradient norm aware minimization (GAM), the accelerated form of the published code.

        g_0 = ∇L(w)                                       (the incoming updates)
        g_1 = ∇L(w + ρ′ g_0 / ‖g_0‖)
        w_2 = w + ρ (g_1 − g_0) / ‖g_1 − g_0‖             (where the gradient is longer)
        g_2 = ∇L(w_2)
        g_3 = ∇L(w_2 + ρ′ g_2 / ‖g_2‖)
        p   = g_0 + |1 − β_0| g_2
        q   = β_1 g_1 + (1 − β_1) g_3
        return q − γ (p − (⟨p, q⟩ / ‖q‖²) q)

    Args:
        rho: Radius ρ ≥ 0 in which the gradient norm is climbed, the code's `grad_norm_rho`; default
            0.2.
        rho_prime: Radius ρ′ ≥ 0 of the finite difference, which is SAM's ascent, the code's
            `grad_rho`; default 0.02, the authors' for ResNets on CIFAR-100 (CIFAR-10: 0.03).
        beta0: β_0 ≥ 0; default 0.5. The code uses it as |1 − β_0| only (CIFAR-10: 0.1).
        beta1: β_1 ≥ 0; default 0.6 (CIFAR-10: 0.1).
        gamma: γ ≥ 0; default 0.03 (CIFAR-10: 0.05).
        outer: Replaces the ball of `rho`; it gets g_1 − g_0.
        perturbation: Replaces the ball of `rho_prime`, in both climbs.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or a radius is given together with what replaces
            it.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.gam(rho=0.1, rho_prime=0.1), optax.sgd(1.0))
        >>> w, loss = jnp.array([1.0, 1.0]), lambda w: w[0] ** 2 + 0.5 * w[1] ** 2
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-2.258, -1.052]

    References:
        Zhang, Xu, Yu, Zou, Cui, CVPR 2023, https://arxiv.org/abs/2303.03108

    Notes:
        This and `gam_exact`, the paper's equation, are different algorithms. `rho=0` is GSAM with
        the radius ρ′ and α = γ (1 + |1 − β_0|); `rho_prime=0` and `rho=0` is the base. The authors'
        `adaptive` is `metric_ball(rho, magnitude(0.0, is_scaled=lambda path, leaf: True))` for both
        climbs, each at the point where it starts. They freeze the statistics of BatchNorm after the
        first pass, as closures here do. Their devices mix their own gradients and average the
        result: `data_parallel(..., ascent="local")`. Readings: `sharp_loss` is that of g_1. Cost: 4
        gradients per step, one after the other; transient copies of g_0 and g_1, and of the
        displacement.
        Fidelity: matches xxgege/GAM.
    """
    check_hyperparam("beta0", beta0, 0)
    check_hyperparam("beta1", beta1, 0)
    check_hyperparam("gamma", gamma, 0)
    inner = ball_of("gam", rho_prime, perturbation, _inner_ball, keyword="rho_prime")
    outer = ball_of("gam", rho, outer, replaced_by="outer")

    def init_fn(params):
        return first_state((inner.init(params), outer.init(params)), params)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        at = partial(evaluate_at, value_fn, params, perturb_dtype=perturb_dtype)
        climb = partial(_climb, value_fn, params, perturb_dtype, extra)
        inner_state, outer_state = state.perturbation
        g_0 = value_fn.own_gradient(g)

        eps, inner_ball = climb(inner, inner_state, g_0)
        sharp_loss, _, g_1 = at(eps)
        moved, outer_ball = climb(outer, outer_state, tree.subtract(g_1, g_0))
        _, _, g_2 = at(moved)
        further, _ = climb(inner, inner_state, g_2, moved)
        _, _, g_3 = at(further)

        weights = (at_step(x, state.step) for x in (beta0, beta1, gamma))
        updates = _combined(g_0, g_1, g_2, g_3, *weights)
        updates = jax.tree.map(value_fn.mean_of_ascents, tree.cast_like(updates, params))
        balls = inner_ball, outer_ball
        readings = take_readings(
            *(state.readings, value, sharp_loss, g_0, g_1, params),
            point=lambda: perturbed(params, eps, perturb_dtype),
            gradients=4,
            ball=balls,
            mean_of_ascents=value_fn.mean_of_ascents,
        )
        return updates, next_state(state, balls, readings)

    return closure_transformation(init_fn, update_fn, name="gam")


def _inner_ball(rho_prime: Radius) -> Transformation:
    check_hyperparam("rho_prime", rho_prime, 0)
    return metric_ball(rho_prime)


def _climb(
    value_fn: Closure,
    params: Any,
    perturb_dtype: DType,
    extra: dict[str, Any],
    ball: optax.GradientTransformationExtraArgs,
    ball_state: Any,
    own_g: Any,
    start: Any = None,
) -> tuple[Any, Any]:
    """Climb from w + start along the gradient of the devices that climb together."""
    g, seen = climbed_from(value_fn, own_g)
    point = params if start is None else perturbed(params, start, perturb_dtype)
    step, _, new = ascend(seen, ball, g, ball_state, point, **extra)
    return step if start is None else optax.tree.add(start, step), new


def _combined(g_0: Any, g_1: Any, g_2: Any, g_3: Any, beta0: Any, beta1: Any, gamma: Any) -> Any:
    p = tree.combine(1.0, g_0, jnp.abs(1 - beta0), g_2)
    q = tree.combine(beta1, g_1, 1 - beta1, g_3)
    return tree.add_scaled(q, -1 * gamma, tree.reject(p, q, tree.length(q)))


def gam_exact(
    rho: Radius = 0.2,
    alpha: ScalarOrSchedule = 0.5,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """GAM as the paper's equation has it, with Hessian products in place of differences.

        g   = ∇L(w)                                       (the incoming updates)
        f   = ∇‖∇L(w)‖ = H(w) g / ‖g‖
        w_a = w + ρ f / ‖f‖
        g_a = ∇L(w_a)
        return g + α ρ H(w_a) g_a / ‖g_a‖

    This descends L + α ρ ‖∇L(w_a)‖: the first-order flatness, with w_a held.

    Args:
        rho: Radius ρ ≥ 0 in which the gradient norm is climbed, and factor of the flatness; default
            0.2.
        alpha: Weight α ≥ 0 of the flatness; default 0.5, ours.
        perturbation: Replaces the ball of the climb, which gets f. `rho` stays the factor.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.gam_exact(rho=0.1, alpha=1.0), optax.sgd(1.0))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # H is the identity
        [-3.06, -4.08]

    References:
        Zhang, Xu, Yu, Zou, Cui, CVPR 2023, https://arxiv.org/abs/2303.03108

    Notes:
        This and `gam`, the form of the published code, are different algorithms. `rho=0` or
        `alpha=0` is the base. A zero gradient gives a zero step. Readings: `sharp_loss` is the loss
        at w_a. Products are taken one after the other, see `samx.sharpness.hvp`. Cost: 2 gradients
        and 2 Hessian products per step, about 6 gradients; transient copies of g and ε.
        Fidelity: **reconstructed**; the published code has the accelerated form alone. The equation
        is a third party's transcription; it matches an independent run of that equation.
    """
    check_hyperparam("rho", rho, 0)
    check_hyperparam("alpha", alpha, 0)
    ball = ball_of("gam_exact", Default(0.0), perturbation, lambda _: metric_ball(rho))

    def init_fn(params):
        return first_state(ball.init(params), params)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        start, loss_here = value_fn.pcast_ascent(params), value_fn.ascent
        g_0 = value_fn.own_gradient(g)
        slope = hvp(loss_here, start)(unit(g_0))
        eps, ball_state = _climb(
            *(value_fn, params, perturb_dtype, extra, ball, state.perturbation, slope)
        )
        at = partial(evaluate_at, value_fn, params, perturb_dtype=perturb_dtype)
        sharp_loss, _, g_a = at(eps)
        curved = hvp(loss_here, perturbed(start, eps, perturb_dtype))(unit(g_a))
        factor = at_step(alpha, state.step) * at_step(rho, state.step)
        updates = tree.add_scaled(g_0, factor, curved)
        updates = jax.tree.map(value_fn.mean_of_ascents, tree.cast_like(updates, params))
        readings = take_readings(
            *(state.readings, value, sharp_loss, g_0, g_a, params),
            point=lambda: perturbed(params, eps, perturb_dtype),
            gradients=2 + 2 * HESSIAN_PRODUCT,
            ball=ball_state,
            mean_of_ascents=value_fn.mean_of_ascents,
        )
        return updates, next_state(state, ball_state, readings)

    return closure_transformation(init_fn, update_fn, name="gam_exact")
