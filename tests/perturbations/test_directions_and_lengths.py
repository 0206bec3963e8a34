"""Perturbations that climb another direction than the gradient, or whose length depends on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from identities import gradient

from samx import perturbations as geometry

pytestmark = pytest.mark.usefixtures("float64")

FREE = {  # the scale of the loss does not matter
    "centralized_ball": geometry.centralized_ball(0.2),
    "centralized_ball, centralized": geometry.centralized_ball(0.2, norm="centralized"),
    "spectral_ball": geometry.spectral_ball(0.2),
    "spectral_ball, global": geometry.spectral_ball(0.2, norm="global"),
    "spectral_ball, sign": geometry.spectral_ball(0.2, vectors="sign"),
    "z_score_ball": geometry.z_score_ball(0.2, 0.5),
    "z_score_ball, global": geometry.z_score_ball(0.2, 0.5, norm="global"),
}
OTHERS = {
    "spectral_ball, zero": geometry.spectral_ball(0.2, vectors="zero"),
    "gradient_matching_step": geometry.gradient_matching_step(0.2, 0.01),
    "loss_rise_ball": geometry.loss_rise_ball(0.2, 0.1),
    "loss_rise_ball, no limit": geometry.loss_rise_ball(0.2, None),
    "partly_normalized_step": geometry.partly_normalized_step(0.2, 0.5),
}
BALLS = FREE | OTHERS
SAM = geometry.metric_ball(0.2)


@jax.jit
def steps_of(g):
    """Take the step of each along a gradient, in one program."""
    return {name: ball.update(g, ball.init(g), g)[0] for name, ball in (BALLS | {"": SAM}).items()}


def real():
    return dict(gradient()[0])


def dot(a, b):
    return float(
        sum(np.sum(np.conj(x) * y).real for x, y in zip(*map(leaves, (a, b)), strict=True))
    )


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_close(found, expected, tolerance=1e-12):
    for x, y in zip(*map(leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_they_climb_real_and_complex_gradients():
    g = real()
    turned = jax.tree.map(lambda x: x * jnp.exp(1j * jnp.arange(x.size).reshape(x.shape)), g)
    for each in (g, turned):
        for name, eps in steps_of(each).items():
            assert dot(each, eps) > 1e-3, name
            assert jax.tree.map(jnp.shape, eps) == jax.tree.map(jnp.shape, g)
            assert all(x.dtype == y.dtype for x, y in zip(leaves(eps), leaves(each), strict=True))


def test_half_precision_gradients_give_float32():
    g = jax.tree.map(lambda x: x.astype(jnp.bfloat16), real())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), g)
    found, expected = steps_of(g), steps_of(wide)
    for name, eps in found.items():
        assert all(x.dtype == np.float32 for x in leaves(eps)), name
        assert_close(eps, expected[name], 1e-5)


def test_integers_change_nothing():
    g = real()
    found = steps_of(g | {"table": jnp.arange(6).reshape(2, 3)})
    for name, eps in found.items():
        del eps["table"]
        assert_close(eps, steps_of(g)[name])


def test_a_zero_gradient_is_a_zero_step():
    zeros = jax.tree.map(jnp.zeros_like, real())
    for name, eps in steps_of(zeros).items():
        assert all((x == 0).all() for x in leaves(eps)), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("leaf", ["W1", "b1"])
def test_what_is_not_finite_shows(bad, leaf):
    g = real()
    g[leaf] = g[leaf].at[0].set(bad)
    for name, eps in steps_of(g).items():
        assert not np.isfinite(eps[leaf]).all(), name


@pytest.mark.parametrize("scale", [2.0**-660, 2.0**660])
def test_squares_out_of_range(scale):
    """They are about 1e-199 and 1e199."""
    g = real()
    usual, scaled = steps_of(g), jax.tree.map(lambda x: scale * x, g)
    for name, eps in steps_of(scaled).items():
        assert all(np.isfinite(x).all() for x in leaves(eps)), name
        if name not in OTHERS:
            assert_close(eps, usual[name], 1e-11)
    length, u = float(optax.tree.norm(g)) * scale, usual[""]
    found = steps_of(scaled)
    along = {
        "gradient_matching_step": 0.2 - 0.01 * length,
        "loss_rise_ball": min(0.2 / np.hypot(length, 1e-6), 0.1) * length / np.hypot(length, 1e-6),
        "loss_rise_ball, no limit": 0.2 / np.hypot(length, 1e-6) * length / np.hypot(length, 1e-6),
        "partly_normalized_step": 0.2 * (0.5 * length + 0.5),
    }
    for name, wanted in along.items():
        for x, y in zip(*map(leaves, (found[name], u)), strict=True):
            np.testing.assert_allclose(x, wanted / 0.2 * y, rtol=1e-10)


# ---- Filters.


def columns(x, axis=-1):
    """Return a kernel as a matrix, one column for each filter."""
    x = np.moveaxis(np.asarray(x), axis, -1)
    return x.reshape(-1, x.shape[-1])


def convolution():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 5)))


@pytest.mark.parametrize("axis", [-1, 1])
def test_convolutions_are_matrices(axis):
    """Each filter is a column: of its mean, its norm, and the matrix of the spectral norm."""
    w = {"k": convolution()}
    matrix = columns(w["k"], axis)
    centralize = geometry.centralize(filter_axis=axis)
    found = centralize.update(w, centralize.init(w))[0]["k"]
    np.testing.assert_allclose(columns(found, axis), matrix - matrix.mean(0), atol=1e-14)
    norms = geometry.filterwise(filter_axis=axis)(w)["k"]
    assert norms.shape == tuple(n if i == axis % 4 else 1 for i, n in enumerate(w["k"].shape))
    np.testing.assert_allclose(norms.ravel(), np.linalg.norm(matrix, axis=0), rtol=1e-14)
    rms = geometry.filterwise("rms", filter_axis=axis)(w)["k"]
    np.testing.assert_allclose(rms.ravel(), np.sqrt(np.mean(matrix**2, 0)), rtol=1e-14)
    ball = geometry.spectral_ball(0.3, filter_axis=axis)
    eps = columns(ball.update(w, ball.init(w), w)[0]["k"], axis)
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(eps, 0.3 * u @ v, atol=1e-13)


def test_filters_of_vectors_numbers_and_zeros():
    w = {
        "b": jnp.array([3.0, -4.0]),
        "x": jnp.array(-2.0),
        "k": jnp.array([[0.0, 1j], [0.0, 1.0]]),
        "half": jnp.full((1, 2), 256.0, jnp.bfloat16),
        "n": jnp.arange(2),
        "none": jnp.zeros((0, 2)),
        "far": jnp.array([[3e200, 3e-200], [4e200, 4e-200]]),
    }
    norms = geometry.filterwise()(w)
    rms = geometry.filterwise("rms")(w)
    assert norms["half"].dtype == jnp.float32
    expected = {
        "b": ([5.0], np.sqrt(2)),
        "x": (2.0, 1.0),
        "k": ([[0.0, np.sqrt(2)]], np.sqrt(2)),
        "half": ([[256.0, 256.0]], 1.0),
        "n": (1.0, 1.0),
        "none": ([[0.0, 0.0]], 1.0),
        "far": ([[5e200, 5e-200]], np.sqrt(2)),
    }
    for k, (norm, divisor) in expected.items():
        np.testing.assert_allclose(norms[k], norm, rtol=1e-14)
        np.testing.assert_allclose(rms[k], np.asarray(norm) / divisor, rtol=1e-14)


def test_the_ball_of_centralized_gradients_is_sams():
    """Without a mean over the inputs, both norms are the same."""
    centralize = geometry.centralize()
    g = centralize.update(real(), ())[0]
    found = steps_of(g)
    for name in ("centralized_ball", "centralized_ball, centralized"):
        assert_close(found[name], found[""], 1e-15)


# ---- The spectral norm.


def test_the_spectral_step_climbs_the_sum_of_dual_norms():
    g = real()
    nuclear = sum(np.linalg.norm(x, "nuc") if x.ndim > 1 else np.linalg.norm(x) for x in leaves(g))
    np.testing.assert_allclose(dot(g, steps_of(g)["spectral_ball"]), 0.2 * nuclear, rtol=1e-13)
    length = float(optax.tree.norm(steps_of(g)["spectral_ball, global"]))
    np.testing.assert_allclose(length, 0.2, rtol=1e-13)


def test_a_gradient_of_low_rank():
    """As of one example: the climb is the nuclear norm, and no direction is longer than ρ."""
    g = real()
    w1, w2 = np.asarray(g["W1"]), np.asarray(g["W2"])
    g |= {
        "W1": jnp.asarray(np.outer(w1[:, 0], w1[0])),
        "W2": jnp.asarray(np.outer(w2[:, 0], w2[0])),
    }
    eps = steps_of(g)["spectral_ball"]
    for k in ("W1", "W2"):
        climbed = np.sum(np.asarray(g[k]) * np.asarray(eps[k]))
        np.testing.assert_allclose(climbed, 0.2 * np.linalg.norm(g[k]), rtol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(eps[k], 2), 0.2, rtol=1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
def test_newton_schulz_moves_each_singular_value_by_its_polynomial(is_complex):
    """Muon's five steps, for tall and for wide matrices; vectors and directions stay exact."""
    g = {k: x * (1 + 0.5j * (k == "W1")) if is_complex else x for k, x in real().items()}
    ball = geometry.spectral_ball(0.2, polar="newton_schulz")
    eps = jax.jit(lambda g: ball.update(g, ball.init(g), g)[0])(g)
    for k in ("W1", "W2"):
        u, s, vh = np.linalg.svd(np.asarray(g[k]), full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        np.testing.assert_allclose(eps[k], 0.2 * (u * s) @ vh, rtol=0, atol=1e-12)
    for k in ("b1", "b2"):
        np.testing.assert_allclose(eps[k], steps_of(real())["spectral_ball"][k], atol=1e-15)


# ---- z-scores.


def test_a_kernel_without_outliers_takes_the_step_of_sam():
    """All |z| of a constant kernel are 0, none above its quantile."""
    g = real()
    g["W2"] = jnp.full_like(g["W2"], 0.5)
    found, sams = steps_of(g)["z_score_ball"], steps_of(g)[""]
    for k in ("W2", "b1", "b2"):
        np.testing.assert_allclose(found[k], sams[k], rtol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(found["W1"]), 0.2, rtol=1e-14)
    assert 0.4 < np.mean(np.asarray(found["W1"]) == 0) < 0.6


def test_one_entry_and_no_entry_have_no_outliers():
    g = {"one": jnp.array([[2.0]]), "none": jnp.zeros((0, 3)), "b": jnp.array([1.5])}
    for norm in ("leaf", "global"):
        ball = geometry.z_score_ball(0.5, norm=norm)
        assert_close(ball.update(g, ball.init(g), g)[0], jax.tree.map(lambda x: 0.2 * x, g))


# ---- Noise.


def test_noise_uses_only_the_shapes_of_the_gradient():
    g = real()
    for make in (geometry.gaussian_noise, geometry.sphere_noise):
        noise = make(0.3, geometry.filterwise(), key=4)
        state = noise.init(g)
        update = jax.jit(noise.update)
        eps, after = update(g, state, g)
        other, _ = update(jax.tree.map(lambda x: jnp.nan * x, g), state, g)
        jax.tree.map(np.testing.assert_array_equal, eps, other)
        assert int(after.step) == 1
        np.testing.assert_array_equal(after.key, state.key)
        assert np.all(np.asarray(update(g, after, g)[0]["W1"]) != np.asarray(eps["W1"]))


def test_noise_has_its_radius_or_deviation():
    w = {"k": jnp.full((40, 50), 3.0), "n": jnp.arange(3), "half": jnp.ones(5, jnp.bfloat16)}
    metric = functools.partial(jax.tree.map, lambda x: 2.0)
    sphere, gauss = geometry.sphere_noise(0.3, metric), geometry.gaussian_noise(0.3, metric)
    on_sphere = sphere.update(w, sphere.init(w), w)[0]
    length = np.sqrt(sum(np.sum(np.square(np.asarray(x, float))) for x in leaves(on_sphere)))
    np.testing.assert_allclose(length, 0.6, rtol=1e-6)
    eps = gauss.update(w, gauss.init(w), w)[0]
    np.testing.assert_allclose(np.std(eps["k"]), 0.6, rtol=0.05)
    assert eps["half"].dtype == on_sphere["half"].dtype == jnp.float32
    for each in (eps, on_sphere):
        np.testing.assert_array_equal(each["n"], 0)
