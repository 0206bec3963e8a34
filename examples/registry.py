"""Every variant by name, for the examples: how to build it, and which radii to choose from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import samx


class Variant(NamedTuple):
    """A row of the examples' tables.

    Attributes:
        make: `(rho, base, batch_like) -> tx`.
        radii: Values of rho to choose from on a validation split, ascending.
        gradients: Gradients per step, in passes over one batch.
    """

    make: Callable[[Any, optax.GradientTransformation, Any], optax.GradientTransformation]
    radii: tuple[float, ...]
    gradients: float


VARIANTS = {
    "base": Variant(lambda rho, base, batch: base, (0.0,), 1),
    "sam": Variant(
        lambda rho, base, batch: optax.chain(samx.sam(rho), base), (0.1, 0.2, 0.5, 1.0), 2
    ),
    "asam": Variant(
        lambda rho, base, batch: optax.chain(samx.asam(rho), base), (0.5, 1.0, 2.0, 4.0), 2
    ),
    "sampa": Variant(
        lambda rho, base, batch: samx.sampa(base, rho, batch_like=batch), (0.1, 0.2, 0.5, 1.0), 2
    ),
}

BASES = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adamw": optax.adamw,
}
