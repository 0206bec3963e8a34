"""Eigenvalues, traces, moments and densities against dense matrices and exact cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from measured import REFERENCE, net_loss, net_params, net_tree, quadratic

from samx import sharpness

pytestmark = pytest.mark.usefixtures("float64")
OPERATORS = ("hessian", "ggn", "empirical_fisher")


def close(value, wanted, rtol=1e-7, atol=0.0):
    np.testing.assert_allclose(value, wanted, rtol=rtol, atol=atol)


def within_errors(estimate, wanted, most=3.0):
    mean, stderr = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in estimate)
    wanted = np.ravel(wanted)
    assert np.all(np.abs(mean - wanted) <= most * stderr + 1e-12), (mean, wanted, stderr)


@functools.cache
def spectra():
    """The five largest eigenvalues of each matrix of the net, from one compiled program."""

    def measure(params):
        return {
            operator: sharpness.eigenvalues(net_loss(), params, operator=operator, iterations=90)
            for operator in OPERATORS
        }

    return jax.jit(measure)(net_params())


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_top_eigenvalues_of_the_net(operator):
    close(spectra()[operator].values, REFERENCE[f"net/{operator}/top5"])
    assert np.all(spectra()[operator].residuals < 1e-8)


def test_the_three_matrices_are_not_confused():
    tops = [float(found.values[0]) for found in spectra().values()]
    assert np.min(np.abs(np.subtract.outer(tops, tops)) + np.eye(3)) > 0.02


def test_eigenvectors_of_the_net():
    found = spectra()["hessian"]
    flat = np.stack(
        [ravel_pytree(jax.tree.map(lambda v, i=i: v[i], found.vectors))[0] for i in range(5)]
    )
    close(np.abs(np.sum(flat * REFERENCE["net/hessian/top5_vectors"], axis=1)), np.ones(5))


def test_few_iterations_come_with_an_error_bound():
    exact = REFERENCE["net/hessian/eigenvalues"]

    @jax.jit
    def measure(params):
        return [
            sharpness.eigenvalues(net_loss(), params, which=which, k=6, iterations=12)
            for which in ("top", "bottom")
        ]

    for found in measure(net_params()):
        gaps = np.min(np.abs(found.values[:, None] - exact[None]), axis=1)
        assert np.all(gaps <= found.residuals + 1e-12)
        assert found.residuals[-1] > 1e-3  # so the bound says something


def test_bottom_and_magnitude_of_an_indefinite_matrix():
    f, params, a, _ = quadratic("indefinite")
    exact = np.linalg.eigvalsh(a)

    @jax.jit
    def measure(params):
        results = {}
        for which in ("top", "bottom", "magnitude"):
            found = sharpness.eigenvalues(f, params, k=16, which=which, iterations=40)
            one = sharpness.extreme_eigenvalue(f, params, which=which, iterations=40)
            vector = jax.tree.map(lambda v: v[0], one.vectors)
            results[which] = found, one, vector, sharpness.hvp(f, params)(vector)
        return results

    results = measure(params)
    for which, wanted in (
        ("top", exact[::-1]),
        ("bottom", exact),
        ("magnitude", exact[np.argsort(-np.abs(exact))]),
    ):
        found, one, vector, product = results[which]
        key = np.abs if which == "magnitude" else np.asarray  # of two signs, either may be first
        close(key(found.values), key(wanted), rtol=1e-10, atol=1e-12)
        close(one.values, wanted[:1], rtol=1e-10)
        assert one.residuals[0] < 1e-10
        assert_trees_close(product, optax.tree.scale(one.values[0], vector), 1e-10)


def assert_trees_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


DIAGONAL = jnp.array([3.0, 2.0, 1.0, *(0.0,) * 17])


def of_diagonal(entries):
    return lambda w: 0.5 * jnp.sum(entries.astype(w.dtype) * w**2)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_breakdown_of_a_matrix_of_low_rank(dtype):
    """A library whose Lanczos does not restart returns 9.35 and -4.28 here."""

    @jax.jit
    def measure(w):
        f = of_diagonal(DIAGONAL)
        found = sharpness.eigenvalues(f, w, k=10, iterations=10)
        return found, sharpness.eigenvalues(f, w, k=1, which="bottom")

    found, bottom = measure(jnp.ones(20, dtype))
    close(found.values, [3, 2, 1, *(0,) * 7], atol=2e-6 if dtype == "float32" else 1e-12)
    assert np.all(found.residuals < 1e-5)
    assert found.values.dtype == dtype
    close(bottom.values, 0, atol=1e-5)


@jax.jit
def spectrum_of(entries):
    f, w = of_diagonal(entries), jnp.ones(5)
    one = sharpness.extreme_eigenvalue(f, w, which="magnitude")
    return sharpness.eigenvalues(f, w, k=5, iterations=5), one


@pytest.mark.parametrize("entries", [jnp.zeros(5), jnp.ones(5), -jnp.arange(5.0)], ids=str)
def test_matrices_that_break_down_at_once(entries):
    """A zero matrix, one where every vector is an eigenvector, and one that is negative."""
    found, one = spectrum_of(entries)
    close(found.values, np.sort(entries)[::-1], atol=1e-12)
    close(one.values, entries[np.argmax(np.abs(entries))], atol=1e-12)


def test_no_copies_of_an_eigenvalue():
    """Without reorthogonalization, many iterations repeat the largest eigenvalue."""
    entries = jnp.concatenate([jnp.linspace(0, 1, 80), jnp.array([5.0])]).astype(jnp.float32)

    @jax.jit
    def measure(w):
        f = of_diagonal(entries)
        one = sharpness.extreme_eigenvalue(f, w, iterations=81)
        return sharpness.eigenvalues(f, w, k=3, iterations=81).values, one.values

    found, one = measure(jnp.ones(81, jnp.float32))
    close(found, [5, 1, 78 / 79], rtol=1e-5)
    close(one, 5, rtol=1e-5)


def test_softmax_on_fixed_features_has_a_kronecker_form():
    """One example: G = H = (diag(p) - p p') x x'."""
    x = jnp.array([[1.0, -2.0, 0.5]])
    f = sharpness.objective(
        apply_fn=lambda w, x: x @ w,
        loss_on_logits=lambda z, x: jax.nn.logsumexp(z, axis=1) - z[:, 0],
        batch=x,
    )
    w = jnp.arange(12.0).reshape(3, 4) / 7
    p = np.asarray(jax.nn.softmax(x @ w)[0])
    wanted = np.kron(x[0][:, None] * x[0][None], np.diag(p) - np.outer(p, p))

    @jax.jit
    def measure(w):
        spectra = [
            sharpness.eigenvalues(f, w, k=12, operator=operator).values
            for operator in ("hessian", "ggn")
        ]
        return spectra, sharpness.trace(f, w, operator="ggn")

    spectra, trace = measure(w)
    for found in spectra:
        close(found, np.linalg.eigvalsh(wanted)[::-1], rtol=1e-9, atol=1e-12)
    within_errors(trace, np.trace(wanted))


def test_linear_least_squares():
    """Hessian and Gauss-Newton are x'x/n; the empirical Fisher weighs by the squared residuals."""
    x = jnp.asarray(np.random.RandomState(0).randn(9, 4))
    weights = jnp.array([1.0, 2.0, 0, 1, 1, 3, 0.5, 0, 1])
    w = jnp.ones(4)
    f = sharpness.objective(
        apply_fn=lambda w, x: x @ w,
        loss_on_logits=lambda z, x: 0.5 * z**2,
        batch=x,
        weights=weights,
        num_batches=2,
    )
    shares = np.diag(weights / weights.sum())
    squares = np.diag((x @ w) ** 2)

    @jax.jit
    def measure(w):
        return {
            operator: sharpness.eigenvalues(f, w, k=4, operator=operator).values
            for operator in OPERATORS
        }

    for operator, matrix in (
        ("hessian", x.T @ shares @ x),
        ("ggn", x.T @ shares @ x),
        ("empirical_fisher", x.T @ shares @ squares @ x),
    ):
        found = measure(w)[operator]
        close(found, np.linalg.eigvalsh(matrix)[::-1], rtol=1e-10)


@pytest.mark.parametrize("operator", OPERATORS)
def test_traces_of_the_net(operator):
    measure = jax.jit(
        lambda params: (
            sharpness.trace(net_loss(), params, operator=operator, draws=400),
            sharpness.diagonal(net_loss(), params, operator=operator, draws=400),
        )
    )
    trace, diagonal = measure(net_params())
    within_errors(trace, REFERENCE[f"net/{operator}/trace"])
    within_errors(diagonal, REFERENCE[f"net/{operator}/diagonal"], most=5)  # 227 of them


def test_norm_moments_and_density_of_the_net():
    grid = REFERENCE["net/hessian/density_grid"]

    @jax.jit
    def measure(params):
        f = net_loss()
        return (
            sharpness.frobenius(f, params, draws=200),
            sharpness.moments(f, params, count=5, draws=200),
            sharpness.density(f, params, grid, sigma=0.02, iterations=50, draws=30),
        )

    frobenius, moments, density = measure(net_params())
    within_errors(frobenius, REFERENCE["net/hessian/frobenius_squared"])
    within_errors(moments, REFERENCE["net/hessian/moments"][:5])
    within_errors(density, REFERENCE["net/hessian/density_sigma0.02"], most=4)
    assert density.stderr[4] < 0.1 * density.mean[2]


def test_draws_may_be_given():
    """The signs of a 2x2 matrix have two different products: the exact trace and its error."""
    a = jnp.array([[2.0, 1.0], [1.0, 5.0]])
    draws = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    mean, stderr = sharpness.trace(lambda w: 0.5 * w @ a @ w, jnp.zeros(2), draws=draws)
    close(mean, 7)
    close(stderr, 2)  # the draws are 9 and 5
    mean, _ = sharpness.diagonal(lambda w: 0.5 * w @ a @ w, jnp.zeros(2), draws=draws)
    close(mean, [2, 5])


def test_standard_errors_cover_the_truth():
    """About 95% of 200 estimates lie within two standard errors."""
    f, params, a, _ = quadratic("indefinite")
    exact = np.linalg.eigvalsh(a)
    grid = jnp.array([0.5])

    @jax.jit
    @jax.vmap
    def measure(key):
        return (
            sharpness.trace(f, params, draws=30, key=key),
            sharpness.frobenius(f, params, draws=30, key=key),
            sharpness.density(f, params, grid, sigma=0.5, iterations=16, draws=30, key=key),
        )

    bells = np.exp(-0.5 * ((0.5 - exact) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi))
    found = measure(jax.random.split(jax.random.key(1), 200))
    for (mean, stderr), wanted in zip(found, (a.trace(), np.sum(a**2), bells.mean()), strict=True):
        covered = np.mean(np.abs(np.ravel(mean) - wanted) <= 2 * np.ravel(stderr))
        assert 0.9 <= covered <= 0.99, covered


def test_net_tree_is_in_flat_order():
    flat = jnp.arange(227.0)
    close(ravel_pytree(net_tree(flat))[0], flat)
