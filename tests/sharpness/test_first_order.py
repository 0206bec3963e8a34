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
def test_first_order_on_a_quadratic(name):
    """g'ε + ε'Aε/2 in closed form."""
    f, w, _, _ = quadratic(name)
    rise = jax.jit(lambda rho: sharpness.first_order(f, w, metric_ball(rho)))
    for rho in (0.1, 1.0):
        wanted = REFERENCE[f"quad/{name}/sam_sharpness_closed/rho{rho}"]
        np.testing.assert_allclose(rise(rho), wanted, rtol=1e-11)


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

    @jax.jit
    def rises():
        own, sgd = ball(lambda step: 0.1 + step, half), optax.sgd(-0.2)
        found = sharpness.first_order(f, w, own), sharpness.first_order(f, w, sgd)
        return jnp.stack(found), jnp.stack([moved(0.05), moved(0.2)])

    np.testing.assert_allclose(*rises(), rtol=1e-12)


def test_a_perturbation_may_read_the_losses_of_examples():
    losses, batch, w = linear_model()
    weights = jnp.arange(11.0)

    def update(g, state, params, *, losses_fn, batch, weights, value_fn, grad):
        largest = jnp.max(weights * losses_fn(params, batch)) / value_fn(params)
        return largest * (g + grad) / 2, state

    climb = optax.GradientTransformationExtraArgs(lambda params: (), update)
    f = sharpness.objective(losses_fn=losses, batch=batch, weights=weights, num_batches=2)

    @jax.jit
    def rises(w):
        eps = jnp.max(weights * losses(w, batch)) / f(w) * jax.grad(f)(w)
        return sharpness.first_order(f, w, climb), f(w + eps) - f(w)

    np.testing.assert_allclose(*rises(w), rtol=1e-11)


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
    f = sharpness.objective(losses_fn=losses, batch=batch, weights=weights, num_batches=num_batches)

    def by_hand(w):
        total = 0.0
        for start in (0, 4, 8):
            own = slice(start, start + 4)
            shard = jax.tree.map(lambda x, own=own: x[own], batch)

            def mean(w, shard=shard, own=own):
                return jnp.sum(losses(w, shard) * of[own]) / np.sum(of[own])

            g = jax.grad(mean)(w)
            total += np.sum(of[own]) * (mean(w + 0.3 * g / jnp.linalg.norm(g)) - mean(w))
        return total / np.sum(of)

    @jax.jit
    def both(w):
        return sharpness.m_sharpness(f, w, metric_ball(0.3), shard_size=4), by_hand(w)

    np.testing.assert_allclose(*both(w), rtol=1e-12)


def test_a_large_shard_is_split_into_batches():
    """No more examples are in memory than in a batch of the objective, a third of 11."""
    losses, batch, w = linear_model()
    sizes = set()

    def seen(w, batch):
        sizes.add(len(batch["y"]))
        return losses(w, batch)

    f = sharpness.objective(losses_fn=seen, batch=batch, num_batches=3)
    jax.eval_shape(lambda w: sharpness.m_sharpness(f, w, metric_ball(0.3), shard_size=8), w)
    assert sizes == {4}


def test_a_shard_of_padding_counts_nothing():
    losses, batch, w = linear_model()
    weights = jnp.where(jnp.arange(11) < 5, 1.0, 0.0)
    f = sharpness.objective(losses_fn=losses, batch=batch, weights=weights)
    first = jax.tree.map(lambda x: x[:5], batch)
    few = sharpness.objective(losses_fn=losses, batch=first)

    @jax.jit
    def both(w):
        return [sharpness.m_sharpness(f, w, metric_ball(0.3), shard_size=5) for f in (f, few)]

    np.testing.assert_allclose(*both(w), rtol=1e-12)


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

    @jax.jit
    def both():
        found = sharpness.exact_sam_gradient(f, w, linf_ball(0.1, elementwise())).gradient
        v = jnp.concatenate([w["a"].reshape(-1), w["b"]])
        s = jnp.sign(a @ v + b)
        g_s = a @ (v + 0.1 * jnp.abs(v) * s) + b
        return jnp.concatenate([found["a"].reshape(-1), found["b"]]), g_s * (
            1 + 0.1 * jnp.sign(v) * s
        )

    np.testing.assert_allclose(*both(), rtol=1e-12)


@pytest.mark.parametrize("make", [metric_ball, monge_ball])
def test_the_exact_gradient_of_a_quadratic_in_closed_form(make):
    """And at its minimum, where no direction is uphill: zeros, not NaN."""

    def loss(w):
        return 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)

    def value(w):
        return sharpness.first_order(loss, w, make(0.2)) + loss(w)

    @jax.jit
    def measures(w):
        found = sharpness.exact_sam_gradient(loss, w, make(0.2))
        return found, jax.grad(value)(w), sharpness.first_order(loss, w, make(0.2))

    found, wanted, _ = measures(jnp.array([1.0, -0.3]))
    np.testing.assert_allclose(found.gradient, wanted, rtol=1e-11)
    for x in jax.tree.leaves(measures(jnp.zeros(2))):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


def test_float32_and_other_dtypes():
    """A half-precision, a complex and an integer leaf against real float64 ones; any scale."""
    coefficients = jnp.array([1.0, 2.0, 3.0, 0.5])

    def quartic(v):
        return jnp.sum(coefficients.astype(v.dtype) * v**2) + v[0] * v[1] * v[2] ** 2 * v[3]

    def loss(w, scale):
        real = [w["half"], w["z"].real, w["z"].imag, w["x"]]
        value = quartic(jnp.stack([x.astype(jnp.float32) for x in real]))
        return scale * (value + 0 * w["count"])

    def measures(f, w):
        exact = sharpness.exact_sam_gradient(f, w, metric_ball(0.1))
        return exact, sharpness.first_order(f, w, metric_ball(0.1))

    v = jnp.array([0.5, 1.0, -0.75, 1.25])
    w = {
        "half": v[0].astype(jnp.bfloat16),
        "z": jax.lax.complex(v[1], v[2]).astype(jnp.complex64),
        "x": v[3].astype(jnp.float32),
        "count": jnp.array(3),
    }
    found_at = jax.jit(lambda w, scale: measures(lambda w: loss(w, scale), w))
    wanted, wanted_rise = jax.jit(lambda v: measures(quartic, v))(v)
    for scale in map(np.float32, (1e-25, 1.0, 1e25)):
        found, rise = found_at(w, scale)
        np.testing.assert_allclose(found.cosine, wanted.cosine, rtol=1e-5)
        np.testing.assert_allclose(np.float64(rise) / scale, wanted_rise, rtol=2e-5)
        for tree, flat in zip(found[:2], wanted[:2], strict=True):
            assert tree["half"].dtype == jnp.float32
            numbers = [tree["half"], tree["z"].real, tree["z"].imag, tree["x"]]
            np.testing.assert_allclose(np.float64(numbers) / scale, flat, rtol=2e-5)


def test_other_parameters_at_once():
    """Over seeds by `vmap`, with numbers of Python as parameters of a plain loss."""

    def loss(w):
        return w["a"] ** 2 * w["b"] + w["b"] ** 3

    def measures(w):
        exact = sharpness.exact_sam_gradient(loss, w, metric_ball(0.1))
        return sharpness.first_order(loss, w, metric_ball(0.1)), exact

    seeds = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([0.5, 0.1])}
    found = jax.jit(jax.vmap(measures))(seeds)
    alone = jax.jit(lambda: [measures({"a": 1.0, "b": 0.5}), measures({"a": 2.0, "b": 0.1})])
    for i, wanted in enumerate(alone()):
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], found), wanted) < 1e-12


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
