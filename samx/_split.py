"""SAM on a part of the loss: the gradient of the rest is taken at the parameters themselves."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx import _tree
from samx._base import closure_transformation
from samx._climb import ascend
from samx._closures import Closure, LossesClosure, batch_size, mean_loss, taken_anew, weighted_mean
from samx._hyper import next_step
from samx._sharp import perturbed, value_and_grad_at
from samx.readings import Readings, no_readings, take_readings

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


class Part(NamedTuple):
    """A part of the loss at the parameters: its value, its gradient, and the one to climb."""

    loss: jax.Array
    grad: optax.Updates
    ascent_grad: optax.Updates


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
            plain, sharp = (_part(fn, params) for fn in fns)
        else:
            plain, sharp = _both(losses_fn, batch, factors, weights, params)
        sharp_fn = fns[1]

        perturb = partial(perturbation.update, **extra | {"value_fn": sharp_fn})
        eps, ball = ascend(perturb, sharp.grad, sharp.ascent_grad, state.perturbation, params)
        sharp_loss, g_s = value_and_grad_at(sharp_fn, params, eps, perturb_dtype=perturb_dtype)

        readings = take_readings(
            state.readings,
            loss=plain.loss + sharp.loss,
            sharp_loss=plain.loss + sharp_loss,
            g=optax.tree.add(plain.grad, sharp.ascent_grad),
            g_s=g_s,
            params=params,
            point=perturbed(params, eps, perturb_dtype),
            gradients=GRADIENTS,
            mean_of_ascents=sharp_fn.mean_of_ascents,
        )
        updates = optax.tree.add(plain.grad, g_s)
        return updates, SplitState(next_step(state.step), ball, readings)

    return closure_transformation(init_fn, update_fn, name=name)


def of_class(labels: jax.Array, values: jax.Array) -> jax.Array:
    """`values[labels]`, `[B]`, as a sum over the classes: it stays where the labels are."""
    is_class = labels[:, None] == jnp.arange(len(values))[None]
    return jnp.sum(jnp.where(is_class, values[None], 0), axis=1)


def _both(
    losses_fn: LossesClosure, batch: Any, factors: tuple[Any, Any], weights: Any, params: Any
) -> list[Part]:
    """Both parts in one forward and two backward passes."""
    devices = losses_fn.devices

    def own(params):
        losses = _tree.widen(losses_fn(params, batch))
        return [weighted_mean(factor * losses, weights) for factor in factors]

    losses, pull = jax.vjp(own, devices.vary(params))
    found = []
    for i, loss in enumerate(losses):
        cotangents = [
            jnp.ones_like(x) if j == i else jnp.zeros_like(x) for j, x in enumerate(losses)
        ]
        (own_grad,) = pull(cotangents)
        own_grad = _tree.keep_floating(own_grad, params)
        loss, grad = devices.mean((loss, own_grad), devices.share(weights))
        ascent_grad = grad
        if devices.own_axes:
            ascent_grad = devices.ascent.mean(own_grad, devices.ascent.share(weights))
        found.append(Part(loss, grad, ascent_grad))
    return found


def _part(fn: Closure, params: Any) -> Part:
    seen, _ = taken_anew(fn, params)
    return Part(seen["value"], seen["grad"], seen.get("ascent_grad", seen["grad"]))


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
