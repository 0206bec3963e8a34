"""GSAM: descend the sharp loss, and its gap to the loss as well.

Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu. "Surrogate Gap Minimization Improves
Sharpness-Aware Training", ICLR 2022. https://arxiv.org/abs/2203.08065
"""

from typing import Literal

from samx.combinations import surrogate_gap
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def gsam(
    rho: Radius = Default(0.05),
    alpha: ScalarOrSchedule = 0.4,
    *,
    descend: Literal["sharp", "clean"] = "sharp",
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Surrogate Gap guided SAM.

        g    = ∇L(w)                                  (the incoming updates)
        ε    = ρ g / ‖g‖
        g_s  = ∇L(w + ε)
        g_⊥  = g − (⟨g, g_s⟩ / ‖g_s‖²) g_s            (the part of g across g_s)
        return g_s − α g_⊥

    To climb L across g_s is to descend the gap L(w + ε) − L(w) without touching L(w + ε).

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05. The paper lets it follow the learning rate:
            `samx.schedules.following`. Its values: 0.04 falling to 0.02 for ResNets with SGD, 0.6
            falling to 0 to 0.2 for vision transformers with AdamW.
        alpha: α ≥ 0, a number or a schedule; default 0.4, the paper's for ViT-B/16 and ViT-S/32.
            ResNets 0.01; other transformers and mixers 0.01 to 1.
        descend: "clean" is the other form of the authors' code, closer to ordinary training:
            g + α (g_s − (⟨g_s, g⟩ / ‖g‖²) g).
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        ValueError: If `rho` or `alpha` is a negative number, `descend` unknown, or `rho` given
            together with `perturbation`; in `update`, see `closure_transformation`.
        TypeError: If `rho` or `alpha` is neither number nor schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.gsam(rho=0.5, alpha=1.0), optax.sgd(0.1))
        >>> w, loss = jnp.array([1.0, 1.0]), lambda w: w[0] ** 2 / 2 + 5 * w[1] ** 2
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-0.075, -1.5]

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
        https://arxiv.org/abs/2203.08065

    Notes:
        `alpha=0` is SAM. Cost: 2 gradients per step, one after the other, and two transient copies
        of the parameters, since g is kept for the end. Readings: `sharp_grad_norm` is ‖g_s‖, before
        anything is taken away. Any other variant's gap: `samx.combinations.surrogate_gap`.
        Where devices climb on their own (`data_parallel(..., ascent="local")`), the mean of g_s is
        taken apart by the mean of g; in the authors' code each device takes its own apart.
        Fidelity: matches google-research/big_vision. `static_args`: `descend`, `perturbation`,
        `perturb_dtype`; `rho` too where `perturbation` is given.
    """
    ball = ball_of("gsam", rho, perturbation)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="gsam")
    return surrogate_gap(sharp, alpha, descend, name="gsam")
