"""vSAM: sample the second-order part of SAM's gradient where it varies, reuse it elsewhere.

Deng, Pang, Zhang, Wang. "Effective Gradient Sample Size via Variation Estimation for Accelerating
Sharpness aware Minimization", 2024. https://arxiv.org/abs/2403.08821
"""

from typing import Any

import jax.numpy as jnp
import optax

from samx.combinations import Mixing, decaying
from samx.core import tree
from samx.core.hyperparams import Default, check_count
from samx.policies.policy import Policy
from samx.policies.quota import quota
from samx.variants._ball import ball_of
from samx.variants._reuse import reuse


def vsam(
    rho: optax.ScalarOrSchedule = Default(0.05),
    decay: optax.ScalarOrSchedule = 0.7,
    *,
    reuse_steps: int = 6,
    policy: Policy | None = None,
    perturbation: optax.GradientTransformation | None = None,
    perturb_dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """vSAM: SAM's gradient is g + h; h is sampled on some steps and reused on the next ones.

        if policy(g):  g_s = ∇L(w + ρ g / ‖g‖)
                       h = g_s − g;  j = 0
                       return g + h
        else:          j = j + 1
                       return g + (decay ^ j if j ≤ reuse_steps else 0) h

    Every window of steps has its quota of samples, which grows and shrinks with the variation of
    ‖h‖: see `policies.quota`.

    Args:
        rho: Radius ρ ≥ 0 of the L2 ball over all parameters, a number or a schedule over the
            optimizer's steps; default 0.05.
        decay: β in [0, 1], what is left of h from one step to the next, a number or a schedule;
            default 0.7.
        reuse_steps: Steps ≥ 0 behind a sample that reuse it; default 6.
        policy: When to sample h; default `policies.quota()`, whose arguments are the paper's:
            window, warm-up, gains.
        perturbation: Another geometry in place of the ball; then leave `rho` out.
        perturb_dtype: Lowest precision of the perturbed point, see `sharpness_aware`.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to stand first in a chain. `update` needs
        `value_fn` (or `losses_fn` and `batch`); `value` is read if given. Its state holds
        `part_ratio`, ‖h‖ / ‖g‖ of the last sample, and `sharp_fraction`.

    Raises:
        ValueError: If a number is out of its range, or `rho` is given together with
            `perturbation`; in `update`, see `closure_transformation`.
        TypeError: If `rho` or `decay` is neither number nor schedule, `reuse_steps` no Python int,
            or `policy` no `Policy`.

    Example:
        >>> import optax, samx
        >>> three_epochs = samx.policies.quota(warmup_steps=3 * 391)
        >>> tx = optax.chain(samx.vsam(0.05, policy=three_epochs), optax.sgd(0.05, momentum=0.9))

    References:
        Deng, Pang, Zhang, Wang, "Effective Gradient Sample Size via Variation Estimation for
        Accelerating Sharpness aware Minimization", 2024, https://arxiv.org/abs/2403.08821

    Notes:
        Cost: 1 gradient per step and 1 more on ⌊quota⌋ steps of every window (the authors' own
        traces sample 29% and 60% of the steps), one copy of the parameters in the state, and a
        transient one.
        Fidelity: matches ajiaaa/vSAM, controller included; defaults are those of its training
        script, but for the warm-up (three epochs there). There, fewer than `window` samples before
        the first window end in NaN; here what is missing counts as no change. For some values of
        `decay` (0.9 is one) rounding makes that code reuse a seventh time. `static_args`:
        `reuse_steps`, `policy`, `perturbation`, `perturb_dtype`; `rho` too where `perturbation` is
        given.
    """
    check_count("reuse_steps", reuse_steps, 0)
    policy = quota() if policy is None else policy
    ball = ball_of("vsam", rho, perturbation)
    return reuse_second_order("vsam", policy, ball, decaying(decay, reuse_steps), perturb_dtype)


def reuse_second_order(
    name: str,
    policy: Policy,
    perturbation: optax.GradientTransformationExtraArgs,
    mixing: Mixing,
    perturb_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """The decomposition that vSAM and ARSAM share: `u = g + mixing(age, step) h`, `h = g_s − g`."""

    def take(g, g_s, step):
        updates = tree.on_line(g, g_s, mixing(jnp.zeros_like(step), step))
        return updates, tree.subtract(g_s, g)

    def add(g, g_norm, state):
        del g_norm
        return tree.add_scaled(g, mixing(state.age, state.step), state.part)

    return reuse(name, policy, perturbation, take=take, add=add, perturb_dtype=perturb_dtype)
