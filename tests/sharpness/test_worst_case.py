"""The largest rise in a ball: recorded and exact maxima, other balls, starts, wrong arguments."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measured import REFERENCE, net_loss, net_params, quadratic
from problem import make

from samx import sam, sharpness
from samx.perturbations import (
    ball,
    layerwise,
    linf_ball,
    magnitude,
    metric_ball,
    monge_ball,
    mup_ball,
    on_leaves,
    unnormalized_step,
)

pytestmark = pytest.mark.usefixtures("float64")

ADAPTIVE = magnitude(0.0, is_scaled=lambda path, leaf: True)
BALLS = {
    "l2": metric_ball,
    "adaptive_l2": lambda rho: metric_ball(rho, ADAPTIVE),
    "linf": linf_ball,
    "adaptive_linf": lambda rho: linf_ball(rho, ADAPTIVE),
}
NET_RADII = {
    "l2": (0.1, 0.5, 1.0),
    "adaptive_l2": (0.1, 0.5, 1.0),
    "linf": (0.005, 0.02),
    "adaptive_linf": (0.02, 0.1),
}
BELOW = {"l2": 1e-6, "adaptive_l2": 1e-6, "linf": 0.02, "adaptive_linf": 0.02}  # the best known


def radius_of(kind, eps, w):
    """The least radius of a ball of this kind in which ε is."""
    scales = jax.tree.map(jnp.abs, w) if "adaptive" in kind else jax.tree.map(jnp.ones_like, w)
    z = [jnp.ravel(e / t) for e, t in zip(*map(jax.tree.leaves, (eps, scales)), strict=True)]
    return jnp.linalg.norm(jnp.concatenate(z), 2 if "l2" in kind else jnp.inf)


@cache
def on_net(kind):
    """All radii at once, compiled once for all keys."""

    def at(rho, key):
        return sharpness.worst_case(net_loss(), net_params(), BALLS[kind](rho), key=key)

    return jax.jit(jax.vmap(at, in_axes=(0, None)))


def recorded(kind):
    return np.array([REFERENCE[f"net/worst_case/{kind}_rho{rho}"] for rho in NET_RADII[kind]])


@pytest.mark.parametrize("kind", BALLS)
def test_recorded_maxima(kind):
    f, w, radii = net_loss(), net_params(), jnp.array(NET_RADII[kind])
    found = on_net(kind)(radii, 0)
    ratio = found.value / recorded(kind)
    assert ratio.min() > 1 - BELOW[kind]
    assert ratio.max() < 1 + (1e-9 if "l2" in kind else 1e-3)  # of L∞ only lower bounds are known
    assert found.per_restart.shape == (len(radii), 16)
    np.testing.assert_array_equal(found.per_restart.max(1), found.value)
    assert found.stationarity.max() < 1e-6
    eps = jax.tree.map(lambda x: x[-1], found.perturbation)
    rise = f(jax.tree.map(jnp.add, w, eps)) - f(w)
    np.testing.assert_allclose(rise, found.value[-1], rtol=1e-12)
    assert radius_of(kind, eps, w) <= radii[-1] * (1 + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BALLS)
def test_recorded_maxima_with_most_keys(kind):
    """At the radius 0.5, 40% of the ascents find the best maximum, so 16 nearly always do."""
    radii = jnp.array(NET_RADII[kind])
    ratios = [on_net(kind)(radii, key).value / recorded(kind) for key in range(20)]
    assert np.mean(np.array(ratios) > 1 - BELOW[kind]) == 1


@cache
def on_quadratic(kind):
    def at(a, g, w, rho):
        def f(w):
            v = jnp.concatenate([w["a"].ravel(), w["b"]])
            return 0.5 * v @ a @ v + g @ v

        return sharpness.worst_case(f, w, BALLS[kind](rho), restarts=64)

    return jax.jit(at)


def largest_vertex(a, g, scales):
    """By enumeration of all vertices of the box, for a convex quadratic."""
    signs = 2.0 * ((np.arange(2**16)[:, None] >> np.arange(16)) & 1) - 1
    eps = signs * scales
    return np.max(eps @ g + 0.5 * np.sum(eps @ a * eps, axis=1))


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("name", ["psd", "indefinite"])
@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_exact_maxima_of_quadratics(kind, name, rho):
    _, w, a, b = quadratic(name)
    found = on_quadratic(kind)(a, b, w, rho)
    flat = np.concatenate([w["a"].ravel(), w["b"]])
    recorded = REFERENCE.get(f"quad/{name}/worst_case/{kind}_rho{rho}")
    if recorded is None:
        scales = rho * (np.abs(flat) if "adaptive" in kind else np.ones(16))
        recorded = largest_vertex(np.asarray(a), np.asarray(a @ flat + b), scales)
    np.testing.assert_allclose(found.value, recorded, rtol=1e-7)


def test_a_gradient_orthogonal_to_the_largest_curvature():
    """Two maxima; the ascent from the gradient's own direction passes a saddle."""
    _, w, a, _ = quadratic("hard")
    zero = jax.tree.map(jnp.zeros_like, w)
    found = on_quadratic("l2")(a, jnp.asarray(REFERENCE["quad/hard/g"]), zero, 1.0)
    np.testing.assert_allclose(found.value, REFERENCE["quad/hard/l2_rho1.0"], rtol=2e-7)


def test_a_weight_of_zero_does_not_move():
    _, w, a, b = quadratic("zero_weight")
    found = on_quadratic("adaptive_l2")(a, b, w, 1.0)
    recorded = REFERENCE["quad/zero_weight/adaptive_l2_rho1.0"]
    np.testing.assert_allclose(found.value, recorded, rtol=1e-7)
    eps = np.concatenate([found.perturbation["a"].ravel(), found.perturbation["b"]])
    np.testing.assert_allclose(eps, REFERENCE["quad/zero_weight/delta"], atol=1e-3)
    assert eps[3] == 0
    assert np.isfinite(found.per_restart).all()


@pytest.mark.parametrize(
    ("largest", "middle", "least", "slope", "most"),
    [
        (1.0, 0.8, -0.6, 0.0, 45),  # 148 without momentum
        (0.1, -0.2, -1.6, 0.02, 90),  # 101 if a step that failed is only halved
        (-0.1, -0.5, -1.6, 0.001, 70),  # inside of the ball; 88 if only small gradients end it
        (1.0, 0.1, -0.5, 1.0, 8),  # 13 if a step with momentum that failed is halved
    ],
)
def test_gradients_of_an_ascent(largest, middle, least, slope, most):
    """Ten curvatures near the largest one, and the others: the mean over 16 ascents."""
    curvature = jnp.concatenate(
        [jnp.linspace(largest, largest - 0.2, 10), middle * jnp.ones(10), least * jnp.ones(10)]
    )
    calls = []

    def f(w):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(0.5 * curvature * w**2 + slope * w)

    jax.jit(lambda w: sharpness.worst_case(f, w, metric_ball(1.0), steps=200))(jnp.zeros(30))
    jax.effects_barrier()
    assert len(calls) < 16 * most


@pytest.mark.parametrize("make_ball", [metric_ball, linf_ball])
def test_a_maximum_inside_of_the_ball(make_ball):
    """It is reached, though every step aims at the edge."""
    center, curvature = jnp.array([0.1, -0.2, 0.05]), jnp.array([1.0, 2.0, 0.5])

    def f(w):
        return -jnp.sum(curvature * (w - center) ** 2)

    found = jax.jit(lambda w: sharpness.worst_case(f, w, make_ball(0.6), restarts=2))(jnp.zeros(3))
    np.testing.assert_allclose(found.value, -f(jnp.zeros(3)), rtol=1e-5)
    np.testing.assert_allclose(found.perturbation, center, atol=2e-3)


def spectral_ball(rho):
    """The ball of matrices whose largest singular value is ρ."""

    def climb(g, params, rho):
        def polar(g):
            u, _, v = jnp.linalg.svd(g, full_matrices=False)
            return rho * u @ v

        return jax.tree.map(polar, g)

    return ball(rho, climb)


def test_a_ball_of_the_users():
    """tr (W + E) C (W + E)ᵀ for a diagonal W: the maximum is Σ c ((s + ρ)² − s²)."""
    c, s = jnp.array([3.0, 2.0, 1.0]), jnp.array([0.3, 0.5, 0.7])
    w = {"w": jnp.eye(4, 3) * s[None]}

    @jax.jit
    def found(w):
        loss = lambda w: jnp.sum(w["w"] ** 2 * c[None])  # noqa: E731
        return sharpness.worst_case(loss, w, spectral_ball(0.4), restarts=3)

    wanted = jnp.sum(c * ((s + 0.4) ** 2 - s**2))
    np.testing.assert_allclose(found(w).per_restart, 3 * [wanted], rtol=1e-6)


def test_balls_of_training():
    """In μP's and the layer-wise geometry, and on some leaves: the same ball in other words."""
    f, w, _, _ = quadratic()
    scales = {"a": 4.0, "b": 0.25}
    tall = {"a": jnp.linalg.norm(w["a"]), "b": jnp.linalg.norm(w["b"])}

    def value(perturbation, f=f, w=w):
        found = jax.jit(lambda w: sharpness.worst_case(f, w, perturbation, restarts=4))(w)
        return found.value

    def in_coordinates(scales):
        """Move z instead, with w = w₀ + scales z, in the plain ball."""

        def of_z(z):
            return f(jax.tree.map(lambda w, s, z: w + s * z, w, scales, z))

        return value(metric_ball(0.7), of_z, jax.tree.map(jnp.zeros_like, w))

    rows = [
        (mup_ball(0.7, scales), {"a": 2.0, "b": 0.5}),
        (metric_ball(0.7, layerwise(is_scaled=lambda path, leaf: True)), tall),
        (on_leaves(metric_ball(0.7), lambda path, leaf: path[0].key == "b"), {"a": 0.0, "b": 1.0}),
    ]
    for perturbation, scales in rows:
        np.testing.assert_allclose(value(perturbation), in_coordinates(scales), rtol=1e-6)


@pytest.mark.parametrize("perturbation", [metric_ball(1.0), linf_ball(0.3, ADAPTIVE)])
def test_not_below_the_one_step_measure(perturbation):
    """Not even with one gradient; and more of them only climb."""
    f, w, _, _ = quadratic("indefinite")

    @jax.jit
    def found(w):
        few, more = (
            sharpness.worst_case(f, w, perturbation, steps=steps, restarts=3) for steps in (1, 4)
        )
        return sharpness.first_order(f, w, perturbation), few, more

    one_step, few, more = found(w)
    np.testing.assert_allclose(few.per_restart[0], one_step, rtol=1e-12)
    assert few.value >= one_step
    assert (more.per_restart > few.per_restart).all()


def test_the_center_is_in_the_ball():
    """No rise at a maximum, nor without a radius; a zero gradient gives no NaN."""
    w = {"a": jnp.zeros(3)}

    def loss(w, curvature, slope):
        return curvature * jnp.sum(w["a"] ** 2) + slope * jnp.sum(w["a"])

    @jax.jit
    def found(curvature, slope, rho):
        return sharpness.worst_case(lambda w: loss(w, curvature, slope), w, metric_ball(rho))

    for case in ((-1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        value, eps, per_restart, stationarity = found(*case)
        assert value == stationarity == 0
        np.testing.assert_array_equal(eps["a"], np.zeros(3))
        assert np.isfinite(per_restart).all()


def test_a_loss_that_is_not_a_number():
    """It shows in its restart, not in the result; and everywhere if it is so at w."""

    @jax.jit
    def found(w):
        return sharpness.worst_case(lambda w: jnp.sum(jnp.sqrt(w)), w, linf_ball(0.2))

    value, _, per_restart, _ = found(jnp.array([0.5, 0.1]))
    is_nan = np.isnan(per_restart)
    assert is_nan.any()
    assert not is_nan.all()
    np.testing.assert_allclose(value, np.sqrt([0.7, 0.3]).sum() - np.sqrt([0.5, 0.1]).sum())
    value, _, per_restart, _ = found(jnp.array([-0.5, 0.1]))
    assert np.isnan(value)
    assert np.isnan(per_restart).all()


@pytest.mark.parametrize("perturbation", [unnormalized_step(0.5), monge_ball(0.5)])
def test_what_is_no_ball_is_not_stationary(perturbation):
    f, w, _, _ = quadratic()
    found = jax.jit(lambda w: sharpness.worst_case(f, w, perturbation, restarts=2))(w)
    assert abs(found.stationarity) > 0.05


def test_layers_of_a_relu_network_may_be_rescaled():
    """The adaptive worst case stays, the plain one does not."""
    rng = np.random.RandomState(0)
    x, y = jnp.asarray(rng.randn(12, 3)), jnp.asarray(rng.randn(12))
    w = {"W1": rng.randn(3, 4), "b1": rng.randn(4), "W2": rng.randn(4)}
    w = jax.tree.map(jnp.asarray, w)

    def f(w):
        hidden = jax.nn.relu(x @ w["W1"] + w["b1"][None])
        return jnp.mean((hidden @ w["W2"] - y) ** 2)

    @jax.jit
    def values(w):
        adaptive = sharpness.worst_case(f, w, metric_ball(0.3, ADAPTIVE))
        return adaptive.value, sharpness.worst_case(f, w, metric_ball(0.3), restarts=4).value

    adaptive, plain = values(w)
    found = values({"W1": 3 * w["W1"], "b1": 3 * w["b1"], "W2": w["W2"] / 3})
    np.testing.assert_allclose(found[0], adaptive, rtol=1e-6)
    assert abs(found[1] / plain - 1) > 0.1


def test_radii_and_seeds_at_once():
    """As in separate calls, whose loops end earlier."""
    f, w, _, _ = quadratic("indefinite")

    def at(rho, factor, key):
        scaled = jax.tree.map(lambda x: factor * x, w)
        return sharpness.worst_case(f, scaled, metric_ball(rho), restarts=3, key=key)

    rows = (
        jnp.array([0.1, 0.5, 1.0]),
        jnp.array([1.0, 0.5, 2.0]),
        jax.random.split(jax.random.key(3), 3),
    )
    found, one = jax.jit(jax.vmap(at))(*rows), jax.jit(at)
    for i in range(3):
        alone = one(*(row[i] for row in rows))
        for x, y in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-9)


def test_single_precision():
    """To five digits the value in float64; an ascent ends when rounding hides what it gains."""
    data = jax.tree.map(lambda x: x.astype(jnp.float32 if x.ndim == 2 else x.dtype), make()[0])
    w = jax.tree.map(lambda w: w.astype(jnp.float32), net_params())
    calls = []

    def f(w):
        jax.debug.callback(lambda: calls.append(1))
        return net_loss(data)(w)

    found = jax.jit(lambda w: sharpness.worst_case(f, w, metric_ball(0.1), restarts=3))(w)
    assert found.value.dtype == found.perturbation["W1"].dtype == jnp.float32
    np.testing.assert_allclose(found.per_restart, 3 * [recorded("l2")[0]], rtol=1e-5)
    assert found.stationarity < 2e-6
    jax.effects_barrier()
    assert len(calls) < 3 * 30


@pytest.mark.parametrize("factor", [1e-20, 1e10])
def test_the_scale_of_the_loss(factor):
    """Ascents in single precision take the same steps, however long gradients are."""
    _, w, a, b = quadratic("indefinite")
    w, a, b = jax.tree.map(lambda x: x.astype(jnp.float32), (w, a, b))

    @jax.jit
    def found(factor):
        def f(w):
            v = jnp.concatenate([w["a"].ravel(), w["b"]])
            return factor * (0.5 * v @ a @ v + b @ v)

        return sharpness.worst_case(f, w, metric_ball(1.0), steps=5, restarts=3)

    one, scaled = found(jnp.float32(1)), found(jnp.float32(factor))
    np.testing.assert_allclose(scaled.per_restart / factor, one.per_restart, rtol=1e-4)
    np.testing.assert_allclose(scaled.stationarity, one.stationarity, rtol=1e-2)


def test_half_precision_complex_and_integer_leaves():
    """|z|² + h² + z's real part: the maximum is (ρ² + ρ) along it."""
    w = {"z": jnp.zeros(2, jnp.complex64), "h": jnp.zeros(2, jnp.bfloat16), "n": jnp.arange(3)}

    def f(w):
        z, h = w["z"], w["h"]
        return jnp.sum(jnp.abs(z) ** 2) + jnp.sum(h * h) + jnp.real(z[0]) + 0 * jnp.sum(w["n"])

    found = jax.jit(lambda w: sharpness.worst_case(f, w, metric_ball(0.5), restarts=3))(w)
    np.testing.assert_allclose(found.value, 0.75, rtol=1e-4)
    eps = found.perturbation
    assert (eps["z"].dtype, eps["h"].dtype, eps["n"].dtype) == ("complex64", "float32", "int64")
    np.testing.assert_allclose(eps["z"], [0.5, 0.0], atol=5e-3)
    np.testing.assert_array_equal(eps["n"], np.zeros(3))


def test_memory_of_one_restart():
    """No array has an axis of the restarts and more."""
    w = {"a": jnp.ones((5, 7))}
    jaxpr = jax.make_jaxpr(
        lambda w: sharpness.worst_case(lambda w: jnp.sum(w["a"] ** 3), w, metric_ball(1.0))
    )(w)
    assert "16]" in str(jaxpr)
    assert "[16,5,7]" not in str(jaxpr)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "`steps` must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "`steps` must be a Python int"),
        ({"restarts": 0}, ValueError, "`restarts` must be at least 1, got 0"),
        ({"restarts": jnp.array(2)}, TypeError, "`restarts` must be a Python int"),
        ({"key": 0.5}, TypeError, "`key` must be a seed or a key"),
        ({"perturbation": 0.1}, TypeError, "worst_case: `perturbation` must be an optax trans"),
        ({"perturbation": metric_ball}, TypeError, r"call metric_ball\(...\)"),
        ({"perturbation": sam(0.1)}, ValueError, "worst_case: `perturbation` must map a gradient"),
        ({"f": 3.0}, TypeError, "worst_case: `f` must be a loss"),
        ({"params": jnp.arange(3)}, ValueError, "worst_case: `params` must hold floating numbers"),
    ],
)
def test_wrong_arguments(changes, error, message):
    arguments = {"f": jnp.sum, "params": jnp.ones(3), "perturbation": metric_ball(0.1)} | changes
    with pytest.raises(error, match=message):
        sharpness.worst_case(**arguments)
