"""The two parts of a sharpness-aware step: the ascent and the gradient at the perturbed point."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import DType
from samx.core.closures import Closure, LossesClosure, scalar_closure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import check_flag, check_floating
from samx.core.inspection import inspect_point
from samx.core.readings import Readings, take_readings

_IS_SHARP_PASS = ContextVar("is_sharp_pass", default=False)


def value_and_grad_at(
    value_fn: Callable[[Any], Any],
    params: optax.Params,
    eps: optax.Updates,
    *,
    has_aux: bool = False,
    perturb_dtype: DType = "float32",
) -> tuple[Any, optax.Updates]:
    """Compute the loss and the gradient at the perturbed point; `params` do not change.

        L(w + ε), ∇L(w + ε)

    The gradient has the dtypes of `params`. At complex leaves it is conjugated, as `update` takes
    and returns gradients: it points uphill. The closure gets half-precision leaves as
    `perturb_dtype(w) + ε`. A step of radius 0.05 spread over many weights is below half a unit in
    the last place of bfloat16, so in bfloat16 it would round to zero. The closure gets integer
    leaves unchanged; their gradient is zero.

    Args:
        value_fn: `params -> scalar`, or `params -> (scalar, aux)` with `has_aux`.
        params: The parameters `w`.
        eps: The perturbation, shaped like `params`.
        has_aux: As in `jax.value_and_grad`; default False.
        perturb_dtype: Lowest precision of the point that the closure gets; default float32. `None`
            keeps the dtypes of the parameters.

    Returns:
        `(loss, gradient)`; with `has_aux`, `((loss, aux), gradient)`.

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
        Cost: one forward and one backward pass, and one transient copy of the parameters.
    """
    closure = scalar_closure("value_and_grad_at", "value_fn", value_fn)
    check_flag("has_aux", has_aux)
    tree.check_arrays("params", params)
    tree.check_like("eps", eps, "params", params)
    inspect_point(params, eps, partial(perturbed, params, eps, perturb_dtype))
    start = closure.evaluation.devices.pcast_left_out(widened(params, perturb_dtype))
    is_widened = any(
        x.dtype != jnp.result_type(w)
        for x, w in zip(*map(jax.tree.leaves, (start, params)), strict=True)
    )

    at_point = partial(closure.with_aux, move=lambda w: perturbed(w, eps, None))
    try:
        with sharp_pass():
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
    grads = tree.conj(tree.keep_floating(grads, params))  # float0 at the integers
    grads = jax.tree.map(lambda g, w: g.astype(jnp.result_type(w)), grads, params)
    return value if has_aux else value[0], grads


def loss_at(
    value_fn: Closure, params: optax.Params, eps: optax.Updates, perturb_dtype: Any
) -> jax.Array:
    """Return the loss at `w + ε`, with no gradient."""
    with sharp_pass():
        return value_fn(perturbed(params, eps, perturb_dtype))


def scores_at(
    losses_fn: LossesClosure, params: optax.Params, eps: optax.Updates, batch: Any, dtype: Any
) -> jax.Array:
    """Return per-example losses `[B]` at `w + ε`, with no gradient; `dtype` is `perturb_dtype`."""
    with sharp_pass():
        return losses_fn.scores(perturbed(params, eps, dtype), batch)


def is_sharp_pass() -> bool:
    """Return whether a loss closure is being called at a perturbed point.

        key = fold_in(key, 1)  if  is_sharp_pass()      fresh dropout masks in the sharp pass

    A closure that does not call this function draws the same masks in every pass of a step, from
    the key that it closes over. The passes then differ only in the perturbation.

    Returns:
        A Python bool: True while the closure is called at a perturbed point, with or without a
        gradient; otherwise False.

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
        The value is known at trace time. A function whose trace is cached, for example your own
        function under `jax.jit` or `jax.checkpoint`, would keep the first value. Call
        `is_sharp_pass` outside that function, and pass the function a key. SAMPa has no clean pass:
        both of its gradients are taken at perturbed points. Cost: none.
    """
    return _IS_SHARP_PASS.get()


@contextmanager
def sharp_pass() -> Iterator[None]:
    """Mark what is computed inside as a pass at the perturbed point."""
    token = _IS_SHARP_PASS.set(True)
    try:
        yield
    finally:
        _IS_SHARP_PASS.reset(token)


def perturbed(params: optax.Params, eps: optax.Updates, perturb_dtype: Any) -> optax.Params:
    """Return the point `w + ε` as the closure sees it, in `perturb_dtype` or wider."""

    def move(w, e):
        w = _widened(w, perturb_dtype)
        if not tree.is_inexact(w):
            return w
        dtype = tree.common_dtype(w.dtype, e.dtype)
        return (w.astype(dtype) + e.astype(dtype)).astype(w.dtype)

    return jax.tree.map(move, params, eps)


def widened(params: Any, dtype: Any) -> Any:
    """Return half-precision leaves in `dtype` or wider, as the closure sees them at a point."""
    return jax.tree.map(lambda w: _widened(w, dtype), params)


def _widened(w: Any, dtype: Any) -> jax.Array:
    w = jnp.asarray(w)
    check_floating("perturb_dtype", dtype)
    if dtype is None or not tree.is_inexact(w):
        return w
    return w.astype(tree.common_dtype(w.dtype, dtype))


def ascend(
    value_fn: Closure,
    perturbation: optax.GradientTransformationExtraArgs,
    g: Any,
    state: Any,
    params: Any,
    /,
    **keywords: Any,
) -> tuple[Any, Any, Any]:
    """Compute the perturbation that climbs `value_fn`, whose gradient is `g`.

    Returns the perturbation ε, the ascent gradient g_a, and the new state of the perturbation.
    If devices climb separately, each device climbs its own gradient. The state is updated with the
    mean gradient `g`, so that it stays equal on all devices.
    """
    perturb = partial(perturbation.update, **keywords | {"value_fn": value_fn})
    ascent_grad = value_fn.own_gradient(g)
    eps, new_state = perturb(ascent_grad, state, params)
    if ascent_grad is not g:
        _, new_state = perturb(g, state, params)
    return eps, ascent_grad, new_state


def climb_further(
    value_fn: Closure,
    perturbation: optax.GradientTransformationExtraArgs,
    state: Any,
    params: Any,
    eps: Any,
    /,
    *,
    steps: int,
    perturb_dtype: Any,
    **keywords: Any,
) -> Any:
    """Return the perturbation after the climbs 2, ..., `steps`; each starts where the last ended.

    Every climb uses the same state of the perturbation. Each takes one gradient.
    """
    perturb = partial(perturbation.update, value_fn=value_fn, **keywords)

    def climb(_, eps):
        _, g_i = value_and_grad_at(value_fn.ascent, params, eps, perturb_dtype=perturb_dtype)
        step, _ = perturb(g_i, state, perturbed(params, eps, perturb_dtype))
        return optax.tree.add(eps, step)

    return fast_convolutions(jax.lax.fori_loop)(1, steps, climb, eps) if steps > 1 else eps


def evaluate_at(
    value_fn: Closure, params: Any, eps: Any, *, perturb_dtype: Any
) -> tuple[jax.Array, Any, Any]:
    """Evaluate the loss and its gradient at `w + ε` once, to climb on from there.

    Returns:
        `(loss, g, own_g)`. If devices climb separately, `g` is the mean of their gradients `own_g`.
        Otherwise both are the same.
    """
    loss, own_g = value_and_grad_at(value_fn.ascent, params, eps, perturb_dtype=perturb_dtype)
    return value_fn.mean_of_ascents(loss), climbed_from(value_fn, own_g)[0], own_g


def climbed_from(value_fn: Closure, own_g: Any) -> tuple[Any, Closure]:
    """Return the mean gradient and the closure for `ascend`, given what this device climbs."""
    if not value_fn.evaluation.devices.local_axes:
        return own_g, value_fn
    g = jax.tree.map(value_fn.mean_of_ascents, own_g)
    return g, replace(value_fn, ascent_grad=own_g)


def sharp_gradient(
    value_fn: Closure,
    params: Any,
    eps: Any,
    last_readings: Readings,
    *,
    loss: Any,
    g: Any,
    ball: Any,
    gradients: Any = 2,
    perturb_dtype: Any,
    has_aux: bool = False,
) -> Any:
    """Compute the gradient at `params + eps`, and the readings of the step.

    Args:
        value_fn: The loss.
        params: The parameters w.
        eps: The perturbation ε.
        last_readings: The readings of the previous step.
        loss: The loss at w.
        g: The ascent gradient.
        ball: The perturbation's state after the step; gradients of its own are counted too.
        gradients: Cost of the step without those, in gradients; default 2.
        perturb_dtype: As in `value_and_grad_at`.
        has_aux: Whether to return the aux of the pass at w + ε too.

    Returns:
        `(g_s, readings)`; with `has_aux`, `(g_s, readings, aux)`.
    """
    (sharp_loss, aux), g_s = value_and_grad_at(
        value_fn, params, eps, has_aux=True, perturb_dtype=perturb_dtype
    )
    readings = take_readings(
        last_readings,
        loss=loss,
        sharp_loss=sharp_loss,
        g=g,
        g_s=g_s,
        params=params,
        point=partial(perturbed, params, eps, perturb_dtype),
        gradients=gradients,
        ball=ball,
        mean_of_ascents=value_fn.mean_of_ascents,
    )
    return (g_s, readings, aux) if has_aux else (g_s, readings)
