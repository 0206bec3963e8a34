"""Losses and their slopes along a direction."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr

from samx.core import tree
from samx.core.closures import Closure, local_loss_and_grad


def values_and_slopes(fns: Sequence[Closure], params: Any, moved: Any) -> list[Any]:
    """Return `(loss, slope)` for each closure: its loss at `params`, and its slope along `moved`.

    Both are means over the devices, which exchange no gradient for them.
    """
    return _forward(fns, params, moved) or [_backward(fn, params, moved) for fn in fns]


def _forward(fns: Sequence[Closure], params: Any, moved: Any) -> list[Any] | None:
    """Return the losses and slopes of all closures in one forward pass.

    `None` if a loss has a custom VJP, and so no forward derivative, or if nothing is traced. JAX
    raises its error for a custom VJP when it lowers the program; while tracing it leaves an
    operation of this name.
    """
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((params, moved))):
        return None
    devices = fns[0].evaluation.devices

    def losses(params):
        return [tree.widen(fn.local(params)[0]) for fn in fns]

    def along_moved():
        tangent = jax.tree.map(_as_tangent, moved, params)
        return jax.jvp(losses, (devices.pcast(params),), (devices.pcast(tangent),))

    program = jax.make_jaxpr(along_moved)()
    if _has_operation(program, "custom_lin"):
        return None
    values = eval_jaxpr(program.jaxpr, program.consts)
    pairs = zip(values[: len(fns)], values[len(fns) :], strict=True)
    return [devices.mean(x, devices.share(fn.weights)) for fn, x in zip(fns, pairs, strict=True)]


def _backward(fn: Closure, params: Any, moved: Any) -> tuple[jax.Array, jax.Array]:
    """Return the same two numbers; the slope is the product of a gradient and `moved`."""
    devices, weights = fn.evaluation.devices, fn.weights
    loss, own_g = local_loss_and_grad(fn, params)
    slope = devices.psum(tree.dot(devices.part_of_mean_grad(own_g, weights), moved))
    return devices.mean(tree.widen(loss), devices.share(weights)), slope


def _has_operation(program: Any, name: str) -> bool:
    """Return whether a jaxpr, or one inside its equations, has an operation of this name."""
    if isinstance(program, tuple | list):
        return any(_has_operation(part, name) for part in program)
    if not hasattr(program, "eqns"):  # a Jaxpr or a ClosedJaxpr
        return False
    return any(
        eqn.primitive.name == name or _has_operation([*eqn.params.values()], name)
        for eqn in program.eqns
    )


def _as_tangent(moved: jax.Array, x: jax.Array) -> Any:
    """Return a direction as JAX takes the tangent of `x`."""
    if not tree.is_inexact(x):
        return np.zeros(jnp.shape(x), jax.dtypes.float0)
    return moved.astype(jnp.result_type(x))
