"""Unified SAM: between SAM and its un-normalized form.

Oikonomou, Loizou. "Sharpness-Aware Minimization: General Analysis and Improved Rates", ICLR 2025.
https://arxiv.org/abs/2503.02225
"""

from samx.core.aliases import DType, Radius, ScalarOrSchedule, Transformation
from samx.perturbations import partly_normalized_step
from samx.schedules import one_minus_inverse
from samx.variants.sam import sharpness_aware


def unified_sam(
    rho: Radius = 0.1,
    lam: ScalarOrSchedule = one_minus_inverse,
    *,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Unified SAM: normalize a share of the ascent, from USAM (λ = 0) to SAM (λ = 1).

        g   = ∇L(w)                        (the incoming updates)
        ε   = ρ (1 − λ + λ / ‖g‖) g
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0; default 0.1, samx's choice.
        lam: Share λ in [0, 1]; default `samx.schedules.one_minus_inverse`, λ = 1 − 1/t on step t =
            1, 2, ..., which the authors recommend: it starts as USAM and becomes SAM. Their other
            schedule is `lambda step: 1 / (step + 1)`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.all_readings(optax.chain(samx.unified_sam(rho=0.1, lam=0.5), optax.sgd(0.1)))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> round(float(optax.tree.get(state, "perturbation_norm")), 3)
        0.3

    References:
        Oikonomou, Loizou, ICLR 2025, https://arxiv.org/abs/2503.02225

    Notes:
        `lam=1` is `sam`, `lam=0` is `usam`, exactly. Where λ < 1, the step depends on the scale of
        the loss. Cost: 2 gradients per step, one after the other; a step counter in the state.
        Fidelity: matches dimitris-oik/unifiedsam, whose `step(closure)` raises as its README shows
        it; it was run through its two halves.
    """
    ball = partly_normalized_step(rho, lam)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="unified_sam")
