"""One SAM step on examples of a batch that are chosen by their losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.closures import Closure, LossesClosure, evaluate, mean_loss
from samx.core.devices import PerExample
from samx.core.hyperparams import as_count
from samx.core.readings import Readings
from samx.core.sharp import ascend, sharp_gradient
from samx.selection.examples import group_size, put


class SamStep(NamedTuple):
    """Results of one SAM step.

    Attributes:
        updates: The sharp gradient.
        gradient: The gradient at w.
        perturbation: State of the perturbation.
        readings: Readings of SAM on these examples.
        losses: `[B]` at w, of this device's examples.
        sharp_losses: `[B]` at w + ε, of this device's examples.
        aux: The aux of the pass at w.
    """

    updates: optax.Updates
    gradient: optax.Updates
    perturbation: optax.OptState
    readings: Readings
    losses: jax.Array
    sharp_losses: jax.Array
    aux: Any


def sam_step(
    losses_fn: LossesClosure,
    batch: Any,
    weights: Any,
    params: optax.Params,
    state: Any,
    extra: dict[str, Any],
    *,
    gradients: float,
    perturbation: optax.GradientTransformationExtraArgs,
    perturb_dtype: Any,
) -> SamStep:
    """Compute both gradients of SAM on these examples; `gradients` is their cost.

    `state` has the fields `perturbation` and `readings`. `extra` holds more keywords for the
    perturbation.
    """
    value_fn = mean_loss(losses_fn, batch, weights, keeps_losses=True)
    seen, (aux, losses) = evaluate(value_fn, params)
    value_fn, g, keywords = seen["value_fn"], seen["grad"], extra | seen
    eps, g_a, ball = ascend(value_fn, perturbation, g, state.perturbation, params, **keywords)
    g_s, readings, (_, sharp_losses) = sharp_gradient(
        *(value_fn, params, eps, state.readings),
        loss=seen["value"],
        g=g_a,
        ball=ball,
        gradients=gradients,
        perturb_dtype=perturb_dtype,
        has_aux=True,
    )
    return SamStep(g_s, g, ball, readings, losses.examples, sharp_losses.examples, aux)


def selected_loss(losses_fn: LossesClosure, batch: Any, choose: Callable[..., Any]) -> Closure:
    """Return the closure of a mean loss over examples that are chosen in the same pass.

    `choose(losses)` returns positions and weights. The aux of the closure is
    `(None, PerExample(losses))` with the losses of the whole batch.
    """
    devices = losses_fn.evaluation.devices

    def local(params):
        losses = tree.widen(losses_fn(params, batch))
        position, weights = choose(jax.lax.stop_gradient(losses))
        ones = jnp.ones(position.size, losses.dtype) if weights is None else weights
        kept = put(ones, position, losses.size).astype(losses.dtype)
        mean_total = devices.psum(jnp.sum(kept)) / devices.count
        mean = jnp.sum(losses * kept) / jnp.where(mean_total == 0, 1, mean_total)
        return mean, (None, PerExample(losses))

    return Closure(local, losses_fn.name, "losses_fn").on(devices)


def groups_here(
    name: str, batch: Any, num_groups: int, losses_fn: LossesClosure
) -> tuple[int, int]:
    """Return the number of groups on this device, and the number of examples in each."""
    num_devices = losses_fn.evaluation.devices.count
    if num_groups % num_devices:
        raise ValueError(
            f"{name}: `num_groups` must be a multiple of the {num_devices} devices, which choose "
            f"among their own examples, got {num_groups}"
        )
    here = num_groups // num_devices
    return here, group_size(name, batch, here)


def as_groups(keyword: str, num_selected: int, num_groups: int) -> tuple[int, int]:
    """Return both counts; require that `num_groups` divides `num_selected`."""
    num_selected, num_groups = as_count(keyword, num_selected), as_count("num_groups", num_groups)
    if num_selected % num_groups:
        raise ValueError(
            f"`{keyword}` must be a multiple of `num_groups`, {num_groups}, got {num_selected}"
        )
    return num_selected, num_groups


def count_of(fraction: float, size: int) -> int:
    """Return how many examples a fraction of `size` is: rounded down, at least 1."""
    return max(1, int(fraction * size + 1e-9))  # 0.29 * 100 is 28.999999999999996
