"""The average case: the mean loss around the parameters. Public in `samx.sharpness`."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import check_choice, check_number
from samx.perturbations.metrics import Metric, checked_metric
from samx.sharpness.coordinates import Coordinates, Vector, normal, uniform
from samx.sharpness.estimates import Estimate, mean_over, vectors_of
from samx.sharpness.objective import as_objective
from samx.sharpness.rises import rise_from

Noise = Literal["normal", "uniform"]


def average_case(
    f: Any,
    params: Any,
    rho: float | jax.Array,
    *,
    noise: Noise = "normal",
    metric: Metric | None = None,
    draws: Any = 100,
    key: int | jax.Array = 0,
) -> Estimate:
    """Estimate by how much the loss rises on average, if every parameter moves at random.

        T = metric(w)
        E L(w + ρ T n) − L(w)          noise = "normal":   n ~ N(0, 1)
                                       noise = "uniform":  n ~ U(−1, 1)

    `rho` is the standard deviation of each coordinate (for uniform noise, the largest move), not
    the length of the whole step, which is about ρ √P for P parameters.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        rho: Radius ρ ≥ 0 of each coordinate, a number, in units of the parameters times T.
        noise: "normal" or "uniform"; default "normal".
        metric: `params -> T`, from `samx.perturbations`; default `identity()`. The adaptive measure
            of Andriushchenko et al. is `magnitude(0.0, is_scaled=lambda path, leaf: True)`.
        draws: The number of draws, at least 2; default 100. Or the draws n themselves, a tree like
            `params` with one more axis in front; then `noise` and `key` do not matter.
        key: Seed or random key of the draws; default 0.

    Returns:
        An `Estimate`: the mean rise, and its standard error.

    Raises:
        ValueError: If `rho` is negative, `noise` is neither of the two, `draws` is below 2, or a
            tree is not like `params`.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> mean, stderr = samx.sharpness.average_case(lambda w: w @ w, jnp.ones(3), 0.1, draws=400)
        >>> bool(abs(mean - 3 * 0.1**2) < 3 * stderr)
        True

    References:
        Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and
        Generalization", ICML 2023, https://arxiv.org/abs/2302.07011
        (tml-epfl/sharpness-vs-generalization).

    Notes:
        To second order it is ρ²/2 Σ T_i² H_ii, with ρ²/6 for uniform noise. The gradient adds no
        bias, but most of the standard error. With normal noise and without a metric, `smoothed`
        estimates the same mean from pairs in which the gradient cancels. Cost: one forward pass for
        each draw, one draw at a time, and one copy of the parameters.
    """
    found, space = as_objective("average_case", f), Coordinates("average_case", params)
    check_number("rho", rho, 0)
    check_choice("noise", noise, ("normal", "uniform"))
    sample = {"normal": normal, "uniform": uniform}[noise]
    count, draw = vectors_of("average_case", space, draws, key, sample)
    rise, moved = rise_from("average_case", found, space), _mover(space, metric, rho)
    return mean_over(count, lambda i: rise(moved(draw(i))))


def smoothed(
    f: Any,
    params: Any,
    sigma: float | jax.Array,
    *,
    draws: Any = 100,
    key: int | jax.Array = 0,
) -> Estimate:
    """Estimate the loss smoothed by a Gaussian, the loss that random weight noise trains on.

        E L(w + σ n) = E (L(w + σ n) + L(w − σ n)) / 2,   n ~ N(0, I)

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        sigma: Standard deviation σ ≥ 0 of each coordinate, a number.
        draws: The number of pairs, at least 2; default 100. Or the draws n themselves, a tree like
            `params` with one more axis in front; then `key` does not matter.
        key: Seed or random key of the draws; default 0.

    Returns:
        An `Estimate`: the smoothed loss, and its standard error. `samx.sharpness.average_case` is
        the smoothed loss minus the loss.

    Raises:
        ValueError: If `sigma` is negative, `draws` is below 2, or its trees are not like `params`.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> mean, stderr = samx.sharpness.smoothed(lambda w: 2 * w[0], jnp.ones(1), 0.1, draws=2)
        >>> float(mean), float(stderr)  # the noise of a linear loss cancels in every pair
        (2.0, 0.0)

    References:
        Bisla, Wang, Choromanska, "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep
        Learning Optimization Landscape", AISTATS 2022, https://arxiv.org/abs/2201.08025

    Notes:
        To second order it is L(w) + σ²/2 tr H. Antithetic pairs cancel the gradient, and every
        other odd term, in each draw. Cost: two forward passes for each draw, one at a time, and one
        copy of the parameters.
    """
    found, space = as_objective("smoothed", f), Coordinates("smoothed", params)
    check_number("sigma", sigma, 0)
    count, draw = vectors_of("smoothed", space, draws, key, normal)
    loss = found.closure("smoothed").compose(space.point)
    rise, moved = rise_from("smoothed", found, space), _mover(space, None, sigma)

    def pair(i):
        n = draw(i)
        rises = fast_convolutions(jax.lax.map)(
            lambda sign: rise(moved([sign.astype(x.dtype) * x for x in n])), jnp.array([1.0, -1.0])
        )
        return jnp.mean(rises)

    mean, stderr = mean_over(count, pair)
    return Estimate(loss(space.start).astype(mean.dtype) + mean, stderr)


def _mover(space: Coordinates, metric: Any, rho: Any) -> Callable[[Vector], Vector]:
    """Return the function from a draw n to the point `w + ρ T n`."""
    scales = checked_metric("average_case", metric)(space.point(space.start))

    def step(n, t):
        return tree.scaled(rho, n * jnp.asarray(t).astype(n.dtype)) if tree.is_inexact(n) else n

    return lambda n: space.moved(jax.tree.map(step, space.vector(n), scales))
