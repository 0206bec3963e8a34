"""What a policy is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


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


def check_policy(name: str, policy: Any) -> None:
    """Refuse what is no policy."""
    if not isinstance(policy, Policy):
        kind = type(policy).__name__
        raise TypeError(
            f"{name}: `policy` must be a samx.policies.Policy, for example policies.every(2), "
            f"got {kind}"
        )


def branch(
    policy: Policy,
    g: Any,
    state: Any,
    look: Callable[[], tuple[Any, Any]],
    skip: Callable[[], Any],
) -> tuple[jax.Array, Any, Any]:
    """Compute one of two results, as the policy decides: a real branch, `jax.lax.cond`.

    `look()` returns `(g_s, result)` and `skip()` returns `result`. The return value is `is_sharp`,
    the result, and the new state of the policy, which has observed `g_s` if there is one.
    """
    is_sharp, decided = policy.decide(g, state)

    def sharp():
        g_s, result = look()
        return result, policy.observe(g, g_s, decided)

    def plain():
        return skip(), decided

    result, new_state = jax.lax.cond(is_sharp, sharp, plain)
    return is_sharp, result, new_state
