"""`perturbations.ball`: what a user's own geometry gets without asking."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from samx.perturbations import ball


def seen_by(rho, g, params=None, climb=None, steps=1):
    """What a climb is called with, and the perturbation of the last step."""
    seen = []

    def watched(g, params, radius):
        seen.append((g, params, radius))
        return climb(g, params, radius) if climb else jax.tree.map(lambda x: x * radius, g)

    perturbation = ball(rho, watched)
    state = perturbation.init(params)
    for _ in range(steps):
        eps, state = perturbation.update(g, state, params, value_fn=None, batch=3)
    return seen[-1], eps


def test_half_precision_is_widened_and_the_rest_stays():
    g = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2), "count": jnp.zeros(2, int)}
    (seen, params, radius), eps = seen_by(0.5, g, params=g)
    assert params is g
    assert radius == 0.5
    dtypes = {"half": jnp.float32, "single": jnp.float32, "count": seen["count"].dtype}
    assert {name: x.dtype for name, x in seen.items()} == dtypes
    chex.assert_trees_all_equal_shapes_and_dtypes(eps, seen)


def test_a_complex_gradient_is_climbed_as_it_comes():
    """As everywhere in optax, the caller has conjugated it."""
    (seen, *_), eps = seen_by(2.0, jnp.array([1.0 + 2.0j]))
    np.testing.assert_array_equal(seen, [1.0 + 2.0j])
    np.testing.assert_array_equal(eps, [2.0 + 4.0j])


def test_a_wider_radius_does_not_widen_the_step(float64):
    """A strong float64 radius, as `optax.inject_hyperparams` passes it, and float32 parameters."""
    del float64
    _, eps = seen_by(jnp.asarray(0.1, jnp.float64), jnp.ones(3, jnp.float32))
    assert eps.dtype == jnp.float32


def test_the_radius_follows_its_schedule():
    radii = [seen_by(lambda step: 0.1 * (1 + step), jnp.ones(1), steps=t)[0][2] for t in (1, 2, 3)]
    np.testing.assert_allclose(radii, [0.1, 0.2, 0.3], rtol=1e-6)


def test_any_variant_takes_it():
    """LookSAM with a user's geometry: here the sign of the gradient."""
    signs = ball(0.1, lambda g, params, rho: jax.tree.map(lambda x: rho * jnp.sign(x), g))
    tx = samx.all_readings(samx.looksam(perturbation=signs, period=2))
    w = jnp.array([1.0, -2.0])
    _, state = tx.update(w, tx.init(w), w, value=0.0, value_fn=lambda w: 0.5 * w @ w)
    norm = optax.tree.get(state, "perturbation_norm")
    np.testing.assert_allclose(norm, 0.1 * np.sqrt(2), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ball(-0.1, lambda g, w, r: g), ValueError, "`rho` must be at least 0, got -0.1"),
        (lambda: ball("0.1", lambda g, w, r: g), TypeError, "`rho` must be a number or a schedule"),
        (lambda: ball(0.1, 3), TypeError, "`climb` must be a function, got 3"),
    ],
)
def test_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
