"""AE-SAM and AE-LookSAM: sharp gradients where the landscape looks sharp.

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
    """AE-SAM: a sharp gradient only where the gradient is long compared with what it has been.

        s  = ‖g‖²
        μ  = decay μ + (1 − decay) s
        σ² = decay σ² + (1 − decay) (s − μ)²
        if s ≥ μ + threshold σ:  return ∇L(w + ρ g / ‖g‖)
        else:                    return g

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05.
        threshold: c, in standard deviations, a number or a schedule; default 0. The paper lets it
            fall linearly from λ₂ to λ₁: `optax.linear_schedule(1.0, -1.0, total_steps)`.
        decay: δ in [0, 1] of the moving averages, a number or a schedule; default 0.9.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        ValueError: If `rho` is negative, `decay` outside [0, 1], or `rho` given together with
            `perturbation`; in `update`, see `closure_transformation`.
        TypeError: If a number is neither number nor schedule.

    Example:
        >>> import optax, samx
        >>> threshold = optax.linear_schedule(1.0, -1.0, transition_steps=1000)
        >>> tx = optax.chain(samx.ae_sam(0.05, threshold), optax.sgd(0.1, momentum=0.9))

    References:
        Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
        ICLR 2023, https://arxiv.org/abs/2304.14647

    Notes:
        `threshold=-inf` is SAM, `inf` the base optimizer. It is
        `perturb_if(policies.squared_norm(threshold, decay), sam(rho))`. Cost: 1 gradient per step
        and 1 more on sharp steps; the paper's schedule makes about half of the steps sharp, most of
        them late. The norm is that of the gradient as handed in, before any clipping and decay.
        Fidelity: no code exists. The rule follows two secondary transcriptions that agree, and
        matches an independent implementation of them; `decay`, λ and the starting values are
        recalled. `static_args`: `perturbation`, `perturb_dtype`; `rho` too where `perturbation` is
        given.
    """
    ball = ball_of("ae_sam", rho, perturbation)
    sam = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="ae_sam")
    return perturb_if(squared_norm(threshold, decay), sam)


def ae_looksam(
    rho: Radius = Default(0.05),
    threshold: ScalarOrSchedule = 0.0,
    alpha: ScalarOrSchedule = 0.7,
    decay: ScalarOrSchedule = 0.9,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """AE-LookSAM: AE-SAM's policy, and LookSAM's reuse on the steps in between.

        if s ≥ μ + threshold σ:  g_s = ∇L(w + ρ g / ‖g‖)
                                 g_v = g_s − (⟨g, g_s⟩ / ‖g‖²) g
                                 return g_s
        else:                    return g + α (‖g‖ / ‖g_v‖) g_v

    with s, μ and σ as in `ae_sam`. Before the first sharp step nothing is reused.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05.
        threshold: c, in standard deviations, a number or a schedule; default 0. The paper's makes
            about a fifth of the steps sharp.
        alpha: Length α ≥ 0 of the reused part, relative to the gradient, a number or a schedule;
            default 0.7.
        decay: δ in [0, 1] of the moving averages, a number or a schedule; default 0.9.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given. Its state holds
        `part_ratio`, ‖g_v‖ / ‖g‖ when it was taken, and `sharp_fraction`.

    Raises:
        ValueError: If `rho` or `alpha` is negative, `decay` outside [0, 1], or `rho` given together
            with `perturbation`; in `update`, see `closure_transformation`.
        TypeError: If a number is neither number nor schedule.

    Example:
        >>> import optax, samx
        >>> threshold = optax.linear_schedule(2.0, 0.5, transition_steps=1000)
        >>> tx = optax.chain(samx.ae_looksam(0.05, threshold), optax.sgd(0.1, momentum=0.9))

    References:
        Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
        ICLR 2023, https://arxiv.org/abs/2304.14647

    Notes:
        `threshold=-inf` is SAM, `alpha=0` AE-SAM. Cost: as `ae_sam`, and one copy of the parameters
        in the state. Fidelity: a reconstruction from memory, no code exists; matches an independent
        implementation of the same equations. `static_args`: `perturbation`, `perturb_dtype`; `rho`
        too where `perturbation` is given.
    """
    ball = ball_of("ae_looksam", rho, perturbation)
    policy = squared_norm(threshold, decay)
    return reuse_orthogonal("ae_looksam", policy, ball, alpha, perturb_dtype)
