"""Perturbations with a separate length for each tensor. Public as `samx.perturbations.<name>`."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import Radius, Transformation
from samx.core.hyperparams import check_function, check_number, check_scalar
from samx.perturbations.balls import ball

LayerScaling: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], Any]


def trust_ratio(w_norm: jax.Array, g_norm: jax.Array, total: jax.Array) -> jax.Array:
    """Return SAM's factor times the trust ratio of a tensor: the default scaling of `layer_steps`.

        (‖w_l‖ / ‖g_l‖) / ‖g‖

    Args:
        w_norm: ‖w_l‖ of the tensor's parameters.
        g_norm: ‖g_l‖ of its gradient.
        total: ‖g‖ over all tensors.

    Returns:
        The factor of `g_l`.

    Raises:
        Nothing.

    Example:
        >>> from samx.perturbations import trust_ratio
        >>> trust_ratio(6.0, 2.0, 3.0)
        1.0

    References:
        Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714; You, Gitman, Ginsburg, "Large
        Batch Training of Convolutional Networks", 2017, https://arxiv.org/abs/1708.03888 (LARS).

    Notes:
        Cost: none. LookSAM's rule from memory; it was not read in the paper.
    """
    for name, norm in (("w_norm", w_norm), ("g_norm", g_norm), ("total", total)):
        check_scalar(name, norm)
    return w_norm / (g_norm * total)


def layer_steps(
    rho: Radius, scaling: LayerScaling = trust_ratio, *, norm_eps: float = 0.0
) -> Transformation:
    """Scale the step of each tensor separately, without a common ball.

        ε_l = ρ · scaling(‖w_l‖, ‖g_l‖ + norm_eps, ‖g‖ + norm_eps) · g_l     for each tensor l

    Args:
        rho: Factor ρ ≥ 0, a number or a schedule.
        scaling: `(‖w_l‖, ‖g_l‖, ‖g‖) -> factor`; default `trust_ratio`. Other scalings in use:
            `lambda w, g, total: w / g` (every tensor moves by ρ times its own norm),
            `lambda w, g, total: 1 / g` (every tensor moves by ρ), and
            `lambda w, g, total: w / g**2` (a port that divides twice).
        norm_eps: Added to the norms of gradients; default 0. A tensor without a gradient does not
            move.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is not a number, array or schedule, or `scaling` is not a function.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import layer_steps
        >>> steps = layer_steps(0.1, lambda w, g, total: w / g)
        >>> w, g = {"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([0.0, 2.0])}
        >>> eps, _ = steps.update(g, steps.init(w), w)
        >>> [round(float(x), 3) for x in eps["a"]]
        [0.0, 0.5]

    References:
        Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022,
        https://arxiv.org/abs/2203.02714 (Look-LayerSAM)

    Notes:
        A scaling with the factor ‖w_l‖ does not move a tensor of zeros, such as a new bias. Cost:
        two norms per tensor, elementwise work. `static_args`: `scaling`.
    """
    check_function("scaling", scaling, 3)
    check_number("norm_eps", norm_eps, 0)

    def climb(g, params, radius):
        length = tree.length(g)
        total = length.norm / length.scale

        def step(g, w):
            if not tree.is_inexact(w):
                return g
            g_norm = tree.scaled_norm(length.scale, g) / length.scale
            is_zero, w_norm = g_norm == 0, tree.plain_norm(w)
            norms = (jnp.where(is_zero, 1, norm + norm_eps) for norm in (g_norm, total))
            scale = scaling(w_norm, *norms)
            check_scalar("scaling(w_norm, g_norm, total)", scale)
            factor = jnp.where(is_zero, 0, radius * scale)
            return tree.scaled(factor, g)

        return jax.tree.map(step, g, params)

    return ball(rho, climb)
