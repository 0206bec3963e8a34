"""vSAM: sample the second-order part of SAM's gradient where it varies, reuse it elsewhere.

Deng, Pang, Zhang, Wang. "Effective Gradient Sample Size via Variation Estimation for Accelerating
Sharpness aware Minimization", 2024. https://arxiv.org/abs/2403.08821
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

from samx.combinations import Mixing, decaying
from samx.core import tree
from samx.core.aliases import DType, Perturbation, Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import Default, check_count
from samx.core.readings import UNKNOWN
from samx.core.sharp import ascend, sharp_gradient
from samx.core.transformation import closure_transformation
from samx.policies import quota
from samx.policies.policy import Policy, branch, check_policy
from samx.variants._ball import ball_of
from samx.variants._reuse import finish_step, init_reuse, reuse_part, take_part


def vsam(
    rho: Radius = Default(0.05),
    decay: ScalarOrSchedule = 0.7,
    *,
    reuse_steps: int = 6,
    policy: Policy | None = None,
    perturbation: Perturbation = None,
    perturb_dtype: DType = "float32",
) -> Transformation:
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
) -> Transformation:
    """VSAM with any policy and mixing: `u = g + mixing(age, step) h`, `h = g_s − g`."""
    check_policy(name, policy)
    sharp = partial(sharp_gradient, perturb_dtype=perturb_dtype)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        climb = partial(ascend, value_fn, perturbation, g, state.perturbation, params, **extra)
        *_, ball_state = climb()  # only its state is used here; the compiler drops the rest
        g_norm = tree.norm(g)

        def look():
            eps, g_a, _ = climb()
            g_s, readings = sharp(value_fn, params, eps, state.readings, loss=value, g=g_a)
            updates = tree.on_line(g, g_s, mixing(jnp.zeros_like(state.step), state.step))
            h = tree.subtract(g_s, g)
            return g_s, (updates, take_part(state, h, g_norm, params, readings))

        def skip():
            kept = reuse_part(state, value, g)
            updates = tree.add_scaled(g, mixing(kept.age, state.step), state.part)
            return tree.cast_like(updates, params), kept

        is_sharp, step, policy_state = branch(policy, g, state.policy, look, skip)
        updates, new_state = step
        return updates, finish_step(new_state, is_sharp, policy_state, ball_state)

    return closure_transformation(partial(init_reuse, policy, perturbation), update_fn, name=name)
