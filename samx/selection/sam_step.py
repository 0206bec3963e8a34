"""SAM on some examples of a batch, chosen by their losses."""

from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from samx.core.closures import LossesClosure, mean_loss, taken_anew, weighted_mean
from samx.core.devices import Devices
from samx.core.hyperparams import check_count
from samx.core.readings import Readings, take_readings
from samx.core.sharp import ascend, perturbed, value_and_grad_at
from samx.selection.examples import group_size

FORWARD = 1 / 3  # of a gradient: a forward pass without its backward pass, by the usual convention


class SamStep(NamedTuple):
    """What a step of SAM leaves behind.

    Attributes:
        updates: The sharp gradient.
        gradient: The gradient at w.
        perturbation: State of the perturbation.
        readings: Those of SAM on these examples.
        losses: `[B]` at w, the device's own.
        sharp_losses: `[B]` at w + ε, the device's own.
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
    perturbation: optax.GradientTransformationExtraArgs,
    state: Any,
    *,
    gradients: float,
    perturb_dtype: Any,
    extra: dict[str, Any],
) -> SamStep:
    """Both gradients of SAM on these examples, at the cost of `gradients`.

    `state` has the fields `perturbation` and `readings`.
    """
    value_fn = mean_loss(losses_fn, batch, weights, keeps_losses=True)
    seen, (aux, losses) = taken_anew(value_fn, params)
    g = seen["grad"]
    perturb = partial(perturbation.update, **extra | seen)
    ascent_grad = seen.get("ascent_grad", g)
    eps, ball = ascend(perturb, g, ascent_grad, state.perturbation, params)
    (sharp_loss, (_, sharp_losses)), g_s = value_and_grad_at(
        value_fn, params, eps, has_aux=True, perturb_dtype=perturb_dtype
    )
    readings = take_readings(
        state.readings,
        loss=seen["value"],
        sharp_loss=sharp_loss,
        g=ascent_grad,
        g_s=g_s,
        params=params,
        point=perturbed(params, eps, perturb_dtype),
        gradients=gradients,
        mean_of_ascents=value_fn.mean_of_ascents,
    )
    return SamStep(g_s, g, ball, readings, losses.examples, sharp_losses.examples, aux)


def groups_here(
    name: str, batch: Any, num_groups: int, losses_fn: LossesClosure
) -> tuple[int, int]:
    """How many of the groups of the whole batch are on this device, and their size."""
    num_devices = losses_fn.devices.count
    if num_groups % num_devices:
        raise ValueError(
            f"{name}: `num_groups` must be a multiple of the {num_devices} devices, which choose "
            f"among their own examples, got {num_groups}"
        )
    here = num_groups // num_devices
    return here, group_size(name, batch, here)


def check_groups(keyword: str, num_selected: int, num_groups: int) -> None:
    """Refuse counts that are none, or that leave the groups unequal."""
    check_count(keyword, num_selected)
    check_count("num_groups", num_groups)
    if num_selected % num_groups:
        raise ValueError(
            f"`{keyword}` must be a multiple of `num_groups`, {num_groups}, got {num_selected}"
        )


def check_fraction(keyword: str, fraction: Any) -> None:
    """Refuse what is no share of a batch that is known when tracing."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(
            f"`{keyword}` must be a Python number, got {type(fraction).__name__}; under "
            f"optax.inject_hyperparams pass static_args=({keyword!r},)"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"`{keyword}` must be in (0, 1], got {fraction!r}")


def count_of(fraction: float, size: int) -> int:
    """So many of `size` examples are a fraction of them: rounded down, but at least one."""
    return max(1, int(fraction * size + 1e-9))  # 0.29 * 100 is 28.999999999999996


def mean_over_batch(losses: jax.Array, weights: jax.Array | None, devices: Devices) -> jax.Array:
    """The mean of the devices' own losses."""
    return devices.mean(weighted_mean(losses, weights), devices.share(weights))
