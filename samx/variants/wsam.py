"""WSAM: sharpness as a regularizer with its own weight.

Yue, Jiang, Ye, Gao, Liu, Zhang. "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
Regularization Term", KDD 2023. https://arxiv.org/abs/2305.15817
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.combinations import mix
from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, at_step, check_hyperparam, map_schedule, next_step
from samx.core.transformation import as_transformation, base_keywords, closure_transformation
from samx.variants._ball import ball_of
from samx.variants.sam import sharpness_aware


class WSAMState(NamedTuple):
    """State of `wsam`.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        base: State of the base optimizer, which sees only the gradients at the parameters.
        sharp: State of SAM.
    """

    step: jax.Array
    base: optax.OptState
    sharp: optax.OptState


def wsam(
    base: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    rho: Radius = Default(0.05),
    gamma: ScalarOrSchedule = 0.9,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Weighted SAM: the base steps on the loss, and a plain gradient step reduces the sharpness.

        g   = ∇L(w)                                   (the incoming updates)
        ε   = ρ g / ‖g‖
        g_s = ∇L(w + ε)
        return base(g) − η α (g_s − g)                α = γ / (1 − γ)

    This is one step on L(w) + α (L(w + ε) − L(w)). The second term bypasses the base: it gets no
    momentum and no preconditioner.

    Args:
        base: The optimizer that takes the step on the loss, including weight decay and clipping.
        learning_rate: Learning rate η ≥ 0 of the step on the sharpness; use the base's own.
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        gamma: Weight γ in [0, 1); default 0.9. Good values are between 0.8 and 0.95. 0 is the base,
            and 0.5 weighs the sharpness as SAM does.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that wraps `base`. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `base` is not a
            transformation.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.wsam(optax.sgd(0.5, momentum=0.9), learning_rate=0.5, rho=0.1, gamma=0.9)
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]  # −0.5 (g + 9 · 0.1 g / ‖g‖)
        [-1.77, -2.36]

    References:
        Yue, Jiang, Ye, Gao, Liu, Zhang, KDD 2023, https://arxiv.org/abs/2305.15817

    Notes:
        If the base is plain gradient descent with the same learning rate, it is `coupled_wsam`.
        Cost: 2 gradients per step, one after the other, and two transient copies of the parameters
        (three without donation); the state is the base's. The authors' `max_norm`, which clips both
        gradients, is not offered: clipping in `base` sees g alone, and clipping after it in a chain
        sees the whole step.
        Fidelity: matches the class `WeightedSAM` that the authors kept in dlrover, with its default
        `decouple=True`. `static_args`: `base`.
    """
    check_hyperparam("learning_rate", learning_rate, 0)
    alpha = _weight(gamma)
    base = as_transformation("wsam", "base", base)
    ball = ball_of("wsam", rho, perturbation)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="wsam")

    def init_fn(params):
        return WSAMState(jnp.zeros((), jnp.int32), base.init(params), sharp.init(params))

    def update_fn(g, state, params, *, value_fn, **extra):
        g_s, sharp_state = sharp.update(g, state.sharp, params, value_fn=value_fn, **extra)
        keywords = base_keywords("wsam", {"value_fn": value_fn, **extra})
        updates, base_state = base.update(g, state.base, params, **keywords)
        eta_alpha = at_step(learning_rate, state.step) * at_step(alpha, state.step)
        updates = tree.add_scaled(updates, -1 * eta_alpha, tree.subtract(g_s, g))
        return updates, WSAMState(next_step(state.step), base_state, sharp_state)

    return closure_transformation(init_fn, update_fn, name="wsam")


def coupled_wsam(
    rho: Radius = Default(0.05),
    gamma: ScalarOrSchedule = 0.9,
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Weighted SAM through the base: move the gradient by a weighted part of g_s − g.

        g   = ∇L(w)                                   (the incoming updates)
        ε   = ρ g / ‖g‖
        g_s = ∇L(w + ε)
        return g + α (g_s − g)                        α = γ / (1 − γ)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05.
        gamma: Weight γ in [0, 1); default 0.9. 0 is the base optimizer, 0.5 is SAM.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.coupled_wsam(rho=0.1, gamma=0.9), optax.sgd(0.5))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-1.77, -2.36]

    References:
        Yue, Jiang, Ye, Gao, Liu, Zhang, KDD 2023, https://arxiv.org/abs/2305.15817

    Notes:
        This is `combinations.mix(sam(rho), γ / (1 − γ))`. The paper prefers `wsam`, whose base does
        not see the sharpness. Cost: 2 gradients per step, one after the other, and two transient
        copies of the parameters. Fidelity: matches the authors' `WeightedSAM(decouple=False)`.
    """
    ball = ball_of("coupled_wsam", rho, perturbation)
    sharp = sharpness_aware(ball, perturb_dtype=perturb_dtype, name="coupled_wsam")
    return mix(sharp, _weight(gamma), name="coupled_wsam")


def _weight(gamma: ScalarOrSchedule) -> Any:
    """Return the weight α of the sharpness, where the loss has weight 1."""
    check_hyperparam("gamma", gamma, 0, 1, excluded=1)  # 1 leaves nothing of the loss
    return map_schedule(gamma, lambda gamma: gamma / (1 - gamma))
