"""Apply SAM to one part of the loss; take the gradient of the rest at the parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core.aliases import Transformation
from samx.core.closures import batch_size, evaluate_factors
from samx.core.hyperparams import as_array, next_step
from samx.core.readings import Readings, no_readings, with_losses
from samx.core.sharp import ascend, sharp_gradient
from samx.core.transformation import closure_transformation

GRADIENTS = 2 + 2 / 3  # two forward and three backward passes


class SplitState(NamedTuple):
    """State of the variants that perturb a part of the loss.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        perturbation: State of the perturbation.
        readings: Readings of the last step; the losses are sums over both parts.
    """

    step: jax.Array
    perturbation: optax.OptState
    readings: Readings


def split_sam(
    name: str,
    factors_of: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    perturbation: optax.GradientTransformationExtraArgs,
    perturb_dtype: Any,
) -> Transformation:
    """Take `∇ mean(plain · ℓ)(w) + ∇ mean(sharp · ℓ)(w + ε)`, where ε climbs the second mean.

    `factors_of(labels, step)` returns the factors `plain` and `sharp` of the losses, `[B]` each.
    """
    sharp = partial(sharp_gradient, gradients=GRADIENTS, perturb_dtype=perturb_dtype)

    def init_fn(params):
        step = jnp.zeros((), jnp.int32)
        return SplitState(step, perturbation.init(params), no_readings(params))

    def update_fn(_, state, params, *, losses_fn, batch, labels, weights=None, **extra):
        factors = factors_of(_checked(name, labels, batch), state.step)
        plain, climbed = evaluate_factors(losses_fn, batch, factors, weights, params)
        sharp_fn, q = climbed["value_fn"], climbed["grad"]
        eps, q_a, ball = ascend(sharp_fn, perturbation, q, state.perturbation, params, **extra)
        loss, g_a = plain["value"] + climbed["value"], optax.tree.add(plain["grad"], q_a)
        q_s, readings = sharp(sharp_fn, params, eps, state.readings, loss=loss, g=g_a, ball=ball)
        sharp_loss = plain["value"] + readings.sharp_loss
        readings = with_losses(readings, loss, sharp_loss)
        updates = optax.tree.add(plain["grad"], q_s)
        return updates, SplitState(next_step(state.step), ball, readings)

    return closure_transformation(init_fn, update_fn, name=name)


def of_class(labels: jax.Array, values: jax.Array) -> jax.Array:
    """Return `values[labels]`, `[B]`, as a sum over the classes: it is sharded like the labels."""
    is_class = labels[:, None] == jnp.arange(len(values))[None]
    return jnp.sum(jnp.where(is_class, values[None], 0), axis=1)


def _checked(name: str, labels: Any, batch: Any) -> jax.Array:
    labels, size = as_array("labels", labels, "integers"), batch_size(name, batch)
    if labels.shape != (size,):
        raise ValueError(
            f"{name}: `labels` must have one class per example, shape ({size},), got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: `labels` must be integers, got {labels.dtype}")
    return labels
