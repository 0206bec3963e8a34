"""µP²: perturbations whose effect does not depend on the width of the network.

Haas, Xu, Cevher, Vankadara. "µP²: Effective Sharpness Aware Minimization Requires Layerwise
Perturbation Scaling", NeurIPS 2024. https://arxiv.org/abs/2411.00075
"""

from typing import Any, Literal

from samx.core.aliases import DType, Radius, Transformation
from samx.perturbations import mup_ball
from samx.variants.sam import sharpness_aware


def mup_sam(
    rho: Radius,
    scales: Any,
    *,
    normalization: Literal["decoupled", "layerwise"] = "decoupled",
    width: float | None = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SAM in the maximal update parametrization with perturbation scaling (µP²).

        s   = scales                   (one number for each leaf, 1 at base width)
        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ s g / ‖√s g‖           "layerwise": ρ s g / (‖s g‖ / √width)
        return g_s = ∇L(w + ε)

    Tune the learning rate and ρ on a narrow network, and keep them for a wide one.

    Args:
        rho: Radius ρ ≥ 0 at base width.
        scales: Tree like `params` of numbers ≥ 0, from `samx.mup.layer_scales`.
        normalization: The paper's own two forms of the norm: "decoupled", the default, is its
            algorithm; "layerwise" is its Definition 4. See `perturbations.mup_ball`.
        width: With "layerwise", how many times as wide as its base the network is.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, `normalization` is unknown, or `width` is missing
            or given without "layerwise"; in `update`, if `scales` does not match `params`.
        TypeError: If `rho` is neither a number nor a schedule, or a scale is not a number.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> def params(width):
        ...     return {"kernel": jnp.ones((2, width)), "head": jnp.ones((width, 1)) / width}
        >>> wide, base = params(8), jax.eval_shape(lambda: params(2))
        >>> scales = samx.mup.layer_scales(wide, base)
        >>> rates = samx.mup.learning_rates(wide, base)  # of SGD, in units of the base width's
        >>> tx = optax.chain(
        ...     samx.mup_sam(0.05, scales),
        ...     optax.sgd(0.1, momentum=0.9),
        ...     optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, rates)),
        ... )
        >>> scales
        {'head': 0.25, 'kernel': 4.0}

    References:
        Haas, Xu, Cevher, Vankadara, NeurIPS 2024, https://arxiv.org/abs/2411.00075

    Notes:
        Scales of 1 are SAM. µP is half of the method: initialize the output layer with 1/width of
        the usual variance, or with zero, and multiply learning rates by `samx.mup.learning_rates`.
        While an output layer is zero, only that layer is perturbed. With Adam as the base the
        scales are the same: the perturbation depends on gradients, not on steps.
        Cost: 2 gradients per step, one after the other, and one transient copy of the parameters.
        Fidelity: "decoupled" matches the perturbation in the first author's later repository
        (moritzhaas/large-lr-width-scaling). "layerwise" comes from the same tables and was checked
        against an independent loop. The paper's own code was not published. `static_args`:
        `scales`, `normalization`, `width`.
    """
    ball = mup_ball(rho, scales, normalization=normalization, width=width)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="mup_sam")
