"""Logits without a scale. Public in `samx.sharpness`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.closures import LogitsClosure, in_two_parts
from samx.sharpness.objective import Objective, as_objective

SMALLEST_NORM = 1e-10  # of the authors' code


def normalize_logits(f: Any) -> Objective:
    """Return an objective whose logits have mean 0 and length 1, for each example.

        z ← z − mean(z),   z ← z / max(‖z‖, 1e-10)      over the last axis, the classes

    A network whose last layer is multiplied by a number has the same normalized logits. So the
    measures of two networks can be compared, however large their logits are.

    Args:
        f: `samx.sharpness.objective(apply_fn=..., loss_on_logits=..., batch=...)`.

    Returns:
        An `Objective` with the same losses on the normalized logits.

    Raises:
        ValueError: If `f` has no logits; where they are computed, if they have no axis of classes.
        TypeError: If `f` is not a loss.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> f = samx.sharpness.objective(
        ...     apply_fn=lambda w, x: x * w,
        ...     loss_on_logits=lambda z, x: -z[:, 0],
        ...     batch=jnp.array([[3.0, 1.0]]),
        ... )
        >>> f = samx.sharpness.normalize_logits(f)
        >>> [round(float(f(jnp.float32(scale))), 4) for scale in (1, 100)]
        [-0.7071, -0.7071]

    References:
        Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and
        Generalization", ICML 2023, https://arxiv.org/abs/2302.07011
        (tml-epfl/sharpness-vs-generalization).

    Notes:
        The loss is another one, and so is its gradient: measure with it, do not train with it.
        Cost: elementwise work on the logits.
    """
    found = as_objective("normalize_logits", f)
    apply_fn, loss_on_logits = found.two_parts("normalize_logits")

    def normalized(params, batch):
        logits, aux = apply_fn.with_aux(params, batch)
        return jax.tree.map(lambda z: _normalized(z) if tree.is_inexact(z) else z, logits), aux

    if found.losses_fn is None:
        return replace(found, apply_fn=normalized)
    # That of an optimizer's step, which knows its devices.
    parts = in_two_parts("normalize_logits", LogitsClosure(normalized), loss_on_logits)
    losses_fn = replace(found.losses("normalize_logits"), fn=parts.fn)
    return replace(found, apply_fn=normalized, losses_fn=losses_fn)


def _normalized(logits: Any) -> jax.Array:
    z = tree.widen(logits)
    if z.ndim < 2:
        raise ValueError(
            "normalize_logits: `apply_fn` must return logits [B, ..., classes], got the shape "
            f"{z.shape}"
        )
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    norm = tree.sqrt(jnp.sum(jnp.real(z * jnp.conj(z)), axis=-1, keepdims=True))
    return z / jnp.maximum(norm, SMALLEST_NORM)
