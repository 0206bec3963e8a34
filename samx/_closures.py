"""Loss closures in one form, and the gradient of one at a perturbed point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx import _tree


class Closure:
    """A loss closure: calling it gives the loss; `with_aux` gives `(loss, aux)`.

    The caller's closure may return either; an aux that is missing is `None`.
    """

    def __init__(self, with_aux: Callable[..., tuple[jax.Array, Any]]):
        self.with_aux = with_aux

    def __call__(self, *args: Any, **keywords: Any) -> jax.Array:
        """The loss, aux dropped."""
        return self.with_aux(*args, **keywords)[0]


def _loss_and_aux(result: Any) -> tuple[Any, Any]:
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)


def scalar_closure(name: str, keyword: str, fn: Callable[..., Any]) -> Closure:
    """`params -> scalar`, checked whenever it is called."""
    if isinstance(fn, Closure):  # an outer wrapper's
        return fn

    def with_aux(*args, **kwargs):
        loss, aux = _loss_and_aux(fn(*args, **kwargs))
        if jnp.shape(loss) != ():
            raise ValueError(
                f"{name}: `{keyword}` must return a scalar (or (scalar, aux)), got shape "
                f"{jnp.shape(loss)}; return the mean, and pass per-example losses as `losses_fn`"
            )
        _check_floating(name, keyword, loss)
        return loss, aux

    return Closure(with_aux)


def losses_closure(name: str, fn: Callable[..., Any]) -> Closure:
    """`(params, batch) -> [B]`, checked whenever it is called."""
    if isinstance(fn, Closure):
        return fn

    def with_aux(params, batch):
        losses, aux = _loss_and_aux(fn(params, batch))
        size = batch_size(name, batch)
        if jnp.shape(losses) != (size,):
            raise ValueError(
                f"{name}: `losses_fn` must return one loss per example, shape ({size},), "
                f"got {jnp.shape(losses)}"
            )
        _check_floating(name, "losses_fn", losses)
        return losses, aux

    return Closure(with_aux)


def _check_floating(name: str, keyword: str, loss: Any) -> None:
    dtype = jnp.result_type(loss)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: `{keyword}` must return real floating numbers, got {dtype}")


def batch_size(name: str, batch: Any) -> int:
    """The common leading axis `B` of a batch's leaves, or a `ValueError` that shows the shapes."""
    shapes = {
        jax.tree_util.keystr(path) or "batch": jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
    }
    if not shapes or () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"{name}: every leaf of `batch` must have the same leading axis [B], got {shapes}"
        )
    return next(iter(shapes.values()))[0]


def value_and_grad_at(
    value_fn: Callable[[Any], Any],
    params: optax.Params,
    eps: optax.Updates,
    *,
    has_aux: bool = False,
    perturb_dtype: Any = jnp.float32,
) -> tuple[Any, optax.Updates]:
    """Loss and gradient at the perturbed point, `params` untouched.

        L(w + ε), ∇L(w + ε)

    The gradient has the dtypes of `params`. Half-precision leaves are handed to the closure as
    `perturb_dtype(w) + ε`: a step of radius 0.05 spread over many weights is below half a unit in
    the last place of bfloat16, and would round to nothing. Integer leaves are handed over as they
    are and get a zero gradient.

    Args:
        value_fn: `params -> scalar`, or `params -> (scalar, aux)` with `has_aux`.
        params: The parameters `w`.
        eps: The perturbation, shaped like `params`.
        has_aux: As in `jax.value_and_grad`; default False.
        perturb_dtype: Lowest precision of the point that the closure sees; `None` keeps the
            parameters' dtypes.

    Returns:
        `(loss, gradient)`, with `has_aux` `((loss, aux), gradient)`.

    Raises:
        TypeError: If the closure fails on the widened parameters; the message names
            `perturb_dtype`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> loss, g = samx.value_and_grad_at(lambda w: w @ w, jnp.ones(2), 0.5 * jnp.ones(2))
        >>> float(loss), g.tolist()
        (4.5, [3.0, 3.0])

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        ICLR 2021, https://arxiv.org/abs/2010.01412 (line 4 of the algorithm).

    Notes:
        Cost: one forward and one backward pass, one transient copy of the parameters.
    """
    point = perturbed(params, eps, perturb_dtype)
    moved = zip(jax.tree.leaves(point), jax.tree.leaves(params), strict=True)
    is_widened = any(p.dtype != jnp.result_type(w) for p, w in moved)
    try:
        value, grads = jax.value_and_grad(value_fn, has_aux=has_aux, allow_int=True)(point)
    except TypeError as error:
        if not is_widened:
            raise
        raise TypeError(
            "the loss closure failed at the perturbed point, where half-precision parameters "
            f"arrive in {jnp.dtype(perturb_dtype).name} so that the perturbation is not rounded "
            "away. Make the closure accept that dtype (float32 parameters with half-precision "
            "compute do), or opt out with perturb_dtype=None."
        ) from error
    grads = _tree.keep_floating(grads, params)  # float0 at the integers
    return value, jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), grads, params)


def perturbed(params: optax.Params, eps: optax.Updates, perturb_dtype: Any) -> optax.Params:
    """The point `w + ε` as the closure sees it, in `perturb_dtype` or wider."""

    def move(w, e):
        w = jnp.asarray(w)
        if not _tree.is_inexact(w):
            return w
        dtype = w.dtype if perturb_dtype is None else jnp.promote_types(w.dtype, perturb_dtype)
        return (w.astype(jnp.promote_types(dtype, jnp.result_type(e))) + e).astype(dtype)

    return jax.tree.map(move, params, eps)


def mean_loss(losses_fn: Closure, batch: Any, weights: jax.Array | None = None) -> Closure:
    """The mean of per-example losses as a closure of the parameters; `weights` 0 is padding."""

    def mean_with_aux(params):
        losses, aux = losses_fn.with_aux(params, batch)
        losses = _tree.widen(losses)
        if weights is None:
            return jnp.mean(losses), aux
        total = jnp.sum(weights)
        return jnp.sum(losses * weights) / jnp.where(total == 0, 1, total), aux

    return Closure(mean_with_aux)
