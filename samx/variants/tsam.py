"""TSAM: a mean of sharp gradients in which the higher losses weigh more.

Li, Zhou, Bilmes. "Reweighting Local Minima with Tilted SAM", ICML 2025.
https://arxiv.org/abs/2410.22656
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import draws, tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import (
    Default,
    RandomKey,
    as_count,
    at_step,
    check_hyperparam,
    next_step,
)
from samx.core.microbatches import joined_aux
from samx.core.readings import Readings, extra_gradients, no_readings, of_microbatches
from samx.core.sharp import ascend, climbed_from, evaluate_at, perturbed, sharp_gradient
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.perturbations.balls import along
from samx.perturbations.metrics import identity
from samx.variants._ball import ball_of


class TSAMState(NamedTuple):
    """State of `tsam`.

    Attributes:
        step: int32, optimizer steps so far; schedules run on it.
        key: uint32, the data of the random key of the noise (`jax.random.key_data`).
        perturbation: State of the perturbation.
        aux: The aux of the last step; `None` without `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    key: jax.Array
    perturbation: optax.OptState
    aux: Any
    readings: Readings


def tsam(
    rho: Radius = Default(0.05),
    tilt: ScalarOrSchedule = 1.0,
    *,
    samples: int = 3,
    radius: ScalarOrSchedule = 1.0,
    sigma: ScalarOrSchedule = 1.0,
    key: int | jax.Array = 0,
    aux_like: Any = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Tilted SAM (TSAM): climb from several noisy points, and weigh the high losses more.

        for i = 1, ..., S:
            z_i ~ N(0, σ² I), shortened to the length radius if it is longer
            x_i = w + z_i
            y_i = x_i + ρ ∇L(x_i) / ‖∇L(x_i)‖
        return Σ_i p_i ∇L(y_i),   p = softmax(t L(y_1), ..., t L(y_S))

    Args:
        rho: Radius ρ ≥ 0 of each climb; default 0.05.
        tilt: t ≥ 0; default 1. 0 is the mean over the points; a large t leaves the worst one. The
            authors also let it rise from 0, or fall to 0: `optax.linear_schedule`.
        samples: Number S ≥ 1 of points; default 3.
        radius: The largest length of the noise, ≥ 0; default 1.
        sigma: Standard deviation σ ≥ 0 of the noise; default 1.
        key: Seed or random key of the noise, the same on all devices; default 0.
        aux_like: What the loss returns as aux, or its shapes; the state then keeps the aux of the
            points y_i: means of its floating leaves, other leaves of the last point.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`. It ignores the
        incoming gradient, so XLA drops that computation.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or `samples` is not a
            Python int; in `init`, if `key` is neither a seed nor a random key.

    Example:
        Eight points left and right of a minimum. With a large tilt, only the highest count:

        >>> import jax.numpy as jnp, optax, samx
        >>> w, loss = jnp.array([0.1]), lambda w: (w ** 2).sum()
        >>> tx = samx.tsam(rho=0.0, tilt=50.0, samples=8, radius=0.5)
        >>> g_s, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> round(float(g_s[0]), 2)  # 2 (0.1 + 0.5)
        1.2

    References:
        Li, Zhou, Bilmes, ICML 2025, https://arxiv.org/abs/2410.22656

    Notes:
        With more than some dozen parameters, standard normal noise is longer than 1: z is uniform
        on the sphere of that radius unless σ is small. `samples=1` and `radius=0` is SAM. Readings:
        means over the points; `loss` is that at x_i, `sharp_loss` that at y_i. A perturbation with
        a state starts each climb from the same state, and keeps that of the last one. Cost: 2 S
        gradients per step; the points are taken one after the other, so that only one weighted mean
        is held. One key in the state.
        Fidelity: matches litian96/TSAM (its scripts for images), its draws replayed. Its scripts
        for language store the weights in place of the gradients, and cannot run as they are.
        `static_args`: `samples`.
    """
    check_hyperparam("tilt", tilt, 0)
    check_hyperparam("radius", radius, 0)
    check_hyperparam("sigma", sigma, 0)
    samples, keys = as_count("samples", samples), RandomKey(key)
    ball = ball_of("tsam", rho, perturbation)

    def init_fn(params):
        step = jnp.zeros((), jnp.int32)
        first = first_aux(aux_like)
        return TSAMState(step, keys.data(), ball.init(params), first, no_readings(params))

    def update_fn(_, state, params, *, value_fn, **extra):
        noise = partial(_noise, state, keys, params, radius, sigma)
        climb = partial(_climb, value_fn, ball, state, params, perturb_dtype, extra)
        tilt_t = at_step(tilt, state.step)

        def add(carry, i):
            mean, log_total, _ = carry
            g_s, ball_state, *found = climb(noise(i))
            readings = found[0]
            log_weight = (tilt_t * readings.sharp_loss).astype(log_total.dtype)
            log_total = jnp.logaddexp(log_total, log_weight)
            mean = tree.on_line(mean, tree.cast_like(g_s, mean), jnp.exp(log_weight - log_total))
            return (mean, log_total, ball_state), found

        zeros = optax.tree.zeros_like(jax.tree.map(tree.widen, params))
        nothing = jnp.full((), -jnp.inf, state.readings.loss.dtype)
        (mean, _, ball_state), found = fast_convolutions(jax.lax.scan)(
            add, (zeros, nothing, state.perturbation), jnp.arange(samples)
        )
        spent = samples * (2 + extra_gradients(ball_state))
        means, aux = joined_aux(found)
        readings = of_microbatches(state.readings, means, spent)
        aux = kept_aux("tsam", aux, aux_like, state.aux)
        new = TSAMState(next_step(state.step), state.key, ball_state, aux, readings)
        return tree.cast_like(mean, params), new

    return closure_transformation(init_fn, update_fn, name="tsam")


def _noise(
    state: TSAMState, keys: RandomKey, params: Any, radius: Any, sigma: Any, draw: jax.Array
) -> Any:
    """Return Gaussian noise that is not longer than `radius`."""
    radius, sigma = at_step(radius, state.step), at_step(sigma, state.step)
    n = draws.normal_like(keys.of(state.key), state.step, params, draw)
    return along(n, identity()(n), lambda norm: jnp.minimum(sigma * norm, radius))


def _climb(
    value_fn: Any,
    ball: optax.GradientTransformationExtraArgs,
    state: TSAMState,
    params: Any,
    perturb_dtype: DType,
    extra: dict[str, Any],
    noise: Any,
) -> tuple[Any, optax.OptState, Readings, Any]:
    """Climb from w + noise; return the gradient there, the ball's state, readings and aux."""
    loss, g, own_g = evaluate_at(value_fn, params, noise, perturb_dtype=perturb_dtype)
    _, seen = climbed_from(value_fn, own_g)
    point = perturbed(params, noise, perturb_dtype)
    eps, g_a, ball_state = ascend(seen, ball, g, state.perturbation, point, **extra)
    g_s, readings, aux = sharp_gradient(
        *(value_fn, params, optax.tree.add(noise, eps), state.readings),
        loss=loss,
        g=g_a,
        ball=None,
        perturb_dtype=perturb_dtype,
        has_aux=True,
    )
    return g_s, ball_state, readings, aux
