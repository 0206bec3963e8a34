"""The worst case: the largest rise of the loss in a ball. Public in `samx.sharpness`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import as_count
from samx.sharpness.coordinates import Coordinates, Vector, normal
from samx.sharpness.estimates import random_key
from samx.sharpness.objective import as_objective
from samx.sharpness.rises import climb_with, rise_from

MOMENTUM = 0.7  # with 0 an ascent takes up to four times as many steps
LEAST_GAIN = 1e-7  # relative to the rise; an ascent whose next step would gain less is done


class WorstCase(NamedTuple):
    """The best maximum that was found in a ball, a lower bound of the largest rise.

    Attributes:
        value: The rise of the loss there, the best of all restarts; at least 0.
        perturbation: The step ε to it, a tree like the parameters, in float32 or wider.
        per_restart: The rises that the restarts reached, `[restarts]`.
        stationarity: 1 − ⟨g, ε⟩ / ⟨g, ball(g)⟩ of this step, where g is the gradient at w + ε. It
            is 0 at a maximum on the edge of the ball; for L2 balls it is 1 − cos(g, ε), in the
            coordinates of the metric. At a maximum inside of the ball, where g is rounding error,
            it says nothing.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> ball = samx.perturbations.metric_ball(0.5)
        >>> found = samx.sharpness.worst_case(lambda w: w @ w, jnp.array([1.0, 0.0]), ball)
        >>> [round(float(x), 3) for x in found.perturbation]
        [0.5, 0.0]
    """

    value: jax.Array
    perturbation: Any
    per_restart: jax.Array
    stationarity: jax.Array


def worst_case(
    f: Any,
    params: Any,
    perturbation: optax.GradientTransformation,
    *,
    steps: int = 100,
    restarts: int = 16,
    key: int | jax.Array = 0,
) -> WorstCase:
    """Search for the largest rise of the loss in a ball around the parameters.

        max L(w + ε) − L(w)   over ε in the ball

    Every restart gives a lower bound, and so does the best of them: an ascent ends in a local
    maximum. On a small tanh network with an L2 ball of radius 0.5, only 40% of the ascents reach
    the best one. Look at `per_restart`: if a single restart reached the best value, take more.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`; over all its examples.
            The average of the maxima of batches is another measure, m-sharpness: it is larger.
        params: The parameters w, any pytree.
        perturbation: The ball, as a perturbation of training: `samx.perturbations.metric_ball`,
            `linf_ball`, `mup_ball`, `on_leaves` of one of them, or your own `ball(rho, climb)`. It
            must return the ε of the ball with the largest ⟨g, ε⟩. This cannot be checked. Steps
            that depend on the length of g, as those of `unnormalized_step` and `monge_ball`, give
            numbers without a meaning, and a `stationarity` that is not near 0. The metric is that
            at w. Schedules are at step 0, and masks are those of a new state.
        steps: The largest number of gradients of one ascent; default 100.
        restarts: The number of ascents; default 16. The first one starts with SAM's own step, and
            the others in random directions, at the edge of the ball.
        key: Seed or random key of the directions; default 0.

    Returns:
        A `WorstCase`. Its value is at least 0, and at least `samx.sharpness.first_order` of the
        same ball (up to rounding). A restart that starts where the loss is not a number has the
        value NaN, and counts for nothing; if all do, the value is NaN.

    Raises:
        ValueError: If `steps` or `restarts` is below 1, or `perturbation` takes gradients at a
            perturbed point itself.
        TypeError: If `f` is not a function, `params` hold something other than arrays,
            `perturbation` is not an optax transformation, or an argument has a wrong type.

    Example:
        The adaptive worst case, which does not see the scale of ReLU layers:

        >>> import jax.numpy as jnp, samx
        >>> from samx.perturbations import magnitude, metric_ball
        >>> ball = metric_ball(0.5, magnitude(0.0, is_scaled=lambda path, leaf: True))
        >>> w = {"a": jnp.array([4.0]), "b": jnp.array([0.5])}
        >>> for c in (1.0, 10.0):
        ...     scaled = {"a": w["a"] * c, "b": w["b"] / c}
        ...     found = samx.sharpness.worst_case(lambda w: w["a"] @ w["b"], scaled, ball)
        ...     print(round(float(found.value), 4))
        1.6642
        1.6642

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, equation 1, of which SAM takes
        one step. Measured so by Andriushchenko et al., "A Modern Look at the Relationship between
        Sharpness and Generalization", ICML 2023, https://arxiv.org/abs/2302.07011, whose code for
        adaptive balls projects in other coordinates than it climbs in, and stays below the maximum.
        The ascent: Frank and Wolfe, 1956; Journée et al., "Generalized Power Method for Sparse
        Principal Component Analysis", JMLR 2010, https://arxiv.org/abs/0811.4724 (full steps); Xu
        et al., "Accelerated Stochastic Power Iteration", AISTATS 2018,
        https://arxiv.org/abs/1707.02670 (the momentum).

    Notes:
        One ascent, with m = 0.7 while full steps (γ = 1) succeed, else m = 0:

            a_{k+1} = g_k + m (g_k − a_{k−1})           g_k = ∇L(w + ε_k)
            ε_{k+1} = (1 − γ) ε_k + γ ball(a_{k+1})

        A step that does not climb is not taken. Each γ is the one that the slopes at both ends of
        the last step ask for, and at most half of one that failed. All points are convex
        combinations of points of the ball. Nothing divides by the metric, so weights of zero do no
        harm. An ascent ends when its next step would gain less than 1e-7 of the rise, to first
        order.

        Cost: at most 1 + restarts · steps gradients, mostly far less: on the small network an
        ascent takes 4 to 30. It takes most steps where the maximum is inside of a face of a cube;
        there it comes near, but slowly. Memory: a gradient, and about ten copies of the parameters;
        restarts run one after the other. There is no reverse-mode derivative.
    """
    name = "worst_case"
    steps, restarts = as_count("steps", steps), as_count("restarts", restarts)
    found, space, start = as_objective(name, f), Coordinates(name, params), random_key(key)
    ball = partial(climb_with(name, found, space, perturbation), space.start)
    rise_and_gradient = jax.value_and_grad(rise_from(name, found, space))

    def measure(eps: Vector) -> _Point:
        value, g = rise_and_gradient(jax.tree.map(jnp.add, space.start, eps))
        best = ball(g)
        gap = tree.dot(g, tree.subtract(best, eps))
        return _Point(eps, tree.widen(value), g, tree.dot(g, best), gap)

    center = measure(jax.tree.map(jnp.zeros_like, space.start))

    def restart(best, i):
        noise = space.random(jax.random.fold_in(start, i), normal)
        top = _ascend(measure, ball, center, tree.where(i == 0, center.g, noise), steps)
        new = top.eps, top.value, top.stationarity
        return tree.where(top.value > best[1], new, best), top.value

    (eps, value, stationarity), per_restart = fast_convolutions(jax.lax.scan)(
        restart,
        (center.eps, center.value, center.stationarity),
        jnp.arange(restarts, dtype=jnp.int32),
    )
    value = jnp.where(jnp.all(jnp.isnan(per_restart)), jnp.nan, value).astype(value.dtype)
    return WorstCase(value, space.vector(eps), per_restart, stationarity)


class _Point(NamedTuple):
    """A perturbation ε, and the loss at w + ε.

    Attributes:
        eps: The perturbation.
        value: The rise of the loss.
        g: The gradient there.
        norm: ⟨g, ball(g)⟩, the radius times the dual norm of g.
        gap: ⟨g, ball(g) − ε⟩, by how much the loss could still rise if it were linear.
    """

    eps: Vector
    value: jax.Array
    g: Vector
    norm: jax.Array
    gap: jax.Array

    @property
    def stationarity(self) -> jax.Array:
        return tree.ratio(self.gap, self.norm)


class _Ascent(NamedTuple):
    """An ascent on its way.

    Attributes:
        point: The best point so far.
        dual: The a of the last step to it.
        aim: The a of the next step.
        stride: The step size γ.
        has_momentum: Whether `aim` has momentum.
        count: The number of points measured.
    """

    point: _Point
    dual: Vector
    aim: Vector
    stride: jax.Array
    has_momentum: jax.Array
    count: jax.Array


def _ascend(
    measure: Callable[[Vector], _Point],
    ball: Callable[[Vector], Vector],
    center: _Point,
    direction: Vector,
    steps: int,
) -> _Point:
    """Climb from the edge of the ball in this direction; return the best point."""

    def is_going(now: _Ascent) -> jax.Array:
        here = now.point
        could_gain = now.stride * here.gap > LEAST_GAIN * jnp.maximum(here.norm, here.value)
        return (now.count == 0) | (could_gain & (now.count < steps))

    def step(now: _Ascent) -> _Ascent:
        here, end = now.point, ball(now.aim)
        there = measure(tree.on_line(here.eps, end, now.stride))
        is_up = (there.value > here.value) | (now.count == 0)
        point = tree.where(is_up, there, here)
        stride = _next_stride(now, is_up, there.g, tree.subtract(end, here.eps))
        has_momentum = is_up & (stride == 1) & (now.count > 1)  # the first aim is no gradient
        momentum = jnp.where(has_momentum, MOMENTUM, 0).astype(stride.dtype)
        aim = tree.add_scaled(point.g, momentum, tree.subtract(point.g, now.dual))
        dual = tree.where(is_up, now.aim, now.dual)
        return _Ascent(point, dual, aim, stride, has_momentum, now.count + 1)

    full, no = jnp.ones_like(center.norm), jnp.zeros_like(center.norm, bool)
    start = _Ascent(center, direction, direction, full, no, jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(is_going, step, start).point


def _next_stride(now: _Ascent, is_up: jax.Array, new_g: Vector, move: Vector) -> jax.Array:
    """Return the step to the top of the parabola with the slopes at both ends of this step.

    After a step with momentum that did not climb, try the same length without.
    """
    slope, new_slope = tree.dot(now.point.g, move), tree.dot(new_g, move)
    is_bent = new_slope < slope
    top = jnp.where(is_bent, now.stride * tree.ratio(slope, slope - new_slope), 1)
    shorter = jnp.where(now.has_momentum, now.stride, jnp.minimum(top, now.stride / 2))
    return jnp.clip(jnp.where(is_up, top, shorter), now.stride / 10, 1)
