"""Chain with a base optimizer that rejects unknown keywords."""

from typing import Any

import optax

from samx.core.aliases import Transformation
from samx.core.transformation import as_transformation, base_keywords, checked_transformation


def with_base(
    tx: optax.GradientTransformation, base: optax.GradientTransformation
) -> Transformation:
    """Chain a sharpness-aware transformation with a base that rejects unknown keywords.

        g_s     = tx(g; all keywords)
        updates = base(g_s; value, grad, value_fn and all keywords that are not samx's own)

    optax's line searches reject keywords that they do not know, such as `losses_fn` and `batch`.
    They also need a `value_fn` that returns a scalar. An ordinary `optax.chain` would pass them all
    keywords. Other bases do not need `with_base`.

    Args:
        tx: The sharpness-aware transformation.
        base: The base optimizer.

    Returns:
        A transformation; its state is that of `optax.chain(tx, base)`.

    Raises:
        Nothing; errors of `tx` and `base` pass through.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=10)
        >>> tx = samx.with_base(samx.sam(0.01), optax.chain(optax.sgd(1.0), search))
        >>> w, batch = jnp.ones(2), jnp.eye(2)
        >>> losses_fn = lambda w, b: (b @ w) ** 2
        >>> value, g = jax.value_and_grad(lambda w: losses_fn(w, batch).mean())(w)
        >>> updates, state = tx.update(
        ...     g, tx.init(w), w, value=value, grad=g, losses_fn=losses_fn, batch=batch)
        >>> bool(losses_fn(w + updates, batch).mean() < value)
        True

    References:
        The keywords of `optax.scale_by_backtracking_linesearch`.

    Notes:
        samx's own keywords are `losses_fn`, `batch`, `weights`, `ascent_fn`, `labels`, `index`,
        `fisher_batch`, `training_fn`, `validation_fn`, `apply_fn`, `loss_on_logits`, `teacher_fn`,
        `features_fn`, `head_fn` and `merge_fn`. If only `losses_fn` and `batch` are given, the base
        gets a `value_fn` that is the mean of the losses. Cost: none.
    """
    tx = as_transformation("with_base", "tx", tx)
    base = as_transformation("with_base", "base", base)

    def update_fn(updates, state, params=None, **extra: Any):
        return base.update(updates, state, params, **base_keywords("with_base", extra))

    chain = optax.chain(tx, optax.GradientTransformationExtraArgs(base.init, update_fn))
    return checked_transformation("with_base", chain.init, chain.update)
