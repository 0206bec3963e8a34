"""SAM: the gradient at the worst point of a small ball around the parameters.

Foret, Kleiner, Mobahi, Neyshabur. "Sharpness-Aware Minimization for Efficiently Improving
Generalization", ICLR 2021. https://arxiv.org/abs/2010.01412
"""

from functools import partial
from typing import NamedTuple

import optax

from samx.core.aliases import DType, Perturbation, Radius, Transformation
from samx.core.hyperparams import Default, as_count
from samx.core.readings import UNKNOWN, Readings, no_readings
from samx.core.sharp import ascend, climb_further, sharp_gradient
from samx.core.transformation import as_transformation, closure_transformation
from samx.variants._ball import ball_of


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`.

    Attributes:
        perturbation: State of the perturbation.
        readings: Readings of the last step.
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
        ascent_steps: Number n ≥ 1 of ascent steps; default 1. As in `optax.contrib.sam` with
            `sync_period = n + 1`, steps are not projected back, so the total step is at
            most n·ρ.
        perturb_dtype: The closure gets the perturbed point in this dtype, or in a wider one;
            default float32, so that the perturbation is not lost in bfloat16 or float16. `None`
            keeps the parameters' dtype.
        name: What error messages call the transformation.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        TypeError: If `ascent_steps` is not a Python int, or `perturbation` is not a transformation.
        ValueError: If `ascent_steps` is below 1.

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
        step, one after the other, and one transient copy of the parameters. The perturbation's
        state advances once per optimizer step, from the gradient at the parameters, whatever
        `ascent_steps` is. Compare with `optax.contrib.sam` at `sync_period` 2 or more: in
        transparent mode, `sync_period=1` undoes the step before. `static_args`: `ascent_steps`.
    """
    ascent_steps = as_count("ascent_steps", ascent_steps)
    perturbation = as_transformation(name, "perturbation", perturbation)
    sharp = partial(sharp_gradient, gradients=1 + ascent_steps, perturb_dtype=perturb_dtype)

    def init_fn(params):
        return SharpnessAwareState(perturbation.init(params), no_readings(params))

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        eps, g_a, ball = ascend(value_fn, perturbation, g, state.perturbation, params, **extra)
        climb_on = partial(climb_further, value_fn, perturbation, state.perturbation, params)
        eps = climb_on(eps, steps=ascent_steps, perturb_dtype=perturb_dtype, **extra)
        g_s, readings = sharp(value_fn, params, eps, state.readings, loss=value, g=g_a, ball=ball)
        return g_s, SharpnessAwareState(ball, readings)

    return closure_transformation(init_fn, update_fn, name=name)


def sam(
    rho: Radius = Default(0.05),
    *,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
    """Sharpness-Aware Minimization (SAM).

        g   = ∇L(w)                    (the incoming updates)
        ε   = ρ g / ‖g‖
        return g_s = ∇L(w + ε)

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters; default 0.05, the paper's
            recommendation.
        perturbation: Replaces the ball and `rho`.
        perturb_dtype: See `sharpness_aware`.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn`.

    Raises:
        ValueError: If a number is out of range, or `rho` is given together with `perturbation`.
        TypeError: If `rho` is neither a number nor a schedule.

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
        transient copy of the parameters. Put weight decay after SAM in the chain. Inside the
        loss it is part of the ascent, as in google-research/sam. There each device climbs along its
        own gradient; here all devices climb the mean gradient, see `data_parallel`.
        Fidelity: matches davda54/sam.
    """
    ball = ball_of("sam", rho, perturbation)
    return sharpness_aware(ball, perturb_dtype=perturb_dtype, name="sam")
