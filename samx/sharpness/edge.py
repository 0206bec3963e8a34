"""The edge of stability: the largest eigenvalue of the Hessian at which training is stable."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.hyperparams import INFINITY, as_array, check_number


def edge(
    learning_rate: float | jax.Array,
    *,
    radius: float | jax.Array,
    momentum: float | jax.Array = 0.0,
    weight: float | jax.Array = 1.0,
) -> jax.Array:
    """Return the edge of stability of sharpness-aware training, a bound on the top eigenvalue.

        λ (1 + a r λ) = 2 (1 + β) / η,   solved for λ

        r = ρ / ‖∇L(w)‖ for SAM,   r = ρ for un-normalized SAM,   r = 0 for the base

    On a quadratic loss, the gradient of a step is λ (1 + a r λ) times the distance to the minimum,
    along an eigenvector of the Hessian with eigenvalue λ. Above the edge this distance grows. In
    full-batch training the top eigenvalue often rises to the edge, and then stays there.

    Args:
        learning_rate: η > 0, that of `optax.sgd`.
        radius: r ≥ 0, how far the perturbation goes along the gradient: ε = r ∇L(w). That of SAM
            grows when the gradient gets small, so take the gradient where the eigenvalue is taken.
        momentum: β in [0, 1), that of `optax.sgd`; default 0. Nesterov's momentum has another edge.
        weight: a ≥ 0, the weight of the sharp gradient in (1 − a) g + a g_s, as in
            `samx.combinations.mix`; default 1. `samx.coupled_wsam` has a = γ / (1 − γ).

    Returns:
        λ, in float32 or wider, of the shape that the arguments have together.

    Raises:
        ValueError: If a number of Python or NumPy is out of range; arrays are not checked for it.
        TypeError: If an argument is neither a number nor an array of real numbers.

    Example:
        >>> import samx
        >>> [float(samx.sharpness.edge(0.5, radius=r)) for r in (0.0, 0.75)]
        [4.0, 1.737...]
        >>> round(1.7370 * (1 + 0.75 * 1.7370), 2)
        4.0

    References:
        Cohen, Kaur, Li, Kolter, Talwalkar, "Gradient Descent on Neural Networks Typically Occurs at
        the Edge of Stability", ICLR 2021, https://arxiv.org/abs/2103.00065; Long, Bartlett,
        "Sharpness-Aware Minimization and the Edge of Stability", JMLR 2024,
        https://arxiv.org/abs/2309.12488 (SAM without momentum); Agarwala, Dauphin, "SAM operates
        far from home", ICML 2023, https://arxiv.org/abs/2302.08692 (un-normalized SAM).

    Notes:
        The formula with momentum and weight follows from the same quadratic; it is exact there.
        The eigenvalue stays at the edge for full batches, squared error and small radii, after
        a thousand steps or more; on a small network it was then 0 to 5% above it on average.
        Mini-batches and adaptive optimizers have other edges. With cross-entropy the eigenvalue
        falls below the edge late in training. Cost: none; the gradient's norm and the eigenvalue
        cost passes.
    """
    eta = _real("learning_rate", learning_rate, 0, excluded=0)
    r, a = _real("radius", radius, 0), _real("weight", weight, 0)
    beta = _real("momentum", momentum, 0, 1, excluded=1)
    # The usual form, (√(1 + 4 a r b) − 1) / (2 a r), is 0 / 0 at r = 0.
    b = 2 * (1 + beta) / eta
    return 2 * b / (1 + jnp.sqrt(1 + 4 * a * r * b))


def _real(
    name: str, value: Any, low: float, high: float = INFINITY, *, excluded: float | None = None
) -> jax.Array:
    """Return a checked number, or an array, in float32 or wider."""
    if not isinstance(value, jax.Array | np.ndarray):
        check_number(name, value, low, high, excluded=excluded)
    return tree.widen(as_array(name, value, "a number or an array of real numbers"))
