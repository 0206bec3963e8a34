"""Friendly SAM: climb the batch-specific part of the gradient.

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
    """Friendly SAM (F-SAM): subtract a moving average of past gradients before the ascent.

        g   = ∇L(w)                    (the incoming updates)
        d   = g − σ m                  (m = 0 on the first step)
        m   = λ m + (1 − λ) g          (m = g on the first step)
        ε   = ρ d / ‖d‖
        return g_s = ∇L(w + ε)

    The average m estimates the gradient of the whole data set: climbing it would raise the
    loss on all data.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05. The authors' runs on
            CIFAR-100: 0.2.
        sigma: Share σ ≥ 0 of the average that is subtracted; default 1, the paper's.
        decay: Decay λ in [0, 1] of the average; default 0.9. On CIFAR-100: 0.6 and 0.95.
        perturbation: Replaces the ball and `rho`; it gets d.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.friendly_sam(rho=0.2, decay=0.6), optax.sgd(0.1, momentum=0.9))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value=loss(w), value_fn=loss)
        >>> optax.tree.get(state, "average").tolist()
        [3.0, 4.0]

    References:
        Li, Zhou, He, Cheng, Huang, CVPR 2024, https://arxiv.org/abs/2403.12350

    Notes:
        `sigma=0` is SAM. Cost: 2 gradients per step, in sequence; one more copy of the parameters
        in the state. The direction is `perturbations.subtract_ema`, which other variants can take
        too. If the gradient hardly changes (that of a whole data set, say), d is rounding error.
        Along d, which is not g, the loss need not rise: `sharpness` and `cosine` may be negative.
        This follows the code. By a transcription of the paper, m starts at 0 there and is updated
        before d is taken: d = g − σ (λ m + (1 − λ) g). That is the same direction as here with
        σ λ / (1 − σ (1 − λ)) in place of σ; so for σ = 1 they differ in the first steps only.
        Fidelity: matches nblt/F-SAM.
    """
    ball = optax.chain(subtract_ema(sigma, decay), ball_of("friendly_sam", rho, perturbation))
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="friendly_sam")
