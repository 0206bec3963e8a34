"""GNP: a penalty on the norm of the gradient.

Zhao, Zhang, Hu. "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
Learning", ICML 2022. https://arxiv.org/abs/2202.03599
"""

from typing import Literal

from samx.combinations import combination
from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_choice, check_hyperparam
from samx.perturbations.balls import along
from samx.perturbations.metrics import identity
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


def gnp(
    rho: Radius = Default(0.1),
    alpha: ScalarOrSchedule = 0.8,
    *,
    clean: Literal["gradient", "unit"] = "gradient",
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Gradient-norm penalty (GNP): descend L + λ‖∇L‖, with λ = α ρ, by finite differences.

        g   = ∇L(w)                        (the incoming updates)
        g_s = ∇L(w + ρ g / ‖g‖)
        return (1 − α) g + α g_s           ("unit": (1 − α) g / ‖g‖ + α g_s)

    Args:
        rho: Step ρ ≥ 0 of the finite difference, the paper's r; default 0.1.
        alpha: Balance α ≥ 0, the penalty λ divided by ρ; default 0.8, of the authors' runs. 1,
            which is SAM, stands in their runs with a warm-up for ViT.
        clean: "gradient", the default and the paper's formula. "unit": the gradient in length 1, as
            in the authors' code by default, and in their published runs.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, `clean` is unknown, or `rho` is given together with
            `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> for clean in ("gradient", "unit"):
        ...     tx = optax.chain(samx.gnp(rho=0.1, alpha=0.5, clean=clean), optax.sgd(1.0))
        ...     updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        ...     print([round(float(u), 3) for u in updates])
        [-3.03, -4.04]
        [-1.83, -2.44]

    References:
        Zhao, Zhang, Hu, ICML 2022, https://arxiv.org/abs/2202.03599; "When Will Gradient
        Regularization Be Harmful?", ICML 2024, https://arxiv.org/abs/2406.09723 (warm-ups)

    Notes:
        `alpha=1` is SAM. The authors' warm-ups over W steps: "r" is
        `rho=optax.linear_schedule(0, rho, W)`, "lambda" is `alpha=optax.linear_schedule(0, alpha,
        W)`, "zero" is `samx.perturb_if(samx.policies.between(W), samx.gnp(...))`. Their code
        then clips: put `optax.clip_by_global_norm(5.0)` after GNP. Their weight decay is a part of
        the loss in both passes. Their devices mix their own gradients, and average then:
        `data_parallel(..., ascent="local")`. Cost: 2 gradients per step, one after the other, and
        one transient copy of the parameters: g is kept until the end.
        Fidelity: matches zhaoyang-0204/gnp in both forms. `static_args`: `clean`.
    """
    check_choice("clean", clean, ("gradient", "unit"))
    check_hyperparam("alpha", alpha, 0)
    ball = ball_of("gnp", rho, perturbation)

    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="gnp")

    def combine(g, g_s, step):
        return tree.on_line(g, g_s, at_step(alpha, step))

    def unit(g):
        return along(g, identity()(g), 1.0)

    return combination("gnp", sharp, combine, clean=unit if clean == "unit" else None)
