"""Policies that depend on the gradient norm. Public as `samx.policies.<name>`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule
from samx.core.hyperparams import at_step, check_hyperparam, next_step
from samx.policies.policy import Policy

LARGEST_RISE = 100  # of a squared norm over its average, as the averages count it


class SquaredNormState(NamedTuple):
    """State of `squared_norm`.

    Attributes:
        step: int32, optimizer steps so far.
        mean: Moving average μ of ‖g‖².
        variance: Moving average σ² of (‖g‖² − μ)².
    """

    step: jax.Array
    mean: jax.Array
    variance: jax.Array


def squared_norm(threshold: ScalarOrSchedule = 0.0, decay: ScalarOrSchedule = 0.9) -> Policy:
    """Take a sharp step where ‖g‖² is large compared with its moving average: AE-SAM's policy.

        s = ‖g‖²
        μ  = decay μ + (1 − decay) s                   (from 0)
        σ² = decay σ² + (1 − decay) (s − μ)²           (from e⁻¹⁰)
        is_sharp = s ≥ μ + threshold σ

    Args:
        threshold: c, in standard deviations, a number or a schedule; default 0. In the paper it
            falls linearly from λ₂ to λ₁: `optax.linear_schedule(1.0, -1.0, total_steps)`. Minus
            infinity makes every step sharp.
        decay: δ in [0, 1], a number or a schedule; default 0.9.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `decay` is outside [0, 1].
        TypeError: If a hyperparameter is neither a number nor a schedule.

    Example:
        >>> import optax, samx
        >>> policy = samx.policies.squared_norm(optax.linear_schedule(1.0, -1.0, 1000))

    References:
        Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
        ICLR 2023, https://arxiv.org/abs/2304.14647

    Notes:
        The first steps are sharp, because μ starts at 0. The rule follows two secondary
        transcriptions, which agree. `decay`, λ and the initial values are from memory, not read.
        One spike does not turn SAM off: once the averages have run for 1/(1 − decay) steps, s
        enters them as at most 100 μ, which ordinary steps do not reach. An s that is not finite
        does not enter. Both are ours. The rule depends on the scale of the loss: s and the first
        variance are absolute. In float32 its averages are out of range for norms below 1e-10, where
        no step may be sharp, and above 4e9, where every step is. Cost: one norm.
    """
    check_hyperparam("threshold", threshold, float("-inf"))
    check_hyperparam("decay", decay, 0, 1)

    def init(params):
        dtype = tree.real_dtype(*jax.tree.leaves(params))
        return SquaredNormState(
            jnp.zeros((), jnp.int32), jnp.zeros((), dtype), jnp.exp(jnp.asarray(-10, dtype))
        )

    def decide(g, state):
        s, kept = tree.dot(g, g).astype(state.mean.dtype), at_step(decay, state.step)
        is_settled = (state.step.astype(state.mean.dtype) * (1 - kept) >= 1) & (state.mean > 0)
        is_spike = is_settled & jnp.isfinite(s) & (s > LARGEST_RISE * state.mean)
        counted = jnp.where(is_spike, LARGEST_RISE * state.mean, s)
        mean = kept * state.mean + (1 - kept) * counted
        variance = kept * state.variance + (1 - kept) * (counted - mean) ** 2
        mean, variance = tree.if_finite((mean, variance), (state.mean, state.variance))
        # Never 0: an infinite threshold times 0 would be NaN.
        deviation = jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
        is_sharp = s >= mean + at_step(threshold, state.step) * deviation
        moments = (x.astype(state.mean.dtype) for x in (mean, variance))
        return is_sharp, SquaredNormState(next_step(state.step), *moments)

    return Policy(init, decide)
