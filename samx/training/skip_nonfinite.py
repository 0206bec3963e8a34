"""Skip the steps whose updates are not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.readings import Monitored, Readings
from samx.core.state import HeldBatch
from samx.core.transformation import as_transformation, checked_transformation


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
    """Skip the steps whose updates are not finite; parameters and optimizer state do not change.

        updates, state′ = tx(g, state, w)
        if all(isfinite(updates)) and state′ is as finite as state:  return updates, state′
        else:                                                        return 0, state

    It tests the final updates, so it also finds an overflow in the sharp pass alone.
    `optax.apply_if_finite` cannot see this overflow, because it tests the incoming gradient.
    `skip_nonfinite` also tests the state: sign-based optimizers such as `optax.lion` keep an
    infinity there that their updates hide.

    Args:
        tx: The whole optimizer: sharpness-aware transformation and base together.

    Returns:
        A transformation that passes every keyword on to `tx`. Its state counts the skipped steps:
        `skipped_steps` and `skipped_in_a_row`. Monitor `skipped_in_a_row`.

    Raises:
        Nothing; errors of `tx` pass through.

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
        A failure that does not come from the new batch repeats in every step, for example in
        SAMPa's pass on its held batch: another reason to monitor `skipped_in_a_row`. If a step does
        not use a gradient, for example that of a leaf that is not perturbed, its infinities change
        only the readings. An infinity that `tx` clips is not detected. Held batches may contain
        infinities, for example in masks.
        Cost: one pass over updates and state, and a select of the state.
    """
    inner = as_transformation("skip_nonfinite", "tx", tx)

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

    return checked_transformation("skip_nonfinite", init_fn, update_fn)


def _computed(state: Any) -> list[Any]:
    """Return the leaves of a state that its optimizer computed and will use again."""
    apart = HeldBatch | Monitored | Readings
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, apart))
    return [leaf for leaf in leaves if not isinstance(leaf, apart)]
