"""Limits and properties of variants that climb another direction, or move by noise: exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import assert_same_updates, batch_like, gradient, sam

import samx
from samx.combinations import mix
from samx.perturbations import filterwise, gaussian_noise, sphere_noise
from samx.schedules import one_minus_inverse, warmup_hold_cosine

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 6


def usam():
    return samx.usam(0.2)


def base():
    return optax.identity()


def noisy():
    return samx.lpf_sgd(0.05, key=3)


def saf(**changes):
    fixed = {"num_examples": 16, "logits_like": np.zeros(3), "steps_per_epoch": 1}
    return samx.saf(**fixed | {"lag": 1, "start": 0} | changes)


EQUAL = {
    "unified_sam, 1": (lambda: samx.unified_sam(0.2, 1.0), sam),
    "unified_sam, 0": (lambda: samx.unified_sam(0.2, 0.0), usam),
    "gnp, 1": (lambda: samx.gnp(0.2, 1.0), sam),
    "gnp, unit, 1": (lambda: samx.gnp(0.2, 1.0, clean="unit"), sam),
    "gnp, 0": (lambda: samx.gnp(0.2, 0.0), base),
    "sagm, 0": (lambda: samx.sagm(0.2, 0.0), lambda: mix(samx.sam(0.2), 0.5)),
    "eigen_sam, 0": (lambda: samx.eigen_sam(0.2, 0.0, every=2), sam),
    "eigen_sam, early": (lambda: samx.eigen_sam(0.2, every=STEPS), sam),
    "cr_sam, 0": (lambda: samx.cr_sam(0.2, 0.0, 0.0), sam),
    "xsam, 1": (lambda: samx.xsam(0.2, alpha=1.0), sam),
    "xsam, no ascent": (lambda: samx.xsam(0.0, every=2), base),
    "x_sam, early": (lambda: samx.x_sam(0.2, every=STEPS), sam),
    "tsam, one point": (lambda: samx.tsam(0.2, samples=1, radius=0.0), sam),
    "tsam, equal points": (lambda: samx.tsam(0.2, 5.0, radius=0.0), sam),
    "lookbehind_sam, 1": (lambda: samx.lookbehind_sam(base(), 0.2, 1, 1.0), sam),
    "gam, 0": (
        lambda: samx.gam(0.0, 0.2, beta0=0.3, gamma=0.1),
        lambda: samx.gsam(0.2, 0.17),
    ),
    "gam, 0 and 0": (lambda: samx.gam(0.0, 0.0, gamma=0.3), base),
    "gam_exact, rho 0": (lambda: samx.gam_exact(0.0, 0.5), base),
    "gam_exact, alpha 0": (lambda: samx.gam_exact(0.2, 0.0), base),
    "sam_polyak, bounded": (
        lambda: samx.sam_polyak(0.2, 1e-3, weight_decay=0.0),
        lambda: optax.chain(samx.sam(0.2), optax.sgd(1e-3)),
    ),
    "sassha, power 0": (
        lambda: samx.sassha(0.1, 0.2, power=0.0, eps=1e-300, weight_decay=0.1),
        lambda: optax.chain(
            samx.sam(0.2), optax.ema(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)
        ),
    ),
    "msassha, 0": (
        lambda: samx.msassha(0.1, 0.0, every=2),
        lambda: samx.sassha(0.1, 0.0, every=2, power=1.0, weight_decay=0.01),
    ),
    "lpf_sgd, 0": (lambda: samx.lpf_sgd(0.0, 4), base),
    "lpf_sgd on a sphere of no radius": (lambda: samx.lpf_sgd(noise=sphere_noise(0.0)), base),
    "rwp, 0": (lambda: samx.rwp(0.0, 0.5), base),
    "marwp, 0": (lambda: samx.marwp(0.0, lam=0.5), base),
    "arwp, eta 0": (lambda: samx.arwp(0.05, 0.0, key=3), noisy),
    "lpf_sgd, noise by hand": (
        lambda: samx.lpf_sgd(noise=gaussian_noise(0.05, filterwise(), key=3)),
        noisy,
    ),
    "saf, 0": (lambda: saf(lam=0.0), base),
    "saf, no epoch with a teacher": (lambda: saf(start=STEPS), base),
    "mesa, 0": (lambda: samx.mesa(0.0, steps_per_epoch=1, start=0), base),
    "mesa, decay 0": (lambda: samx.mesa(decay=0.0, steps_per_epoch=1, start=0), base),
    "marwp, eta 0": (
        lambda: samx.marwp(0.05, 0.0, lam=0.3, key=4),
        lambda: samx.rwp(0.05, 0.3, key=4),
    ),
}


def test_equal(monkeypatch):
    """Normal numbers take most of the compilation; any others that the key decides do too."""

    def waves(key, shape, dtype):
        number = 1 + jax.random.key_data(key).sum() % 997
        return jnp.cos(number * jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape)).astype(dtype)

    monkeypatch.setattr(jax.random, "normal", waves)
    pairs = [*EQUAL.items()]
    for start in range(4):  # four small programs compile faster than a large one
        assert_same_updates(dict(pairs[start::4]), 1e-14, STEPS)


def test_le_sam_whose_radius_is_reached_everywhere():
    """Its epsilon of 1e-12 inside the root makes the step a little shorter than SAM's."""
    assert_same_updates({"capped": (lambda: samx.le_sam(10.0, 0.2), sam)}, 1e-11, STEPS)


def test_le_sam_rises_by_sigma():
    """Below the largest radius, to first order, on every step, whatever the gradient's length."""
    (g, _), sigma = gradient(), optax.linear_schedule(0.3, 0.1, 4)
    perturbation = samx.perturbations.loss_rise_ball(sigma, None)
    state, update = perturbation.init(g), jax.jit(perturbation.update)
    for t, scale in enumerate([1.0, 1e-2, 1e3, 1e-4]):
        scaled = jax.tree.map(lambda x, scale=scale: scale * x, g)
        eps, state = update(scaled, state, g)
        square = float(optax.tree.norm(scaled, squared=True))
        expected = float(sigma(t)) * square / (square + 1e-12)
        np.testing.assert_allclose(float(optax.tree.vdot(scaled, eps)), expected, rtol=1e-13)


@functools.cache
def eigen_step():
    """Compile a step of Eigen-SAM after a refresh; return a function of the eigenvector."""
    (g, params), batch = gradient(), batch_like()
    tx = samx.all_readings(samx.eigen_sam(0.2, 0.7))

    @jax.jit
    def step(v):
        state = optax.tree.set(tx.init(params), eigenvector=v)
        closures = {"losses_fn": problem.losses_fn, "batch": batch}
        updates, state = tx.update(g, state, params, **closures)
        return updates, optax.tree.get(state, "perturbation_norm")

    return step


def unit(tree):
    return jax.tree.map(lambda x: x / optax.tree.norm(tree), tree)


def test_eigen_sam_does_not_see_the_sign_of_the_vector():
    _, params = gradient()
    v = unit(params)
    (found, _), (other, _) = eigen_step()(v), eigen_step()(jax.tree.map(jnp.negative, v))
    jax.tree.map(np.testing.assert_array_equal, found, other)


def test_eigen_sam_with_a_vector_along_the_gradient_is_sam():
    (g, params), batch, tx = gradient(), batch_like(), sam()
    found, norm = eigen_step()(unit(g))
    closures = {"losses_fn": problem.losses_fn, "batch": batch}
    expected = jax.jit(lambda: tx.update(g, tx.init(params), params, **closures)[0])()
    np.testing.assert_allclose(norm, 0.2, rtol=1e-13)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-13), found, expected)


def test_eigen_sam_is_longer_than_its_radius():
    g, params = gradient()
    v, u = unit(params), unit(g)
    across = 1 - float(optax.tree.vdot(u, v)) ** 2
    np.testing.assert_allclose(eigen_step()(v)[1], 0.2 * np.sqrt(1 + 0.7**2 * across), rtol=1e-12)


def test_x_sam_without_a_correction_is_sam_in_length_1():
    (_, params), batch = gradient(), batch_like()
    g = jax.grad(lambda w: problem.losses_fn(w, batch).mean())(params)
    closures = {"losses_fn": problem.losses_fn, "batch": batch}
    tx, theirs = samx.x_sam(0.2, 0.0), sam()
    state = optax.tree.set(tx.init(params), eigenvector=unit(params))
    found = jax.jit(lambda: tx.update(g, state, params, **closures)[0])()
    g_s = jax.jit(lambda: theirs.update(g, theirs.init(params), params, **closures)[0])()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-13), found, unit(g_s))


def test_every_update_of_xsam_is_as_long_as_the_sharp_gradient():
    (_, params), batch = gradient(), batch_like()
    g = jax.grad(lambda w: problem.losses_fn(w, batch).mean())(params)

    @jax.jit
    def length(alpha):
        tx = samx.all_readings(samx.xsam(0.2, alpha=alpha))
        closures = {"losses_fn": problem.losses_fn, "batch": batch}
        updates, state = tx.update(g, tx.init(params), params, **closures)
        return optax.tree.norm(updates) / optax.tree.get(state, "sharp_grad_norm")

    np.testing.assert_allclose([length(a) for a in (0.0, 0.4, 1.0, 7.0)], 1.0, rtol=1e-12)


def test_the_corners_of_the_schedule_of_le_sam():
    schedule = jax.jit(warmup_hold_cosine(0.4, 2, 5, 9))
    found = [float(schedule(t)) for t in (0, 1, 2, 4, 5, 7, 9, 20)]
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.4, 0.4, 0.2, 0, 0], atol=1e-15)
    fall = 0.2 * (1 + np.cos(np.pi / 4))
    np.testing.assert_allclose(float(schedule(6)), fall, rtol=1e-14)
    at_once = warmup_hold_cosine(0.4, 0, 0, 2)
    np.testing.assert_allclose([at_once(t) for t in range(4)], [0.4, 0.2, 0, 0], atol=1e-15)
    between = warmup_hold_cosine(1.0, 0.5, 0.5, 1.5)  # in epochs, not a whole number
    np.testing.assert_allclose([between(t) for t in (0.25, 0.5, 1.0)], [0.5, 1.0, 0.5], atol=1e-15)


def test_the_share_of_unified_sam():
    found = jax.vmap(one_minus_inverse)(jnp.arange(4))
    np.testing.assert_allclose(found, [0, 1 / 2, 2 / 3, 3 / 4], rtol=1e-15)
    assert found.dtype == jnp.float64
