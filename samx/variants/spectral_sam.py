"""SAM in the spectral norm of each matrix, the geometry of Muon.

Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher. "Training Deep Learning Models with
Norm-Constrained LMOs", ICML 2025. https://arxiv.org/abs/2502.07529 (the geometry)
"""

from typing import Literal

from samx.core.aliases import DType, Radius, Transformation
from samx.perturbations import spectral_ball
from samx.variants.sam import sharpness_aware


def spectral_sam(
    rho: Radius = 0.05,
    *,
    norm: Literal["leaf", "global"] = "leaf",
    vectors: Literal["l2", "sign", "zero"] = "l2",
    polar: Literal["svd", "newton_schulz"] = "svd",
    perturb_dtype: DType = "float32",
) -> Transformation:
    """SAM in a ball of spectral norms: every matrix moves by an orthogonal matrix times ρ.

        g   = ∇L(w)                        (the incoming updates)
        U S Vᵀ = g_l                       (each leaf l with two axes or more, as a matrix)
        ε_l = ρ U Vᵀ                       (other leaves: ρ g_l / ‖g_l‖)
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 in the spectral norm; default 0.05, samx's choice. In L2 a matrix of rank
            r moves by ρ √r.
        norm: "leaf", the default, or "global": ε is rescaled to the L2 length ρ.
        vectors: How leaves with one axis move: "l2", the default, "sign", or "zero".
        polar: How U Vᵀ is computed: "svd", the default, or "newton_schulz", Muon's iterations in
            matrix products, for accelerators.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If `rho` is a negative number, or `norm`, `vectors` or `polar` is unknown.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.spectral_sam(rho=0.1), optax.sgd(1.0))
        >>> w, loss = jnp.array([[3.0, 0.0], [0.0, 1.0]]), lambda w: 0.5 * jnp.sum(w * w)
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates.ravel()]
        [-3.1, -0.0, -0.0, -1.1]

    References:
        Pethick et al., ICML 2025, https://arxiv.org/abs/2502.07529: the linear minimization oracle.

    Notes:
        A definition of samx: we know of no paper with this form. With `optax.contrib.muon` as the
        base, ascent and descent have the same geometry. See `perturbations.spectral_ball`, also for
        convolutions. Cost: 2 gradients per step, one after the other, and one thin singular value
        decomposition per matrix, or 15 matrix products; no state.
        Fidelity: matches an independent loop. `static_args`: `norm`, `vectors`, `polar`.
    """
    ball = spectral_ball(rho, norm=norm, vectors=vectors, polar=polar)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="spectral_sam")
