"""The density of eigenvalues, by quadrature. Public in `samx.sharpness`."""

from typing import Any

import jax
import jax.numpy as jnp

from samx.core.hyperparams import as_array, as_count, check_number
from samx.sharpness.estimates import Estimate, mean_over, random_key
from samx.sharpness.lanczos import lanczos
from samx.sharpness.products import Operator, product_with


def density(
    f: Any,
    params: Any,
    grid: Any,
    *,
    sigma: float | jax.Array,
    operator: Operator = "hessian",
    iterations: int = 40,
    draws: int = 10,
    key: int | jax.Array = 0,
) -> Estimate:
    """Estimate the density of the eigenvalues, smoothed by a normal distribution.

        density(t) = (1/P) Σ_i N(t; λ_i, σ²) ≈ mean over starts of Σ_j s_1j² N(t; value_j, σ²)

    where the values and the first components s_1j belong to the matrix T of `eigenvalues`.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree with P numbers.
        grid: `float[n]`, where the density is wanted, in units of the eigenvalues.
        sigma: σ > 0, the width of the smoothing in the same units.
        operator: "hessian", the default, "ggn" or "empirical_fisher", as for `eigenvalues`.
        iterations: Dimension of each space; default 40. More than P are not made.
        draws: Number of random starts, at least 2; default 10.
        key: Seed or random key of the starts; default 0.

    Returns:
        `Estimate(mean, stderr)`, each `[n]`. The integral over all numbers is 1.

    Raises:
        ValueError: If `sigma` is not above 0, `grid` is not `[n]`, `draws` is below 2, `operator`
            is unknown, or `f` lacks the logits or losses that the operator needs.
        TypeError: If `f` is not a function, `params` are not arrays, or a count is not an integer.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> grid = jnp.linspace(-1.0, 3.0, 401)
        >>> found = samx.sharpness.density(lambda w: w @ w / 2, jnp.ones(3), grid, sigma=0.1)
        >>> [round(float(x), 3) for x in (grid[found.mean.argmax()], found.mean.sum() * 0.01)]
        [1.0, 1.0]

    References:
        Ubaru, Chen, Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature", 2017;
        Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density", ICML 2019, https://arxiv.org/abs/1901.10159

    Notes:
        Cost: `iterations` products for each draw, about 2 gradients each for the Hessian, and
        `iterations` + 1 copies of the parameters in memory.
    """
    check_number("sigma", sigma, 0, excluded=0)
    iterations, count = as_count("iterations", iterations), as_count("draws", draws, 2)
    space, times = product_with("density", f, params, operator)
    grid = as_array("grid", grid, "numbers [n]").astype(space.dtype)
    if grid.ndim != 1 or not grid.size:
        raise ValueError(f"density: `grid` must have the shape [n], got {grid.shape}")
    start, size = random_key(key), min(iterations, space.size)

    def one(i):
        found, _ = lanczos(space, times, size, jax.random.fold_in(start, i))
        bells = jax.scipy.stats.norm.pdf(grid[:, None], found.values[None], sigma)
        return jnp.sum(bells * found.vectors[:1] ** 2, axis=1)

    return mean_over(count, one)
