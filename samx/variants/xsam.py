"""XSAM: look for the direction of the maximum between the ascent and the sharp gradient.

Chen, Zhou. "Revisiting Sharpness-Aware Minimization: A More Faithful and Effective
Implementation", ICLR 2026. https://arxiv.org/abs/2603.10048
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import (
    Default,
    as_count,
    at_step,
    check_hyperparam,
    check_static_number,
    map_schedule,
    next_step,
)
from samx.core.order import after
from samx.core.readings import FORWARD, UNKNOWN, Readings, no_readings
from samx.core.sharp import ascend, climb_further, loss_at, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.perturbations.balls import metric_ball
from samx.variants._ball import ball_of


class XSAMState(NamedTuple):
    """State of `xsam`.

    Attributes:
        step: int32, optimizer steps so far.
        perturbation: State of the perturbation.
        alpha: The position α between both directions, found by the last search; 1 before it.
        extra_gradients: float32, the cost of the last step's search, in gradients over one batch.
        readings: Readings of the last step.
    """

    step: jax.Array
    perturbation: optax.OptState
    alpha: jax.Array
    extra_gradients: jax.Array
    readings: Readings


def xsam(
    rho: Radius = Default(0.15),
    *,
    every: int = 100,
    alpha: ScalarOrSchedule | None = None,
    rho_max: Radius = 0.3,
    alpha_max: float = 2.0,
    alpha_step: float = 0.1,
    ascent_steps: int = 1,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """XSAM: turn the sharp gradient towards the maximum of the loss on a sphere.

        w_k = w, climbed k times by ρ / k along the gradient    (ε = w_k − w)
        g_s = ∇L(w_k)
        v_0 = ε / ‖ε‖,  v_1 = g_s / ‖g_s‖,  θ = the angle between both
        v(α) = (sin((1 − α) θ) v_0 + sin(α θ) v_1) / sin θ          (slerp)
        on the steps 0, every, 2 every, ...:
            α = argmax L(w + ρ_max v(α))  over  α = 0, alpha_step, ..., alpha_max
        return ‖g_s‖ v(α)

    X-SAM, with a hyphen, is another method: `x_sam`.

    Args:
        rho: Length ρ ≥ 0 of all climbs together; default 0.15.
        every: Steps from one search to the next; default 100. The authors search on the first batch
            of each epoch: give the number of steps per epoch.
        alpha: A position α ≥ 0 in place of the search. 1 is SAM, 0 steps along the ascent, more
            than 1 goes beyond the sharp gradient. Default `None`: the search.
        rho_max: Radius ρ_max ≥ 0 of the search; default 0.3.
        alpha_max: The largest α that is tried; default 2.
        alpha_step: The distance of two α; default 0.1.
        ascent_steps: Number k ≥ 1 of climbs; default 1.
        perturbation: Replaces the ball and `rho`: one climb.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If a hyperparameter is neither a number nor a schedule, a count is not a Python
            int, or `alpha_max` or `alpha_step` is not a Python number.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> loss = lambda w: 0.5 * (w[0] ** 2 + 4 * w[1] ** 2)
        >>> w = jnp.array([1.0, 1.0])
        >>> for alpha in (0.0, 1.0, None):
        ...     tx = optax.chain(samx.xsam(rho=1.0, rho_max=1.0, alpha=alpha), optax.sgd(1.0))
        ...     updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        ...     print([round(float(u), 2) for u in updates])
        [-1.93, -7.74]
        [-1.24, -7.88]
        [-1.1, -7.9]

    References:
        Chen, Zhou, ICLR 2026, https://arxiv.org/abs/2603.10048

    Notes:
        Every update has the length of the sharp gradient. `alpha=1` is SAM, with `ascent_steps=k`
        the k-step one. On the authors' small example the search always ends at `alpha_max`: two
        directions that are close give an extrapolation. The smallest α wins among equal losses. If
        all are equal, as for ρ = 0 or ρ_max = 0, or if none is finite, α stays. Without an ascent
        the sharp gradient is returned. If both directions are opposite, no plane is defined, and
        the result lies along v_0. The angle is measured as arctan2, which loses nothing in float32;
        the authors take an arccos. A search that is due on a step without a sharp gradient
        (`perturb_if`) is left out. Where devices climb separately (`data_parallel(...,
        ascent="local")`), v_0 is the direction of the mean of their ascents. Cost: k + 1 gradients
        per step, one after the other, and on steps that search one forward pass for each α, 21 by
        default; one number in the state.
        Fidelity: matches Cccjl219/XSAM, its search included. `static_args`: `every`, `alpha_max`,
        `alpha_step`, `ascent_steps`.
    """
    every, ascent_steps = as_count("every", every), as_count("ascent_steps", ascent_steps)
    if alpha is not None:
        check_hyperparam("alpha", alpha, 0)
    check_hyperparam("rho_max", rho_max, 0)
    check_static_number("alpha_max", alpha_max, 0)
    check_static_number("alpha_step", alpha_step, 0, excluded=0)
    tried = np.arange(int((alpha_max + 1e-5) / alpha_step) + 1) * alpha_step
    ball = ball_of("xsam", rho, perturbation, partial(_part_of_the_climb, ascent_steps))
    sharp = partial(sharp_gradient, gradients=1 + ascent_steps, perturb_dtype=perturb_dtype)

    def init_fn(params):
        readings, zero = no_readings(params), jnp.zeros((), jnp.float32)
        start = jnp.ones((), readings.loss.dtype)
        return XSAMState(jnp.zeros((), jnp.int32), ball.init(params), start, zero, readings)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        eps, g_a, ball_state = ascend(value_fn, ball, g, state.perturbation, params, **extra)
        climb_on = partial(climb_further, value_fn, ball, state.perturbation, params)
        eps = climb_on(eps, steps=ascent_steps, perturb_dtype=perturb_dtype, **extra)
        is_due = state.step % every == 0 if alpha is None else jnp.zeros((), bool)
        is_due &= not value_fn.evaluation.is_skipped_step
        cost = jnp.where(is_due, len(tried) * FORWARD, 0).astype(jnp.float32)
        new = state._replace(
            step=next_step(state.step), perturbation=ball_state, extra_gradients=cost
        )
        g_s, readings = sharp(value_fn, params, eps, state.readings, loss=value, g=g_a, ball=new)
        direction = _slerp(jax.tree.map(value_fn.mean_of_ascents, eps), g_s)

        def loss_of(alpha):
            step = tree.scaled(at_step(rho_max, state.step), direction(alpha))
            return loss_at(value_fn, params, step, perturb_dtype)

        if alpha is None:
            found = _argmax(loss_of, tried, is_due, state.alpha)
        else:
            found = jnp.asarray(at_step(alpha, state.step), state.alpha.dtype)
        updates = tree.scaled(tree.norm(g_s), direction(found))
        return tree.cast_like(updates, params), new._replace(alpha=found, readings=readings)

    return closure_transformation(init_fn, update_fn, name="xsam")


def _part_of_the_climb(ascent_steps: int, rho: Radius) -> Transformation:
    """Return the ball of one climb."""
    check_hyperparam("rho", rho, 0)
    return metric_ball(map_schedule(rho, lambda rho: rho / ascent_steps))


def _slerp(eps: Any, g_s: Any) -> Callable[[Any], Any]:
    """Return α -> v(α), of length 1, between the directions of both trees."""
    end = tree.length(g_s)
    eps = after(eps, end.norm)
    start = tree.length(eps)
    v_0, v_1 = tree.with_length(eps, 1.0, start), tree.with_length(g_s, 1.0, end)
    cosine = tree.dot(v_0, v_1)
    sine = tree.plain_norm(tree.combine(1.0, v_1, -cosine, v_0))
    has_ascent = start.norm > 0
    angle = jnp.arctan2(jnp.where(has_ascent, sine, 1.0), jnp.where(has_ascent, cosine, 0.0))

    def direction(alpha):
        along_end = tree.ratio(jnp.sin(alpha * angle), sine)
        along_start = jnp.cos(alpha * angle) - cosine * along_end
        along_end = jnp.where(has_ascent, along_end, 1.0)
        return tree.combine(along_start, v_0, along_end, v_1)

    return direction


def _argmax(
    loss_of: Callable[[jax.Array], jax.Array], tried: np.ndarray, is_due: Any, held: jax.Array
) -> jax.Array:
    """Return the first α of the highest loss if a search is due, else the one that is held."""

    def search():
        alphas = jnp.asarray(tried, held.dtype)
        losses = fast_convolutions(jax.lax.map)(loss_of, alphas)
        is_known = jnp.isfinite(losses)
        highest = jnp.max(losses, where=is_known, initial=-jnp.inf)
        lowest = jnp.min(losses, where=is_known, initial=jnp.inf)
        best = alphas[jnp.argmax(jnp.where(is_known, losses, -jnp.inf))]
        return jnp.where(highest > lowest, best, held)

    return fast_convolutions(jax.lax.cond)(is_due, search, lambda: held)
