"""The barrier between two sets of parameters. Public in `samx.sharpness`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core.hyperparams import as_count
from samx.sharpness.coordinates import Coordinates
from samx.sharpness.objective import as_objective
from samx.sharpness.slices import losses_at, scaled


class Barrier(NamedTuple):
    """The loss on the straight line between two sets of parameters.

    Attributes:
        height: How far the loss rises above the straight line between the losses at the ends.
        t: Where it rises highest, from 0 (the first parameters) to 1.
        losses: The losses on the line, `[points]`.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> def loss(w):
        ...     return (w ** 2 - 1) ** 2
        >>> found = samx.sharpness.barrier(loss, jnp.array(-1.0), jnp.array(1.0), points=3)
        >>> [x.tolist() for x in found], float(found.above_mean)
        ([1.0, 0.5, [0.0, 1.0, 0.0]], 1.0)
    """

    height: jax.Array
    t: jax.Array
    losses: jax.Array

    @property
    def above_mean(self) -> jax.Array:
        """How far the loss rises above the mean of the losses at the ends."""
        ends = self.losses[..., 0] / 2 + self.losses[..., -1] / 2
        return jnp.max(self.losses, axis=-1) - ends


def barrier(f: Any, a: Any, b: Any, *, points: int = 11) -> Barrier:
    """Measure the barrier between two sets of parameters, on the straight line between them.

        max over t of  L((1 − t) a + t b) − ((1 − t) L(a) + t L(b))

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        a: The first parameters, any pytree. Integers are those of `a` on the whole line.
        b: The second parameters, a tree like `a`.
        points: The number of points on the line, with its ends; at least 3, default 11.

    Returns:
        A `Barrier`. Its height is 0 for a convex loss, and never negative.

    Raises:
        ValueError: If `b` is not a tree like `a`, or `points` is below 3.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> found = samx.sharpness.barrier(lambda w: jnp.sum(jnp.cos(w)), jnp.zeros(1), jnp.ones(1))
        >>> round(float(found.height), 3), round(float(found.t), 1), found.losses.shape
        (0.107, 0.5, (11,))

    References:
        Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and the Lottery Ticket
        Hypothesis", ICML 2020, https://arxiv.org/abs/1912.05671 (above the mean);
        Entezari et al., "The Role of Permutation Invariance in Linear Mode Connectivity of Neural
        Networks", ICLR 2022, https://arxiv.org/abs/2110.06296 (above the line)

    Notes:
        The largest of some points is a lower bound; take more points if the line is rough. Neurons
        are not matched before. Cost: `points` forward passes, one at a time, and one copy of the
        parameters.
    """
    space = Coordinates("barrier", a, "a")
    loss = as_objective("barrier", f).closure("barrier").compose(space.point)
    end = space.of("b", b)
    count = as_count("points", points, 3)
    t = jnp.linspace(0.0, 1.0, count, dtype=space.dtype)

    def point(t):
        return [scaled(1 - t, x) + scaled(t, y) for x, y in zip(space.start, end, strict=True)]

    losses = losses_at(loss, point, t)
    t = t.astype(losses.dtype)
    above = losses - ((1 - t) * losses[0] + t * losses[-1])
    highest = jnp.argmax(above)
    return Barrier(above[highest], t[highest], losses)
