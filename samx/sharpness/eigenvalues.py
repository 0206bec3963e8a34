"""Eigenvalues at the ends of a spectrum, with error bounds. Public in `samx.sharpness`."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import as_count, check_choice
from samx.sharpness.estimates import random_key
from samx.sharpness.lanczos import combined, lanczos, short_lanczos
from samx.sharpness.products import Operator, product_with

Which = Literal["top", "bottom", "magnitude"]


class Eigenvalues(NamedTuple):
    """Eigenvalues of a symmetric matrix, with unit eigenvectors and error bounds.

    Attributes:
        values: `[k]`, the eigenvalues.
        vectors: A tree like the parameters, with leading axis `k`: the eigenvectors, up to sign.
        residuals: `[k]`, ‖A v − value v‖. Up to rounding, some eigenvalue of A is no further from
            the value than this.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> found = samx.sharpness.eigenvalues(lambda w: w[0] ** 2, jnp.ones(2), k=1)
        >>> round(float(found.values[0]), 3), found.vectors.shape
        (2.0, (1, 2))
    """

    values: jax.Array
    vectors: Any
    residuals: jax.Array


def eigenvalues(
    f: Any,
    params: Any,
    *,
    k: int = 5,
    which: Which = "top",
    operator: Operator = "hessian",
    iterations: int = 20,
    key: int | jax.Array = 0,
) -> Eigenvalues:
    """Compute `k` eigenvalues at an end of the spectrum, their eigenvectors and error bounds.

        A = ∇²L(w), the Gauss-Newton matrix, or the empirical Fisher matrix
        T = Qᵀ A Q,   Q an orthonormal basis of span{v, A v, A² v, ...}     (Lanczos)
        T s = value s   gives   vector = Q s,   residual = ‖A vector − value vector‖

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree with P numbers.
        k: How many; default 5.
        which: "top", the default: the largest by value, in falling order. "bottom": the smallest
            by value, in rising order. "magnitude": the largest by absolute value.
        operator: "hessian", the default. "ggn": the generalized Gauss-Newton matrix, for
            cross-entropy the Fisher information; `f` must have logits. "empirical_fisher": the mean
            of g gᵀ over the gradients of examples with their own labels; `f` must have losses of
            examples. These are three different matrices.
        iterations: Dimension of the space, at least `k`; default 20. More than P are not made.
        key: Seed or random key of the start; default 0.

    Returns:
        `Eigenvalues`. Check `residuals`: a large one asks for more iterations.

    Raises:
        ValueError: If `k` is above P, `iterations` is below `k`, `which` or `operator` is unknown,
            or `f` lacks the logits or losses that the operator needs.
        TypeError: If `f` is not a function, `params` are not arrays, or a count is not an integer.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> loss = lambda w: 3 * w["a"] ** 2 / 2 - w["b"] ** 2 / 2
        >>> w = {"a": 1.0, "b": 1.0}
        >>> for which in ("top", "bottom"):
        ...     found = samx.sharpness.eigenvalues(loss, w, k=1, which=which)
        ...     print(round(float(found.values[0]), 3))
        3.0
        -1.0

    References:
        Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem", 1950; Parlett,
        "The Symmetric Eigenvalue Problem", 1998 (full reorthogonalization).

    Notes:
        Every new vector is made orthogonal to all others twice, so no eigenvalue appears as a
        copy of another. If the space is exhausted early, as for a matrix of low rank, it goes on
        from a random vector, and the values stay right. Of a multiple eigenvalue such a space
        shows one copy for each start. Half-precision parameters are measured in float32.
        Cost: `iterations` products of about 2 gradients each (Gauss-Newton: 1.6), see `hvp`, and
        `iterations` copies of the parameters in memory beside those of a product. On small networks
        20 iterations gave the top eigenvalue to 1e-3 and five of them to 1% of the top one. The
        bottom converges more slowly: take 40. For large models see `extreme_eigenvalue`.
    """
    check_choice("which", which, ("top", "bottom", "magnitude"))
    k, iterations = as_count("k", k), as_count("iterations", iterations)
    space, times = product_with("eigenvalues", f, params, operator)
    if k > space.size:
        raise ValueError(f"`k` must be at most {space.size}, the number of parameters, got {k}")
    if iterations < k:
        raise ValueError(f"`iterations` must be at least `k`, {k}, got {iterations}")
    found, basis = lanczos(space, times, min(iterations, space.size), random_key(key))
    order = _order(found.values, which)[:k]
    vectors = combined(basis, found.vectors[:, order])
    return Eigenvalues(found.values[order], space.vector(vectors, (k,)), found.residuals[order])


def extreme_eigenvalue(
    f: Any,
    params: Any,
    *,
    which: Which = "top",
    operator: Operator = "hessian",
    iterations: int = 20,
    key: int | jax.Array = 0,
) -> Eigenvalues:
    """Compute one eigenvalue at an end of the spectrum with a few vectors in memory.

        A, T as for `eigenvalues`; no vector of the basis is kept

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree with P numbers.
        which: "top", the default, "bottom" or "magnitude", as for `eigenvalues`.
        operator: "hessian", the default, "ggn" or "empirical_fisher", as for `eigenvalues`.
        iterations: Dimension of the space; default 20. More than P are not made.
        key: Seed or random key of the start; default 0.

    Returns:
        `Eigenvalues` with one value, one vector and one residual. The residual is measured.

    Raises:
        ValueError: If `which` or `operator` is unknown, or `f` lacks the logits or losses that the
            operator needs.
        TypeError: If `f` is not a function, `params` are not arrays, or a count is not an integer.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> found = samx.sharpness.extreme_eigenvalue(lambda w: jnp.sum(w ** 4), jnp.arange(3.0))
        >>> [round(float(x), 3) for x in found.values], found.vectors.shape
        ([48.0], (1, 3))

    References:
        Lanczos, 1950; Paige, "Accuracy and Effectiveness of the Lanczos Algorithm for the Symmetric
        Eigenproblem", 1980 (why the ends of the spectrum survive the loss of orthogonality).

    Notes:
        Two passes: the first finds the value, the second adds up the vector. Cost:
        2 `iterations` + 1 products; if only the value is used under `jit`, XLA drops the second
        pass, and `iterations` products are left. Memory does not grow with `iterations`: counted
        for a dense net of 10 million parameters, 8 copies of them in all, or 7 for the value alone;
        other models took up to 11. With 10 iterations or fewer, `eigenvalues` needs about as much.
    """
    check_choice("which", which, ("top", "bottom", "magnitude"))
    iterations = as_count("iterations", iterations)
    space, times = product_with("extreme_eigenvalue", f, params, operator)
    value, vector = short_lanczos(
        *(space, times, min(iterations, space.size), random_key(key)),
        lambda found: _order(found.values, which)[0],
    )
    residual = tree.plain_norm(
        [a - value.astype(a.dtype) * x for a, x in zip(times(vector), vector, strict=True)]
    )
    stacked = space.vector([x[None] for x in vector], (1,))
    return Eigenvalues(value[None], stacked, residual[None])


def _order(values: jax.Array, which: Which) -> jax.Array:
    """Return the indices of ascending values, the wanted ones first."""
    if which == "magnitude":
        return jnp.argsort(-jnp.abs(values))
    ascending = jnp.arange(values.size)
    return ascending if which == "bottom" else ascending[::-1]
