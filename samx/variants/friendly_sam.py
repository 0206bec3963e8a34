"""Friendly SAM: climb what is special about this batch.

Li, Zhou, He, Cheng, Huang. "Friendly Sharpness-Aware Minimization", CVPR 2024.
https://arxiv.org/abs/2403.12350
"""

import optax

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.perturbations import subtract_ema
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def friendly_sam(
    rho: Radius = Default(0.05),
    sigma: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Friendly SAM (F-SAM).

        g   = ∇L(w)                    (the incoming updates)
        d   = g − σ m                  (m = 0 on the first step)
        m   = λ m + (1 − λ) g          (m = g on the first step)
        ε   = ρ d / ‖d‖
        return g_s = ∇L(w + ε)

    The average m stands for the gradient of the whole data set: climbing it would hurt everywhere.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05. The authors' runs on CIFAR-100: 0.2.
        sigma: Share σ ≥ 0 of the average that is not climbed, a number or a schedule; default 1,
            the paper's.
        decay: λ in [0, 1] of the average, a number or a schedule; default 0.9. On CIFAR-100: 0.6
            and 0.95.
        perturbation: Another geometry in place of the ball, which gets d; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        ValueError: If `rho` or `sigma` is a negative number, `decay` one outside [0, 1], or `rho`
            given together with `perturbation`; in `update`, see `closure_transformation`.
        TypeError: If one of them is neither number nor schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.friendly_sam(rho=0.2, decay=0.6), optax.sgd(0.1, momentum=0.9))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value=loss(w), value_fn=loss)
        >>> optax.tree.get(state, "average").tolist()
        [3.0, 4.0]

    References:
        Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization", CVPR 2024,
        https://arxiv.org/abs/2403.12350

    Notes:
        `sigma=0` is SAM. Cost: 2 gradients per step, one after the other; one more copy of the
        parameters in the state. The direction is
        `perturbations.subtract_ema`, which other variants take too.
        With a gradient that hardly changes, of a whole data set say, d is rounding.
        The code is followed. By a transcription of it, the paper has m = 0 at first and updates it
        before d is taken: d = g − σ (λ m + (1 − λ) g), the same direction as here with
        σ λ / (1 − σ (1 − λ)) in place of σ; so for σ = 1 they differ in the first steps only.
        The readings' `cosine` compares ε with g_s: up a deviation, not up the gradient, the loss
        need not rise. Fidelity: matches nblt/F-SAM. `static_args`: `perturbation`,
        `perturb_dtype`; `rho` too where `perturbation` is given.
    """
    ball = optax.chain(subtract_ema(sigma, decay), ball_of("friendly_sam", rho, perturbation))
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="friendly_sam")
