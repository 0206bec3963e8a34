"""CR-SAM: SAM that also descends the curvature along the ascent.

Wu, Luo, Wunsch. "CR-SAM: Curvature Regularized Sharpness-Aware Minimization", AAAI 2024.
https://arxiv.org/abs/2312.13555
"""

from functools import partial

import jax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_hyperparam
from samx.core.order import after
from samx.core.readings import UNKNOWN
from samx.core.sharp import ascend, sharp_gradient, value_and_grad_at
from samx.core.transformation import closure_transformation
from samx.variants._ball import ball_of
from samx.variants._states import first_state, next_state


def cr_sam(
    rho: Radius = Default(0.1),
    gamma: ScalarOrSchedule = 0.1,
    beta: ScalarOrSchedule = 0.01,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Curvature Regularized SAM (CR-SAM): look at both ends of the ascent.

        g = ∇L(w)                          (the incoming updates)
        ε = ρ g / ‖g‖
        p = ∇L(w + ε)
        q = ∇L(w − ε)
        return p + γ (p + q − 2 g) + β (p − q)

    p + q − 2 g is the gradient of the second difference of the loss, and p − q that of the first:
    on a quadratic loss they are 0 and 2 H ε.

    Args:
        rho: Radius ρ ≥ 0; default 0.1.
        gamma: Weight γ ≥ 0 of the second difference; default 0.1.
        beta: Weight β ≥ 0 of the first difference; default 0.01, of the authors' script. Their
            class has 0.1.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.cr_sam(rho=0.1, gamma=0.5, beta=0.0), optax.sgd(1.0))
        >>> w, loss = jnp.array([1.0, 0.0]), lambda w: w[0] ** 3 / 3
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # −1.1² − 0.5 (1.1² + 0.9² − 2)
        [-1.22, -0.0]

    References:
        Wu, Luo, Wunsch, AAAI 2024, https://arxiv.org/abs/2312.13555

    Notes:
        `gamma=0` and `beta=0` is SAM. The paper regularizes a normalized trace of the Hessian. As
        we remember it, the differences are divided by differences of the losses; the published code
        divides by nothing, and this is the code. Cost: 3 gradients per step. The last two
        need not wait for each other; here they run one after the other. Transient copies: g, ε, p.
        Fidelity: matches TrustAIoT/CR-SAM.
    """
    check_hyperparam("gamma", gamma, 0)
    check_hyperparam("beta", beta, 0)
    ball = ball_of("cr_sam", rho, perturbation)
    sharp = partial(sharp_gradient, gradients=3, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return first_state(ball.init(params), params)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        eps, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **extra)
        p, readings = sharp(
            value_fn, params, eps, state.readings, loss=value, g=g_a, ball=ball_state
        )
        back = after(tree.scaled(-1.0, eps), tree.plain_norm(p))
        _, q = value_and_grad_at(value_fn, params, back, perturb_dtype=perturb_dtype)
        gamma_t, beta_t = at_step(gamma, state.step), at_step(beta, state.step)
        combined = jax.tree.map(lambda g, p, q: _combined(g, p, q, gamma_t, beta_t), g, p, q)
        return tree.cast_like(combined, params), next_state(state, ball_state, readings)

    return closure_transformation(init_fn, update_fn, name="cr_sam")


def _combined(g, p, q, gamma, beta):
    if not tree.is_inexact(g):
        return p
    g, p, q = tree.widen(g), tree.widen(p), tree.widen(q)
    return p + gamma * (p + q - 2 * g) + beta * (p - q)
