"""The state of the variants that reuse a part of the last sharp gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.hyperparams import next_step
from samx.core.readings import Readings, no_readings, skip_readings
from samx.policies.policy import Policy, branch


class ReuseState(NamedTuple):
    """State of the variants that reuse a part of the sharp gradient.

    Attributes:
        step: int32, optimizer steps so far.
        age: int32, steps since the part was taken.
        policy: State of the policy.
        perturbation: State of the perturbation.
        part: The reused part, shaped like the parameters; zeros until the first one is taken.
        part_norm: ‖part‖.
        part_ratio: ‖part‖ / ‖g‖ at the step that took the part.
        sharp_fraction: Share of the steps so far with a sharp gradient.
        readings: Readings of the last step.
    """

    step: jax.Array
    age: jax.Array
    policy: Any
    perturbation: optax.OptState
    part: optax.Updates
    part_norm: jax.Array
    part_ratio: jax.Array
    sharp_fraction: jax.Array
    readings: Readings


def init_reuse(policy: Policy, perturbation: Any, params: Any) -> ReuseState:
    """Return the state before the first step."""
    readings = no_readings(params)
    return ReuseState(
        step=jnp.zeros((), jnp.int32),
        age=jnp.zeros((), jnp.int32),
        policy=policy.init(params),
        perturbation=perturbation.init(params),
        part=optax.tree.zeros_like(params),
        part_norm=jnp.zeros_like(readings.grad_norm),
        part_ratio=jnp.zeros_like(readings.grad_norm),
        sharp_fraction=jnp.zeros((), jnp.float32),
        readings=readings,
    )


def take_part(
    state: ReuseState, part: Any, length: tree.Length, g_length: tree.Length, readings: Readings
) -> ReuseState:
    """Store the part of a sharp gradient for the next steps.

    `length` is that of the part, and `g_length` that of the gradient, with the same scale.
    """
    return state._replace(
        age=jnp.zeros_like(state.age),
        part=tree.cast_like(part, state.part),
        part_norm=length.norm / length.scale,
        part_ratio=tree.ratio(length.norm, g_length.norm),
        readings=readings,
    )


def reuse_part(state: ReuseState, value: Any, g: Any) -> ReuseState:
    """Keep the part for another step; `value` and `g` are the loss and gradient of this step."""
    readings = skip_readings(state.readings, value, g)
    return state._replace(age=next_step(state.age), readings=readings)


def look_or_skip(
    policy: Policy,
    g: Any,
    state: ReuseState,
    ball_state: Any,
    look: Callable[[], tuple[Any, tuple[Any, ReuseState]]],
    skip: Callable[[], tuple[Any, ReuseState]],
) -> tuple[Any, ReuseState]:
    """Do what the policy decides, count the step, and store the states.

    `look()` returns `(g_s, (updates, state))`, and `skip()` returns `(updates, state)`.
    """
    is_sharp, (updates, state), policy_state = branch(policy, g, state.policy, look, skip)
    step = next_step(state.step)
    share = state.sharp_fraction
    fraction = share + (is_sharp.astype(share.dtype) - share) / step.astype(share.dtype)
    return updates, state._replace(
        step=step, policy=policy_state, perturbation=ball_state, sharp_fraction=fraction
    )
