"""Lanczos' method for symmetric products, with full reorthogonalization or with three vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.sharpness.coordinates import Coordinates, Vector, normal
from samx.sharpness.products import Product


class Tridiagonal(NamedTuple):
    """The symmetric matrix T = Qᵀ A Q, and the decomposition T = S diag(values) Sᵀ.

    Attributes:
        values: `[m]`, the eigenvalues of T, ascending: the Ritz values.
        vectors: `[m, m]`, S.
        next_beta: The length of what A adds to the space after its last vector; 0 if nothing.
    """

    values: jax.Array
    vectors: jax.Array
    next_beta: jax.Array

    @property
    def residuals(self) -> jax.Array:
        """`[m]`, ‖A x − value x‖ of each Ritz pair: an eigenvalue of A is that near."""
        return jnp.abs(self.next_beta * self.vectors[-1])


def lanczos(
    space: Coordinates, times: Product, iterations: int, key: jax.Array
) -> tuple[Tridiagonal, Vector]:
    """Return T of a Krylov space from a random start, and its orthonormal basis, `[m, ...]`.

    Every new vector is made orthogonal to all others twice. Where the space is exhausted, a random
    vector starts another one, and the matrix falls into blocks.
    """
    start, key = _random_unit(space, key, lambda x: x), jax.random.fold_in(key, 1)
    basis = [jnp.zeros((iterations, *(1,) * x.ndim), x.dtype) * x[None] for x in start]

    def step(carry, j):
        basis, v, largest = carry
        basis = [b.at[j].set(x) for b, x in zip(basis, v, strict=True)]

        def outside(x):
            return _rejected(basis, _rejected(basis, x))

        w = times(v)
        alpha = tree.dot(v, w)
        w = outside(w)
        beta, largest, is_exhausted = _length(space, w, alpha, largest)
        v = jax.lax.cond(
            is_exhausted,
            lambda: _random_unit(space, jax.random.fold_in(key, j), outside),
            lambda: _over(w, beta),
        )
        return (basis, v, largest), (alpha, jnp.where(is_exhausted, 0, beta))

    zero = jnp.zeros((), space.dtype)
    steps = jnp.arange(iterations, dtype=jnp.int32)
    (basis, *_), (alphas, betas) = _scan(step, (basis, start, zero), steps)
    return _decomposed(alphas, betas), basis


def short_lanczos(
    space: Coordinates,
    times: Product,
    iterations: int,
    key: jax.Array,
    choose: Callable[[Tridiagonal], jax.Array],
) -> tuple[jax.Array, Vector]:
    """Return a Ritz value and its unit vector, with three vectors in memory.

    `choose` returns the index of the Ritz value. The vectors are not kept: a second pass computes
    them again and adds them up. Rounding makes them lose their orthogonality, which repeats
    eigenvalues that are found already, and so changes neither the largest nor the smallest.
    """
    start, key = _random_unit(space, key, lambda x: x), jax.random.fold_in(key, 1)
    zero = jnp.zeros((), space.dtype)

    def step(carry, j):
        before, v, beta, largest = carry
        w = times(v)
        alpha = tree.dot(v, w)
        w = [
            x - alpha.astype(x.dtype) * y - beta.astype(x.dtype) * z
            for x, y, z in zip(w, v, before, strict=True)
        ]
        beta, largest, is_exhausted = _length(space, w, alpha, largest)
        after = jax.lax.cond(
            is_exhausted,
            lambda: _random_unit(space, jax.random.fold_in(key, j), lambda x: x),
            lambda: _over(w, beta),
        )
        beta = jnp.where(is_exhausted, 0, beta)
        return (v, after, beta, largest), (alpha, beta)

    first = ([jnp.zeros_like(x) for x in start], start, zero, zero)
    steps = jnp.arange(iterations, dtype=jnp.int32)
    _, numbers = _scan(step, first, steps)
    found = _decomposed(*numbers)
    chosen = choose(found)

    def add(carry, inputs):
        (lanczos_vectors, total), (j, weight) = carry, inputs
        total = [
            t + weight.astype(t.dtype) * x for t, x in zip(total, lanczos_vectors[1], strict=True)
        ]
        return (step(lanczos_vectors, j)[0], total), None

    zeros = [jnp.zeros_like(x) for x in start]
    (_, total), _ = _scan(add, (first, zeros), (steps, found.vectors[:, chosen]))
    return found.values[chosen], _over(total, tree.plain_norm(total))


def combined(basis: Vector, weights: jax.Array) -> Vector:
    """Return the sums over the basis `[m, ...]` with weights `[m, k]`, as `[k, ...]`."""
    numbers = (((0,), (0,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    return [jax.lax.dot_general(weights.astype(b.dtype), b, numbers, highest) for b in basis]


def _scan(*args: Any) -> Any:
    return fast_convolutions(jax.lax.scan)(*args)


def _decomposed(alphas: jax.Array, betas: jax.Array) -> Tridiagonal:
    beside = jnp.diag(betas[:-1], 1)
    values, vectors = jnp.linalg.eigh(jnp.diag(alphas) + beside + beside.T)
    return Tridiagonal(values, vectors, betas[-1])


def _length(
    space: Coordinates, w: Vector, alpha: jax.Array, largest: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the length of the next vector, the size of T, and whether only rounding is left."""
    beta = tree.plain_norm(w)
    largest = jnp.maximum(largest, jnp.abs(alpha) + beta)
    rounding = 10 * jnp.finfo(space.dtype).eps * space.size**0.5
    return beta, largest, beta <= rounding * largest


def _random_unit(space: Coordinates, key: jax.Array, project: Callable[[Vector], Vector]) -> Vector:
    x = project(space.random(key, normal))
    return _over(x, tree.plain_norm(x))


def _over(x: Vector, length: jax.Array) -> Vector:
    return [tree.ratio(y, length.astype(y.dtype)) for y in x]


def _rejected(basis: Vector, w: Vector) -> Vector:
    """Return the part of `w` orthogonal to the basis, whose missing vectors are zeros.

    One vector after the other: products with all of them at once would hold as much memory again.
    """

    def without(w, b):
        along = tree.dot(b, w)
        return [x - along.astype(x.dtype) * y for x, y in zip(w, b, strict=True)], None

    return _scan(without, w, basis)[0]
