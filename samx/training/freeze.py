"""Train some of the parameters only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core.aliases import Transformation
from samx.core.hyperparams import check_function
from samx.core.transformation import as_transformation, closure_transformation, freeze_leaves


def freeze(tx: optax.GradientTransformation, mask: Any) -> Transformation:
    """Keep some of the parameters as they are, in every pass of any optimizer.

        L(w) = L(trained, stop_gradient(frozen))
        updates = 0  at the frozen leaves

    A sharpness-aware transformation in front of `optax.partition({..., optax.set_to_zero()})` or
    `optax.freeze` climbs the frozen leaves too: they take a part of the radius, often most of it.
    Inside `freeze`, the trained leaves get the whole radius, and no pass computes a gradient of the
    frozen ones.

    Args:
        tx: The whole optimizer: sharpness-aware transformation and base together.
        mask: As in `optax.freeze`: a tree of booleans, where a boolean may stand for a part of
            `params`; `True` freezes. Or a function `params -> mask`.

    Returns:
        A transformation. Its state is that of `tx`. `update` needs what `tx` needs.

    Raises:
        TypeError: If `tx` is not a transformation, or `mask` holds something else than booleans.
        ValueError: In `update`, if `mask` does not have the structure of `params`.

    Example:
        Only the head is trained. By hand, it is the step of SAM on the head alone:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> loss = lambda w: (w["head"] * w["body"] ** 2).sum()
        >>> w = {"body": jnp.array([1.0, 2.0]), "head": jnp.array([0.3, -0.5])}
        >>> sam = optax.chain(samx.sam(0.5), optax.sgd(0.1))
        >>> tx = samx.freeze(sam, {"body": True, "head": False})
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in (*updates["body"], *updates["head"])]
        [0.0, 0.0, -0.1, -0.4]

    References:
        `optax.freeze` and `optax.selective_transform`, inside which `tx` would get only a part of
        the parameters.

    Notes:
        The state of `tx` covers all parameters. To save that memory, partition the base too:
        `optax.partition({"train": base, "freeze": optax.set_to_zero()}, labels)`.
        Cost: that of `tx`; the backward passes end where the trained parameters end.
        `static_args`: all arguments.
    """
    inner = as_transformation("freeze", "tx", tx)
    if callable(mask):
        check_function("mask", mask, 1)
    else:
        _check_mask(mask)

    def update_fn(updates, state, params, *, value_fn, **extra):
        is_frozen = _broadcast(mask(params) if callable(mask) else mask, params)
        extra = freeze_leaves(extra | {"value_fn": value_fn}, is_frozen)
        updates, state = inner.update(_zeroed(updates, is_frozen), state, params, **extra)
        return _zeroed(updates, is_frozen), state

    return closure_transformation(inner.init, update_fn, name="freeze")


def _zeroed(updates: Any, is_frozen: Any) -> Any:
    return jax.tree.map(lambda u, held: jnp.zeros_like(u) if held else u, updates, is_frozen)


def _broadcast(mask: Any, params: Any) -> Any:
    _check_mask(mask)
    try:
        return jax.tree.broadcast(mask, params)
    except ValueError as error:
        raise ValueError(
            f"freeze: `mask` must have the structure of `params`, {jax.tree.structure(params)}, "
            f"got {jax.tree.structure(mask)}"
        ) from error


def _check_mask(mask: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        if not isinstance(leaf, bool):
            raise TypeError(
                f"freeze: `mask` must hold booleans, got {leaf!r} at "
                f"mask{jax.tree_util.keystr(path)}"
            )
