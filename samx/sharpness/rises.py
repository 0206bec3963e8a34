"""How much higher the loss is at another point, and the step that a perturbation takes there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from samx.core import tree
from samx.core.transformation import as_transformation
from samx.sharpness.coordinates import Coordinates, Vector
from samx.sharpness.objective import Objective, padded


def rise_from(name: str, f: Objective, space: Coordinates) -> Callable[[Vector], jax.Array]:
    """Return the function from a point x to the rise of the loss, `L(x) − L(w)`.

    The losses of examples are subtracted one by one, and their differences averaged. In float32 the
    difference of two means would have a rounding error about ten times as large.
    """
    if f.value_fn is not None:
        loss = f.closure(name).compose(space.point)
        start = loss(space.start)
        return lambda x: loss(x) - start
    losses_fn = f.losses(name)
    losses_at = losses_fn.compose(space.point)
    batch, weights = padded(f.batch, f.weights, f.num_batches)
    start = losses_at.scores(space.start, batch)

    def rises(x, data):
        batch, start = data
        return tree.widen(losses_at(x, batch)) - start

    pairs = replace(f, batch=(batch, start), weights=weights)
    return pairs.mean(replace(losses_fn, fn=rises))


def climb_with(
    name: str, f: Objective, space: Coordinates, perturbation: Any
) -> Callable[[Vector, Vector], Vector]:
    """Return the function from a point and the gradient there to ε, the first step of training."""
    perturbation = as_transformation(name, "perturbation", perturbation)
    keywords = f.keywords(name)

    def climb(x, g):
        params, grad = space.point(x), space.vector(g)
        eps, _ = perturbation.update(grad, perturbation.init(params), params, grad=grad, **keywords)
        return space.of("perturbation(g)", eps)

    return climb
