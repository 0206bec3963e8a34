"""--monitor: the measures of sharpness that scripts take during training."""

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
    tx: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs | optax.GradientTransformation:
    """Return the optimizer with a monitor, which measures in every so many steps; 0: without one.

    The loss is that of the step: on its batch, with its dropout masks, and with BatchNorm over the
    batch. Put wrappers such as `samx.accumulate` around: then a measure needs no more memory than
    a microbatch, and float16 is scaled.
    """
    if not every:
        return tx
    number = jax.ShapeDtypeStruct((), jnp.float32)
    monitor = samx.sharpness.monitor(
        {"measured": measure}, every, values_like={"measured": dict.fromkeys(NAMES, number)}
    )
    return optax.chain(tx, monitor)


def measured(opt_state: Any, before: Any) -> dict[str, jax.Array]:
    """Return what a step measured: its numbers, and whether they are new; nothing without monitor.

    A step that float16 skipped has measured nothing, since its state is thrown away. So the states
    after and before the step tell, and not the number of the step.
    """
    last, old = (optax.tree.get(state, "monitored") for state in (opt_state, before))
    if last is None:
        return {}
    return last.values["measured"] | {"is_measured": last.at_step != old.at_step}
