"""A model in two parts: features, and an output layer that turns them into logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.closures import (
    Closure,
    LogitsClosure,
    LossesClosure,
    as_update_keywords,
    evaluate,
    local_value_and_grad,
)

MeanLoss = Callable[[Callable[[Any], Any], Callable[[Any, Any], Any]], Closure]


class Features:
    """The features of a batch at w: computed once, used in several passes of the output layer.

    Where gradients are accumulated over microbatches, each pass computes them again: the features
    of a whole batch are not kept there.
    """

    def __init__(
        self, features_fn: LogitsClosure, losses_fn: LossesClosure, params: Any, batch: Any
    ):
        self.fn, self.params, self.batch = features_fn, params, batch
        self.is_kept = not losses_fn.is_accumulated
        if self.is_kept:
            at = losses_fn.evaluation.devices.pcast(params)
            self.kept, self.pull = jax.vjp(lambda w: features_fn(w, batch), at)

    def shapes(self) -> Any:
        """Return the features, or their shapes where they are not kept."""
        return self.kept if self.is_kept else jax.eval_shape(self.fn, self.params, self.batch)

    def constant(self, w: Any, batch: Any) -> Any:
        """Return the features at w, whatever the argument is, without a gradient."""
        del w
        return jax.lax.stop_gradient(self.kept if self.is_kept else self.fn(self.params, batch))

    def evaluate(self, mean_loss: MeanLoss, head_at: Callable[[Any], Any]) -> dict[str, Any]:
        """Return `value`, `grad` and `value_fn` of a loss, as `evaluate` does.

        Args:
            mean_loss: `(head_at, features_of) -> closure`. It evaluates the output layer at
                `head_at(w)`, on `features_of(w, batch)`.
            head_at: The parameters of the output layer, a function of w.
        """
        if not self.is_kept:
            return evaluate(mean_loss(head_at, self.fn), self.params)[0]
        closure = mean_loss(lambda pair: head_at(pair[0]), lambda pair, _: pair[1])
        pair: Any = (self.params, self.kept)
        (value, _), pair = local_value_and_grad(closure, pair)
        g, at_features = pair
        (through,) = self.pull(at_features)
        whole = jax.tree.map(
            lambda x, y, w: x + y if tree.is_inexact(w) else x, g, through, self.params
        )
        return as_update_keywords(closure, value, whole, self.params)


def matrices_read(head_fn: LogitsClosure, params: Any, features: Any) -> Any:
    """Return a tree of booleans: which leaves have two axes or more, and `head_fn` reads them."""
    jaxpr = jax.make_jaxpr(head_fn)(params, features).jaxpr
    leaves, structure = jax.tree.flatten(params)
    read = _inputs_read(jaxpr, [True] * len(jaxpr.outvars))[: len(leaves)]
    chosen = [is_read and jnp.ndim(w) >= 2 for is_read, w in zip(read, leaves, strict=True)]
    return jax.tree.unflatten(structure, chosen)


def _inputs_read(jaxpr: Any, outputs: list[bool]) -> list[bool]:
    """Return which inputs of a program these outputs depend on; inside jit and remat too."""
    needed = {id(x) for x, is_needed in zip(jaxpr.outvars, outputs, strict=True) if is_needed}
    for equation in reversed(jaxpr.eqns):
        used = [id(x) in needed for x in equation.outvars]
        if not any(used):
            continue
        read = [True] * len(equation.invars)
        if equation.primitive.name in ("jit", "pjit", "checkpoint", "remat2"):
            inner = equation.params["jaxpr"]
            read = _inputs_read(getattr(inner, "jaxpr", inner), used)
        needed |= {id(x) for x, is_read in zip(equation.invars, read, strict=True) if is_read}
    return [id(x) in needed for x in jaxpr.invars]
