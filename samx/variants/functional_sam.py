"""Functional-SAM: the derivative of the logits at the perturbed point, that of the loss at w.

Singh, Mobahi, Agarwala, Dauphin. "Avoiding Spurious Sharpness Minimization Broadens Applicability
of SAM", ICML 2025. https://arxiv.org/abs/2502.02407
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.closures import LogitsClosure, PerExample, checked_loss, evaluate, mean_loss
from samx.core.hyperparams import Default
from samx.core.readings import no_readings
from samx.core.sharp import ascend, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.variants._ball import ball_of
from samx.variants.sam import SharpnessAwareState


def functional_sam(
    rho: Radius = Default(0.05),
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Functional-SAM: perturb what the model computes, and not how the loss judges it.

        z = logits at w,   c = ∂L/∂z                   (of the clean logits)
        ε = ρ g / ‖g‖,     g = ∇L(w)
        return J(w + ε)ᵀ c                             (J: the derivative of the logits)

    SAM also changes c: it takes ∂L/∂z at the logits of the perturbed point. In language models that
    part of its effect dominates, and does not help.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05, SAM's.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `apply_fn`, `loss_on_logits`
        and `batch`, and respects `weights`. It does not use the incoming gradient, so XLA drops its
        computation.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If `rho` is neither a number nor a schedule.

    Example:
        Of a linear model it is the plain gradient: J is the same everywhere.

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> w, batch = jnp.array([3.0, 4.0]), {"x": jnp.eye(2)}
        >>> closures = {
        ...     "apply_fn": lambda w, batch: batch["x"] @ w,
        ...     "loss_on_logits": lambda logits, batch: logits**2}
        >>> tx = samx.functional_sam(rho=0.5)
        >>> g_s, state = tx.update(w, tx.init(w), w, batch=batch, **closures)
        >>> g_s.tolist()
        [3.0, 4.0]

    References:
        Singh, Mobahi, Agarwala, Dauphin, ICML 2025, https://arxiv.org/abs/2502.02407

    Notes:
        `rho=0` is the base optimizer. `loss_on_logits` must give each example a loss of its own
        logits. Logits are one array or a tree. The readings `sharp_loss` and `sharpness` are of the
        loss at w + ε, which is not what the gradient belongs to. Cost: 2 gradients per step, one
        after the other, one transient copy of the parameters, and the clean logits.
        Fidelity: reconstructed from the equation; there is no code of the authors. It matches a run
        of ours by that equation. The paper's preconditioned form is not here.
    """
    ball = ball_of("functional_sam", rho, perturbation)

    def init_fn(params):
        return SharpnessAwareState(ball.init(params), no_readings(params))

    def update_fn(
        _, state, params, *, apply_fn, loss_on_logits, batch, losses_fn, weights=None, **extra
    ):
        loss_on_logits = checked_loss("functional_sam", loss_on_logits)
        clean = losses_fn.with_fn(partial(_clean, apply_fn, loss_on_logits))
        seen, (_, kept) = evaluate(mean_loss(clean, batch, weights), params)
        climbed = extra | {"batch": batch, "losses_fn": losses_fn, "weights": weights}
        value_fn, g = seen["value_fn"], seen["grad"]
        eps, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **climbed)
        functional = losses_fn.with_fn(partial(_functional, apply_fn, loss_on_logits))
        value_fn = mean_loss(functional, (batch, kept.examples), weights)
        at = {"loss": seen["value"], "g": g_a, "ball": ball_state, "perturb_dtype": perturb_dtype}
        g_s, readings = sharp_gradient(value_fn, params, eps, state.readings, **at)
        return g_s, SharpnessAwareState(ball_state, readings)

    return closure_transformation(init_fn, update_fn, name="functional_sam")


def _clean(apply_fn: LogitsClosure, loss_on_logits: Any, params: Any, batch: Any) -> Any:
    """Return the losses, and as an aux each example's ∂ℓ/∂z."""
    logits = apply_fn(params, batch)
    losses, pull = jax.vjp(lambda z: loss_on_logits(z, batch), stop_gradient(logits))
    (c,) = pull(jnp.ones_like(losses))
    return loss_on_logits(logits, batch), (None, PerExample(c))


def _functional(apply_fn: LogitsClosure, loss_on_logits: Any, params: Any, data: Any) -> Any:
    """Return the losses, with the gradient Jᵀ c."""
    batch, c = data
    logits = apply_fn(params, batch)

    def product(c, z):  # over all axes but that of the examples
        return (tree.widen(c) * tree.widen(z)).real.sum(axis=tuple(range(1, z.ndim)))

    linear = jnp.stack(jax.tree.leaves(jax.tree.map(product, c, logits))).sum(axis=0)
    losses = tree.widen(loss_on_logits(stop_gradient(logits), batch))
    return losses + (linear - stop_gradient(linear)).astype(losses.dtype), None
