"""Schedules of the radius that optax does not have. Any optax schedule may be a radius too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from samx.core.hyperparams import (
    as_count,
    check_number,
    check_scalar,
    check_schedule,
    check_static_number,
)

__all__ = ["following", "one_minus_inverse", "start_of_decay", "warmup_hold_cosine"]

ROUNDING = 1e-6  # relative difference of learning rates that count as equal


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


def one_minus_inverse(step: Any) -> jax.Array:
    """Return the share of Unified SAM's ascent that is normalized: from USAM to SAM.

        λ_t = 1 − 1/t       on step t = 1, 2, ...

    Args:
        step: The optimizer's steps so far, 0 on the first.

    Returns:
        λ, 0 on the first step, and close to 1 after many.

    Raises:
        ValueError: If `step` is a negative number.
        TypeError: If `step` is not a number.

    Example:
        >>> import samx
        >>> [float(samx.schedules.one_minus_inverse(step)) for step in (0, 1, 3)]
        [0.0, 0.5, 0.75]

    References:
        Oikonomou, Loizou, ICLR 2025, https://arxiv.org/abs/2503.02225

    Notes:
        Cost: none.
    """
    check_number("step", step, 0)
    return 1 - 1 / (jnp.asarray(step, float) + 1)


def start_of_decay(schedule: optax.Schedule, num_steps: int) -> int:
    """Return the step at which a learning rate begins to fall, after its warm-up and its hold.

        start = 1 + the last step t with η_t = max(η_0, ..., η_{num_steps − 1})

    There SAM can begin, if it is used only while the learning rate falls.

    Args:
        schedule: The schedule η of the base optimizer. Its peak does not matter: a schedule with
            the peak 1 has the same start.
        num_steps: Steps ≥ 1 of the training run.

    Returns:
        A Python int from 1 to `num_steps`. `num_steps` means that the learning rate does not fall,
        as a constant one: then there is no late part, and `policies.between(num_steps)` makes no
        step sharp.

    Raises:
        ValueError: If a value of the schedule is not finite, or is not known while tracing, as with
            a traced peak; if `num_steps` is below 1.
        TypeError: If `schedule` is not a schedule, or `num_steps` is not a Python int.

    Example:
        SAM in the last part only, with a radius that rises in a line over its first 50 steps:

        >>> import optax, samx
        >>> learning_rate = optax.join_schedules(
        ...     [optax.linear_schedule(0.0, 0.1, 100), optax.constant_schedule(0.1),
        ...      optax.linear_schedule(0.1, 0.0, 200)], [100, 800])
        >>> start = samx.schedules.start_of_decay(learning_rate, num_steps=1000)
        >>> start
        801
        >>> rho = optax.linear_schedule(0.0, 0.05, 50, transition_begin=start)
        >>> tail = samx.perturb_if(samx.policies.between(start), samx.sam(rho))
        >>> tx = optax.chain(tail, optax.sgd(learning_rate, momentum=0.9))

    References:
        For SAM late in training: `samx.policies.between`.

    Notes:
        Values that differ from the peak by less than one in a million count as the peak, because
        float32 rounds. A cosine falls at once: the start is 1, or the step after the warm-up. The
        schedule is evaluated for all steps at once when this function is called, also inside a
        traced function. Cost: none in the training.
    """
    check_schedule("schedule", schedule)
    num_steps = as_count("num_steps", num_steps)

    def value_at(step):
        value = schedule(step)
        check_scalar("schedule(step)", value)
        return value

    with jax.ensure_compile_time_eval():
        try:
            values = jax.vmap(value_at)(jnp.arange(num_steps))
        except jax.errors.JAXTypeError:  # a schedule in Python, or in NumPy
            values = np.array([value_at(step) for step in range(num_steps)])
    if isinstance(values, Tracer):
        raise ValueError(
            "start_of_decay: the values of `schedule` must be known, got traced ones; its peak "
            "does not matter: pass the same schedule with a peak of 1.0"
        )
    values = np.asarray(values)
    is_wrong = ~np.isfinite(values)
    if is_wrong.any():
        at = int(is_wrong.argmax())
        raise ValueError(
            f"start_of_decay: `schedule` must give finite numbers, got {values[at]} at step {at}"
        )
    peak = values.max()
    return 1 + int(np.flatnonzero(values >= peak - ROUNDING * abs(peak))[-1])


def warmup_hold_cosine(
    peak_value: float, warmup: float, decay_from: float, end: float
) -> optax.Schedule:
    """Return LE-SAM's schedule: rise in a line, stay, and fall along a cosine to 0.

        σ_t = σ_max t / warmup                                            t < warmup
        σ_t = σ_max                                                       t < decay_from
        σ_t = σ_max (1 + cos(π (t − decay_from) / (end − decay_from))) / 2      then; 0 at the end

    Args:
        peak_value: σ_max ≥ 0.
        warmup: Time of the rise, ≥ 0.
        decay_from: Time at which the fall starts, at least `warmup`.
        end: Time at which 0 is reached, above `decay_from`.

    Returns:
        A schedule. Times are in the units of its argument, the optimizer's steps if it is used as
        it is.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If an argument is not a number.

    Example:
        The authors' 200 epochs, constant within each. Their first and their last have σ = 0:

        >>> import samx
        >>> by_epoch = samx.schedules.warmup_hold_cosine(0.35, 9, 160, 199)
        >>> sigma = lambda step, steps_per_epoch=100: by_epoch(step // steps_per_epoch)
        >>> [round(float(sigma(100 * epoch)), 3) for epoch in (0, 9, 160, 180, 199)]
        [0.0, 0.35, 0.35, 0.168, 0.0]
        >>> tx = samx.le_sam(sigma)

    References:
        Wang, Liu, Xie, Gao, ICML 2026, https://arxiv.org/abs/2605.10183
        (smithgun2005/LE-SAM-ICML2026: a warm-up over epochs 0 to 9, a cosine over 160 to 199)

    Notes:
        Cost: none.
    """
    check_static_number("peak_value", peak_value, 0)
    check_static_number("warmup", warmup, 0)
    check_static_number("decay_from", decay_from, warmup)
    check_static_number("end", end, decay_from, excluded=decay_from)

    def schedule(step):
        t = jnp.asarray(step, float)
        rise = t / warmup if warmup else 1.0
        fall = jnp.clip((t - decay_from) / (end - decay_from), 0, 1)
        return peak_value * jnp.minimum(rise, 1.0) * (1 + jnp.cos(jnp.pi * fall)) / 2

    return schedule
