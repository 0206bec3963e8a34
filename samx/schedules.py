"""Schedules of the radius that optax does not have. Any optax schedule may be a radius too."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core.hyperparams import check_scalar, check_schedule, check_static_number

__all__ = ["following"]


def following(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float = 0.0,
    *,
    peak_value: float,
    end_value: float = 0.0,
) -> optax.Schedule:
    """Return a radius that follows the learning rate, large while steps are large, as in GSAM.

        ρ_t = max(0, ρ_min + (ρ_max − ρ_min) (η_t − η_min) / (η_max − η_min))

    Args:
        learning_rate: The schedule η of the base optimizer, in absolute values, not as a factor of
            its peak.
        rho_max: Radius ρ_max ≥ 0 at the peak of the learning rate.
        rho_min: Radius ρ_min in [0, rho_max] at the end value of the learning rate; default 0.
        peak_value: Peak η_max of the learning rate, as in optax's schedules.
        end_value: End value η_min of the learning rate, in [0, peak_value]; default 0. With
            `end_value=peak_value` (a constant learning rate) the radius is `rho_max`.

    Returns:
        A schedule over the optimizer's steps, for the `rho` of any variant.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If `learning_rate` is not a schedule, or another argument is not a number.

    Example:
        >>> import optax, samx
        >>> learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000, end_value=0.01)
        >>> rho = samx.schedules.following(
        ...     learning_rate, 0.2, 0.02, peak_value=0.1, end_value=0.01)
        >>> tx = optax.chain(samx.gsam(rho, alpha=0.4), optax.sgd(learning_rate, momentum=0.9))
        >>> [round(float(rho(step)), 4) for step in (0, 50, 100, 1000)]
        [0.0, 0.1, 0.2, 0.02]

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
        https://arxiv.org/abs/2203.08065, section 4.2 (google-research/big_vision)

    Notes:
        In a warm-up from below `end_value` the line goes below `rho_min`. The authors' code lets
        the radius become negative, which is a descent; here it stops at 0. Cost: none.
    """
    if not callable(learning_rate):
        raise TypeError(
            f"following: `learning_rate` must be a schedule, step -> number, got {learning_rate!r};"
            " with a constant learning rate, pass a number as `rho`"
        )
    check_schedule("learning_rate", learning_rate)
    check_static_number("rho_max", rho_max, 0)
    check_static_number("rho_min", rho_min, 0, rho_max)
    check_static_number("peak_value", peak_value, 0)
    check_static_number("end_value", end_value, 0, peak_value)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        if peak_value == end_value:
            return jnp.asarray(rho_max)
        eta: Any = learning_rate(step)
        check_scalar("learning_rate(step)", eta)
        share = (eta - end_value) / (peak_value - end_value)
        return jnp.maximum(0, rho_min + (rho_max - rho_min) * share)

    return schedule
