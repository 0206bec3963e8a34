"""Monge SAM: SAM with a ball that is measured on the graph of the loss.

Jacobsen, Arvanitidis. "Monge SAM: Robust Reparameterization-Invariant Sharpness-Aware Minimization
Based on Loss Geometry", 2025. https://arxiv.org/abs/2502.08448
"""

from samx.core.aliases import DType, Radius, Transformation
from samx.perturbations import monge_ball
from samx.variants.sam import sharpness_aware


def monge_sam(rho: Radius = 0.05, *, perturb_dtype: DType = "float32") -> Transformation:
    """Monge SAM (M-SAM): like SAM where the loss is flat, like the base where it is steep.

        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ g / (‖g‖ √(1 + ‖g‖²))
        return g_s = ∇L(w + ε)

    To first order, w + ε is the worst point of the ball of radius ρ in the metric I + g gᵀ. This is
    the metric of the graph of the loss.

    Args:
        rho: Radius ρ ≥ 0 over all parameters, measured on the graph of the loss; default 0.05.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.all_readings(optax.chain(samx.monge_sam(rho=1.0), optax.sgd(0.1)))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> round(float(optax.tree.get(state, "perturbation_norm")), 4)  # 1 / √26
        0.1961

    References:
        Jacobsen, Arvanitidis, 2025, https://arxiv.org/abs/2502.08448

    Notes:
        This is not Momentum-SAM (`momentum_sam`) or micro-batch SAM (`msam`). `rho=0` is the base
        optimizer. Cost: 2 gradients per step, one after the other, and one transient copy of the
        parameters. The radius depends on the scale of the loss: use mean losses. For other
        variants, the geometry is `perturbations.monge_ball`.
        Fidelity: the paper's closed form; it matches a third party's code
        (manavdahra/sam-opt-research), because the authors' code was not available.
    """
    return sharpness_aware(monge_ball(rho), perturb_dtype=perturb_dtype, name="monge_sam")
