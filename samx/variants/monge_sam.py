"""Monge SAM: a ball on the surface of the loss.

Jacobsen, Arvanitidis. "Monge SAM: Robust Reparameterization-Invariant Sharpness-Aware Minimization
Based on Loss Geometry", 2025. https://arxiv.org/abs/2502.08448
"""

from samx.core.aliases import DType, Radius, Transformation
from samx.perturbations import monge_ball
from samx.variants.sam import sharpness_aware


def monge_sam(rho: Radius = 0.05, *, perturb_dtype: DType = "float32") -> Transformation:
    """Monge SAM (M-SAM): like SAM where the loss is flat, like its base where it is steep.

        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ g / (‖g‖ √(1 + ‖g‖²))
        return g_s = ∇L(w + ε)

    The worst point, to first order, of the ball of radius ρ in the metric I + g gᵀ, which the graph
    of the loss has.

    Args:
        rho: Radius ρ ≥ 0 over all parameters, on the surface of the loss, a number or a schedule
            over the optimizer's steps; default 0.05.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        ValueError: If `rho` is a negative number; in `update`, see `closure_transformation`.
        TypeError: If `rho` is neither number nor schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.monge_sam(rho=1.0), optax.sgd(0.1))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> round(float(optax.tree.get(state, "perturbation_norm")), 4)  # 1 / √26
        0.1961

    References:
        Jacobsen, Arvanitidis, 2025, https://arxiv.org/abs/2502.08448

    Notes:
        Not Momentum-SAM (`momentum_sam`), nor micro-batch SAM (`msam`). `rho=0` is the base
        optimizer. Cost: 2 gradients per step, one after the other, and one transient copy of the
        parameters. The radius depends on the scale of the loss: use mean losses. Its geometry for
        other variants is `perturbations.monge_ball`.
        Fidelity: the paper's closed form; matches a third party's code (manavdahra/
        sam-opt-research), since the authors' could not be had. `static_args`: `perturb_dtype`.
    """
    return sharpness_aware(monge_ball(rho), perturb_dtype=perturb_dtype, name="monge_sam")
