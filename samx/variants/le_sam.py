"""LE-SAM: a fixed rise of the loss in place of a fixed radius.

Wang, Liu, Xie, Gao. "Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of
Sharpness-Aware Minimization", ICML 2026. https://arxiv.org/abs/2605.10183
"""

from samx.combinations import combination
from samx.core import tree
from samx.core.aliases import DType, Perturbation, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_hyperparam
from samx.perturbations import loss_rise_ball
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def le_sam(
    sigma: ScalarOrSchedule = Default(0.35),
    rho_max: ScalarOrSchedule | None = 0.3,
    alpha: ScalarOrSchedule = 0.0,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Loss-Equated SAM (LE-SAM): climb until the loss has risen by σ, to first order.

        g   = ∇L(w)                        (the incoming updates)
        n   = √(‖g‖² + 1e-12)
        ε   = min(σ / n, ρ_max) g / n
        return ∇L(w + ε) − α g

    Args:
        sigma: Rise σ ≥ 0 of the loss; default 0.35, the authors' trainer's (their class: 0.1). It
            follows `samx.schedules.warmup_hold_cosine` in their runs.
        rho_max: Largest radius ρ_max ≥ 0; default 0.3 (their class: 0.05). `None`: no limit.
        alpha: Share α ≥ 0 of the gradient that is subtracted; default 0.
        perturbation: Replaces the ball, `sigma` and `rho_max`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `sigma` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.le_sam(sigma=0.5), optax.sgd(0.1))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value=loss(w), value_fn=loss)
        >>> round(float(optax.tree.get(state, "sharpness")), 3)  # σ, and half of ‖ε‖² = 0.1²
        0.505

    References:
        Wang, Liu, Xie, Gao, ICML 2026, https://arxiv.org/abs/2605.10183

    Notes:
        Where ρ_max is reached on every step, it is SAM with that radius. The README of the authors
        has `rho_max=999`, which never is. The rise is in units of the loss, mean or sum. The
        authors' class puts its epsilon of 1e-12 where Adam looks for its own: an Adam inside runs
        with `optax.adam(eps=1e-12)`. Their `topk` takes the mean of the largest losses of the
        batch, chosen again at w + ε: write that into the loss. Their `adaptive` is described in
        `perturbations.loss_rise_ball`; with it, whether their α subtracts g or |w| g is not known,
        and here it is g.
        Cost: 2 gradients per step, one after the other; no state.
        Fidelity: matches smithgun2005/LE-SAM-ICML2026. `static_args`: `rho_max` if it is `None`,
        and `sigma` if `perturbation` is given.
    """
    check_hyperparam("alpha", alpha, 0)
    make = lambda sigma: loss_rise_ball(sigma, rho_max)  # noqa: E731
    ball = ball_of("le_sam", sigma, perturbation, make, keyword="sigma")
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="le_sam")

    def combine(g, g_s, step):
        return tree.add_scaled(g_s, -1 * at_step(alpha, step), g)

    return combination("le_sam", sharp, combine)
