"""Policies: on which steps the sharp gradient is computed, and what to do on the others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx import _tree
from samx._base import SCALAR_CLOSURES, closure_transformation
from samx._closures import Closure, LossesClosure, batch_size
from samx._hyper import as_key, at_step, check_count, check_number, next_step
from samx._metrics import LeafPredicate
from samx.readings import UNKNOWN, skip_readings

__all__ = ["Policy", "between", "every", "quota", "random", "squared_norm"]


def _unchanged(g: Any, g_s: Any, state: Any) -> Any:
    del g, g_s
    return state


class Policy(NamedTuple):
    """When to look again: three functions, like an optax transformation of decisions.

    They get the gradient `g` at the parameters, averaged over all devices, so that all devices
    decide alike, and keep whatever they like in a state of their own.

    Attributes:
        init: `params -> state`.
        decide: `(g, state) -> (is_sharp, state)`, on every step of the optimizer; `is_sharp` is a
            boolean scalar.
        observe: `(g, g_s, state) -> state`, after each sharp gradient `g_s`; default nothing.

    Example:
        Sharp gradients where the gradient is long:

        >>> import jax.numpy as jnp, optax, samx
        >>> def longer_than(length):
        ...     return samx.policies.Policy(
        ...         init=lambda params: (),
        ...         decide=lambda g, state: (optax.tree.norm(g) > length, state))
        >>> tx = samx.perturb_if(longer_than(1.0), samx.sam(0.1))
    """

    init: Callable[[Any], Any]
    decide: Callable[[Any, Any], tuple[jax.Array, Any]]
    observe: Callable[[Any, Any, Any], Any] = _unchanged


class PerturbIfState(NamedTuple):
    """State of `perturb_if`.

    Attributes:
        policy: State of the policy.
        inner: State of the transformation, its readings those of the last step, sharp or not.
    """

    policy: Any
    inner: optax.OptState


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


class QuotaState(NamedTuple):
    """State of `quota`.

    Attributes:
        step: int32, optimizer steps so far.
        key: The random key of all draws.
        quota: Sharp steps of this window, before rounding down.
        taken: int32, sharp steps that this window has had.
        norms: `[window]`, ‖h‖ of the last sharp steps, the newest last.
        ratios: `[window]`, ‖h‖ / ‖g‖ of the same.
        variances: `[window]`, how `norms` varied at the last sharp steps.
    """

    step: jax.Array
    key: jax.Array
    quota: jax.Array
    taken: jax.Array
    norms: jax.Array
    ratios: jax.Array
    variances: jax.Array


def perturb_if(
    policy: Policy, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Compute the sharp gradient on some steps only; the others take the gradient as it is.

        if policy(g):  return inner(g)                 (SAM, or what else `inner` is)
        else:          return g                        (the base optimizer's step, one gradient)

    A real branch (`jax.lax.cond`): the closures of a skipped step are never called.

    Time remains the optimizer's step. On a skipped step `inner` runs on the loss that is linear,
    L(w) + ⟨g, v − w⟩ at v, which costs nothing and has the gradient g everywhere: its radius
    schedule and the moving averages of its perturbation go on as if nothing had been skipped.

    Args:
        policy: When to look, for example from `samx.policies`.
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`;
            not one that wraps a base optimizer, whose own step would be skipped with it.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs what
        `inner` needs, and `value_fn` (or `losses_fn` and `batch`). Readings of a skipped step have
        an infinite `sharp_loss`, and zeros for what needs a sharp gradient.

    Raises:
        TypeError: If `policy` is no `Policy`, or `inner` no transformation.
        ValueError: In `update`, see `closure_transformation`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> sam = samx.perturb_if(samx.policies.every(2), samx.sam(0.1))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> state = sam.init(w)
        >>> for _ in range(3):
        ...     g_s, state = sam.update(w, state, w, value_fn=loss)
        ...     print([round(float(x), 2) for x in g_s])
        [3.06, 4.08]
        [3.0, 4.0]
        [3.06, 4.08]

    References:
        Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency
        in Deep Learning", AAAI 2023, https://arxiv.org/abs/2203.09962 (`policies.random`; "SAM-k"
        of the LookSAM paper is `policies.every`).

    Notes:
        A policy that always says yes gives `inner`, one that never does the base optimizer. Cost:
        one gradient per step, and `inner`'s further ones on sharp steps. Under `jax.vmap` the
        branch remains one as long as the decision does not depend on what is mapped: initialize
        the state inside the mapped function and train there. Otherwise both sides are computed.
        What `inner` remembers of sharp gradients (`vsam` inside, say) is g after a skipped step:
        such variants take a policy of their own. `static_args`: all.
    """
    check_policy("perturb_if", policy)
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        kind = type(inner).__name__
        raise TypeError(f"perturb_if: `inner` must be an optax transformation, got {kind}")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        return PerturbIfState(policy.init(params), inner.init(params))

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        is_sharp, policy_state = policy.decide(g, state.policy)

        def look():
            closures = extra | {"value_fn": value_fn, "value": value}
            g_s, inner_state = inner.update(g, state.inner, params, **closures)
            return g_s, inner_state, policy.observe(g, g_s, policy_state)

        def skip():
            closures = extra | _linear(g, params, value, extra)
            _, inner_state = inner.update(g, state.inner, params, **closures)
            last = optax.tree.get(state.inner, "readings")
            if last is not None:
                readings = skip_readings(last, value, g)
                inner_state = optax.tree.set(inner_state, readings=readings)
            return g, inner_state, policy_state

        g_s, inner_state, policy_state = jax.lax.cond(is_sharp, look, skip)
        return g_s, PerturbIfState(policy_state, inner_state)

    return closure_transformation(init_fn, update_fn, name="perturb_if")


def _linear(g: Any, params: Any, value: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Closures of the linear loss L(w) + ⟨g, v − w⟩, which every example has."""

    def own(point):
        moved = jax.tree.map(
            lambda v, w: _tree.widen(v) - w if _tree.is_inexact(w) else w, point, params
        )
        return value + _tree.dot(optax.tree.conj(g), moved), None

    def with_aux(point, batch):
        return jnp.full(batch_size("perturb_if", batch), own(point)[0]), None

    given = {"value_fn", *extra}
    closures: dict[str, Any] = {"value": value}
    closures |= {keyword: Closure(own) for keyword in SCALAR_CLOSURES if keyword in given}
    if "losses_fn" in given:
        closures["losses_fn"] = LossesClosure(with_aux)
    return closures


def check_policy(name: str, policy: Any) -> None:
    """Refuse what is no policy."""
    if not isinstance(policy, Policy):
        kind = type(policy).__name__
        raise TypeError(
            f"{name}: `policy` must be a samx.policies.Policy, for example policies.every(2), "
            f"got {kind}"
        )


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


def random(probability: optax.ScalarOrSchedule, key: int | jax.Array = 0) -> Policy:
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
        is_sharp = uniform_at(state.key, state.step) < at_step(probability, state.step)
        return is_sharp, state._replace(step=next_step(state.step))

    return Policy(init, decide)


def uniform_at(key: jax.Array, step: jax.Array) -> jax.Array:
    """The draw of a step from [0, 1), made of nothing else: a resumed run draws the same."""
    return jax.random.uniform(jax.random.fold_in(key, step))


def squared_norm(threshold: optax.ScalarOrSchedule = 0.0, decay: float = 0.9) -> Policy:
    """Where the gradient is long compared with what it has been: AE-SAM's policy.

        s = ‖g‖²
        μ  = decay μ + (1 − decay) s                   (from 0)
        σ² = decay σ² + (1 − decay) (s − μ)²           (from e⁻¹⁰)
        is_sharp = s ≥ μ + threshold σ

    Args:
        threshold: c, in standard deviations, a number or a schedule over the optimizer's steps;
            default 0. The paper lets it fall linearly from λ₂ to λ₁:
            `optax.linear_schedule(1.0, -1.0, total_steps)`. Minus infinity is every step.
        decay: δ in [0, 1]; default 0.9.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If `decay` is outside [0, 1].
        TypeError: If one of them is neither number nor schedule.

    Example:
        >>> import optax, samx
        >>> policy = samx.policies.squared_norm(optax.linear_schedule(1.0, -1.0, 1000))

    References:
        Jiang, Yang, Zhang, Kwok, "An Adaptive Policy to Employ Sharpness-Aware Minimization",
        ICLR 2023, https://arxiv.org/abs/2304.14647

    Notes:
        Cost: one norm. As μ starts at 0, the first steps are sharp. The rule follows two secondary
        transcriptions that agree; `decay`, λ and the starting values are recalled, not read.
        `static_args`: none.
    """
    check_number("threshold", threshold, float("-inf"))
    check_number("decay", decay, 0, 1)

    def init(params):
        dtype = _tree.real_dtype(*jax.tree.leaves(params))
        return SquaredNormState(
            jnp.zeros((), jnp.int32), jnp.zeros((), dtype), jnp.exp(jnp.asarray(-10, dtype))
        )

    def decide(g, state):
        s = _tree.dot(g, g).astype(state.mean.dtype)
        mean = decay * state.mean + (1 - decay) * s
        variance = decay * state.variance + (1 - decay) * (s - mean) ** 2
        # Never 0: an infinite threshold times 0 would be no number.
        deviation = jnp.sqrt(jnp.maximum(variance, jnp.finfo(variance.dtype).tiny))
        is_sharp = s >= mean + at_step(threshold, state.step) * deviation
        moments = (x.astype(state.mean.dtype) for x in (mean, variance))
        return is_sharp, SquaredNormState(next_step(state.step), *moments)

    return Policy(init, decide)


def quota(
    window: int = 50,
    *,
    num_blocks: int = 5,
    max_fraction: float = 0.8,
    ratio_gain: float = 0.13,
    variance_gain: float = 0.13,
    warmup_steps: int = 50,
    is_measured: LeafPredicate | None = None,
    key: int | jax.Array = 0,
) -> Policy:
    """So many sharp gradients in every window of steps, more where they vary: vSAM's policy.

        after a sharp gradient:  h = g_s − g
            push ‖h‖ to norms, ‖h‖ / ‖g‖ to ratios     (the last `window` of each)
            push mean over blocks of variance(sort(norms)) to variances
        at the start of a window:
            A, B  = mean relative changes of ratios, variances, each clipped to [−1, 1]
            quota = clip(quota (1 + ratio_gain A + variance_gain B), 1, ⌊max_fraction window⌋)
        is_sharp = (fewer than ⌊quota⌋ so far  and  uniform ≥ 1 − quota / window)
                   or no more steps are left than the quota lacks

    The last line makes the quota exact: every full window has ⌊quota⌋ sharp steps.

    Args:
        window: Steps K ≥ 2 of a window; default 50.
        num_blocks: Blocks of equal size into which the sorted norms are cut, each of two or more;
            default 5.
        max_fraction: Upper bound in (0, 1] of the sharp share; default 0.8.
        ratio_gain: Gain of the relative change of ‖h‖ / ‖g‖; default 0.13.
        variance_gain: Gain of the relative change of the variance; default 0.13.
        warmup_steps: Steps ≥ 0 at the start that are all sharp; default 50. The authors: three
            epochs. With fewer than `window` the statistics are not full when they are first used,
            and what is missing counts as no change.
        is_measured: `(path, leaf) -> bool`, the leaves that norms are taken over; default all. The
            authors take the last ten tensors of the network, an order that a tree does not have.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If a number is out of its range, or `num_blocks` does not cut the window into
            equal blocks of two or more; when used, if `is_measured` chooses no leaf.
        TypeError: If a count is not a Python int, or `key` no key.

    Example:
        >>> import samx
        >>> tx = samx.perturb_if(samx.policies.quota(window=20, warmup_steps=20), samx.sam(0.05))

    References:
        Deng, Pang, Zhang, Wang, "Effective Gradient Sample Size via Variation Estimation for
        Accelerating Sharpness aware Minimization", 2024, https://arxiv.org/abs/2403.08821

    Notes:
        Follows ajiaaa/vSAM. As there, the first window after the warm-up is one step short and has
        no sharp step beyond the warm-up's. The quota starts at 1. Cost: two norms on sharp steps.
        `static_args`: `window`, `num_blocks`, `max_fraction`, `warmup_steps`, `is_measured`, `key`.
    """
    check_count("window", window, 2)
    check_count("num_blocks", num_blocks)
    check_count("warmup_steps", warmup_steps, 0)
    check_number("max_fraction", max_fraction, 0, 1)
    check_number("ratio_gain", ratio_gain, 0)
    check_number("variance_gain", variance_gain, 0)
    if window % num_blocks or window < 2 * num_blocks:
        raise ValueError(
            "quota: `num_blocks` must cut `window` into equal blocks of two or more, got "
            f"num_blocks={num_blocks} for window={window}"
        )
    largest = max(1, int(window * max_fraction))

    def init(params):
        dtype = _tree.real_dtype(*jax.tree.leaves(params))
        return QuotaState(
            step=jnp.zeros((), jnp.int32),
            key=as_key("quota", key),
            quota=jnp.ones((), dtype),
            taken=jnp.zeros((), jnp.int32),
            norms=jnp.zeros(window, dtype),
            ratios=jnp.zeros(window, dtype),
            variances=jnp.zeros(window, dtype),
        )

    def decide(g, state):
        del g
        is_warmup = state.step < warmup_steps
        position = (state.step - warmup_steps + 1) % window  # 1 at the first step behind it
        is_start = ~is_warmup & (position == 0)
        growth = 1 + ratio_gain * _trend(state.ratios) + variance_gain * _trend(state.variances)
        quota = jnp.where(is_start, jnp.clip(state.quota * growth, 1, largest), state.quota)
        taken = jnp.where(is_start, 0, state.taken)

        lacking = quota.astype(jnp.int32) - taken
        is_drawn = uniform_at(state.key, state.step) >= 1 - quota / window
        is_sharp = is_warmup | ((lacking > 0) & is_drawn) | (window - position <= lacking)
        taken = jnp.where(is_warmup, 1, taken + is_sharp)
        return is_sharp, state._replace(
            step=next_step(state.step),
            quota=quota.astype(state.quota.dtype),
            taken=taken.astype(jnp.int32),
        )

    def observe(g, g_s, state):
        if is_measured is not None:
            chosen = jax.tree_util.tree_map_with_path(is_measured, g)
            if not any(jax.tree.leaves(chosen)):
                raise ValueError("quota: `is_measured` chooses none of the leaves")
            g, g_s = (_tree.keep(tree, chosen) for tree in (g, g_s))
        length, g_norm = _tree.norm(_tree.subtract(g_s, g)), _tree.norm(g)
        norms = _push(state.norms, length)
        blocks = jnp.sort(norms).reshape(num_blocks, -1)
        return state._replace(
            norms=norms,
            ratios=_push(state.ratios, length / jnp.where(g_norm == 0, 1, g_norm)),
            variances=_push(state.variances, jnp.var(blocks, axis=1, ddof=1).mean()),
        )

    return Policy(init, decide, observe)


def _push(history: jax.Array, value: jax.Array) -> jax.Array:
    """The newest value last, the oldest dropped."""
    return jnp.append(history[1:], value.astype(history.dtype))


def _trend(history: jax.Array) -> jax.Array:
    """The mean relative change from one value to the next, in [−1, 1]."""
    before, after = history[:-1], history[1:]
    changes = (after - before) / jnp.where(before == 0, 1, before)
    return jnp.clip(jnp.mean(jnp.where(before == 0, 0, changes)), -1, 1)
