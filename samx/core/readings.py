"""Readings: what a sharpness-aware step saw, kept in every variant's state.

A SAM that silently does nothing looks exactly like its base optimizer. The readings make it
visible: a perturbation norm of zero, a sharp loss that is not above the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree

FORWARD = 1 / 3  # of a gradient: a forward pass without its backward pass, by convention
UNKNOWN = float("inf")  # a loss that nobody measured; NaN would trip jax_debug_nans


class Readings(NamedTuple):
    """What the last step saw, and what all steps cost: scalars, found by `optax.tree.get`.

    Losses and norms are float32, or float64 where a parameter is. Inside `data_parallel` losses are
    means over the devices and norms those of the mean gradients; where devices climb on their own,
    `grad_norm`, `perturbation_norm` and `cosine` are means of what the devices saw.

    Attributes:
        loss: Loss at the parameters, `value` of the caller; infinity if it was not passed.
        sharp_loss: Loss at the perturbed point, the same examples (`ksam`: the chosen ones, whose
            loss at the parameters is `selected_loss` of its state).
        grad_norm: L2 norm of the gradient at the parameters, ‖g‖.
        sharp_grad_norm: L2 norm of the sharp gradient, ‖g_s‖.
        perturbation_norm: L2 norm of the perturbation that the closure really saw, ‖(w + ε) − w‖:
            0 where half precision rounds it away.
        cosine: Cosine of the angle between that perturbation and `g_s`, which for an L2 ball is
            the one between `g` and `g_s`; 0 if one of them is zero.
        is_sharp: Whether the last step computed a sharp gradient.
        gradients_spent: Gradients since `init`, in passes over one batch (the caller's included,
            if the variant uses it); of half of the examples half a one, and a forward pass alone is
            a third; float32, so exact up to 2²⁴.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.sam(rho=0.1), optax.sgd(0.5))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value=loss(w), value_fn=loss)
        >>> readings = optax.tree.get(state, "readings")
        >>> [round(float(x), 3) for x in (readings.loss, readings.sharp_loss, readings.grad_norm)]
        [12.5, 13.005, 5.0]
        >>> round(float(optax.tree.get(state, "perturbation_norm")), 3)
        0.1
    """

    loss: jax.Array
    sharp_loss: jax.Array
    grad_norm: jax.Array
    sharp_grad_norm: jax.Array
    perturbation_norm: jax.Array
    cosine: jax.Array
    is_sharp: jax.Array
    gradients_spent: jax.Array


def no_readings(params: Any) -> Readings:
    """The readings before the first step: losses unknown, everything else zero."""
    dtype = tree.real_dtype(*jax.tree.leaves(params))
    return Readings(
        jnp.full((), UNKNOWN, dtype),
        jnp.full((), UNKNOWN, dtype),
        *(jnp.zeros((), dtype) for _ in range(4)),
        is_sharp=jnp.zeros((), bool),
        gradients_spent=jnp.zeros((), jnp.float32),
    )


def take_readings(
    last: Readings,
    loss: Any,
    sharp_loss: Any,
    g: Any,
    g_s: Any,
    params: Any,
    point: Any,
    gradients: float,
    mean_of_ascents: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Readings:
    """The readings of a step that took `g_s` at `point`, at the cost of `gradients`.

    The perturbation is measured from `point`, which the backward pass needs anyway: to keep `g`
    for it would cost a copy of the parameters. So would one shared difference, held from the norm,
    which XLA takes before the sharp pass, to the product behind it; of opposite sign, it is two.
    """
    moved = jax.tree.map(jnp.subtract, point, params)
    moved_norm = tree.norm(jax.tree.map(jnp.subtract, params, point))
    sharp_grad_norm = tree.norm(g_s)
    product = moved_norm * sharp_grad_norm
    cosine = tree.dot(optax.tree.conj(moved), g_s) / jnp.where(product == 0, 1, product)
    taken = Readings(
        loss=loss,
        sharp_loss=sharp_loss,
        grad_norm=mean_of_ascents(tree.norm(g)),
        sharp_grad_norm=sharp_grad_norm,
        perturbation_norm=mean_of_ascents(moved_norm),
        cosine=mean_of_ascents(cosine),
        is_sharp=jnp.ones((), bool),
        gradients_spent=last.gradients_spent + gradients,
    )
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), taken, last)


def skip_readings(last: Readings, loss: Any, g: Any) -> Readings:
    """The readings of a step that took the gradient `g` and no sharp one."""
    zero = jnp.zeros(())
    taken = Readings(
        loss=loss,
        sharp_loss=jnp.asarray(UNKNOWN),
        grad_norm=tree.norm(g),
        sharp_grad_norm=zero,
        perturbation_norm=zero,
        cosine=zero,
        is_sharp=jnp.zeros((), bool),
        gradients_spent=last.gradients_spent + 1,
    )
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), taken, last)


def extra_gradients(state: Any) -> Any:
    """Return the gradients that a perturbation took in its last step, in passes over one batch."""
    return sum(spent for _, spent in optax.tree.get_all_with_path(state, "extra_gradients"))
