"""What a ball and a metric do to one gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from identities import assert_same, ball_step, gradient

import samx
from samx import perturbations as geometry

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_monge_ball_between_a_ball_and_a_step_that_falls(scale):
    g, params = gradient()
    g = jax.tree.map(lambda x: scale * x, g)
    eps = ball_step(geometry.monge_ball(0.3), g, params)
    length, climbed = optax.tree.norm(eps), optax.tree.vdot(g, eps)
    # The length is measured on the graph of the loss.
    np.testing.assert_allclose(jnp.hypot(length, climbed), 0.3, rtol=1e-8)
    assert climbed > 0


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_radius_is_the_length_of_the_step(rho):
    g, params = gradient()
    np.testing.assert_allclose(
        optax.tree.norm(ball_step(geometry.metric_ball(rho), g, params)), rho, rtol=1e-10
    )
    metric = geometry.magnitude(0.1)
    eps = ball_step(geometry.metric_ball(rho, metric), g, params)
    relative = jax.tree.map(jnp.divide, eps, metric(params))
    np.testing.assert_allclose(optax.tree.norm(relative), rho, rtol=1e-10)
    corner = ball_step(geometry.linf_ball(rho), g, params)
    assert all(np.all(np.abs(leaf) == rho) for leaf in jax.tree.leaves(corner))


def test_numbers_as_scales():
    """A metric may return Python's numbers, one for a leaf."""
    g, params = gradient()
    numbers = {name: 0.5 + len(name) * i for i, name in enumerate(params)}
    arrays = jax.tree.map(jnp.asarray, numbers)
    eps = ball_step(geometry.metric_ball(0.3, lambda params: numbers), g, params)
    assert_same(eps, ball_step(geometry.metric_ball(0.3, lambda params: arrays), g, params))
    relative = jax.tree.map(jnp.divide, eps, arrays)
    np.testing.assert_allclose(optax.tree.norm(relative), 0.3, rtol=1e-10)


def test_corner_of_an_adaptive_ball():
    g, params = gradient()
    metric = geometry.magnitude(0.1)
    eps = ball_step(geometry.linf_ball(0.3, metric), g, params)
    scales = metric(params)
    assert_same(eps, jax.tree.map(lambda g, t: 0.3 * t * jnp.sign(g), g, scales), atol=1e-15)


def test_layerwise_eta_moves_a_tensor_of_zeros():
    w = {"kernel": jnp.zeros(3)}
    g = {"kernel": jnp.array([3.0, 0.0, 4.0])}
    step = jax.jit(lambda eta: ball_step(geometry.metric_ball(1.0, geometry.layerwise(eta)), g, w))
    for eta in (0.0, 0.5):
        np.testing.assert_allclose(np.linalg.norm(step(eta)["kernel"]), eta, rtol=1e-10)


def test_half_precision_gradients_have_a_float32_norm():
    g = jnp.full(1000, 1.0234375, jnp.bfloat16)  # the square is halfway between two bfloat16
    tx = samx.sam(0.5)

    @jax.jit
    def both(g):
        after = tx.update(g, tx.init(g), g, value_fn=lambda w: w.astype(jnp.float32).sum())
        return ball_step(geometry.metric_ball(0.5), g, g), after[1]

    eps, state = both(g)
    assert eps.dtype == jnp.float32
    np.testing.assert_allclose(optax.tree.norm(eps), 0.5, rtol=1e-5)
    np.testing.assert_allclose(state.readings.grad_norm, 1.0234375 * 1000**0.5, rtol=1e-5)


def test_step_goes_up():
    g, params = gradient()
    for ball in (
        geometry.metric_ball(0.1),
        geometry.metric_ball(0.1, geometry.magnitude()),
        geometry.metric_ball(0.1, geometry.layerwise(0.1)),
        geometry.linf_ball(0.1, geometry.magnitude()),
    ):
        assert float(optax.tree.vdot(g, ball_step(ball, g, params))) > 0


def test_step_does_not_depend_on_the_scale_of_the_loss():
    g, params = gradient()
    ball = geometry.metric_ball(0.1, geometry.magnitude())
    larger = jax.tree.map(lambda x: 1e3 * x, g)
    assert_same(ball_step(ball, larger, params), ball_step(ball, g, params), atol=1e-12)


def test_asam_does_not_depend_on_the_scale_of_the_weights():
    """With eta=0, scaling w -> c w and g -> g / c gives ε -> c ε, which is the same function."""
    g, params = gradient()
    ball = geometry.metric_ball(0.5, geometry.magnitude(0.0, is_scaled=lambda path, leaf: True))
    scaled = jax.tree.map(lambda x: 10 * x, params)
    eps = ball_step(ball, jax.tree.map(lambda x: x / 10, g), scaled)
    assert_same(jax.tree.map(lambda x: x / 10, eps), ball_step(ball, g, params), atol=1e-12)


def test_leaves_that_are_not_selected_stay_exactly_where_they_are():
    g, params = gradient()

    def is_weight(path, leaf):
        return leaf.ndim == 2

    whole = ball_step(geometry.metric_ball(0.1), g, params)
    selected = ball_step(geometry.on_leaves(geometry.metric_ball(0.1), is_weight), g, params)
    over_all = ball_step(
        geometry.on_leaves(geometry.metric_ball(0.1), is_weight, norm="all"), g, params
    )
    for eps in (selected, over_all):
        assert not np.any(eps["b1"])
        assert not np.any(eps["b2"])
    np.testing.assert_allclose(optax.tree.norm(selected), 0.1, rtol=1e-10)
    assert_same({k: over_all[k] for k in ("W1", "W2")}, {k: whole[k] for k in ("W1", "W2")})


def test_complex_parameters_climb():
    """The conjugate of JAX's gradient points uphill; the caller conjugates."""
    target = jnp.array([1.0 + 2.0j, -1.0j])

    def loss(w):
        return jnp.sum(jnp.abs(w - target) ** 2)

    w = jnp.array([0.5 - 0.5j, 2.0 + 1.0j])

    @jax.jit
    def update(w):
        tx, (value, g) = samx.all_readings(samx.sam(0.1)), jax.value_and_grad(loss)(w)
        g = jnp.conj(g)
        return g, tx.update(g, tx.init(w), w, value=value, value_fn=loss)[1].readings

    g, readings = update(w)
    norm = np.linalg.norm(g)
    np.testing.assert_allclose(readings.sharp_loss - readings.loss, 0.1 * norm + 0.01, rtol=1e-8)
    np.testing.assert_allclose(readings.cosine, 1.0, rtol=1e-8)


def test_adaptive_in_the_most_used_pytorch_code():
    """davda54/sam with `adaptive=True`: every leaf is scaled, biases too, and nothing is added."""
    w = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.05, -0.003])}

    def loss(w):
        return (w["kernel"] ** 2).sum() + (3 * w["bias"] - 1).sum() ** 2

    g = jax.grad(loss)(w)
    norm = np.sqrt(sum(np.sum((np.abs(w[k]) * g[k]) ** 2) for k in w))
    expected = {k: 2.0 / norm * w[k] ** 2 * g[k] for k in w}
    for tx, is_theirs in (
        (samx.asam(2.0, eta=0.0, is_scaled=lambda path, leaf: True), True),
        (samx.asam(2.0), False),
    ):
        updates, _ = tx.update(g, tx.init(w), w, value_fn=loss)
        found = jax.grad(loss)({k: w[k] + expected[k] for k in w})
        assert is_theirs == all(np.allclose(updates[k], found[k], rtol=1e-10) for k in w)


def test_adaptive_in_the_authors_code_of_gsam():
    """The step is scaled by |w|, and not the norm: the line in GSAM's docstring."""
    w, rho = jnp.array([1.0, -3.0, 0.2]), 0.5

    def loss(w):
        return (w**4).sum() + w[0] * w[1]

    def climb(g, w, rho):
        factor = rho / (optax.tree.norm(g) + 1e-30)
        return jax.tree.map(lambda g, w: factor * jnp.abs(w) * g, g, w)

    g = jax.grad(loss)(w)
    g_s = jax.grad(loss)(w + rho * np.abs(w) * g / np.linalg.norm(g))
    expected = g_s - 0.4 * (g - (g @ g_s) / (g_s @ g_s) * g_s)
    for ball, is_theirs in (
        (geometry.ball(rho, climb), True),
        (geometry.metric_ball(rho, geometry.magnitude(0.0)), False),
    ):
        tx = samx.gsam(alpha=0.4, perturbation=ball)
        updates, _ = tx.update(g, tx.init(w), w, value_fn=loss)
        assert is_theirs == np.allclose(updates, expected, rtol=1e-10)
