"""Policies of the step count and of chance. Public as `samx.policies.<name>`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core.aliases import ScalarOrSchedule
from samx.core.hyperparams import as_key, at_step, check_count, check_number, next_step
from samx.policies import draws
from samx.policies.policy import Policy, check_policy


class StepState(NamedTuple):
    """State of a policy that looks at the clock only.

    Attributes:
        step: int32, optimizer steps so far.
    """

    step: jax.Array


class BetweenState(NamedTuple):
    """State of `between`.

    Attributes:
        step: int32, optimizer steps so far.
        policy: State of the policy inside.
    """

    step: jax.Array
    policy: Any


class RandomState(NamedTuple):
    """State of `random`.

    Attributes:
        step: int32, optimizer steps so far.
        key: The random key of all draws.
    """

    step: jax.Array
    key: jax.Array


def every(period: int, first: int = 0) -> Policy:
    """Every so many steps.

        is_sharp = step ≥ first  and  (step − first) mod period = 0

    Args:
        period: Steps ≥ 1 from one sharp gradient to the next; 1 is every step.
        first: The first sharp step, counted from 0; default 0. The steps before it are plain.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `period` is below 1 or `first` below 0.
        TypeError: If one of them is not a Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.policies import every
        >>> policy = every(3)
        >>> state, decisions = policy.init(jnp.ones(2)), []
        >>> for _ in range(5):
        ...     is_sharp, state = policy.decide(jnp.ones(2), state)
        ...     decisions.append(bool(is_sharp))
        >>> decisions
        [True, False, False, True, False]

    References:
        Liu et al., "Towards Efficient and Scalable Sharpness-Aware Minimization", CVPR 2022,
        https://arxiv.org/abs/2203.02714 (its "SAM-k").

    Notes:
        Cost: 1 + 1/period gradients per step with `perturb_if(every(period), sam())`.
        `static_args`: all.
    """
    check_count("period", period)
    check_count("first", first, 0)

    def init(params):
        del params
        return StepState(jnp.zeros((), jnp.int32))

    def decide(g, state):
        del g
        is_sharp = (state.step >= first) & ((state.step - first) % period == 0)
        return is_sharp, StepState(next_step(state.step))

    return Policy(init, decide)


def between(start: int = 0, stop: int | None = None, policy: Policy | None = None) -> Policy:
    """A part of the training only: late, early, or in the middle.

        is_sharp = start ≤ step < stop  and  policy(g)

    Args:
        start: The first step, counted from 0, on which a sharp gradient may be taken; default 0.
        stop: The first step on which none is taken any more; default never.
        policy: Which of the steps in between; default all. It runs on all steps, so that its clock
            and its averages are those of the whole training.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `start` is below 0, or `stop` below `start`.
        TypeError: If one of them is not a Python int, or `policy` no `Policy`.

    Example:
        >>> import samx
        >>> late = samx.policies.between(start=9000)
        >>> late_and_rarely = samx.policies.between(9000, policy=samx.policies.every(5))

    References:
        Andriushchenko, Flammarion, "Towards Understanding Sharpness-Aware Minimization",
        ICML 2022, https://arxiv.org/abs/2206.06232 (a few late epochs of SAM give most of its
        effect).

    Notes:
        Cost: none of its own. `static_args`: all.
    """
    check_count("start", start, 0)
    if stop is not None:
        check_count("stop", stop, start)
    policy = every(1) if policy is None else policy
    check_policy("between", policy)

    def init(params):
        return BetweenState(jnp.zeros((), jnp.int32), policy.init(params))

    def decide(g, state):
        is_sharp, inner = policy.decide(g, state.policy)
        is_sharp &= state.step >= start
        if stop is not None:
            is_sharp &= state.step < stop
        return is_sharp, BetweenState(next_step(state.step), inner)

    def observe(g, g_s, state):
        return state._replace(policy=policy.observe(g, g_s, state.policy))

    return Policy(init, decide, observe)


def random(probability: ScalarOrSchedule, key: int | jax.Array = 0) -> Policy:
    """Independent draws: randomized sharpness-aware training.

        is_sharp ~ Bernoulli(probability)

    Args:
        probability: Probability in [0, 1] of a sharp gradient, a number or a schedule over the
            optimizer's steps.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `probability` is a number outside [0, 1].
        TypeError: If `probability` is neither number nor schedule, or `key` no key.

    Example:
        >>> import samx
        >>> rst = samx.perturb_if(samx.policies.random(0.5), samx.sam(0.05))

    References:
        Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency
        in Deep Learning", AAAI 2023, https://arxiv.org/abs/2203.09962

    Notes:
        Draw `t` is made of the key and the step alone, so that a resumed training draws the same.
        Cost: 1 + probability gradients per step on average. The paper's schedules are optax's
        constant, piecewise and linear ones; how it names them was not read. `static_args`: `key`.
    """
    check_number("probability", probability, 0, 1)

    def init(params):
        del params
        return RandomState(jnp.zeros((), jnp.int32), as_key("random", key))

    def decide(g, state):
        del g
        is_sharp = draws.uniform_at(state.key, state.step) < at_step(probability, state.step)
        return is_sharp, state._replace(step=next_step(state.step))

    return Policy(init, decide)
