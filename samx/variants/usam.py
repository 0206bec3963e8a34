"""USAM: un-normalized SAM.

Andriushchenko, Flammarion. "Towards Understanding Sharpness-Aware Minimization", ICML 2022.
https://arxiv.org/abs/2206.06232
"""

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default
from samx.perturbations import unnormalized_step
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def usam(
    rho: Radius = Default(0.05),
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Un-normalized SAM: the perturbation is proportional to the gradient.

        g   = ∇L(w)          (the incoming updates)
        ε   = ρ g
        g_s = ∇L(w + ε)
        return g_s

    Args:
        rho: Factor ρ ≥ 0 of the gradient; default 0.05. It is not a radius: SAM's values do not
            carry over.
        perturbation: Replaces the step and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.all_readings(samx.usam(rho=0.5))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> g_s, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> g_s.tolist(), float(state.readings.perturbation_norm)
        ([4.5, 6.0], 2.5)

    References:
        Andriushchenko, Flammarion, ICML 2022, https://arxiv.org/abs/2206.06232

    Notes:
        `rho=0` is the base optimizer. Cost: 2 gradients per step, one after the other, and one
        transient copy of the parameters. Fidelity: matches cltan023/stablesam2024, usam.py without
        its renormalization.
    """
    step = ball_of("usam", rho, perturbation, unnormalized_step)
    return sharpness_aware(step, perturb_dtype=perturb_dtype, name="usam")
