"""Every variant by name, for the examples: how to build it, and which radii to choose from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import samx


class Variant(NamedTuple):
    """A row of the examples' tables.

    Attributes:
        make: `(rho, base, batch_like, aux_like) -> tx`; the last two are the shapes of a batch and
            of the aux of the loss, for variants that hold one in their state.
        radii: Values of rho to choose from on a validation split, ascending.
        gradients: Gradients per step, in passes over one batch.
        rho: The paper's recommendation for CIFAR-10.
        keeps_aux: Whether the state holds the aux of a pass, for want of a clean one.
    """

    make: Callable[[Any, optax.GradientTransformation, Any, Any], optax.GradientTransformation]
    radii: tuple[float, ...]
    gradients: float
    rho: float
    keeps_aux: bool = False


VARIANTS = {
    "base": Variant(lambda rho, base, batch, aux: base, (0.0,), 1, 0.0),
    "sam": Variant(
        lambda rho, base, batch, aux: optax.chain(samx.sam(rho), base),
        (0.1, 0.2, 0.5, 1.0),
        2,
        0.05,
    ),
    "asam": Variant(
        lambda rho, base, batch, aux: optax.chain(samx.asam(rho), base),
        (0.5, 1.0, 2.0, 4.0),
        2,
        0.5,
    ),
    "sampa": Variant(
        lambda rho, base, batch, aux: samx.sampa(base, rho, batch_like=batch, aux_like=aux),
        (0.1, 0.2, 0.5, 1.0),
        2,
        0.1,
        keeps_aux=True,
    ),
    "sampa-separate": Variant(  # the same numbers; on the CPU faster
        lambda rho, base, batch, aux: samx.sampa(
            base, rho, batch_like=batch, aux_like=aux, gradients="separate"
        ),
        (0.1, 0.2, 0.5, 1.0),
        2,
        0.1,
        keeps_aux=True,
    ),
}

BASES = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adamw": optax.adamw,
}
