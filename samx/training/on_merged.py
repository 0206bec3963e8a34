"""Perturb weights that follow from the parameters: those that adapters are merged into."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.closures import Closure, evaluate
from samx.core.merging import Merged, view
from samx.core.transformation import (
    CLOSURES_OF_PARAMS,
    as_transformation,
    check_in_front,
    closure_transformation,
)


def on_merged(inner: optax.GradientTransformation, weights_like: Any = None) -> Transformation:
    """Perturb the merged weights, and train the parameters that they follow from.

        W   = merge_fn(w)
        u   = inner(∇L(W))                   inner sees W as its parameters, and L as its loss
        return J(w)ᵀ u                       J: the derivative of merge_fn

    The parameters are adapters, for example, and W = W₀ + s A B. With `merge_fn`, all closures of
    `update` take weights, whatever the optimizer is. SAM alone still climbs the adapters: its
    perturbation has their low rank. Inside `on_merged`, SAM climbs the weights that are deployed.

    Args:
        inner: A transformation that stands first in a chain, such as `samx.sam(0.05)`.
        weights_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the weights:
            `jax.eval_shape(merge_fn, params)`. Default `None`: they are shaped like the parameters.

    Returns:
        A transformation that stands first in a chain. Its state is that of `inner`. `update` needs
        what `inner` needs, and `merge_fn`, `params -> weights`. Without that and `weights_like`,
        this is `inner`.

    Raises:
        TypeError: If `inner` is not a transformation; in `init`, if `weights_like` holds something
            else than arrays, numbers or shapes.
        ValueError: In `init`, if `inner` wraps a base or is an optimizer; in `update`, if the
            weights are not shaped like `weights_like`, or `merge_fn` is given inside `perturb_if`,
            which belongs inside `on_merged`.

    Example:
        A frozen weight W₀ and an adapter of rank 1. SAM moves all of W:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> frozen = jnp.diag(jnp.array([2.0, 1.0]))
        >>> adapter = {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.zeros((1, 2))}
        >>> merge_fn = lambda adapter: frozen + adapter["lora_a"] @ adapter["lora_b"]
        >>> value_fn = lambda weights: 0.5 * (weights**2).sum()
        >>> inner = samx.on_merged(samx.sam(0.1), jax.eval_shape(merge_fn, adapter))
        >>> tx = optax.chain(inner, optax.sgd(0.1))
        >>> grads = jax.grad(lambda adapter: value_fn(merge_fn(adapter)))(adapter)
        >>> updates, _ = tx.update(
        ...     grads, tx.init(adapter), adapter, value_fn=value_fn, merge_fn=merge_fn)
        >>> [round(float(x), 3) for x in updates["lora_b"][0]]
        [-0.209, -0.104]

    References:
        The weights of Flat-LoRA (Li et al., ICML 2025, https://arxiv.org/abs/2409.14396) and
        Bi-LoRA (Liu et al., ICLR 2026, https://arxiv.org/abs/2508.19564) are merged ones.

    Notes:
        `merge_fn` is any differentiable function: a product of factors, weights that are rounded
        with a straight-through gradient, one matrix that is copied for its two uses. Let it return
        the adapted weights alone, and let the closures fill in the frozen ones: those are then
        neither perturbed nor copied. `samx.freeze` outside works as elsewhere. Cost: that of
        `inner`, whose gradients are those of the weights; a clean gradient that `inner` reads is
        taken again, in place of the caller's. `static_args`: all.
    """
    inner = as_transformation("on_merged", "inner", inner)

    def init_fn(params):
        state = inner.init(params) if weights_like is None else _init(inner, weights_like)
        check_in_front("on_merged", state)
        return state

    def update_fn(g, state, params, *, value_fn, merge_fn=None, **extra):
        if merge_fn is None and weights_like is None:
            return inner.update(g, state, params, value_fn=value_fn, **extra)
        _check_not_skipped(value_fn)
        weights, pull = jax.vjp(_view(merge_fn), params)
        _check_weights(weights, params if weights_like is None else weights_like)
        extra |= {k: extra[k].compose(Merged) for k in CLOSURES_OF_PARAMS if k in extra}
        seen, _ = evaluate(value_fn.compose(Merged), weights)
        u, state = inner.update(seen["grad"], state, weights, **extra | seen)
        return _pulled(pull, u, weights, params), state

    return closure_transformation(init_fn, update_fn, name="on_merged")


def _init(inner: Transformation, weights_like: Any) -> Any:
    """Return the state of `inner` for weights of these shapes; none of them is stored."""
    tree.check_arrays("weights_like", weights_like, has_shapes=True)

    def init():
        return inner.init(jax.tree.map(jnp.zeros_like, weights_like))

    return jax.jit(init)()


def _view(merge_fn: Any) -> Callable[[Any], Any]:
    if merge_fn is None:
        raise ValueError(
            "on_merged: `merge_fn` is missing, and `weights_like` was given. Call "
            "tx.update(..., merge_fn=merge), where merge(params) are the weights"
        )
    return view(merge_fn)


def _check_weights(weights: Any, like: Any) -> None:
    """Require the weights for which the state was made."""
    try:
        tree.check_like("merge_fn(params)", weights, "weights_like", like)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"on_merged: {error}. Pass weights_like=jax.eval_shape(merge_fn, params); without it, "
            "weights must be shaped like the parameters"
        ) from error


def _check_not_skipped(value_fn: Closure) -> None:
    if value_fn.evaluation.is_skipped_step:
        raise ValueError(
            "on_merged: with `merge_fn`, a skipped step has no gradient of the weights; write "
            "on_merged(perturb_if(policy, inner)) in place of perturb_if(policy, on_merged(inner))"
        )


def _pulled(pull: Callable[[Any], Any], u: Any, weights: Any, params: Any) -> Any:
    """Return the gradient at the parameters, given that at the weights, as optax conjugates it."""

    def cotangent(x, w):
        if not tree.is_inexact(w):
            return np.zeros(jnp.shape(w), jax.dtypes.float0)
        return jnp.conj(x).astype(w.dtype)

    (grads,) = pull(jax.tree.map(cotangent, u, weights))
    return tree.conj(tree.keep_floating(grads, params))
