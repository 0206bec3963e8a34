"""The state of variants that count steps, and hold nothing else of their own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core.hyperparams import next_step
from samx.core.readings import Readings, no_readings


class SteppedState(NamedTuple):
    """State of `cr_sam`, `gam`, `gam_exact` and `tsam`.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        perturbation: State of the perturbation; `gam` has two.
        readings: Readings of the last step.
    """

    step: jax.Array
    perturbation: optax.OptState
    readings: Readings


def first_state(perturbation: optax.OptState, params: Any) -> SteppedState:
    """Return the state before the first step."""
    return SteppedState(jnp.zeros((), jnp.int32), perturbation, no_readings(params))


def next_state(
    state: SteppedState, perturbation: optax.OptState, readings: Readings
) -> SteppedState:
    """Return the state after a step."""
    return SteppedState(next_step(state.step), perturbation, readings)
