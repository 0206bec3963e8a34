"""Loss scaling: gradients of half-precision losses without underflow, steps without overflow."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.closures import evaluate
from samx.core.hyperparams import as_count, check_number
from samx.core.transformation import SCALAR_CLOSURES, closure_transformation
from samx.training.skip_nonfinite import SkipNonfiniteState, skip_nonfinite

SMALLEST, LARGEST = 2.0**-126, 2.0**126  # their inverses are normal float32 numbers too


class ScaleLossState(NamedTuple):
    """State of `scale_loss`.

    Attributes:
        inner: State of the wrapped optimizer, and the counts of skipped steps.
        loss_scale: float32, the scale of the next step.
        finite_steps: int32, steps taken since the last change of the scale.
    """

    inner: SkipNonfiniteState
    loss_scale: jax.Array
    finite_steps: jax.Array


def scale_loss(
    tx: optax.GradientTransformation,
    scale: float = 2.0**16,
    *,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Transformation:
    """Scale the loss dynamically around any optimizer, to train with float16 compute.

        every gradient:  ∇L = ∇(scale · L) / scale      (the backward pass runs scaled)
        updates, state′ = tx(∇L, state, w)
        if all(isfinite(updates)):  return updates, state′; every growth_interval steps in a row
                                    scale = growth_factor · scale
        else:                       return 0, state;  scale = backoff_factor · scale

    An overflow in any gradient that a step uses, clean or sharp, skips the whole step.

    Args:
        tx: The whole optimizer: sharpness-aware transformation and base together.
        scale: Initial scale > 0; default 2¹⁶. The scale always stays in [2⁻¹²⁶, 2¹²⁶].
        growth_factor: Factor ≥ 1; default 2. With both factors 1 the scale is fixed.
        backoff_factor: Factor in (0, 1]; default 0.5.
        growth_interval: Steps ≥ 1 without overflow before the scale grows; default 2000.

    Returns:
        A transformation. Losses and gradients are scaled only inside the backward passes. Readings,
        moments and the base optimizer see them unscaled. Like `accumulate`, it computes the
        gradient and `value` again, from `value_fn`: pass anything shaped like `params`, and read
        the loss with `optax.tree.get(state, "loss")`. The state counts skipped steps like the state
        of `skip_nonfinite`, and holds the `loss_scale`.

    Raises:
        ValueError: If an argument is out of its range; in `update`, if `scale_loss` is inside
            `accumulate`: put it around `accumulate`.
        TypeError: If `growth_interval` is not a Python int, or another argument is not a number.

    Example:
        float16 rounds a gradient of 1e-8 to zero:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> w, x = jnp.ones(1), jnp.full(1, 1e-4, jnp.float16)
        >>> value_fn = lambda w: 1e-4 * ((w.astype(jnp.float16) * x).sum()).astype(jnp.float32)
        >>> for tx in (samx.sam(0.05), samx.scale_loss(samx.sam(0.05))):
        ...     updates, _ = tx.update(jax.grad(value_fn)(w), tx.init(w), w, value_fn=value_fn)
        ...     print(f"{float(updates[0]):.1e}")
        0.0e+00
        1.0e-08

    References:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018,
        https://arxiv.org/abs/1710.03740. Names and defaults are those of
        `flax.training.dynamic_scale`.

    Notes:
        Use it with float32 parameters and float16 compute. Gradients of float16 parameters end in
        float16: values below 6e-8 become zero, scaled or not. A loss returned in float16 limits the
        scale to 65504. bfloat16 has the range of float32 and needs no scale: use `skip_nonfinite`,
        which `scale_loss` contains. A gradient that overflows leaves the closure as NaN. Neither a
        sign nor clipping in `tx` can hide the NaN, and `jax_debug_nans` reports it. Compute second
        derivatives inside a variant as `jax.jvp` of a gradient. Put `scale_loss` around
        `accumulate`: `data_parallel(scale_loss(accumulate(tx, K)), axis)`. Cost: that of
        `skip_nonfinite`. `static_args`: `growth_interval`.
    """
    check_number("scale", scale, SMALLEST, LARGEST)
    check_number("growth_factor", growth_factor, 1, LARGEST)
    check_number("backoff_factor", backoff_factor, SMALLEST, 1)
    growth_interval = as_count("growth_interval", growth_interval)
    inner: Any = skip_nonfinite(tx)  # optax.OptState does not declare the fields

    def init_fn(params):
        return ScaleLossState(
            inner.init(params), jnp.asarray(scale, jnp.float32), jnp.zeros((), jnp.int32)
        )

    def update_fn(_, state, params, *, value_fn, **extra):
        scaled = partial(_scaled, scale=state.loss_scale)
        if "losses_fn" in extra:
            losses_fn = extra["losses_fn"]
            if losses_fn.evaluation.num_microbatches > 1:
                raise ValueError(
                    "scale_loss: stands inside accumulate; put it around: "
                    "samx.scale_loss(samx.accumulate(tx, num_microbatches))"
                )
            extra["losses_fn"] = losses_fn.wrapped(scaled)
        extra["value_fn"] = value_fn
        for keyword in SCALAR_CLOSURES:
            if keyword in extra:
                closure = extra[keyword]
                extra[keyword] = replace(closure, fn=scaled(closure.local), ascent_grad=None)
        extra |= evaluate(extra["value_fn"], params)[0]
        updates, inner_state = inner.update(extra["grad"], state.inner, params, **extra)

        is_skipped = inner_state.skipped_in_a_row > 0
        finite_steps = jnp.where(is_skipped, 0, state.finite_steps + 1)
        has_grown = finite_steps == growth_interval
        factor = jnp.where(is_skipped, backoff_factor, jnp.where(has_grown, growth_factor, 1.0))
        loss_scale = jnp.clip(state.loss_scale * factor, SMALLEST, LARGEST)
        return updates, ScaleLossState(
            inner_state,
            loss_scale.astype(jnp.float32),
            jnp.where(has_grown, 0, finite_steps),
        )

    return closure_transformation(init_fn, update_fn, name="scale_loss")


def _scaled(fn: Callable[..., Any], scale: jax.Array) -> Callable[..., Any]:
    """Return the same `(params, ...) -> (loss, aux)` with cotangents scaled inside."""

    def with_aux(params, *args):
        loss, aux = fn(_scale_cotangent(params, 1 / scale), *args)
        return _scale_cotangent(loss, scale), aux

    return with_aux


@jax.custom_vjp
def _scale_cotangent(tree: Any, factor: jax.Array) -> Any:
    del factor
    return tree


def _scaled_or_nan(factor, c):
    if not tree.is_inexact(c):
        return c
    scaled = (tree.widen(c) * factor).astype(c.dtype)
    return jnp.where(jnp.isfinite(scaled), scaled, jnp.nan)  # sign(inf) or clip(inf) would hide it


_scale_cotangent.defvjp(
    lambda tree, factor: (tree, factor),
    lambda factor, cotangent: (jax.tree.map(partial(_scaled_or_nan, factor), cotangent), None),
)
