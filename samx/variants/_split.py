"""SAM on a part of the loss: the gradient of the rest is taken at the parameters themselves."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.closures import (
    Closure,
    LossesClosure,
    batch_size,
    mean_loss,
    over_devices,
    taken_anew,
    weighted_mean,
)
from samx.core.hyperparams import next_step
from samx.core.readings import Readings, no_readings, take_readings
from samx.core.sharp import ascend, perturbed, value_and_grad_at
from samx.core.transformation import closure_transformation

GRADIENTS = 2 + 2 / 3  # two forward and three backward passes


class SplitState(NamedTuple):
    """State of the variants that perturb a part of the loss.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        perturbation: State of the perturbation.
        readings: What the last step saw; the losses are those of both parts together.
    """

    step: jax.Array
    perturbation: optax.OptState
    readings: Readings


def split_sam(
    name: str,
    factors_of: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    perturbation: optax.GradientTransformationExtraArgs,
    perturb_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """`∇ mean(plain · ℓ)(w) + ∇ mean(sharp · ℓ)(w + ε)`, where ε climbs the second mean.

    `factors_of(labels, step)` gives the factors `plain` and `sharp` of the losses, `[B]` each.
    """

    def init_fn(params):
        step = jnp.zeros((), jnp.int32)
        return SplitState(step, perturbation.init(params), no_readings(params))

    def update_fn(updates, state, params, *, losses_fn, batch, labels, weights=None, **extra):
        del updates
        factors = factors_of(_checked(name, labels, batch), state.step)
        fns = [_mean_of(losses_fn, batch, factor, weights) for factor in factors]
        if losses_fn.num_microbatches > 1:
            plain, sharp = (taken_anew(fn, params)[0] for fn in fns)
        else:
            plain, sharp = _both(fns, factors, losses_fn, batch, params)
        sharp_fn, q = sharp["value_fn"], sharp["grad"]
        ascent_grad = sharp.get("ascent_grad", q)

        perturb = partial(perturbation.update, **extra | {"value_fn": sharp_fn})
        eps, ball = ascend(perturb, q, ascent_grad, state.perturbation, params)
        sharp_loss, g_s = value_and_grad_at(sharp_fn, params, eps, perturb_dtype=perturb_dtype)

        readings = take_readings(
            state.readings,
            loss=plain["value"] + sharp["value"],
            sharp_loss=plain["value"] + sharp_loss,
            g=optax.tree.add(plain["grad"], ascent_grad),
            g_s=g_s,
            params=params,
            point=perturbed(params, eps, perturb_dtype),
            gradients=GRADIENTS,
            mean_of_ascents=sharp_fn.mean_of_ascents,
        )
        updates = optax.tree.add(plain["grad"], g_s)
        return updates, SplitState(next_step(state.step), ball, readings)

    return closure_transformation(init_fn, update_fn, name=name)


def of_class(labels: jax.Array, values: jax.Array) -> jax.Array:
    """`values[labels]`, `[B]`, as a sum over the classes: it stays where the labels are."""
    is_class = labels[:, None] == jnp.arange(len(values))[None]
    return jnp.sum(jnp.where(is_class, values[None], 0), axis=1)


def _both(
    fns: list[Closure], factors: Any, losses_fn: LossesClosure, batch: Any, params: Any
) -> list[dict[str, Any]]:
    """What is to be known of both parts, in one forward and two backward passes."""

    def own(params):
        losses = tree.widen(losses_fn(params, batch))
        return [
            weighted_mean(factor * losses, fn.weights)
            for fn, factor in zip(fns, factors, strict=True)
        ]

    values, pull = jax.vjp(own, losses_fn.devices.vary(params))
    zeros = jax.tree.map(jnp.zeros_like, values)
    seen = []
    for i, fn in enumerate(fns):
        cotangents = [*zeros[:i], jnp.ones_like(values[i]), *zeros[i + 1 :]]
        (own_grad,) = pull(cotangents)
        seen.append(over_devices(fn, values[i], own_grad, params))
    return seen


def _mean_of(losses_fn: LossesClosure, batch: Any, factor: jax.Array, weights: Any) -> Closure:
    """The mean of `factor · ℓ`; the factors travel with their examples."""

    def with_aux(params, data):
        return data["factor"] * losses_fn(params, data["batch"]), None

    scaled = losses_fn._replace(with_aux=with_aux)
    return mean_loss(scaled, {"batch": batch, "factor": factor}, weights)


def _checked(name: str, labels: Any, batch: Any) -> jax.Array:
    labels, size = jnp.asarray(labels), batch_size(name, batch)
    if labels.shape != (size,):
        raise ValueError(
            f"{name}: `labels` must have one class per example, shape ({size},), got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: `labels` must be integers, got {labels.dtype}")
    return labels
