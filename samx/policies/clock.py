"""Policies that depend on the step count, or are random. Public as `samx.policies.<name>`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core.aliases import ScalarOrSchedule
from samx.core.hyperparams import (
    RandomKey,
    as_count,
    as_list,
    at_step,
    check_hyperparam,
    next_step,
)
from samx.policies import draws
from samx.policies.policy import Policy, check_policy


class StepState(NamedTuple):
    """State of a policy that depends on the step count only.

    Attributes:
        step: int32, optimizer steps so far.
    """

    step: jax.Array


class BetweenState(NamedTuple):
    """State of `between`.

    Attributes:
        step: int32, optimizer steps so far.
        policy: State of the wrapped policy.
    """

    step: jax.Array
    policy: Any


class JoinedState(NamedTuple):
    """State of `join_policies`.

    Attributes:
        step: int32, optimizer steps so far.
        policies: States of the joined policies.
    """

    step: jax.Array
    policies: tuple[Any, ...]


class RandomState(NamedTuple):
    """State of `random`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
    """

    step: jax.Array
    key: jax.Array


def every(period: int, first: int = 0) -> Policy:
    """Take a sharp step every `period` steps.

        is_sharp = step ≥ first  and  (step − first) mod period = 0

    Args:
        period: Steps ≥ 1 from one sharp step to the next; 1 makes every step sharp.
        first: The first sharp step, counted from 0; default 0. Earlier steps are not sharp.

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
        https://arxiv.org/abs/2203.02714 ("SAM-k").

    Notes:
        Cost: 1 + 1/period gradients per step with `perturb_if(every(period), sam())`.
        `static_args`: all.
    """
    period = as_count("period", period)
    first = as_count("first", first, 0)

    def init(params):
        del params
        return StepState(jnp.zeros((), jnp.int32))

    def decide(g, state):
        del g
        is_sharp = (state.step >= first) & ((state.step - first) % period == 0)
        return is_sharp, StepState(next_step(state.step))

    return Policy(init, decide)


def between(start: int = 0, stop: int | None = None, policy: Policy | None = None) -> Policy:
    """Restrict sharp steps to one part of the training run: early, middle or late.

        is_sharp = start ≤ step < stop  and  policy(g)

    Args:
        start: The first step, counted from 0, that may be sharp; default 0.
        stop: From this step on, no step is sharp; default `None`, no end.
        policy: Chooses among the steps in between; default all of them. It runs on every step, so
            that its step count and its averages cover the whole training run.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `start` is below 0, or `stop` below `start`.
        TypeError: If `start` or `stop` is not a Python int, or `policy` is not a `Policy`.

    Example:
        >>> import samx
        >>> late = samx.policies.between(start=9000)
        >>> late_and_rarely = samx.policies.between(9000, policy=samx.policies.every(5))

    References:
        Andriushchenko, Flammarion, "Towards Understanding Sharpness-Aware Minimization",
        ICML 2022, https://arxiv.org/abs/2206.06232 (figure 9: a few late epochs of SAM give most
        of its effect); Zhou et al., "Sharpness-Aware Minimization Efficiently Selects Flatter
        Minima Late in Training", ICLR 2025, https://arxiv.org/abs/2410.10373 (the same, with a
        theory).

    Notes:
        Where the learning rate begins to fall: `samx.schedules.start_of_decay`. Cost: none beyond
        `policy`; 1 + the share of steps from `start` to `stop` gradients per step with
        `perturb_if(between(start, stop), sam())`. `static_args`: all.
    """
    start = as_count("start", start, 0)
    if stop is not None:
        stop = as_count("stop", stop, start)
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


def join_policies(policies: Sequence[Policy], boundaries: Sequence[int]) -> Policy:
    """Use one policy after another: for example every fifth step early, and every step late.

        i = number of boundaries ≤ step
        is_sharp = policies[i](g)

    Args:
        policies: The policies, in order, at least one. Each of them runs on every step and observes
            every sharp gradient. So its step count and its averages cover the whole training run.
        boundaries: The steps, counted from 0, from which on the second policy decides, the third,
            and so on; one fewer than policies, none smaller than the one before.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If there is no policy, if the number of boundaries does not fit, or if one of
            them is below 0 or below the one before.
        TypeError: If an element of `policies` is not a `Policy`, or one of `boundaries` is not a
            Python int.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.policies import every, join_policies
        >>> policy = join_policies([every(3), every(1)], boundaries=[5])
        >>> state, decisions = policy.init(jnp.ones(2)), []
        >>> for _ in range(8):
        ...     is_sharp, state = policy.decide(jnp.ones(2), state)
        ...     decisions.append(int(is_sharp))
        >>> decisions
        [1, 0, 0, 1, 0, 1, 1, 1]

    References:
        Late sharp steps matter most: see `between`. The joint schedule is ours, after SAM-k.

    Notes:
        Named after `optax.join_schedules`, but the steps of a policy are those of the whole run;
        there each schedule counts from its own boundary. `every(5, first=3)` counts from where you
        want. Cost: that of all policies, which for clocks is nothing. `join_policies([every(k),
        every(1)], [start])` in `perturb_if` costs 1 + 1/k gradients per step early, and 2 late: 1.4
        on average with k = 5 and the last quarter. `static_args`: all.
    """
    is_one = isinstance(policies, Policy)  # a tuple of functions
    parts = [policies] if is_one else as_list("policies", policies, "policies")
    if is_one or not parts:
        got = "one that is not in a list" if is_one else "none"
        raise ValueError(f"join_policies: `policies` must be a list of policies, got {got}")
    for index, part in enumerate(parts):
        check_policy("join_policies", part, f"policies[{index}]")
    starts = [0]
    for boundary in as_list("boundaries", boundaries, "Python ints"):
        starts.append(as_count("boundaries", boundary, starts[-1]))
    if len(starts) != len(parts):
        raise ValueError(
            "join_policies: `boundaries` must have one step fewer than `policies`, got "
            f"{len(starts) - 1} for {len(parts)} policies"
        )

    def init(params):
        return JoinedState(jnp.zeros((), jnp.int32), tuple(part.init(params) for part in parts))

    def decide(g, state):
        decided = [part.decide(g, old) for part, old in zip(parts, state.policies, strict=True)]
        decisions, states = zip(*decided, strict=True)
        is_sharp = decisions[0]
        for start, decision in zip(starts[1:], decisions[1:], strict=True):
            is_sharp = jnp.where(state.step >= start, decision, is_sharp)
        return is_sharp, JoinedState(next_step(state.step), states)

    def observe(g, g_s, state):
        pairs = zip(parts, state.policies, strict=True)
        return state._replace(policies=tuple(part.observe(g, g_s, old) for part, old in pairs))

    return Policy(init, decide, observe)


def random(probability: ScalarOrSchedule, key: int | jax.Array = 0) -> Policy:
    """Draw independently whether a step is sharp: randomized sharpness-aware training (RST).

        is_sharp ~ Bernoulli(probability)

    Args:
        probability: Probability in [0, 1] of a sharp step, a number or a schedule.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `probability` is a number outside [0, 1].
        TypeError: If `probability` is neither a number nor a schedule; in `init`, if `key` is
            neither a seed nor a random key.

    Example:
        >>> import samx
        >>> rst = samx.perturb_if(samx.policies.random(0.5), samx.sam(0.05))

    References:
        Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency
        in Deep Learning", AAAI 2023, https://arxiv.org/abs/2203.09962

    Notes:
        A draw depends only on the key and the step, so that a resumed training run draws the same.
        The paper's schedules are optax's constant, piecewise and linear schedules; the paper's
        names for them were not read. Cost: 1 + probability gradients per step on average.
    """
    check_hyperparam("probability", probability, 0, 1)
    keys = RandomKey(key)

    def init(params):
        del params
        return RandomState(jnp.zeros((), jnp.int32), keys.data())

    def decide(g, state):
        del g
        draw = draws.uniform_at(keys.of(state.key), state.step)
        return draw < at_step(probability, state.step), state._replace(step=next_step(state.step))

    return Policy(init, decide)
