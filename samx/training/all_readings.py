"""Ask for the readings that cost memory traffic."""

from typing import Any

import jax
import optax

from samx.core.aliases import Transformation
from samx.core.readings import is_readings, with_request
from samx.core.transformation import as_transformation, checked_transformation


def all_readings(tx: optax.GradientTransformation) -> Transformation:
    """Take all readings of a variant, also those that read every parameter again.

        sharp_grad_norm   = ‖g_s‖
        perturbation_norm = ‖(w + ε) − w‖
        cosine            = ⟨(w + ε) − w, g_s⟩ / (‖(w + ε) − w‖ ‖g_s‖)

    Without it a state holds only the readings that a step computes anyway, see `samx.Readings`.

    Args:
        tx: A sharpness-aware transformation, or an optimizer that contains some.

    Returns:
        `tx`, whose states hold all readings. The steps are the same.

    Raises:
        TypeError: If `tx` is not a transformation.
        ValueError: In `init`, if no state inside `tx` has readings.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.all_readings(optax.chain(samx.sam(rho=0.1), optax.sgd(0.5)))
        >>> w, loss = jnp.array([3.0, 4.0]), lambda w: 0.5 * w @ w
        >>> _, state = tx.update(w, tx.init(w), w, value=loss(w), value_fn=loss)
        >>> names = "perturbation_norm", "sharp_grad_norm", "cosine"
        >>> [round(float(optax.tree.get(state, name)), 3) for name in names]
        [0.1, 5.1, 1.0]

    References:
        None; the readings are those of `samx.Readings`.

    Notes:
        The request is in the state that `init` returns; `update` is that of `tx`. Cost: in copies P
        of the parameters, about 8 P of memory traffic per sharp step, where a step of SAM with a
        small batch has about 16 P, and up to one more P of memory.
    """
    inner = as_transformation("all_readings", "tx", tx)

    def init_fn(params):
        state = inner.init(params)
        nodes, structure = jax.tree.flatten(state, is_leaf=is_readings)
        if not any(map(is_readings, nodes)):
            raise ValueError(
                "all_readings: `tx` must contain a sharpness-aware transformation, such as "
                f"samx.sam(0.05), got one without readings in its state, a {type(state).__name__}"
            )
        return structure.unflatten(_requested(node) for node in nodes)

    return checked_transformation("all_readings", init_fn, inner.update)


def _requested(node: Any) -> Any:
    return with_request(node) if is_readings(node) else node
