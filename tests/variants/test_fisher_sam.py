"""Fisher SAM's ball: its metric, its radius schedule, and a zero gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx

ETA = 4.0


def perturbation_of(tx, state, g):
    """Return the perturbation of a step; the gradient of this loss is the point itself."""
    g_s, state = tx.update(g, state, jnp.zeros_like(g), value_fn=lambda w: 0.5 * w @ w)
    return g_s, state


def test_the_step_ends_on_the_ball_at_every_step_of_a_schedule(float64):
    del float64
    radii = [0.3, 0.2, 0.1, 0.1]
    tx = samx.fisher_sam(optax.linear_schedule(0.3, 0.1, 2), ETA)
    g, state = jnp.array([0.5, -2.0, 1e-3]), tx.init(jnp.zeros(3))
    for rho in radii:
        eps, state = perturbation_of(tx, state, g)
        np.testing.assert_allclose(jnp.sum(eps**2 * (1 + ETA * g**2)), rho**2, rtol=1e-10)
        direction = g / (1 + ETA * g**2)
        np.testing.assert_allclose(
            eps / jnp.linalg.norm(eps), direction / jnp.linalg.norm(direction)
        )


def test_no_gradient_no_step():
    tx = samx.fisher_sam(0.1)
    eps, _ = perturbation_of(tx, tx.init(jnp.zeros(3)), jnp.zeros(3))
    assert not np.any(eps)


def test_a_complex_gradient_climbs(float64):
    """A complex parameter is two real ones, but the metric sees its squared magnitude."""
    del float64
    w = jnp.array([1.0 + 2.0j, -0.5j])
    tx = samx.fisher_sam(0.2, ETA)

    def loss(w):
        return jnp.sum(jnp.abs(w) ** 2)

    g = jnp.conj(jax.grad(loss)(w))
    _, state = tx.update(g, tx.init(w), w, value=loss(w), value_fn=loss)
    assert state.readings.sharp_loss > state.readings.loss


def test_eta_has_no_schedule():
    with pytest.raises(TypeError, match="`eta` must be a number, got the function"):
        samx.fisher_sam(0.1, lambda step: 1.0)


@pytest.mark.parametrize("eta", [-1.0, -1e-9])
def test_eta_is_not_negative(eta):
    with pytest.raises(ValueError, match="`eta` must be at least 0"):
        samx.fisher_sam(0.1, eta)


def test_half_precision_parameters_see_the_step():
    data, params = problem.make(jnp.bfloat16)
    batch = problem.batch_at(data, 0)

    def loss(params):
        return problem.losses_fn(params, batch).astype(jnp.float32).mean()

    @jax.jit
    def readings(params):
        tx, (value, g) = samx.all_readings(samx.fisher_sam(0.05)), jax.value_and_grad(loss)(params)
        return tx.update(g, tx.init(params), params, value=value, value_fn=loss)[1].readings

    assert readings(params).perturbation_norm > 0.03
