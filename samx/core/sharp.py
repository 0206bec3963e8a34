"""The gradient at a perturbed point."""

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.closures import LossesClosure, scalar_closure

_IS_SHARP_PASS = ContextVar("is_sharp_pass", default=False)


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
    closure = scalar_closure("value_and_grad_at", "value_fn", value_fn)
    start = closure.devices.vary_left_out(
        jax.tree.map(lambda w: _widened(w, perturb_dtype), params)
    )
    is_widened = any(
        x.dtype != jnp.result_type(w)
        for x, w in zip(*map(jax.tree.leaves, (start, params)), strict=True)
    )

    def at_point(start):
        with _sharp_pass():
            return closure.with_aux(start, lambda w: perturbed(w, eps, None))

    try:
        value, grads = jax.value_and_grad(at_point, has_aux=True, allow_int=True)(start)
    except TypeError as error:
        if not is_widened:
            raise
        raise TypeError(
            "the loss closure failed at the perturbed point, where half-precision parameters "
            f"arrive in {jnp.dtype(perturb_dtype).name} so that the perturbation is not rounded "
            "away. Make the closure accept that dtype (float32 parameters with half-precision "
            "compute do), or opt out with perturb_dtype=None."
        ) from error
    grads = tree.keep_floating(grads, params)  # float0 at the integers
    grads = jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), grads, params)
    return value if has_aux else value[0], grads


def scores_at(
    losses_fn: LossesClosure, params: optax.Params, eps: optax.Updates, batch: Any, dtype: Any
) -> jax.Array:
    """Per-example losses `[B]` at `w + ε`, without a gradient; `dtype` is `perturb_dtype`."""
    with _sharp_pass():
        return losses_fn.scores(perturbed(params, eps, dtype), batch)


def is_sharp_pass() -> bool:
    """Whether a loss closure is being called at a perturbed point: for randomness of its own there.

        key = fold_in(key, 1)  if  is_sharp_pass()      fresh dropout masks in the sharp pass

    A closure that does not ask draws the same masks in every pass of a step, from the key that it
    closes over: then the perturbation alone tells the passes apart.

    Returns:
        A Python bool: True while `value_and_grad_at` calls the closure, otherwise False.

    Raises:
        Nothing.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> def loss(w):
        ...     print("sharp" if samx.is_sharp_pass() else "clean")
        ...     return w @ w
        >>> w, tx = jnp.ones(2), samx.sam(0.1)
        >>> g = jax.grad(loss)(w)
        clean
        >>> updates, state = tx.update(g, tx.init(w), w, value_fn=loss)
        sharp

    References:
        google-research/sam draws the same masks in both passes, davda54/sam fresh ones.

    Notes:
        An answer at trace time. A function that keeps its trace, such as one of your own under
        `jax.jit` or `jax.checkpoint`, would keep the answer too: ask outside of it, and pass it a
        key. SAMPa has no clean pass: both of its gradients are taken at perturbed points. Cost:
        none.
    """
    return _IS_SHARP_PASS.get()


@contextmanager
def _sharp_pass():
    token = _IS_SHARP_PASS.set(True)
    try:
        yield
    finally:
        _IS_SHARP_PASS.reset(token)


def perturbed(params: optax.Params, eps: optax.Updates, perturb_dtype: Any) -> optax.Params:
    """The point `w + ε` as the closure sees it, in `perturb_dtype` or wider."""

    def move(w, e):
        w = _widened(w, perturb_dtype)
        if not tree.is_inexact(w):
            return w
        return (w.astype(jnp.promote_types(w.dtype, jnp.result_type(e))) + e).astype(w.dtype)

    return jax.tree.map(move, params, eps)


def _widened(w: Any, dtype: Any) -> jax.Array:
    w = jnp.asarray(w)
    if dtype is None or not tree.is_inexact(w):
        return w
    return w.astype(jnp.promote_types(w.dtype, dtype))


def ascend(
    perturb: Callable[..., Any], g: Any, ascent_grad: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """The step up `ascent_grad`, and the new state of the perturbation, which `g` determines.

    The two gradients differ where devices climb on their own: each along its own gradient, but with
    a state that all of them share.
    """
    eps, new_state = perturb(ascent_grad, state, params)
    if ascent_grad is not g:
        _, new_state = perturb(g, state, params)
    return eps, new_state
