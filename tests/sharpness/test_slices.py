"""Slices through the loss, filter normalization, barriers between two sets of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measured import REFERENCE, net_loss, net_params, quadratic

from samx import sharpness

pytestmark = pytest.mark.usefixtures("float64")

NAMES = ("W1", "W2", "b1", "b2")
GRID = REFERENCE["net/slice/grid"]


def direction(i, kind="normalized"):
    return {name: jnp.asarray(REFERENCE[f"net/slice/direction{i}_{kind}/{name}"]) for name in NAMES}


def test_recorded_filters():
    normalize = jax.jit(lambda d: sharpness.filter_normalize(d, net_params()))
    for i in (1, 2):
        found = normalize(direction(i, "raw"))
        for name in NAMES:
            np.testing.assert_allclose(found[name], direction(i)[name], rtol=1e-14)


def test_recorded_slices():
    """On a line; on a plane with a pair of trees, and with a stack as eigenvectors are."""
    f, w, d, e = net_loss(num_batches=7), net_params(), direction(1), direction(2)
    stack = jax.tree.map(lambda *x: jnp.stack(x), d, e)

    @jax.jit
    def slices():
        line = sharpness.slice_1d(f, w, d, GRID)
        return line, *(sharpness.slice_2d(f, w, x, GRID, GRID[:4]) for x in ((d, e), stack))

    line, plane, same = slices()
    np.testing.assert_allclose(line, REFERENCE["net/slice/values_1d"], rtol=1e-13)
    np.testing.assert_allclose(plane, REFERENCE["net/slice/values_2d"][:, :4], rtol=1e-13)
    np.testing.assert_array_equal(plane, same)


def lengths(kernel, axis=-1):
    return np.linalg.norm(np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1), axis=1)


def test_filters_of_convolutions_and_other_axes():
    rng = np.random.RandomState(0)
    w = {"conv": rng.randn(2, 3, 4, 5), "scale": np.array(2.0), "n": np.arange(3)}
    w |= {"bias": np.ones(3), "zero": np.zeros((2, 2))}
    d = jax.tree.map(lambda x: rng.randn(*x.shape), w)

    @jax.jit
    def directions(d, w):
        hows = {}, {"vectors": "keep"}, {"filter_axis": 0}
        zeros = jax.tree.map(jnp.zeros_like, d)
        found = [sharpness.filter_normalize(d, w, **how) for how in hows]
        return *found, sharpness.filter_normalize(zeros, w)

    found, kept, first, zeros = directions(d, w)
    conv = np.asarray(found["conv"])
    np.testing.assert_allclose(lengths(conv), lengths(w["conv"]))
    np.testing.assert_allclose(conv / lengths(conv), d["conv"] / lengths(d["conv"]))
    np.testing.assert_allclose(lengths(np.asarray(first["conv"]), 0), lengths(w["conv"], 0))
    for name in ("scale", "bias", "zero", "n"):
        np.testing.assert_array_equal(found[name], np.zeros_like(w[name]))
        assert found[name].dtype == w[name].dtype
    np.testing.assert_array_equal(kept["bias"], d["bias"])
    np.testing.assert_array_equal(kept["scale"], d["scale"])
    assert not any(np.any(x) for x in jax.tree.leaves(zeros))


def test_filters_of_any_length_and_dtype():
    """Squares leave the range of float32; a complex filter has one length."""
    w = np.array([[3.0, 3e-25], [4.0, 4e-25]], np.complex64)
    given = {
        "f": w.real,
        "h": jnp.asarray(w.real, jnp.bfloat16),
        "z": w * np.array([[1], [1j]], w.dtype),
    }
    d = np.array([[6.0, 6e25], [8.0, 8e25]])
    found = jax.jit(sharpness.filter_normalize)(dict.fromkeys(given, d), given)
    for name, x in found.items():
        assert x.dtype == (jnp.complex64 if name == "z" else jnp.float32)
        np.testing.assert_allclose(x, w.real, rtol=4e-3, atol=1e-28)


def test_slices_in_half_precision_and_over_seeds():
    """Steps far below an ulp of bfloat16 arrive; integers stay; parameters may be batched."""

    def loss(w):
        return jnp.sum(w["x"].astype(jnp.float32)) * w["n"]

    w = {"x": jnp.ones(2, jnp.bfloat16), "n": jnp.array(2)}
    d = {"x": jnp.array([1.0, 2.0]), "n": jnp.array(0)}
    found = sharpness.slice_1d(loss, w, d, jnp.array([0.0, 2**-12]))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [4, 4 + 6 * 2**-12])

    def plane(x):
        return sharpness.slice_2d(lambda w: w[0] ** 2 + w[1], x, jnp.eye(2), [1, 2], [0.5])

    np.testing.assert_allclose(jax.vmap(plane)(jnp.eye(2)), [[[4.5], [9.5]], [[2.5], [5.5]]])


def test_a_pair_of_pairs():
    """Parameters may be a tuple of two themselves."""
    w = (jnp.array(1.0), jnp.array(2.0))
    pair = ((1.0, 0.0), (0.0, 1.0))
    stack = (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    for directions in (pair, stack, list(pair)):
        found = sharpness.slice_2d(lambda w: w[0] + 10 * w[1], w, directions, [0.0, 1.0], [3.0])
        np.testing.assert_allclose(found, [[51.0], [52.0]])


def test_the_recorded_barrier():
    f, a, b = net_loss(num_batches=7), net_params(), net_params("net_b")

    @jax.jit
    def barriers(a, b):
        return sharpness.barrier(f, a, b), sharpness.barrier(net_loss(), a, b, points=10001)

    found, dense = barriers(a, b)
    np.testing.assert_allclose(found.losses, REFERENCE["barrier/losses_11"], rtol=1e-13)
    np.testing.assert_allclose(found.height, REFERENCE["barrier/above_line_11"], rtol=1e-13)
    assert found.t == 0.5
    np.testing.assert_allclose(dense.height, REFERENCE["barrier/above_line"], rtol=1e-13)
    np.testing.assert_allclose(dense.above_mean, REFERENCE["barrier/above_mean"], rtol=1e-13)
    np.testing.assert_allclose(dense.t, REFERENCE["barrier/above_line_t"])


def test_no_barrier_in_a_convex_loss():
    """Exactly 0 at the ends of a line in a quadratic; a concave loss has a barrier."""
    f, w, _, _ = quadratic()

    @jax.jit
    def barriers():
        ends = jax.tree.map(lambda x: jnp.stack([x + 1, -x]), w)
        convex = jax.vmap(lambda end: sharpness.barrier(f, w, end, points=5))(ends)
        concave = jax.vmap(lambda end: sharpness.barrier(lambda w: -f(w), w, end))(ends)
        return convex, concave, concave.above_mean

    convex, concave, above_mean = barriers()
    np.testing.assert_array_equal(convex.height, [0, 0])
    assert np.all(concave.height > 0)
    assert np.all(above_mean >= concave.height)


def test_a_barrier_in_float32_ends_at_the_given_points():
    line = jax.jit(lambda a, b: sharpness.barrier(lambda w: w, a, b, points=4))
    a, b = np.float32(100.1), np.float32(0.001)
    np.testing.assert_array_equal(line(a, b).losses[np.array([0, 3])], [a, b])
    wave = jax.jit(lambda a, b: sharpness.barrier(lambda w: jnp.sin(10 * w), a, b, points=4))
    found = wave(np.float32(0.1), np.float32(0.7))
    t = np.linspace(0, 1, 4)
    losses = np.sin(1 + 6 * t)
    above = losses - ((1 - t) * losses[0] + t * losses[-1])
    np.testing.assert_allclose(found.height, np.max(above), rtol=1e-5)
    np.testing.assert_allclose(found.t, t[np.argmax(above)], rtol=1e-6)


def loss(w):
    return jnp.sum(w["a"] ** 2)


W = {"a": np.ones((2, 3))}


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (
            ValueError,
            r"filter_normalize: `direction`\['a'\] must have the shape of `params`",
            lambda s: s.filter_normalize({"a": np.ones(3)}, W),
        ),
        (
            ValueError,
            "`vectors` must be 'zero' or 'keep'",
            lambda s: s.filter_normalize(W, W, vectors="copy"),
        ),
        (
            ValueError,
            r"filter_normalize: `filter_axis` must be an axis .*\['a'\] has the shape \(2, 3\)",
            lambda s: s.filter_normalize(W, W, filter_axis=3),
        ),
        (TypeError, "`filter_axis` must be", lambda s: s.filter_normalize(W, W, filter_axis=1.0)),
        (
            ValueError,
            r"slice_1d: `alphas` must have the shape \[n\], got \(\)",
            lambda s: s.slice_1d(loss, W, W, 1.0),
        ),
        (TypeError, "`alphas` must be a vector", lambda s: s.slice_1d(loss, W, W, "all")),
        (
            ValueError,
            "slice_1d: `direction` must have the structure",
            lambda s: s.slice_1d(loss, W, 1.0, [1.0]),
        ),
        (
            ValueError,
            "slice_2d: `directions` must be a pair of trees",
            lambda s: s.slice_2d(loss, W, (W, W, W), [1.0], [1.0]),
        ),
        (
            ValueError,
            "slice_2d: `directions` must be two directions, got 3",
            lambda s: s.slice_2d(loss, W, {"a": np.ones((3, 2, 3))}, [1.0], [1.0]),
        ),
        (
            ValueError,
            r"slice_2d: `betas` must have the shape \[n\], got \(1, 1\)",
            lambda s: s.slice_2d(loss, W, (W, W), [1.0], [[1.0]]),
        ),
        (TypeError, "slice_2d: `f` must be a loss", lambda s: s.slice_2d(0, W, (W, W), [1], [1])),
        (
            ValueError,
            r"barrier: `b`\['a'\] must have the shape",
            lambda s: s.barrier(loss, W, {"a": np.ones(2)}),
        ),
        (ValueError, "`points` must be at least 3", lambda s: s.barrier(loss, W, W, points=2)),
        (TypeError, "barrier: `f` must be a loss", lambda s: s.barrier(None, W, W)),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call(sharpness)
