"""Schedules of the radius. Any optax schedule is one; here is what optax does not have."""

import jax
import jax.numpy as jnp
import optax

from samx.core.hyperparams import check_number

__all__ = ["following"]


def following(
    learning_rate: optax.Schedule,
    rho_max: float,
    rho_min: float = 0.0,
    *,
    peak_value: float,
    end_value: float = 0.0,
) -> optax.Schedule:
    """A radius that follows the learning rate: large while steps are large. GSAM's.

        ρ_t = max(0, ρ_min + (ρ_max − ρ_min) (η_t − η_min) / (η_max − η_min))

    Args:
        learning_rate: The schedule η of the base optimizer, in absolute values: not a factor of a
            peak.
        rho_max: ρ_max ≥ 0 where the learning rate is at its peak.
        rho_min: ρ_min in [0, rho_max], where the learning rate has its end value; default 0.
        peak_value: η_max, as in optax's schedules.
        end_value: η_min in [0, peak_value); default 0. With `end_value=peak_value`, a learning rate
            that stays the same, the radius is `rho_max`.

    Returns:
        A schedule of the optimizer's steps, for the `rho` of any variant.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If `learning_rate` is no schedule, or one of the others no number.

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
        In a warm-up from below `end_value` the line goes below `rho_min`. The authors' code goes on
        below zero, which is a descent; here the radius ends at 0. Cost: none.
    """
    if not callable(learning_rate):
        raise TypeError(
            f"following: `learning_rate` must be a schedule, step -> number, got {learning_rate!r};"
            " a constant one needs no schedule of the radius"
        )
    check_number("rho_max", rho_max, 0)
    check_number("rho_min", rho_min, 0, rho_max)
    check_number("peak_value", peak_value, 0)
    check_number("end_value", end_value, 0, peak_value)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        if peak_value == end_value:
            return jnp.asarray(rho_max)
        share = (learning_rate(step) - end_value) / (peak_value - end_value)
        return jnp.maximum(0, rho_min + (rho_max - rho_min) * share)

    return schedule
