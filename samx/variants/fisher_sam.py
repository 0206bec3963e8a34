"""Fisher SAM: a ball in the metric of the diagonal empirical Fisher information.

Kim, Li, Hu, Hospedales. "Fisher SAM: Information Geometry and Sharpness Aware Minimisation",
ICML 2022. https://arxiv.org/abs/2206.04920
"""

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import DType, Radius, Transformation
from samx.core.hyperparams import check_number
from samx.perturbations import ball
from samx.variants.sam import sharpness_aware


def fisher_sam(
    rho: Radius = 0.1, eta: float = 1.0, *, perturb_dtype: DType = "float32"
) -> Transformation:
    """SAM in a ball that is narrow where the gradient is large.

        g   = ∇L(w)                              (the incoming updates)
        F   = 1 + eta g²                         (elementwise)
        ε   = ρ F⁻¹g / √⟨g, F⁻¹g⟩                so that  ⟨ε, F ε⟩ = ρ²
        g_s = ∇L(w + ε)
        return g_s

    Args:
        rho: Radius ρ ≥ 0 in the metric F; default 0.1.
        eta: Weight η ≥ 0 of the Fisher information; default 1. 0 is SAM.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If `rho` is neither a number nor a schedule, or `eta` is not a number.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.all_readings(optax.chain(samx.fisher_sam(rho=0.1), optax.sgd(0.1)))
        >>> w, loss = jnp.array([0.6, 0.8]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> round(float(optax.tree.get(state, "perturbation_norm")), 3)
        0.081

    References:
        Kim, Li, Hu, Hospedales, ICML 2022, https://arxiv.org/abs/2206.04920

    Notes:
        The Fisher information is the square of the batch gradient, not the mean of squared
        gradients of examples. So the ball depends on the scale of the loss.
        Cost: 2 gradients per step, one after the other; elementwise work; no state.
        Fidelity: no code by the authors is known. Matches a third party's
        (johnjaejunlee95/torch-unified-SAM-optimization) to 1e-12; the defaults are theirs, and the
        paper's text was not read.
    """
    check_number("eta", eta, 0)

    def climb(g, params, radius):
        del params

        def over_root(x):
            """Return F^(-1/2) x; squares would overflow."""
            return jax.tree.map(lambda x, g: x / jnp.hypot(1.0, jnp.sqrt(eta) * jnp.abs(g)), x, g)

        whitened = over_root(g)
        return over_root(tree.with_length(whitened, radius, tree.length(whitened)))

    return sharpness_aware(ball(rho, climb), perturb_dtype=perturb_dtype, name="fisher_sam")
