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
    stack = jax.tree.map(lambda *x: jnp.stack(x), *directions.values())
    found = jax.jit(jax.vmap(lambda d: sharpness.directional(f, w, d)))(stack)
    wanted = [REFERENCE[f"net/directional_sharpness/{name}"] for name in directions]
    np.testing.assert_allclose(found, wanted, rtol=1e-11)
    along_w = sharpness.directional(f, w, w, operator="ggn")
    fisher_rao = along_w * optax.tree.vdot(w, w)
    np.testing.assert_allclose(fisher_rao, REFERENCE["net/fisher_rao"], rtol=1e-11)


@pytest.mark.parametrize("name", ["psd", "indefinite"])
def test_the_curvature_of_a_quadratic(name):
    f, w, _, _ = quadratic(name)
    for key, direction in (("gradient", jax.grad(f)(w)), ("w", w)):
        found = sharpness.directional(f, w, direction)
        wanted = REFERENCE[f"quad/{name}/directional/{key}"]
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    zeros = jax.tree.map(jnp.zeros_like, w)
    assert sharpness.directional(f, w, zeros) == 0


FACTORS = (1.0, -2.0, 3.0, -4.0, 5.0)


def test_the_recorded_alignment_with_eigenvectors():
    """Of the gradient, by value; neither lengths nor signs matter."""
    vectors = net_tree(REFERENCE["net/hessian/top5_vectors"])
    g = net_tree(REFERENCE["net/grad"])
    longer = jax.vmap(lambda c, v: jax.tree.map(lambda x: c * x, v))(jnp.array(FACTORS), vectors)
    found = jnp.cumsum(sharpness.alignment(longer, g))
    wanted = REFERENCE["net/gradient_alignment/cumulative_1_5_10_20"]
    np.testing.assert_allclose(found[jnp.array([0, 4])], wanted[:2], rtol=1e-8)


def test_alignment_with_an_orthogonal_basis_sums_to_one():
    g = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(-3.0), "n": jnp.array(5)}
    basis = 3 * jnp.linalg.qr(jnp.array([[1.0, 2, 0], [0, -1, 1], [5, 1, 1]]))[0]
    vectors = {"a": basis[:, :2], "b": basis[:, 2], "n": jnp.zeros(3, int)}
    found = sharpness.alignment(vectors, g)
    np.testing.assert_allclose(found, (basis @ jnp.array([1.0, 2, -3]) / 3) ** 2 / 14)
    np.testing.assert_allclose(jnp.sum(found), 1)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lengths_do_not_matter_in_float32(scale):
    """Squares would leave the range of float32. A zero vector has no direction: 0, not NaN."""
    g, d = jnp.array([3e-20, 4e-20], jnp.float32), jnp.array([scale, -scale], jnp.float32)
    found = sharpness.alignment(jnp.stack([d, 0 * d]), g)
    np.testing.assert_allclose(found, [0.02, 0], rtol=1e-6)
    np.testing.assert_array_equal(sharpness.alignment(d[None], 0 * g), [0])
    curvature = sharpness.directional(lambda w: w[0] ** 2 + 2 * w[1] ** 2, 0 * d, d)
    assert curvature.dtype == jnp.float32
    np.testing.assert_allclose(curvature, 3, rtol=1e-6)


def test_complex_and_half_precision_leaves():
    """A complex number is two real ones; gradients are conjugated, as `update` takes them."""
    w = {"z": jnp.array(1.0 + 2.0j, jnp.complex64), "h": jnp.array(1.0, jnp.bfloat16)}

    def loss(w):
        return w["z"].real ** 2 + 3 * w["z"].imag ** 2 + 0.5 * w["h"].astype(jnp.float32) ** 2

    d = {"z": jnp.array(1.0 + 1.0j), "h": jnp.array(0.0)}
    np.testing.assert_allclose(sharpness.directional(loss, w, d), (2 + 6) / 2, rtol=1e-6)
    g = jax.tree.map(jnp.conj, jax.grad(loss)(w))  # (2 + 12i, 1)
    vectors = {"z": jnp.array([1.0 + 0j, 1.0j, 0]), "h": jnp.array([0.0, 0.0, 1.0])}
    found = sharpness.alignment(vectors, g)
    np.testing.assert_allclose(found, np.array([4, 144, 1]) / 149, rtol=1e-6)


def is_leaf(name):
    return lambda path, leaf: path[-1].key == name


@pytest.mark.parametrize(("name", "normalized"), [("W1", 1.57184516), ("W2", 0.43360880)])
def test_the_recorded_relative_flatness(name, normalized):
    """The paper's, and divided by the number of inputs; random draws agree."""
    f, w = net_loss(num_batches=7), net_params()

    @jax.jit
    def measures():
        exact = sharpness.relative_flatness(f, w, is_leaf(name))
        drawn = sharpness.relative_flatness(f, w, is_leaf(name), draws=300, key=1)
        return exact, drawn

    exact, drawn = measures()
    np.testing.assert_allclose(exact.mean, REFERENCE[f"net/relative_flatness/{name}"], rtol=1e-11)
    assert exact.stderr == 0
    assert abs(drawn.mean - exact.mean) < 3 * drawn.stderr
    assert 0 < drawn.stderr < 0.03 * exact.mean
    found = sharpness.relative_flatness(f, w, is_leaf(name), normalize=True)
    np.testing.assert_allclose(found.mean, normalized, rtol=2e-8)


def conv_loss(kernel):
    """A loss of the kernel of a convolution, [2, 1, in, out], with a dense Hessian."""
    mix = jnp.asarray(np.random.RandomState(0).randn(kernel.size, kernel.size))
    return jnp.sum(jnp.sin(mix @ kernel.reshape(-1)))


@pytest.mark.parametrize("shape", [(2, 1, 2, 3), (2, 1, 1, 3), (3, 1)])
def test_relative_flatness_by_its_definition(shape):
    """All axes but the last are inputs; with more inputs than outputs, and with fewer."""
    kernel = jnp.asarray(np.random.RandomState(1).randn(*shape))
    params = {"a": jnp.ones(2), "kernel": kernel, "z": jnp.array(1.0 + 1.0j)}

    def loss(params):
        return conv_loss(params["kernel"]) * params["a"][0]

    matrix = kernel.reshape(-1, shape[-1])
    h = jax.hessian(conv_loss)(kernel).reshape(*matrix.shape, *matrix.shape)
    wanted = jnp.einsum("js,jt,isit->", matrix, matrix, h)

    def estimate(key):
        return sharpness.relative_flatness(loss, params, is_leaf("kernel"), draws=50, key=key)

    found = sharpness.relative_flatness(loss, params, is_leaf("kernel"))
    np.testing.assert_allclose(found.mean, wanted, rtol=1e-11)
    drawn = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 200))
    if kernel.size > 3:
        covered = np.abs(drawn.mean - wanted) < 1.96 * drawn.stderr
        assert 0.9 < np.mean(covered) < 0.99
    scaled = sharpness.relative_flatness(loss, params, is_leaf("kernel"), normalize=True)
    np.testing.assert_allclose(scaled.mean, wanted / len(matrix), rtol=1e-11)


def test_relative_flatness_in_float32():
    """The leaves before the chosen one may be of any kind."""
    kernel = jnp.asarray(np.random.RandomState(1).randn(5, 2), jnp.bfloat16)
    params = {"a": jnp.ones(2, jnp.complex64), "b": jnp.array([1, 2]), "c": kernel}

    def loss(params, wide=jnp.float32):
        return conv_loss(params["c"].astype(wide)) + jnp.sum(jnp.abs(params["a"]) ** 2)

    found = sharpness.relative_flatness(loss, params, is_leaf("c"))
    exact = sharpness.relative_flatness(
        lambda p: loss(p, jnp.float64), params | {"c": kernel.astype(float)}, is_leaf("c")
    )
    assert found.mean.dtype == jnp.float32
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-4)


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
