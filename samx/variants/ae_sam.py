"""AE-SAM and AE-LookSAM: take a sharp gradient when the gradient norm is large.

Jiang, Yang, Zhang, Kwok. "An Adaptive Policy to Employ Sharpness-Aware Minimization", ICLR 2023.
https://arxiv.org/abs/2304.14647
"""

from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.policies import squared_norm
from samx.policies.perturb_if import perturb_if
from samx.variants._ball import ball_of
from samx.variants.looksam import reuse_orthogonal
from samx.variants.sam import sharpness_aware


def ae_sam(
    rho: Radius = Default(0.05),
    threshold: ScalarOrSchedule = 0.0,
    decay: ScalarOrSchedule = 0.9,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """AE-SAM: take a sharp gradient only when the gradient norm is large compared with its past.

        s  = ‖g‖²
        μ  = decay μ + (1 − decay) s
        σ² = decay σ² + (1 − decay) (s − μ)²
        if s ≥ μ + threshold σ:  return ∇L(w + ρ g / ‖g‖)
        else:                    return g

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        threshold: Threshold c, in standard deviations; default 0. The paper decreases it linearly
            from λ₂ to λ₁: `optax.linear_schedule(1.0, -1.0, total_steps)`.
        decay: Decay δ in [0, 1] of the moving averages; default 0.9.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import optax, samx
        >>> threshold = optax.linear_schedule(1.0, -1.0, transition_steps=1000)
        >>> tx = optax.chain(samx.ae_sam(0.05, threshold), optax.sgd(0.1, momentum=0.9))

    References:
        Jiang, Yang, Zhang, Kwok, ICLR 2023, https://arxiv.org/abs/2304.14647

    Notes:
        `threshold=-inf` is SAM, `inf` the base optimizer. The transformation is
        `perturb_if(policies.squared_norm(threshold, decay), sam(rho))`. Cost: 1 gradient per step,
        and 1 more on sharp steps. The paper's schedule makes about half of the steps sharp, most of
        them late. The norm is that of the incoming gradient, before clipping and decay.
        Fidelity: no code exists; the rule follows two secondary transcriptions that agree, and
        matches an independent implementation of them; `decay`, λ and the starting values are
        recalled. A third party's collection of the equations of 28 SAM papers has the same rule.
    """
    ball = ball_of("ae_sam", rho, perturbation)
    sam = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="ae_sam")
    return perturb_if(squared_norm(threshold, decay), sam)


def ae_looksam(
    rho: Radius = Default(0.05),
    threshold: ScalarOrSchedule = 0.0,
    alpha: ScalarOrSchedule = 0.1,
    decay: ScalarOrSchedule = 0.9,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """AE-LookSAM: AE-SAM's policy, with LookSAM's reuse on the other steps.

        if s ≥ μ + threshold σ:  g_s = ∇L(w + ρ g / ‖g‖)
                                 g_v = g_s − (⟨g, g_s⟩ / ‖g‖²) g
                                 return g_s
        else:                    return g + α (‖g‖ / ‖g_v‖) g_v

    with s, μ and σ as in `ae_sam`. Before the first sharp step nothing is reused.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        threshold: As in `ae_sam`; default 0. The paper's makes about a fifth of the steps sharp.
        alpha: Length α ≥ 0 of the reused part, relative to the gradient; default 0.1, see
            `looksam`.
        decay: As in `ae_sam`; default 0.9.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`. The state holds
        `part_ratio`, ‖g_v‖ / ‖g‖ on the last sharp step, and `sharp_fraction`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import optax, samx
        >>> threshold = optax.linear_schedule(2.0, 0.5, transition_steps=1000)
        >>> tx = optax.chain(samx.ae_looksam(0.05, threshold), optax.sgd(0.1, momentum=0.9))

    References:
        Jiang, Yang, Zhang, Kwok, ICLR 2023, https://arxiv.org/abs/2304.14647

    Notes:
        `threshold=-inf` is SAM, `alpha=0` AE-SAM. Cost: as `ae_sam`, and one copy of the parameters
        in the state. Fidelity: a reconstruction from memory, no code exists; matches an independent
        implementation of the same equations.
    """
    ball = ball_of("ae_looksam", rho, perturbation)
    policy = squared_norm(threshold, decay)
    return reuse_orthogonal("ae_looksam", policy, ball, alpha, perturb_dtype)
