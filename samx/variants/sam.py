"""SAM: the gradient at the worst point of a small ball around the parameters.

Foret, Kleiner, Mobahi, Neyshabur. "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021. https://arxiv.org/abs/2010.01412
"""

from functools import partial
from typing import NamedTuple

import jax
import optax

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default, check_count
from samx.core.readings import UNKNOWN, Readings, extra_gradients, no_readings
from samx.core.sharp import ascend, sharp_gradient, value_and_grad_at
from samx.core.transformation import as_transformation, closure_transformation
from samx.variants._ball import ball_of


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`.

    Attributes:
        perturbation: State of the perturbation.
        readings: What the last step saw.
    """

    perturbation: optax.OptState
    readings: Readings


def sharpness_aware(
    perturbation: optax.GradientTransformation,
    ascent_steps: int = 1,
    *,
    perturb_dtype: DType = "float32",
    name: str = "sharpness_aware",
) -> Transformation:
    """Replace the gradient by the gradient at a perturbed point: SAM in any geometry.

        g = ∇L(w)                                      (the incoming updates)
        ε = perturbation(g)
        repeat ascent_steps − 1 times:
            ε = ε + perturbation(∇L(w + ε))            (each step of the full radius)
        return g_s = ∇L(w + ε)

    Args:
        perturbation: An optax transformation from a gradient to a step up the loss, for example
            from `samx.perturbations`.
        ascent_steps: Number of ascent steps n ≥ 1; default 1. As in `optax.contrib.sam` with
            `sync_period = n + 1`, steps are not projected back: the radius adds up to n·ρ at most.
        perturb_dtype: Lowest precision of the perturbed point; default float32, so that bfloat16
            and float16 parameters really see the perturbation. `None` keeps their dtype.
        name: What error messages call it.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        TypeError: If `ascent_steps` is not a Python int, or `perturbation` no transformation.
        ValueError: If `ascent_steps` is below 1; in `update`, see `closure_transformation`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> ball = samx.perturbations.linf_ball(0.1)
        >>> tx = optax.chain(samx.sharpness_aware(ball), optax.sgd(0.5))
        >>> w, loss = jnp.array([1.0, -2.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-0.55, 1.05]

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412

    Notes:
        A perturbation of zero gives the base optimizer. Cost: `1 + ascent_steps` gradients per
        step, one after the other, and one transient copy of the parameters. The state advances
        once per optimizer step, from the gradient at the parameters, whatever `ascent_steps` is.
        `static_args`: `perturbation`, `ascent_steps`, `perturb_dtype`, `name`.
    """
    check_count("ascent_steps", ascent_steps)
    perturbation = as_transformation(name, "perturbation", perturbation)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return SharpnessAwareState(perturbation.init(params), no_readings(params))

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        eps, g_a, ball = ascend(value_fn, perturbation, g, state.perturbation, params, **extra)
        if ascent_steps > 1:
            climb = partial(_climb_further, value_fn, perturbation, state.perturbation, extra)
            eps = climb(params, eps, ascent_steps - 1, perturb_dtype)
        cost = 1 + ascent_steps + extra_gradients(ball)
        g_s, readings = sharp(
            value_fn, params, eps, state.readings, loss=value, g=g_a, gradients=cost
        )
        return g_s, SharpnessAwareState(ball, readings)

    return closure_transformation(init_fn, update_fn, name=name)


def _climb_further(value_fn, perturbation, state, extra, params, eps, num_steps, perturb_dtype):
    """Take further ascent steps, each along the gradient at the point reached so far."""

    def climb(_, eps):
        _, g_i = value_and_grad_at(value_fn.ascent, params, eps, perturb_dtype=perturb_dtype)
        point = optax.apply_updates(params, eps)
        step, _ = perturbation.update(g_i, state, point, value_fn=value_fn, **extra)
        return optax.tree.add(eps, step)

    return jax.lax.fori_loop(0, num_steps, climb, eps)


def sam(
    rho: Radius = Default(0.05),
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Sharpness-Aware Minimization.

        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ g / ‖g‖
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05, the paper's recommendation.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given.

    Raises:
        ValueError: If `rho` is a negative number, or given together with `perturbation`; in
            `update`, see `closure_transformation`.
        TypeError: If `rho` is neither number nor schedule.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.sam(rho=0.1), optax.sgd(0.5))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(u), 3) for u in updates]
        [-1.53, -2.04]

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
        Generalization", ICLR 2021, https://arxiv.org/abs/2010.01412

    Notes:
        `rho=0` is the base optimizer. Cost: 2 gradients per step, one after the other, and one
        transient copy of the parameters. Weight decay belongs behind it in the chain, or inside the
        loss, where it is part of the ascent as in google-research/sam. That code climbs on each
        device with its own gradient; here the ascent gradient is the one handed in.
        Fidelity: matches davda54/sam. `static_args`: `perturbation`, `perturb_dtype`; `rho` too
        where `perturbation` is given.
    """
    ball = ball_of("sam", rho, perturbation)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="sam")
