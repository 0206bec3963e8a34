"""Reuse: take a part of the sharp gradient on some steps, and add it to the gradient on others."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.hyperparams import next_step
from samx.core.readings import UNKNOWN, Readings, no_readings, skip_readings, take_readings
from samx.core.sharp import ascend, perturbed, value_and_grad_at
from samx.core.transformation import closure_transformation
from samx.policies.policy import Policy, check_policy


class ReuseState(NamedTuple):
    """State of the variants that reuse a part of the sharp gradient.

    Attributes:
        step: int32, optimizer steps so far.
        age: int32, steps since the part was taken.
        policy: State of the policy.
        perturbation: State of the perturbation.
        part: What is reused, shaped like the parameters; zeros before it is first taken.
        part_norm: ‖part‖.
        part_ratio: ‖part‖ / ‖g‖ when it was taken.
        sharp_fraction: Share of the steps so far with a sharp gradient.
        readings: What the last step saw.
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


def reuse(
    name: str,
    policy: Policy,
    perturbation: optax.GradientTransformationExtraArgs,
    *,
    take: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
    add: Callable[[Any, jax.Array, ReuseState], Any],
    perturb_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """The frame of LookSAM and vSAM, which differ in what they take and how they add it.

    ε = perturbation(g)
    if policy(g):  g_s = ∇L(w + ε);  return u, part = take(g, g_s, step)
    else:          return add(g, ‖g‖, state)
    """
    check_policy(name, policy)

    def init_fn(params):
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

    def update_fn(g, state, params, *, value_fn, ascent_grad, value=UNKNOWN, **extra):
        perturb = partial(perturbation.update, value_fn=value_fn, **extra)
        climb = partial(ascend, perturb, g, ascent_grad, state.perturbation, params)
        is_sharp, policy_state = policy.decide(g, state.policy)
        _, ball = climb()  # on every step, but for its state only: the compiler drops the rest
        age = next_step(state.age)
        g_norm = tree.norm(g)

        def look():
            eps, _ = climb()
            sharp_loss, g_s = value_and_grad_at(value_fn, params, eps, perturb_dtype=perturb_dtype)
            updates, part = take(g, g_s, state.step)
            readings = take_readings(
                state.readings,
                loss=value,
                sharp_loss=sharp_loss,
                g=ascent_grad,
                g_s=g_s,
                params=params,
                point=perturbed(params, eps, perturb_dtype),
                gradients=2,
                mean_of_ascents=value_fn.mean_of_ascents,
            )
            length = tree.norm(part)
            taken = {
                "age": jnp.zeros_like(age),
                "policy": policy.observe(g, g_s, policy_state),
                "part": tree.cast_like(part, params),
                "part_norm": length,
                "part_ratio": length / jnp.where(g_norm == 0, 1, g_norm),
                "readings": readings,
            }
            return updates, state._replace(**taken)

        def skip():
            last = state._replace(age=age, policy=policy_state)
            updates = tree.cast_like(add(g, g_norm, last), params)
            return updates, last._replace(readings=skip_readings(state.readings, value, g))

        updates, state = jax.lax.cond(is_sharp, look, skip)
        step = next_step(state.step)
        fraction = state.sharp_fraction + (is_sharp - state.sharp_fraction) / step
        return updates, state._replace(step=step, perturbation=ball, sharp_fraction=fraction)

    return closure_transformation(init_fn, update_fn, name=name)
