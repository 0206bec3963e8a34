"""What a training loop writes down after each step."""

from typing import Any

import jax
import optax

NAMES = ("loss", "sharp_loss", "sharpness", "grad_norm", "is_sharp")


def readings_of(opt_state: Any, value: jax.Array) -> dict[str, jax.Array]:
    """Return the readings of an optimizer's state; `value` is the loss if it keeps none.

    A variant that does not use its incoming gradient has the loss among its readings. Then nothing
    uses `value`, and the compiler drops the pass that computes it.
    """
    readings = optax.tree.get(opt_state, "readings")
    if readings is None:
        return {"loss": value}
    return {name: getattr(readings, name) for name in NAMES}
