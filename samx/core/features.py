"""A model in two parts: features, and an output layer that turns them into logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samx.core.closures import LogitsClosure, LossesClosure


def computed_once(
    features_fn: LogitsClosure, losses_fn: LossesClosure, params: Any, batch: Any
) -> Callable[[Any, Any], Any]:
    """Return `features_fn` at these parameters and this batch, its forward pass done once.

    A gradient goes back through that pass. Where gradients are accumulated over microbatches, each
    takes its own pass: the features of a whole batch are not kept.
    """
    if losses_fn.is_accumulated:
        return features_fn
    pcast = losses_fn.evaluation.devices.pcast
    features, pull = jax.vjp(lambda w: features_fn(w, batch), pcast(params))

    @jax.custom_vjp
    def stored(w):
        del w
        return features

    stored.defvjp(lambda _: (features, None), lambda _, cotangent: pull(cotangent))
    return lambda w, _: stored(w)


def matrices_read(
    features_fn: LogitsClosure, head_fn: LogitsClosure, params: Any, batch: Any
) -> Any:
    """Return a tree of booleans: which leaves have two axes or more, and `head_fn` reads them."""
    features = jax.eval_shape(features_fn, params, batch)
    jaxpr = jax.make_jaxpr(head_fn)(params, features).jaxpr
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {*map(id, jaxpr.outvars)}
    leaves, structure = jax.tree.flatten(params)
    read = [id(x) in used for x in jaxpr.invars[: len(leaves)]]
    chosen = [is_read and jnp.ndim(w) >= 2 for is_read, w in zip(read, leaves, strict=True)]
    return jax.tree.unflatten(structure, chosen)
