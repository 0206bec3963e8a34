"""Compute the sharp gradient on some steps only. Public as `samx.perturb_if`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.closures import Closure, Evaluation, LossesClosure, batch_size
from samx.core.readings import UNKNOWN, is_readings, skip_readings
from samx.core.transformation import (
    SCALAR_CLOSURES,
    as_transformation,
    check_in_front,
    closure_transformation,
)
from samx.policies.policy import Policy, branch, check_policy


class PerturbIfState(NamedTuple):
    """State of `perturb_if`.

    Attributes:
        policy: State of the policy.
        inner: State of the transformation. Its readings are those of the last step, sharp or not.
    """

    policy: Any
    inner: optax.OptState


def perturb_if(policy: Policy, inner: optax.GradientTransformation) -> Transformation:
    """Compute the sharp gradient on some steps only; pass `g` on unchanged on the others.

        if policy(g):  return inner(g)                 (SAM, or another `inner`)
        else:          return g                        (the base optimizer's step, one gradient)

    This is a real branch (`jax.lax.cond`): a skipped step never calls the closures.

    Schedules still count the optimizer's steps. On a skipped step, `inner` runs on a linear loss,
    L(w) + ⟨g, v − w⟩ at v. This loss costs nothing and has the gradient g everywhere. So the radius
    schedule of `inner` and the moving averages of its perturbation continue as on a sharp step.

    Args:
        policy: Decides which steps are sharp, for example one from `samx.policies`.
        inner: A sharpness-aware transformation that stands first in a chain, such as `samx.sam`.
            It must not wrap a base optimizer or be a chain that ends in one, because the base's
            step would be skipped too.

    Returns:
        A transformation that stands first in a chain. `update` needs `value_fn` and what `inner`
        needs. The readings of a skipped step have an infinite `sharp_loss`, and zeros for the
        values that need a sharp gradient.

    Raises:
        TypeError: If `policy` is not a `Policy`, or `inner` is not a transformation.
        ValueError: In `init`, if `inner` wraps a base.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> sam = samx.perturb_if(samx.policies.every(2), samx.sam(0.1))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> update = jax.jit(lambda *args: sam.update(*args, value_fn=loss))
        >>> state = sam.init(w)
        >>> for _ in range(3):
        ...     g_s, state = update(w, state, w)
        ...     print([round(float(x), 2) for x in g_s])
        [3.06, 4.08]
        [3.0, 4.0]
        [3.06, 4.08]

    References:
        Zhao, Zhang, Hu, "Randomized Sharpness-Aware Training for Boosting Computational Efficiency
        in Deep Learning", AAAI 2023, https://arxiv.org/abs/2203.09962 (`policies.random`; "SAM-k"
        of the LookSAM paper is `policies.every`).

    Notes:
        A policy that always decides for a sharp step gives `inner`; one that never does gives the
        base optimizer. Under `jax.vmap`, only one branch is computed if the decision does not
        depend on mapped values: initialize the state inside the mapped function and train there.
        Otherwise both branches are computed. If `inner` stores sharp gradients (as `vsam` does), a
        skipped step stores g instead; such variants have their own `policy` argument. Cost: one
        gradient per step, plus the extra gradients of `inner` on sharp steps. `static_args`: all.
    """
    check_policy("perturb_if", policy)
    inner = as_transformation("perturb_if", "inner", inner)

    def init_fn(params):
        inner_state = inner.init(params)
        check_in_front("perturb_if", inner_state)
        return PerturbIfState(policy.init(params), inner_state)

    def update_fn(g, state, params, *, value_fn, value=UNKNOWN, **extra):
        def look():
            closures = extra | {"value_fn": value_fn, "value": value}
            g_s, inner_state = inner.update(g, state.inner, params, **closures)
            return g_s, (g_s, inner_state)

        def skip():
            closures = extra | _linear(g, params, value, extra)
            _, inner_state = inner.update(g, state.inner, params, **closures)
            inner_state = jax.tree.map(
                lambda new, old: skip_readings(old, value, g) if is_readings(new) else new,
                *(inner_state, state.inner),
                is_leaf=is_readings,
            )
            return tree.cast_like(g, params), inner_state

        _, (g_s, inner_state), policy_state = branch(policy, g, state.policy, look, skip)
        return g_s, PerturbIfState(policy_state, inner_state)

    return closure_transformation(init_fn, update_fn, name="perturb_if")


def _linear(g: Any, params: Any, value: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the closures of the linear loss L(w) + ⟨g, v − w⟩, the same for every example."""
    at_params = 0.0 if value is UNKNOWN else tree.widen(value)

    def loss_at(point):
        moved = jax.tree.map(
            lambda v, w: tree.widen(v) - tree.widen(w) if tree.is_inexact(w) else w, point, params
        )
        return at_params + tree.dot(g, moved)

    def losses_at(point, batch):
        return jnp.full(batch_size("perturb_if", batch), loss_at(point))

    given = {"value_fn", *extra}
    closures: dict[str, Any] = {"value": value}
    skipped = Evaluation(is_skipped_step=True)
    for keyword in given.intersection(SCALAR_CLOSURES):
        closures[keyword] = Closure(loss_at, evaluation=skipped)
    if "losses_fn" in given:
        closures["losses_fn"] = LossesClosure(losses_at, evaluation=skipped)
    return closures
