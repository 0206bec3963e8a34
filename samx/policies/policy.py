"""The type of a policy, and the branch that follows its decision."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import check_function


def _unchanged(g: Any, g_s: Any, state: Any) -> Any:
    del g, g_s
    return state


class Policy(NamedTuple):
    """Three functions that decide on which steps the sharp gradient is computed.

    They work like an optax transformation, with their own state. The gradient `g` at the parameters
    is the mean over all devices, so that all devices decide the same.

    Attributes:
        init: `params -> state`.
        decide: `(g, state) -> (is_sharp, state)`, called on every step of the optimizer; `is_sharp`
            is a boolean scalar.
        observe: `(g, g_s, state) -> state`, called after each sharp gradient `g_s`; the default
            returns the state unchanged.

    Example:
        Take a sharp step where the gradient is long:

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


def check_policy(name: str, policy: Any, argument: str = "policy") -> None:
    """Require a `Policy`; `argument` names it in messages."""
    if not isinstance(policy, Policy):
        kind = type(policy).__name__
        raise TypeError(
            f"{name}: `{argument}` must be a samx.policies.Policy, for example policies.every(2), "
            f"got {kind}"
        )

    for field, count in (("init", 1), ("decide", 2), ("observe", 3)):
        check_function(f"{argument}.{field}", getattr(policy, field), count)


def branch(
    policy: Policy,
    g: Any,
    state: Any,
    look: Callable[[], tuple[Any, Any]],
    skip: Callable[[], Any],
) -> tuple[jax.Array, Any, Any]:
    """Compute one of two results, as the policy decides; a real branch (`jax.lax.cond`).

    `look()` returns `(g_s, result)` and `skip()` returns `result`. Returns `is_sharp`, the result,
    and the new state of the policy. The policy has observed `g_s` if the step was sharp.
    """
    is_sharp, decided = policy.decide(g, state)
    length = tree.length(g)

    def sharp():
        with tree.known_length(g, length):
            g_s, result = look()
            return result, policy.observe(g, g_s, decided)

    def plain():
        with tree.known_length(g, length):
            return skip(), decided

    result, new_state = fast_convolutions(jax.lax.cond)(is_sharp, sharp, plain)
    return is_sharp, result, new_state
