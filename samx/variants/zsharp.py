"""ZSharp: climb the outliers of the gradient.

Yun. "Sharpness-Aware Minimization with Z-Score Gradient Filtering", 2025.
https://arxiv.org/abs/2505.02369
"""

from typing import Literal

from samx.core.aliases import DType, Radius, ScalarOrSchedule, Transformation
from samx.perturbations import z_score_ball
from samx.variants.sam import sharpness_aware


def zsharp(
    rho: Radius = 0.05,
    quantile: ScalarOrSchedule = 0.95,
    *,
    norm: Literal["leaf", "global"] = "leaf",
    perturb_dtype: DType = "float32",
) -> Transformation:
    """ZSharp: perturb only the weights whose gradients are outliers in their layer.

        g   = ∇L(w)                                    (the incoming updates)
        z_l = (g_l − mean(g_l)) / std(g_l)             (each kernel l)
        kept_l = g_l where |z_l| is above its quantile, else 0
        ε_l = ρ kept_l / ‖kept_l‖                      (biases: ρ g_l / ‖g‖)
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of each kernel; default 0.05. The whole step is about ρ √(number of
            kernels) long.
        quantile: Share in [0, 1] of each kernel's entries that do not move, the authors' alpha;
            default 0.95.
        norm: "leaf", the default and the code's, or "global", the paper's: ε = ρ kept / ‖kept‖.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `norm` is unknown.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.zsharp(rho=0.1, quantile=0.5), optax.sgd(0.5))
        >>> w, loss = jnp.array([[3.0, 0.0], [0.1, -4.0]]), lambda w: 0.5 * jnp.sum(w * w)
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates.ravel()]
        [-1.53, -0.0, -0.05, 2.04]

    References:
        Yun, 2025, https://arxiv.org/abs/2505.02369

    Notes:
        Details of the filter: `perturbations.z_score_ball`. Cost: 2 gradients per step, one after
        the other, and one sort per kernel; no state.
        Fidelity: matches YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering.
        `norm="global"` follows a third party's transcription of the paper, which does not say what
        happens to biases: here they are not filtered. `static_args`: `norm`.
    """
    ball = z_score_ball(rho, quantile, norm=norm)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="zsharp")
