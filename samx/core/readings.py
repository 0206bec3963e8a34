"""Readings: metrics of the last sharpness-aware step, kept in every variant's state.

A SAM that silently does nothing behaves exactly like its base optimizer. The readings show this:
the sharp loss is not above the loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.state import is_field

FORWARD = 1 / 3  # cost of a forward pass alone, in gradients, by convention
FLAGS: Any = jax.config  # it does not declare its flags
UNKNOWN = float("inf")  # a loss that was not computed; NaN would trigger jax_debug_nans


class Readings(NamedTuple):
    """Metrics of the last step, and the cost of all steps: scalars, read with `optax.tree.get`.

    What a step computes anyway is always there. The last three are `None` unless
    `samx.all_readings` asks for them, because they read every parameter several more times.

    Log `sharpness` during training: it shows whether SAM does what it should. Healthy values are
    positive. For `sam` they are about `rho * grad_norm`, the rise of a straight line, or more where
    the loss curves up. 0 or rounding error means that SAM does nothing: rho is 0, or half precision
    rounds the perturbation away. As large as the loss or larger means that rho is too large.

    Losses and norms are float32, or float64 if a parameter is float64. Squares of `g_s` are summed
    as they are: above 1.8e19 the reading `sharp_grad_norm` is infinite, and `cosine` 0. Inside
    `data_parallel`, losses are means over the devices, and norms are those of the mean gradients.
    If devices climb separately, `grad_norm`, `perturbation_norm` and `cosine` are means of the
    devices' values.

    Attributes:
        loss: Loss at the parameters: the caller's `value`, or infinity if it was not passed. A
            variant or wrapper that evaluates the loss itself reports its own.
        sharp_loss: Loss at the perturbed point, on the same examples. For `ksam`, on the chosen
            examples; their loss at the parameters is `selected_loss` in its state.
        sharpness: Rise of the loss, L(w + ε) − L(w), on the same examples. Infinite if the loss at
            the parameters is not known, and on steps without a sharp gradient.
        grad_norm: L2 norm of the gradient at the parameters, ‖g‖.
        is_sharp: Whether the last step computed a sharp gradient.
        gradients_spent: Gradients computed since `init`, in passes over one batch. The caller's
            gradient counts if the variant uses it. A gradient over half of the examples counts one
            half, a forward pass alone one third. float32, so exact up to 2²⁴.
        sharp_grad_norm: L2 norm of the sharp gradient, ‖g_s‖.
        perturbation_norm: L2 norm of the perturbation that the closure saw, ‖(w + ε) − w‖; 0 if
            half precision rounds the perturbation away.
        cosine: Cosine of the angle between that perturbation and `g_s`. If SAM's
            ball climbs `g`, it is the cosine between `g` and `g_s`. It is 0 if one of the two is
            zero.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(samx.sam(rho=0.1), optax.sgd(0.5))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value=loss(w), value_fn=loss)
        >>> readings = optax.tree.get(state, "readings")
        >>> [round(float(x), 3) for x in (readings.loss, readings.sharp_loss, readings.grad_norm)]
        [12.5, 13.005, 5.0]
        >>> round(float(optax.tree.get(state, "sharpness")), 3)
        0.505

        If one of your parameters is called "readings", the type tells them apart:

        >>> is_ours = lambda path, value: isinstance(value, samx.Readings)
        >>> readings = optax.tree.get(state, "readings", filtering=is_ours)
    """

    loss: jax.Array
    sharp_loss: jax.Array
    sharpness: jax.Array
    grad_norm: jax.Array
    is_sharp: jax.Array
    gradients_spent: jax.Array
    sharp_grad_norm: Any = None
    perturbation_norm: Any = None
    cosine: Any = None


class Monitored(NamedTuple):
    """What `samx.sharpness.monitor` measured last.

    Attributes:
        values: A dictionary from the names of the measures to their values; infinite before the
            first measurement.
        at_step: int32, the step before which they were measured, counted from 0; -1 before the
            first.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> measures = {"trace": lambda f, w: samx.sharpness.trace(f, w, draws=2).mean}
        >>> tx = optax.chain(optax.sgd(0.1), samx.sharpness.monitor(measures, every=10))
        >>> w, loss = jnp.ones(3), lambda w: w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value_fn=loss)
        >>> monitored = optax.tree.get(state, "monitored")
        >>> float(monitored.values["trace"]), int(monitored.at_step)
        (6.0, 0)
    """

    values: Any
    at_step: jax.Array


ON_REQUEST = ("sharp_grad_norm", "perturbation_norm", "cosine")


def is_readings(node: Any) -> bool:
    """Return whether a node of a state holds the readings."""
    return isinstance(node, Readings)


def without_requests(node: Any) -> Any:
    """Return readings without those on request, and every other node of a state as it is."""
    return node._replace(**dict.fromkeys(ON_REQUEST)) if is_readings(node) else node


def no_readings(params: Any) -> Readings:
    """Return the readings before the first step: losses are infinite, everything else is zero."""
    dtype = tree.real_dtype(*jax.tree.leaves(params))
    return Readings(
        *(jnp.full((), stored_number(UNKNOWN), dtype) for _ in range(3)),
        grad_norm=jnp.zeros((), dtype),
        is_sharp=jnp.zeros((), bool),
        gradients_spent=jnp.zeros((), jnp.float32),
    )


def with_request(readings: Readings) -> Readings:
    """Return the readings before the first step with those that are there on request."""
    return readings._replace(**{name: jnp.zeros_like(readings.grad_norm) for name in ON_REQUEST})


def take_readings(
    last: Readings,
    loss: Any,
    sharp_loss: Any,
    g: Any,
    g_s: Any,
    params: Any,
    point: Callable[[], Any],
    gradients: float,
    ball: Any,
    mean_of_ascents: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> Readings:
    """Return the readings of a step that took `g_s` at `point()`, at the cost of `gradients`.

    `last` says which readings are taken: those that are not `None`. `loss` is that of the same
    examples at `params`. `ball` is the perturbation's state after the step; its own gradients are
    added to the cost.
    """
    measured = dict.fromkeys(ON_REQUEST)
    if last.cosine is not None:
        measured = _measured(g_s, params, point(), mean_of_ascents)
    taken = Readings(
        loss=loss,
        sharp_loss=sharp_loss,
        sharpness=_rise(loss, sharp_loss, last.loss.dtype),
        grad_norm=mean_of_ascents(tree.norm(g)),
        is_sharp=jnp.ones((), bool),
        gradients_spent=last.gradients_spent + gradients + extra_gradients(ball),
        **measured,
    )
    return _like(last, taken)


def _measured(g_s: Any, params: Any, point: Any, mean_of_ascents: Any) -> dict[str, Any]:
    """Return the readings on request.

    The perturbation is measured as a difference from `point`, which the backward pass needs anyway.
    Keeping `g` for this purpose would cost a copy of the parameters. One shared difference would
    cost a copy too: XLA computes the norm before the sharp pass, and would keep the difference
    until the dot product after it. So the code takes two differences, of opposite sign.
    """
    moved, back = (tree.subtract(*pair) for pair in ((point, params), (params, point)))
    moved_norm, sharp_grad_norm = tree.plain_norm(back), tree.plain_norm(g_s)
    cosine = tree.ratio(tree.dot(moved, g_s), moved_norm * sharp_grad_norm)
    norm, cosine = mean_of_ascents(moved_norm), mean_of_ascents(cosine)
    return dict(zip(ON_REQUEST, (sharp_grad_norm, norm, cosine), strict=True))


def _rise(loss: Any, sharp_loss: Any, dtype: Any) -> Any:
    """Return how much the loss rises; infinity if the loss at the parameters is not known."""
    if loss is UNKNOWN:
        return UNKNOWN
    loss, sharp_loss = jnp.asarray(loss, dtype), jnp.asarray(sharp_loss, dtype)
    return jnp.where(jnp.isposinf(loss), loss, sharp_loss - loss)


def skip_readings(last: Readings, loss: Any, g: Any) -> Readings:
    """Return the readings of a step that used the gradient `g` and no sharp gradient."""
    unknown = jnp.asarray(stored_number(UNKNOWN))
    taken = jax.tree.map(jnp.zeros_like, last)._replace(
        loss=loss,
        sharp_loss=unknown,
        sharpness=unknown,
        grad_norm=tree.norm(g),
        gradients_spent=last.gradients_spent + 1,
    )
    return _like(last, taken)


def of_microbatches(last: Readings, means: Readings, gradients: Any) -> Readings:
    """Return the readings of a step, whose losses and norms are means over its microbatches."""
    spent = last.gradients_spent + gradients
    return means._replace(is_sharp=jnp.ones((), bool), gradients_spent=spent)


def with_losses(readings: Readings, loss: Any, sharp_loss: Any) -> Readings:
    """Return the readings with other losses, of the same examples at w and at w + ε."""
    sharpness = _rise(loss, sharp_loss, readings.loss.dtype)
    others = readings._replace(loss=loss, sharp_loss=sharp_loss, sharpness=sharpness)
    return _like(readings, others)


def with_loss(readings: Readings, loss: Any) -> Readings:
    """Return the readings with another loss, not of the examples of the sharp loss."""
    return _like(readings, readings._replace(loss=loss))


def _like(last: Readings, taken: Readings) -> Readings:
    return jax.tree.map(lambda new, old: jnp.asarray(stored_number(new), old.dtype), taken, last)


def stored_number(number: Any) -> Any:
    """Return the number; where `jax_debug_infs` forbids infinity, the largest float32 instead."""
    if isinstance(number, float) and number == UNKNOWN and FLAGS.jax_debug_infs:
        return float(jnp.finfo(jnp.float32).max)
    return number


def extra_gradients(state: Any) -> Any:
    """Return the gradients that a perturbation took in its last step, in passes over one batch."""
    found = optax.tree.get_all_with_path(state, "extra_gradients", filtering=is_field)
    return sum(spent for _, spent in found)
