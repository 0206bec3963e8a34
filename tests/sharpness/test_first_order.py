"""SAM's own rise, the same for shards of examples, and the exact gradient of SAM's loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from measured import REFERENCE, net_loss, net_params, quadratic

from samx import sharpness
from samx.perturbations import (
    ball,
    linf_ball,
    magnitude,
    metric_ball,
    monge_ball,
    unnormalized_step,
)

pytestmark = pytest.mark.usefixtures("float64")

RADII = (0.05, 0.1, 0.5)


def elementwise():
    return magnitude(0.0, is_scaled=lambda path, leaf: True)


def relative_error(found, wanted):
    return max(
        np.max(np.abs(x - y)) / np.max(np.abs(y))
        for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
    )


def test_first_order_is_the_recorded_rise():
    """For all radii at once; the objective in 7 batches."""
    w = net_params()

    def rises(rho):
        plain = sharpness.first_order(net_loss(num_batches=7), w, metric_ball(rho))
        return plain, sharpness.first_order(net_loss(), w, metric_ball(rho, elementwise()))

    found = jax.jit(jax.vmap(rises))(jnp.array(RADII))
    for kind, values in zip(("sam_sharpness", "sam_sharpness_adaptive"), found, strict=True):
        wanted = [REFERENCE[f"net/{kind}/rho{rho}"] for rho in RADII]
        np.testing.assert_allclose(values, wanted, rtol=1e-11)


@pytest.mark.parametrize("name", ["psd", "indefinite"])
@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_first_order_on_a_quadratic(name, rho):
    """g'ε + ε'Aε/2 in closed form."""
    f, w, _, _ = quadratic(name)
    wanted = REFERENCE[f"quad/{name}/sam_sharpness_closed/rho{rho}"]
    np.testing.assert_allclose(sharpness.first_order(f, w, metric_ball(rho)), wanted, rtol=1e-11)


def linear_model():
    rng = np.random.RandomState(1)
    batch = {"x": jnp.asarray(rng.randn(11, 3)), "y": jnp.asarray(rng.randn(11))}
    return lambda w, b: (jnp.tanh(b["x"] @ w) - b["y"]) ** 2, batch, jnp.asarray(rng.randn(3))


def test_first_order_takes_every_perturbation():
    """A ball of the user's at a schedule's step 0, and a transformation that is not samx's."""
    f, w, _, _ = quadratic()

    def half(g, params, rho):
        return jax.tree.map(lambda g: 0.5 * rho * g, g)

    def moved(factor):
        return f(jax.tree.map(lambda w, g: w + factor * g, w, jax.grad(f)(w))) - f(w)

    found = sharpness.first_order(f, w, ball(lambda step: 0.1 + step, half))
    np.testing.assert_allclose(found, moved(0.05), rtol=1e-12)
    np.testing.assert_allclose(sharpness.first_order(f, w, optax.sgd(-0.2)), moved(0.2), rtol=1e-12)


def test_a_perturbation_may_read_the_losses_of_examples():
    losses, batch, w = linear_model()
    weights = jnp.arange(11.0)

    def update(g, state, params, *, losses_fn, batch, weights, value_fn, grad):
        largest = jnp.max(weights * losses_fn(params, batch)) / value_fn(params)
        return largest * (g + grad) / 2, state

    climb = optax.GradientTransformationExtraArgs(lambda params: (), update)
    f = sharpness.objective(losses_fn=losses, batch=batch, weights=weights, num_batches=2)
    eps = jnp.max(weights * losses(w, batch)) / f(w) * jax.grad(f)(w)
    np.testing.assert_allclose(sharpness.first_order(f, w, climb), f(w + eps) - f(w), rtol=1e-11)


@pytest.mark.parametrize("size", [1, 4, 16, 64])
def test_m_sharpness_is_the_recorded_one(size):
    f, w = net_loss(), net_params()

    def rises(rho):
        return sharpness.m_sharpness(f, w, metric_ball(rho), shard_size=size)

    found = jax.jit(jax.vmap(rises))(jnp.array([0.05, 0.1]))
    wanted = [REFERENCE[f"net/m_sharpness/m{size}_rho{rho}"] for rho in (0.05, 0.1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-11)


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("has_weights", [False, True])
def test_shards_and_examples_count_by_their_weights(num_batches, has_weights):
    """Against a loop by hand over 3 shards. The last one is smaller; one example has weight 0."""
    losses, batch, w = linear_model()
    weights = np.random.RandomState(2).rand(11) * (np.arange(11) != 6) if has_weights else None
    of = np.ones(11) if weights is None else weights
    total = 0.0
    for start in (0, 4, 8):
        own = slice(start, start + 4)
        shard = jax.tree.map(lambda x, own=own: x[own], batch)

        def mean(w, shard=shard, own=own):
            return jnp.sum(losses(w, shard) * of[own]) / np.sum(of[own])

        g = jax.grad(mean)(w)
        total += np.sum(of[own]) * (mean(w + 0.3 * g / jnp.linalg.norm(g)) - mean(w))
    f = sharpness.objective(losses_fn=losses, batch=batch, weights=weights, num_batches=num_batches)
    found = sharpness.m_sharpness(f, w, metric_ball(0.3), shard_size=4)
    np.testing.assert_allclose(found, total / np.sum(of), rtol=1e-12)


def test_a_shard_of_padding_counts_nothing():
    losses, batch, w = linear_model()
    weights = jnp.where(jnp.arange(11) < 5, 1.0, 0.0)
    f = sharpness.objective(losses_fn=losses, batch=batch, weights=weights)
    first = jax.tree.map(lambda x: x[:5], batch)
    few = sharpness.objective(losses_fn=losses, batch=first)
    found, wanted = (sharpness.m_sharpness(f, w, metric_ball(0.3), shard_size=5) for f in (f, few))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def by_hand(f, rho, metric=None, power=2):
    """SAM's loss, written out: L(w + ρ T² g / ‖T g‖), or L(w + ρ T² g) with power 0."""

    def value(w):
        g = jax.grad(f)(w)
        t = jax.tree.map(lambda w: jnp.abs(w) + 0.1 if metric else jnp.ones_like(w), w)
        length = optax.tree.norm(jax.tree.map(jnp.multiply, t, g))
        factor = rho / length if power else rho
        return f(jax.tree.map(lambda w, t, g: w + factor * t**2 * g, w, t, g))

    return value


PERTURBATIONS = {
    "metric_ball": (metric_ball(0.1), {}),
    "adaptive": (
        metric_ball(0.1, magnitude(0.1, is_scaled=lambda path, leaf: True)),
        {"metric": True},
    ),
    "unnormalized": (unnormalized_step(0.1), {"power": 0}),
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_the_exact_gradient_is_that_of_the_composition(name):
    perturbation, how = PERTURBATIONS[name]
    f, w = net_loss(), net_params()

    @jax.jit
    def both(w):
        found = sharpness.exact_sam_gradient(f, w, perturbation)
        g = jax.grad(f)(w)
        eps, _ = perturbation.update(g, perturbation.init(w), w)
        g_s = jax.grad(f)(optax.apply_updates(w, eps))
        return found, jax.grad(by_hand(f, 0.1, **how))(w), g_s

    found, exact, g_s = both(w)
    assert relative_error(found.gradient, exact) < 1e-11
    assert relative_error(found.first_order, g_s) < 1e-11
    cosine = optax.tree.vdot(exact, g_s) / optax.tree.norm(exact) / optax.tree.norm(g_s)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-11)
    assert relative_error(g_s, exact) > 1e-3


def test_the_exact_gradient_of_corners():
    """Signs are constants, the metric is not: ε = ρ |w| sign(g) has ∂ε/∂w = ρ sign(w) sign(g)."""
    f, w, a, b = quadratic()
    found = sharpness.exact_sam_gradient(f, w, linf_ball(0.1, elementwise()))
    v = jnp.concatenate([w["a"].reshape(-1), w["b"]])
    s = jnp.sign(a @ v + b)
    g_s = a @ (v + 0.1 * jnp.abs(v) * s) + b
    exact = g_s + 0.1 * jnp.sign(v) * s * g_s
    flat = jnp.concatenate([found.gradient["a"].reshape(-1), found.gradient["b"]])
    np.testing.assert_allclose(flat, exact, rtol=1e-12)


@pytest.mark.parametrize("make", [metric_ball, monge_ball])
def test_the_exact_gradient_of_a_quadratic_in_closed_form(make):
    """And at its minimum, where no direction is uphill: zeros, not NaN."""

    def loss(w):
        return 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)

    def value(w):
        return sharpness.first_order(loss, w, make(0.2)) + loss(w)

    w = jnp.array([1.0, -0.3])
    found = sharpness.exact_sam_gradient(loss, w, make(0.2))
    np.testing.assert_allclose(found.gradient, jax.grad(value)(w), rtol=1e-11)
    found = sharpness.exact_sam_gradient(loss, 0 * w, make(0.2))
    np.testing.assert_array_equal(jnp.concatenate([*found[:2], found.cosine[None]]), 0)
    assert sharpness.first_order(loss, 0 * w, make(0.2)) == 0


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_float32_and_other_dtypes(scale):
    """A half-precision, a complex and an integer leaf against real float64 ones; any scale."""
    coefficients = jnp.array([1.0, 2.0, 3.0, 0.5])

    def quartic(v):
        return jnp.sum(coefficients.astype(v.dtype) * v**2) + v[0] * v[1] * v[2] ** 2 * v[3]

    def loss(w):
        real = [w["half"], w["z"].real, w["z"].imag, w["x"]]
        value = quartic(jnp.stack([x.astype(jnp.float32) for x in real]))
        return jnp.float32(scale) * (value + 0 * w["count"])

    v = jnp.array([0.5, 1.0, -0.75, 1.25])
    w = {
        "half": v[0].astype(jnp.bfloat16),
        "z": jax.lax.complex(v[1], v[2]).astype(jnp.complex64),
        "x": v[3].astype(jnp.float32),
        "count": jnp.array(3),
    }
    found = jax.jit(lambda w: sharpness.exact_sam_gradient(loss, w, metric_ball(0.1)))(w)
    wanted = sharpness.exact_sam_gradient(quartic, v, metric_ball(0.1))
    for tree, flat in ((found.gradient, wanted.gradient), (found.first_order, wanted.first_order)):
        assert tree["half"].dtype == jnp.float32
        numbers = jnp.stack([tree["half"], tree["z"].real, tree["z"].imag, tree["x"]])
        np.testing.assert_allclose(np.float64(numbers) / np.float32(scale), flat, rtol=2e-5)
    np.testing.assert_allclose(found.cosine, wanted.cosine, rtol=1e-5)
    rise = sharpness.first_order(loss, w, metric_ball(0.1))
    wanted = sharpness.first_order(quartic, v, metric_ball(0.1))
    np.testing.assert_allclose(np.float64(rise) / np.float32(scale), wanted, rtol=2e-5)


def test_other_parameters_at_once():
    """Over seeds by `vmap`, with numbers of Python as parameters of a plain loss."""

    def loss(w):
        return w["a"] ** 2 * w["b"] + w["b"] ** 3

    def measures(w):
        exact = sharpness.exact_sam_gradient(loss, w, metric_ball(0.1))
        return sharpness.first_order(loss, w, metric_ball(0.1)), exact

    seeds = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([0.5, 0.1])}
    found = jax.vmap(measures)(seeds)
    for i, one in enumerate(({"a": 1.0, "b": 0.5}, {"a": 2.0, "b": 0.1})):
        wanted, own = measures(one), jax.tree.map(lambda x, i=i: x[i], found)
        assert relative_error(own, wanted) < 1e-12


def losses(w, x):
    return x @ w


W, BALL = np.ones(2), metric_ball(0.1)
F = sharpness.objective(losses_fn=losses, batch=np.eye(2))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, "first_order: `f` must be a loss", lambda s: s.first_order(3, W, BALL)),
        (
            TypeError,
            "first_order: `perturbation` must be an optax transformation, got float",
            lambda s: s.first_order(F, W, 0.1),
        ),
        (
            TypeError,
            "exact_sam_gradient: `perturbation` must be .* call metric_ball",
            lambda s: s.exact_sam_gradient(F, W, metric_ball),
        ),
        (
            ValueError,
            "m_sharpness: needs the losses of examples",
            lambda s: s.m_sharpness(lambda w: w @ w, W, BALL, shard_size=1),
        ),
        (
            ValueError,
            "m_sharpness: `shard_size` must be at most 2 examples, got 3",
            lambda s: s.m_sharpness(F, W, BALL, shard_size=3),
        ),
        (
            ValueError,
            "`shard_size` must be at least 1",
            lambda s: s.m_sharpness(F, W, BALL, shard_size=0),
        ),
        (
            TypeError,
            "`shard_size` must be a Python int",
            lambda s: s.m_sharpness(F, W, BALL, shard_size=1.5),
        ),
        (
            TypeError,
            "m_sharpness: `perturbation` must be",
            lambda s: s.m_sharpness(F, W, None, shard_size=1),
        ),
        (
            TypeError,
            "`params` must be an array",
            lambda s: s.exact_sam_gradient(F, "weights", BALL),
        ),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call(sharpness)
