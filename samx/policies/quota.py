"""vSAM's policy: a quota of sharp steps per window. Public as `samx.policies.quota`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import (
    RandomKey,
    as_count,
    check_function,
    check_number,
    check_static_number,
    next_step,
)
from samx.perturbations.metrics import LeafPredicate
from samx.policies import draws
from samx.policies.policy import Policy


class QuotaState(NamedTuple):
    """State of `quota`.

    Attributes:
        step: int32, optimizer steps so far.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
        quota: Number of sharp steps of this window, before rounding down.
        taken: int32, sharp steps so far in this window.
        norms: `[window]`, ‖h‖ of the last sharp steps, newest last.
        ratios: `[window]`, ‖h‖ / ‖g‖ of the same steps.
        variances: `[window]`, the variance of `norms` at each of these steps.
    """

    step: jax.Array
    key: jax.Array
    quota: jax.Array
    taken: jax.Array
    norms: jax.Array
    ratios: jax.Array
    variances: jax.Array


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
    """Take a fixed number of sharp steps per window, more if sharp gradients vary more (vSAM).

        after a sharp gradient:  h = g_s − g
            push ‖h‖ to norms, ‖h‖ / ‖g‖ to ratios     (the last `window` of each)
            push mean over blocks of variance(sort(norms)) to variances
        at the start of a window:
            A, B  = mean relative changes of ratios, variances, each clipped to [−1, 1]
            quota = clip(quota (1 + ratio_gain A + variance_gain B), 1, ⌊max_fraction window⌋)
        is_sharp = (fewer than ⌊quota⌋ so far  and  uniform ≥ 1 − quota / window)
                   or  steps left in the window ≤ sharp steps still missing

    The last line makes the quota exact: every full window has ⌊quota⌋ sharp steps.

    Args:
        window: Number K ≥ 2 of steps per window; default 50.
        num_blocks: Number of equal blocks into which the sorted norms are split, each of two or
            more norms; default 5.
        max_fraction: Largest fraction of sharp steps, in [1/window, 1]; default 0.8.
        ratio_gain: Gain of the relative change of ‖h‖ / ‖g‖; default 0.13.
        variance_gain: Gain of the relative change of the variance; default 0.13.
        warmup_steps: Number ≥ 0 of first steps that are all sharp; default 50. The authors use
            three epochs. With fewer steps than `window`, the statistics are incomplete when they
            are first used; missing values count as no change.
        is_measured: `(path, leaf) -> bool`, the leaves over which norms are taken; default all. The
            authors take the last ten tensors of the network; a tree does not have that order.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        A `Policy`.

    Raises:
        ValueError: If a number is out of range, or `num_blocks` does not split the window into
            equal blocks of two or more; when used, if `is_measured` chooses no leaf.
        TypeError: If a count is not a Python int; in `init`, if `key` is neither a seed nor a
            random key.

    Example:
        >>> import samx
        >>> tx = samx.perturb_if(samx.policies.quota(window=20, warmup_steps=20), samx.sam(0.05))

    References:
        Deng, Pang, Zhang, Wang, "Effective Gradient Sample Size via Variation Estimation for
        Accelerating Sharpness aware Minimization", 2024, https://arxiv.org/abs/2403.08821

    Notes:
        Follows ajiaaa/vSAM. As in that code, the first window after the warm-up is one step short.
        It has no sharp step: the quota starts at 1, and the warm-up has used it. A measurement that
        is not finite is left out. Cost: two norms on sharp steps. `static_args`: `window`,
        `num_blocks`, `max_fraction`, `warmup_steps`, `is_measured`.
    """
    window = as_count("window", window, 2)
    num_blocks = as_count("num_blocks", num_blocks)
    warmup_steps = as_count("warmup_steps", warmup_steps, 0)
    check_static_number("max_fraction", max_fraction, 1 / window, 1)
    check_number("ratio_gain", ratio_gain, 0)
    check_number("variance_gain", variance_gain, 0)
    keys = RandomKey(key)
    if is_measured is not None:
        check_function("is_measured", is_measured, 2)
    if window % num_blocks or window < 2 * num_blocks:
        raise ValueError(
            "quota: `num_blocks` must cut `window` into equal blocks of two or more, got "
            f"num_blocks={num_blocks} for window={window}"
        )
    largest = int(window * max_fraction)

    def init(params):
        dtype = tree.real_dtype(*jax.tree.leaves(params))
        return QuotaState(
            step=jnp.zeros((), jnp.int32),
            key=keys.data(),
            quota=jnp.ones((), dtype),
            taken=jnp.zeros((), jnp.int32),
            norms=jnp.zeros(window, dtype),
            ratios=jnp.zeros(window, dtype),
            variances=jnp.zeros(window, dtype),
        )

    def decide(g, state):
        del g
        is_warmup = state.step < warmup_steps
        position = (state.step - warmup_steps + 1) % window  # 1 at the first step after it
        is_start = ~is_warmup & (position == 0)
        growth = 1 + ratio_gain * _trend(state.ratios) + variance_gain * _trend(state.variances)
        quota = jnp.where(is_start, jnp.clip(state.quota * growth, 1, largest), state.quota)
        taken = jnp.where(is_start, 0, state.taken)

        lacking = quota.astype(jnp.int32) - taken
        is_drawn = draws.uniform_at(keys.of(state.key), state.step) >= 1 - quota / window
        is_sharp = is_warmup | ((lacking > 0) & is_drawn) | (window - position <= lacking)
        taken = jnp.where(is_warmup, 1, taken + is_sharp.astype(taken.dtype))
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
            g, g_s = (tree.keep(gradient, chosen) for gradient in (g, g_s))
        g_length = tree.length(g)
        length = tree.scaled_norm(g_length.scale, tree.subtract(g_s, g))
        norms = _push(state.norms, length / g_length.scale)
        blocks = jnp.sort(norms).reshape(num_blocks, -1)
        ratios = _push(state.ratios, length / jnp.where(g_length.norm == 0, 1, g_length.norm))
        variances = _push(state.variances, jnp.var(blocks, axis=1, ddof=1).mean())
        measured = state._replace(norms=norms, ratios=ratios, variances=variances)
        return tree.if_finite(measured, state)

    return Policy(init, decide, observe)


def _push(history: jax.Array, value: jax.Array) -> jax.Array:
    """Append the newest value and drop the oldest."""
    return jnp.append(history[1:], value.astype(history.dtype))


def _trend(history: jax.Array) -> jax.Array:
    """Return the mean relative change from one value to the next, clipped to [−1, 1]."""
    before, after = history[:-1], history[1:]
    changes = (after - before) / jnp.where(before == 0, 1, before)
    return jnp.clip(jnp.mean(jnp.where(before == 0, 0, changes)), -1, 1)
