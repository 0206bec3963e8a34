"""GSAM: descend the sharp loss, and also the gap between it and the loss.

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
    """Surrogate Gap guided SAM: also descend the gap between the sharp loss and the loss.

        g    = ∇L(w)                                  (the incoming updates)
        ε    = ρ g / ‖g‖
        g_s  = ∇L(w + ε)
        g_⊥  = g − (⟨g, g_s⟩ / ‖g_s‖²) g_s            (the part of g orthogonal to g_s)
        return g_s − α g_⊥

    Climbing L orthogonally to g_s lowers the gap L(w + ε) − L(w), and to first order does not
    change L(w + ε).

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05. In the paper it follows
            the learning rate: `samx.schedules.following`. Its values: from 0.04 down to 0.02 for
            ResNets with SGD, from 0.6 down to a value from 0 to 0.2 for vision transformers with
            AdamW.
        alpha: Weight α ≥ 0; default 0.4, the paper's for ViT-B/16 and ViT-S/32. ResNets: 0.01;
            other transformers and mixers: 0.01 to 1.
        descend: Which of the two rules in the authors' code. "sharp", the default, is the rule
            above. "clean" descends the clean loss instead, which is closer to ordinary training:
            g + α (g_s − (⟨g_s, g⟩ / ‖g‖²) g).
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `descend` is unknown.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.gsam(rho=0.5, alpha=1.0), optax.sgd(0.1))
        >>> w, loss = jnp.array([1.0, 1.0]), lambda w: w[0] ** 2 / 2 + 5 * w[1] ** 2
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-0.075, -1.5]

        The authors' `adaptive_perturbation=True`, whose step is |w| g, with the norm of g alone:

        >>> from samx.perturbations import ball
        >>> def climb(g, w, rho):
        ...     factor = rho / (optax.tree.norm(g) + 1e-30)
        ...     return jax.tree.map(lambda g, w: factor * jnp.abs(w) * g, g, w)
        >>> adaptive = samx.gsam(alpha=1.0, perturbation=ball(0.5, climb))

    References:
        Zhuang et al., ICLR 2022, https://arxiv.org/abs/2203.08065

    Notes:
        `alpha=0` is SAM, with "clean" the base optimizer. Cost: 2 gradients per step, in sequence,
        and two transient copies of the parameters, because g is kept until the end. The reading
        `sharp_grad_norm` (on request, `samx.all_readings`) is that of g_s. For any other variant:
        `samx.combinations.surrogate_gap`. Where devices climb separately
        (`data_parallel(..., ascent="local")`), the means of g and g_s over the devices are
        decomposed; in the authors' code each device decomposes its own. Fidelity: matches
        google-research/big_vision. Its `adaptive_perturbation`, ε = ρ |w| g / ‖g‖, is no metric of
        samx: it scales the step by |w|, and not the norm. `magnitude(0)` scales both, which is
        ASAM's geometry. A `perturbation` that chains `metric_ball(rho)` with an `optax.stateless`
        which multiplies by |w| has this formula; it was not compared with a recorded run.
        `static_args`: `descend`.
    """
    ball = ball_of("gsam", rho, perturbation)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="gsam")
    return surrogate_gap(sharp, alpha, descend, name="gsam")
