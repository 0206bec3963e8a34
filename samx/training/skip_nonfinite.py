"""Skip the steps whose updates are not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.readings import Readings
from samx.core.state import HeldBatch


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
        inner: State of the wrapped optimizer, as of its last finite step.
        skipped_steps: int32, steps skipped since `init`.
        skipped_in_a_row: int32, steps skipped since the last one that was taken.
    """

    inner: optax.OptState
    skipped_steps: jax.Array
    skipped_in_a_row: jax.Array


def skip_nonfinite(tx: optax.GradientTransformation) -> Transformation:
    """Skip the steps whose updates are not finite, as if their batch had never come.

        updates, state′ = tx(g, state, w)
        if all(isfinite(updates)) and state′ is as finite as state:  return updates, state′
        else:                                                        return 0, state

    It looks at the final updates, so it also catches an overflow in the sharp pass alone, which
    `optax.apply_if_finite` cannot see: that one tests the incoming gradient. And at the state,
    where sign-based optimizers such as `optax.lion` keep an infinity that their updates hide.

    Args:
        tx: The whole optimizer, sharpness-aware transformation and base together.

    Returns:
        An `optax.GradientTransformationExtraArgs` that passes every keyword on. Its state counts
        the skipped steps (`skipped_steps`, `skipped_in_a_row`): watch the second one.

    Raises:
        Nothing of its own; what `tx` raises.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = samx.skip_nonfinite(optax.chain(samx.sam(0.05), optax.sgd(0.1)))
        >>> w, broken = jnp.ones(2), lambda w: jnp.sqrt(-w).sum()
        >>> updates, state = tx.update(jax.grad(broken)(w), tx.init(w), w, value_fn=broken)
        >>> updates.tolist(), int(state.skipped_steps)  # the root of -1
        ([0.0, 0.0], 1)

    References:
        `optax.apply_if_finite`, which restores the state in the same way.

    Notes:
        Schedules, held batches, moments and readings all stay as they were before the skipped step.
        What breaks without the new batch, such as SAMPa's pass on the batch that it holds, breaks
        again: another reason to watch `skipped_in_a_row`. A gradient that the step does not use,
        such as that of a leaf that is not perturbed, breaks nothing but the readings; an infinity
        that `tx` clips is not seen; and held batches may have infinities, in masks say.
        Cost: one pass over updates and state, and a select of the state.
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params):
        zeros = (jnp.zeros((), jnp.int32) for _ in range(2))
        return SkipNonfiniteState(inner.init(params), *zeros)

    def update_fn(updates, state, params=None, **extra):
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        pairs = zip(_computed(inner_state), _computed(state.inner), strict=True)
        checks = [jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)]
        checks += [
            jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
            for new, old in pairs
            if tree.is_inexact(new)
        ]
        is_finite = jnp.all(jnp.asarray(checks))
        skipped = (~is_finite).astype(jnp.int32)
        return (
            tree.where(is_finite, updates, optax.tree.zeros_like(updates)),
            SkipNonfiniteState(
                inner=tree.where(is_finite, inner_state, state.inner),
                skipped_steps=state.skipped_steps + skipped,
                skipped_in_a_row=skipped * (state.skipped_in_a_row + 1),
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _computed(state: Any) -> list[Any]:
    """The leaves of a state that its optimizer computed and will compute with."""
    apart = HeldBatch | Readings
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, apart))
    return [leaf for leaf in leaves if not isinstance(leaf, apart)]
