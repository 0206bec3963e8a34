"""The average rise and the smoothed loss: recorded draws, closed forms, standard errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measured import REFERENCE, net_loss, net_params, net_tree, quadratic

from samx import sharpness
from samx.perturbations import layerwise, magnitude

pytestmark = pytest.mark.usefixtures("float64")

RADII = (0.01, 0.05, 0.1)


def elementwise():
    return magnitude(0.0, is_scaled=lambda path, leaf: True)


def test_recorded_draws_give_the_recorded_rises():
    """In one program for all radii, with and without a metric."""
    f, w = net_loss(num_batches=7), net_params()

    @jax.jit
    def rises(draws):
        def rise(rho):
            plain = sharpness.average_case(f, w, rho, draws=draws)
            adaptive = sharpness.average_case(f, w, rho, metric=elementwise(), draws=draws)
            return plain.mean, adaptive.mean

        return jax.vmap(rise)(jnp.array(RADII))

    for noise, ball in (("normal", "l2"), ("uniform", "linf")):
        found = rises(net_tree(REFERENCE[f"net/average/{noise}_draws"]))
        for kind, values in zip(("average", "average_adaptive"), found, strict=True):
            wanted = [REFERENCE[f"net/{kind}/{ball}_rho{rho}_100draws"] for rho in RADII]
            np.testing.assert_allclose(values, wanted, rtol=1e-10, atol=1e-13)


def test_the_smoothed_loss_agrees_with_400000_recorded_pairs():
    f, w = net_loss(), net_params()
    smoothed = jax.vmap(lambda sigma: sharpness.smoothed(f, w, sigma, draws=200, key=1))
    mean, stderr = jax.jit(smoothed)(jnp.array(RADII))
    for i, sigma in enumerate(RADII):
        value, recorded_stderr, _ = REFERENCE[f"net/gaussian_smoothed/sigma{sigma}"]
        assert abs(mean[i] - value) < 3 * np.hypot(stderr[i], recorded_stderr)
        assert stderr[i] < 0.05 * (value - REFERENCE["net/loss"])


@pytest.fixture(scope="module")
def many_trials():
    """Estimates with 200 keys on quadratics, and their closed forms."""
    with jax.enable_x64(True):
        f, w, a, _ = quadratic("indefinite")
        flat = jnp.concatenate([w["a"].reshape(-1), w["b"]])
        trace, adaptive = jnp.trace(a), jnp.sum(jnp.diag(a) * flat**2)

        def estimates(key):
            return {
                "normal": sharpness.average_case(f, w, 0.1, key=key),
                "uniform": sharpness.average_case(f, w, 0.1, noise="uniform", key=key),
                "adaptive": sharpness.average_case(f, w, 0.1, metric=elementwise(), key=key),
                "smoothed": sharpness.smoothed(f, w, 0.1, key=key),
            }

        exact = {
            "normal": 0.005 * trace,
            "uniform": 0.01 / 6 * trace,
            "adaptive": 0.005 * adaptive,
            "smoothed": f(w) + 0.005 * trace,
        }
        for name, key in (("normal", "average/l2"), ("adaptive", "average_adaptive/l2")):
            np.testing.assert_allclose(exact[name], REFERENCE[f"quad/indefinite/{key}_rho0.1"])
        keys = jax.random.split(jax.random.key(3), 200)
        return jax.jit(jax.vmap(estimates))(keys), exact


@pytest.mark.parametrize("name", ["normal", "uniform", "adaptive", "smoothed"])
def test_standard_errors_cover_the_closed_form(many_trials, name):
    found, exact = many_trials[0][name], many_trials[1][name]
    misses = np.abs(found.mean - exact) / found.stderr
    assert 0.91 < np.mean(misses < 1.96) < 0.99
    assert abs(np.mean(found.mean) - exact) < 4 * np.std(found.mean) / np.sqrt(200)
    np.testing.assert_allclose(np.mean(found.stderr), np.std(found.mean), rtol=0.2)


def test_a_pair_cancels_the_gradient():
    """The smoothed loss has a smaller standard error; a linear loss is not smoothed at all."""
    f, w, _, _ = quadratic()

    def linear(w):
        return jnp.sum(w["a"]) - 2 * w["b"][1]

    @jax.jit
    def estimates():
        plain = sharpness.average_case(f, w, 0.01, draws=20)
        straight = sharpness.smoothed(linear, w, 0.5, draws=3)
        return plain, sharpness.smoothed(f, w, 0.01, draws=20), straight, linear(w)

    plain, smoothed, straight, wanted = estimates()
    assert smoothed.stderr < 0.1 * plain.stderr
    np.testing.assert_allclose(straight, [wanted, 0], rtol=1e-13, atol=1e-13)


def test_the_first_draw_of_smoothed_is_that_of_average_case():
    """Both are means over the same normal draws, so even losses give the same numbers."""
    w = {"a": jnp.zeros(3)}

    @jax.jit
    def estimates(key):
        found = sharpness.smoothed(loss, w, 0.3, draws=5, key=key)
        return found, sharpness.average_case(loss, w, 0.3, draws=5, key=key)

    np.testing.assert_allclose(*estimates(2), rtol=1e-12)


def test_a_metric_may_return_numbers_scalars_and_arrays():
    w = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([2.0]), "c": jnp.array([1.0])}
    draws = {"a": jnp.array([[1.0, 2.0], [0, 0]]), "b": jnp.ones((2, 1)), "c": jnp.ones((2, 1))}

    def loss(w):
        return jnp.sum(w["a"]) + 10 * w["b"][0] + 100 * w["c"][0]

    def metric(params):
        return {"a": layerwise()(params)["a"], "b": 2, "c": jnp.abs(params["c"])}

    measure = jax.jit(lambda: sharpness.average_case(loss, w, 0.1, metric=metric, draws=draws))
    mean, stderr = measure()
    np.testing.assert_allclose(mean, 0.1 * (5 * 3 / 2 + 10 * 2 + 100 * 1))
    np.testing.assert_allclose(stderr, 0.1 * 15 / 2)


def test_other_dtypes():
    """Half precision moves in float32, a complex number in two directions, an integer not."""
    w = {
        "half": jnp.ones(1, jnp.bfloat16),
        "complex": jnp.ones(1, jnp.complex64),
        "count": jnp.array([7]),
    }

    def loss(w):
        wide = w["half"].astype(jnp.float32)
        return jnp.sum(wide**2) + jnp.sum(jnp.abs(w["complex"]) ** 2) + 0.0 * w["count"][0]

    def estimate(key):
        return sharpness.average_case(loss, w, 0.001, metric=elementwise(), draws=30, key=key)

    found = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 200))
    assert found.mean.dtype == jnp.float32
    # Three directions with curvature 2; for the slope 2, in two of them: 2 ρ √(2 / draws).
    np.testing.assert_allclose(np.mean(found.stderr), 0.002 * np.sqrt(2 / 30), rtol=0.05)
    assert 0.9 < np.mean(np.abs(found.mean - 3e-6) < 2.05 * found.stderr) < 0.99


def test_float32_subtracts_the_losses_of_examples():
    """The rounding errors of the mean loss are ten times as large as those of its rises."""
    rng = np.random.RandomState(0)
    x, y = rng.randn(1024, 5).astype(np.float32), 1 + rng.rand(1024).astype(np.float32)
    w, draws = rng.randint(-200, 200, 5) / 2**7, rng.randint(-200, 200, (20, 1, 5)) / 2**7

    def losses(w, batch):
        return (batch["y"] - batch["x"] @ w) ** 2

    def rises(dtype, mean_of=None):
        batch, start = {"x": x.astype(dtype), "y": y.astype(dtype)}, w.astype(dtype)
        f = sharpness.objective(losses_fn=losses, batch=batch)
        if mean_of is not None:
            f = sharpness.objective(value_fn=lambda w: mean_of(losses(w, batch)))

        def rise(draw):  # w + ρ n is exact in float32
            return sharpness.average_case(f, start, 2**-10, draws=jnp.repeat(draw, 2, 0)).mean

        return jax.jit(jax.vmap(rise))(draws.astype(dtype))

    exact = rises(np.float64)
    errors = [np.std(x - exact) for x in (rises(np.float32), rises(np.float32, jnp.mean))]
    assert errors[0] < 3e-5 * np.std(exact)
    assert errors[0] < 0.3 * errors[1]


def test_a_radius_of_zero_and_a_constant_loss():
    f, w, _, _ = quadratic()

    @jax.jit
    def estimates():
        constant = sharpness.smoothed(lambda w: 0 * w["b"][0] + 3.0, w, 1.0, draws=2)
        return sharpness.average_case(f, w, 0.0, draws=2), constant

    np.testing.assert_array_equal(estimates(), [(0, 0), (3, 0)])


def loss(w):
    return w["a"] @ w["a"]


PARAMS = {"a": np.ones(3)}


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "`rho` must be at least 0", lambda s: s.average_case(loss, PARAMS, -1.0)),
        (TypeError, "`rho` must be a number", lambda s: s.average_case(loss, PARAMS, "much")),
        (ValueError, "`sigma` must be at least 0", lambda s: s.smoothed(loss, PARAMS, -0.1)),
        (
            ValueError,
            "`noise` must be 'normal' or 'uniform', got 'laplace'",
            lambda s: s.average_case(loss, PARAMS, 0.1, noise="laplace"),
        ),
        (
            ValueError,
            "average_case: `metric` must return the structure",
            lambda s: s.average_case(loss, PARAMS, 0.1, metric=lambda params: 1.0),
        ),
        (TypeError, "`metric` must be", lambda s: s.average_case(loss, PARAMS, 0.1, metric=2.0)),
        (ValueError, "`draws` must be at least 2", lambda s: s.smoothed(loss, PARAMS, 1, draws=1)),
        (
            ValueError,
            r"smoothed: `draws`\['a'\] must have the shape of `params`",
            lambda s: s.smoothed(loss, PARAMS, 1, draws={"a": np.ones((2, 4))}),
        ),
        (TypeError, "smoothed: `f` must be a loss", lambda s: s.smoothed(1.0, PARAMS, 1)),
        (TypeError, "`key` must be a seed", lambda s: s.average_case(loss, PARAMS, 1, key="a")),
        (
            ValueError,
            "average_case: `params` must hold floating numbers",
            lambda s: s.average_case(loss, {"a": np.arange(3)}, 1),
        ),
    ],
)
def test_bad_input(error, words, call):
    with pytest.raises(error, match=words):
        call(sharpness)
