"""Stable SAM: the sharp gradient, rescaled to the norm of the gradient.

Tan, Zhang, Liu, Wang, Hao. "Stabilizing Sharpness-aware Minimization Through A Simple
Renormalization Strategy", JMLR 26, 2025. https://arxiv.org/abs/2401.07250
"""

from samx.combinations import renormalized
from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default, check_flag
from samx.perturbations import metric_ball, unnormalized_step
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def stable_sam(
    rho: Radius = Default(0.05),
    *,
    normalize: bool = False,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Stable SAM: rescale the sharp gradient to the norm of the gradient.

        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ g                      with `normalize`: ρ g / ‖g‖
        g_s = ∇L(w + ε)
        return (‖g‖ / ‖g_s‖) g_s

    Args:
        rho: Factor ρ ≥ 0 of the gradient; default 0.05. It is not comparable with SAM's; with
            `normalize`, it is a radius like SAM's.
        normalize: Whether the perturbation has a fixed length; default False, as in the paper's
            experiments. True is the authors' first version of the code.
        perturbation: Replaces the step, `rho` and `normalize`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` or `normalize` is given together with
            `perturbation`.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.stable_sam(rho=0.5), optax.sgd(1.0))
        >>> w, loss = jnp.array([3.0, 1.0]), lambda w: w[0] ** 2 / 2 + 2 * w[1] ** 2
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # as long as the gradient, [3, 4]
        [-1.756, -4.682]

    References:
        Tan, Zhang, Liu, Wang, Hao, JMLR 2025, https://arxiv.org/abs/2401.07250

    Notes:
        `rho=0` is the base optimizer. Without the renormalization it is `samx.usam`. Cost: 2
        gradients per step, one after the other, one norm, and one transient copy of the parameters.
        Adam divides by the size of gradients, so with Adam little of the renormalization is left.
        Put clipping after it in the chain. Norms are plain L2 norms in any geometry. With its
        adaptive perturbation, the authors' code compares norms weighted by the weights, those of
        g_s by the perturbed weights. One line of that code, which is commented out and only ever
        shortens g_s, is not offered.
        Fidelity: matches cltan023/stablesam2024, usam.py and, with `normalize`, sam.py: the paper's
        own two forms. The paper's text was not read. `static_args`: `normalize`.
    """
    check_flag("normalize", normalize)
    if normalize and perturbation is not None:
        raise ValueError(
            "stable_sam: got `normalize` together with `perturbation`, which has its own length; "
            "leave `normalize` out"
        )
    ball = ball_of("stable_sam", rho, perturbation, metric_ball if normalize else unnormalized_step)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="stable_sam")
    return renormalized(sharp, name="stable_sam")
