"""Curvature along directions, alignment with eigenvectors, relative flatness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from measured import REFERENCE, net_loss, net_params, net_tree, quadratic

from samx import sharpness

pytestmark = pytest.mark.usefixtures("float64")


def test_the_recorded_curvature_along_directions():
    """And the Fisher-Rao norm: w'Gw = |w|² times the curvature along w."""
    f, w = net_loss(num_batches=7), net_params()
    directions = {
        "gradient": net_tree(REFERENCE["net/grad"]),
        "displacement": jax.tree.map(jnp.subtract, w, problem.make()[1]),
        "random": net_tree(REFERENCE["net/direction/random"]),
    }

    @jax.jit
    def measures():
        stack = jax.tree.map(lambda *x: jnp.stack(x), *directions.values())
        along_w = sharpness.directional(f, w, w, operator="ggn")
        fisher_rao = along_w * optax.tree.vdot(w, w)
        return jax.vmap(lambda d: sharpness.directional(f, w, d))(stack), fisher_rao

    found, fisher_rao = measures()
    wanted = [REFERENCE[f"net/directional_sharpness/{name}"] for name in directions]
    np.testing.assert_allclose(found, wanted, rtol=1e-11)
    np.testing.assert_allclose(fisher_rao, REFERENCE["net/fisher_rao"], rtol=1e-11)


@pytest.mark.parametrize("name", ["psd", "indefinite"])
def test_the_curvature_of_a_quadratic(name):
    f, w, _, _ = quadratic(name)

    @jax.jit
    def measures():
        zeros = jax.tree.map(jnp.zeros_like, w)
        return [sharpness.directional(f, w, d) for d in (jax.grad(f)(w), w, zeros)]

    wanted = [REFERENCE[f"quad/{name}/directional/{key}"] for key in ("gradient", "w")]
    np.testing.assert_allclose(measures(), [*wanted, 0], rtol=1e-12)


def test_the_recorded_alignment_with_eigenvectors():
    """Of the gradient, by value; neither lengths nor signs matter."""
    vectors = REFERENCE["net/hessian/top5_vectors"] * np.array([[1.0], [-2], [3], [-4], [5]])
    g = net_tree(REFERENCE["net/grad"])
    found = np.cumsum(np.asarray(jax.jit(sharpness.alignment)(net_tree(vectors), g)))
    wanted = REFERENCE["net/gradient_alignment/cumulative_1_5_10_20"]
    np.testing.assert_allclose(found[[0, 4]], wanted[:2], rtol=1e-8)


@pytest.mark.slow
def test_the_alignment_with_twenty_eigenvectors_that_lanczos_found():
    f, w, g = net_loss(), net_params(), net_tree(REFERENCE["net/grad"])

    @jax.jit
    def measure(w, g):
        vectors = sharpness.eigenvalues(f, w, k=20, iterations=227).vectors
        return sharpness.alignment(vectors, g)

    found = np.cumsum(measure(w, g))[np.array([0, 4, 9, 19])]
    wanted = REFERENCE["net/gradient_alignment/cumulative_1_5_10_20"]
    np.testing.assert_allclose(found, wanted, rtol=1e-7)


def test_alignment_with_an_orthogonal_basis_sums_to_one():
    """Integers have no part in it."""
    g = {"a": np.array([1.0, 2.0]), "b": np.array(-3.0), "n": np.array(5)}
    basis = 3 * np.linalg.qr(np.array([[1.0, 2, 0], [0, -1, 1], [5, 1, 1]]))[0]
    vectors = {"a": basis[:, :2], "b": basis[:, 2], "n": np.zeros(3, int)}
    found = jax.jit(sharpness.alignment)(vectors, g)
    np.testing.assert_allclose(found, (basis @ np.array([1.0, 2, -3]) / 3) ** 2 / 14)
    np.testing.assert_allclose(np.sum(found), 1)


def test_lengths_do_not_matter_in_float32():
    """Squares would leave the range of float32. A zero vector has no direction: 0, not NaN."""

    @jax.jit
    def measures(d, g):
        zeros = sharpness.alignment(d[None], 0 * g)
        curvature = sharpness.directional(lambda w: w[0] ** 2 + 2 * w[1] ** 2, 0 * d, d)
        return sharpness.alignment(jnp.stack([d, 0 * d]), g), zeros, curvature

    for scale in (1e-30, 1e30):
        d, g = np.array([scale, -scale], np.float32), np.array([3e-20, 4e-20], np.float32)
        found, zeros, curvature = measures(d, g)
        np.testing.assert_allclose(found, [0.02, 0], rtol=1e-6)
        np.testing.assert_array_equal(zeros, [0])
        assert curvature.dtype == jnp.float32
        np.testing.assert_allclose(curvature, 3, rtol=1e-6)


def test_complex_and_half_precision_leaves():
    """A complex number is two real ones; gradients are conjugated, as `update` takes them."""
    w = {"z": jnp.array(1.0 + 2.0j, jnp.complex64), "h": jnp.array(1.0, jnp.bfloat16)}

    def loss(w):
        return w["z"].real ** 2 + 3 * w["z"].imag ** 2 + 0.5 * w["h"].astype(jnp.float32) ** 2

    @jax.jit
    def measures():
        d = {"z": jnp.array(1.0 + 1.0j), "h": jnp.array(0.0)}
        g = jax.tree.map(jnp.conj, jax.grad(loss)(w))  # (2 + 12i, 1)
        vectors = {"z": jnp.array([1.0 + 0j, 1.0j, 0]), "h": jnp.array([0.0, 0.0, 1.0])}
        return sharpness.directional(loss, w, d), sharpness.alignment(vectors, g)

    curvature, found = measures()
    np.testing.assert_allclose(curvature, (2 + 6) / 2, rtol=1e-6)
    np.testing.assert_allclose(found, np.array([4, 144, 1]) / 149, rtol=1e-6)


def is_leaf(name):
    return lambda path, leaf: path[-1].key == name


@pytest.mark.parametrize(("name", "normalized"), [("W1", 1.57184516), ("W2", 0.43360880)])
def test_the_recorded_relative_flatness(name, normalized):
    """The paper's, and divided by the number of inputs; random draws agree."""
    f, w = net_loss(num_batches=7), net_params()

    @jax.jit
    def measures():
        exact = sharpness.relative_flatness(f, w, is_leaf(name), normalize=True)
        drawn = sharpness.relative_flatness(f, w, is_leaf(name), draws=300, key=1)
        return exact, drawn, sharpness.relative_flatness(f, w, is_leaf(name))

    scaled, drawn, exact = measures()
    np.testing.assert_allclose(exact.mean, REFERENCE[f"net/relative_flatness/{name}"], rtol=1e-11)
    assert exact.stderr == 0
    assert abs(drawn.mean - exact.mean) < 3 * drawn.stderr
    assert 0 < drawn.stderr < 0.03 * exact.mean
    np.testing.assert_allclose(scaled.mean, normalized, rtol=2e-8)


def conv_loss(kernel):
    """A loss of the kernel of a convolution, [2, 1, in, out], with a dense Hessian."""
    mix = jnp.asarray(np.random.RandomState(0).randn(kernel.size, kernel.size), kernel.dtype)
    return jnp.sum(jnp.sin(mix @ kernel.reshape(-1)))


@pytest.mark.parametrize("shape", [(2, 1, 2, 3), (1, 2, 1, 3)])
def test_relative_flatness_by_its_definition(shape):
    """All axes but the last are inputs, here 4 or 2 of them, and 3 outputs."""
    kernel = jnp.asarray(np.random.RandomState(1).randn(*shape))
    params = {"a": jnp.ones(2), "c": jnp.ones(shape, complex), "kernel": kernel, "n": jnp.array(1)}

    def loss(params):
        return conv_loss(params["kernel"]) * params["a"][0]

    def estimate(key):
        how = {"draws": 50, "key": key, "normalize": True}
        return sharpness.relative_flatness(loss, params, is_leaf("kernel"), **how)

    @jax.jit
    def measures(kernel, keys):
        matrix = kernel.reshape(-1, shape[-1])
        h = jax.hessian(conv_loss)(kernel).reshape(*matrix.shape, *matrix.shape)
        wanted = jnp.einsum("js,jt,isit->", matrix, matrix, h)
        found = sharpness.relative_flatness(loss, params, is_leaf("kernel"))
        return wanted, found, jax.vmap(estimate)(keys)

    wanted, found, drawn = measures(kernel, jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(found.mean, wanted, rtol=1e-11)
    covered = np.abs(drawn.mean - wanted / (kernel.size / 3)) < 1.96 * drawn.stderr
    assert 0.9 < np.mean(covered) < 0.99


def test_relative_flatness_in_float32():
    """Of a kernel in half precision."""
    kernel = jnp.asarray(np.random.RandomState(1).randn(5, 2), jnp.bfloat16)

    @jax.jit
    def measures(kernel):
        found = sharpness.relative_flatness(conv_loss, kernel, lambda path, leaf: True)
        wide = kernel.astype(float)
        return found.mean, sharpness.relative_flatness(conv_loss, wide, lambda p, x: True).mean

    found, exact = measures(kernel)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def loss_of(w):
    return jnp.sum(w["kernel"] ** 2) + jnp.sum(w["bias"])


W = {"kernel": np.ones((2, 3)), "bias": np.ones(3)}


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (
            ValueError,
            "directional: `direction` must have the structure of `params`",
            lambda s: s.directional(loss_of, W, 1.0),
        ),
        (ValueError, "`operator` must be", lambda s: s.directional(loss_of, W, W, operator="h")),
        (
            ValueError,
            "directional: needs the logits",
            lambda s: s.directional(loss_of, W, W, operator="ggn"),
        ),
        (
            ValueError,
            r"alignment: `vectors`\['bias'\] must have the shape of `g`",
            lambda s: s.alignment({"kernel": np.ones((2, 2, 3)), "bias": np.ones((2, 2))}, W),
        ),
        (
            ValueError,
            r"alignment: `vectors`\['bias'\] must have the shape of `g`, \(3, 3\), got \(2, 3\)",
            lambda s: s.alignment({"kernel": np.ones((3, 2, 3)), "bias": np.ones((2, 3))}, W),
        ),
        (TypeError, "must be an array", lambda s: s.alignment(W, "g")),
        (
            ValueError,
            r"must choose one of the leaves of `params`.* got \[\"\['bias'\]\", \"\['kernel'\]\"\]",
            lambda s: s.relative_flatness(loss_of, W, lambda path, leaf: True),
        ),
        (
            ValueError,
            "`is_chosen` must choose one of the leaves of `params`, .* got none",
            lambda s: s.relative_flatness(loss_of, W, lambda path, leaf: False),
        ),
        (
            ValueError,
            r"got \['bias'\] with the dtype float64 and the shape \(3,\)",
            lambda s: s.relative_flatness(loss_of, W, lambda path, leaf: leaf.ndim == 1),
        ),
        (
            TypeError,
            "`is_chosen` must be a function",
            lambda s: s.relative_flatness(loss_of, W, "kernel"),
        ),
        (
            TypeError,
            "`normalize` must be True or False",
            lambda s: s.relative_flatness(loss_of, W, lambda p, x: x.ndim == 2, normalize=1),
        ),
        (
            ValueError,
            "`draws` must be at least 2",
            lambda s: s.relative_flatness(loss_of, W, lambda p, x: x.ndim == 2, draws=1),
        ),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call(sharpness)
