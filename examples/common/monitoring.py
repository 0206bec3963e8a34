"""--monitor: the measures of sharpness that scripts take during training."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

import samx

NAMES = ("top_eigenvalue", "top_eigenvalue_error", "rise")
ITERATIONS = 10  # of Lanczos' method: 21 products with the Hessian give the value and its error
RADIUS = 0.05  # SAM's for CIFAR-10, for all variants: rises of two runs can be compared


def measure(f: Any, params: Any, radius: float = RADIUS) -> dict[str, jax.Array]:
    """Measure the sharpness of a loss.

    The cost is that of about 40 gradients. The rise at the radius and in the geometry of a variant
    costs nothing: it is the reading `sharpness`.

    Args:
        f: The loss: `samx.sharpness.objective(...)`, or what `samx.sharpness.monitor` passes.
        params: The parameters w.
        radius: The radius of the rise.

    Returns:
        "top_eigenvalue", of the Hessian; "top_eigenvalue_error", within which is an eigenvalue; and
        "rise", L(w + ε) − L(w) for a step ε of length `radius` along the gradient.
    """
    top = samx.sharpness.extreme_eigenvalue(f, params, iterations=ITERATIONS)
    rise = samx.sharpness.first_order(f, params, samx.perturbations.metric_ball(radius))
    return dict(zip(NAMES, (top.values[0], top.residuals[0], rise), strict=True))


def monitored(
    tx: optax.GradientTransformation, every: int, num_batches: int = 1
) -> optax.GradientTransformation:
    """Return the optimizer with a monitor, which measures every so many steps; 0: without one.

    The loss is that of the step: on its batch, with its dropout masks, and with BatchNorm over the
    batch. In float16 it is not scaled: products with the Hessian overflow before gradients do.

    Args:
        tx: The whole optimizer, with its wrappers.
        every: Steps between two measurements.
        num_batches: Into how many microbatches the batch is split, one after the other, as by
            `samx.accumulate`.
    """
    if not every:
        return tx

    def measure_in_batches(f, params):
        return measure(replace(f, num_batches=num_batches), params)

    number = jax.ShapeDtypeStruct((), jnp.float32)
    monitor = samx.sharpness.monitor(
        {"measured": measure_in_batches},
        every,
        values_like={"measured": dict.fromkeys(NAMES, number)},
    )
    return optax.chain(tx, monitor)


def measured(opt_state: Any, step: Any) -> dict[str, jax.Array]:
    """Return what was measured last, and whether it was in this step, counted from 0.

    Without a monitor in the state, return nothing.
    """
    last = optax.tree.get(opt_state, "monitored")
    if last is None:
        return {}
    return last.values["measured"] | {"is_measured": last.at_step == step}
