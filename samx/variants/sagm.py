"""SAGM: sharpness-aware gradient matching.

Wang, Zhang, Lei, Zhang. "Sharpness-Aware Gradient Matching for Domain Generalization", CVPR 2023.
https://arxiv.org/abs/2303.10353
"""

from samx.combinations import mix
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.perturbations import gradient_matching_step
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def sagm(
    rho: Radius = Default(0.05),
    alpha: ScalarOrSchedule = 0.001,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Sharpness-Aware Gradient Matching (SAGM): align the gradient and the sharp gradient.

        g   = ∇L(w)                        (the incoming updates)
        ε   = (ρ / ‖g‖ − α) g
        return (g + ∇L(w + ε)) / 2

    The step back by α g is a step of descent, so that the base lowers the loss, the sharp loss, and
    the angle between both gradients.

    Args:
        rho: Radius ρ ≥ 0; default 0.05.
        alpha: Rate α ≥ 0 of the step back; default 0.001. Where ‖g‖ > ρ / α, the whole step goes
            down.
        perturbation: Replaces ε, with `rho` and `alpha`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.sagm(rho=0.1, alpha=0.01), optax.sgd(1.0))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-3.015, -4.02]

    References:
        Wang, Zhang, Lei, Zhang, CVPR 2023, https://arxiv.org/abs/2303.10353

    Notes:
        `alpha=0` is the mean of the gradient and SAM's, `combinations.mix(sam(rho), 0.5)`. The
        paper, as we remember it, adds both gradients without the half: twice the learning rate. The
        authors' `adaptive` is `gradient_matching_step(rho, alpha, metric)` as `perturbation`. Cost:
        2 gradients per step, one after the other; one step counter in the state.
        Fidelity: matches Wang-pengfei/SAGM.
    """
    make = lambda rho: gradient_matching_step(rho, alpha)  # noqa: E731
    ball = ball_of("sagm", rho, perturbation, make)
    return mix(sharpness_aware(ball, perturb_dtype=perturb_dtype, name="sagm"), 0.5, name="sagm")
