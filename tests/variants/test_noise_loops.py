"""Variants that move by noise, against independent loops, their draws replayed.

No recorded run has these settings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from loops import BASES
from recorded import assert_same, patch_normals, watch

import samx
from samx.perturbations import filterwise, gaussian_noise, sphere_noise

pytestmark = pytest.mark.usefixtures("float64")

STEPS, MOST = 6, 4  # microbatches


def make_draws():
    rng, params = np.random.default_rng(3), problem.make(np.float32)[1]
    return {k: rng.normal(size=(STEPS, MOST, *w.shape)) for k, w in params.items()}


DRAWS = make_draws()


def rising(first):
    """A schedule, and its values."""
    return lambda step: first * (1 + step), [first * (1 + t) for t in range(STEPS)]


def per_tensor(params):
    """A metric by hand: the root mean square of each tensor, its noise is relative to it."""
    return {k: jnp.linalg.norm(w) / w.size**0.5 for k, w in params.items()}


def per_tensor_by_hand(params):
    return {k: np.sqrt(np.mean(w**2)) for k, w in params.items()}


def rms(params):
    return reference.filter_norms(params, is_rms=True)


def of_filters(sigma):
    return reference.gaussian(sigma, reference.filter_norms)


def constant(value):
    return [value] * STEPS


SIGMA, SIGMAS = rising(0.01)
ETA, ETAS = rising(0.3)
DECAY, DECAYS = rising(0.15)
SHARE, SHARES = rising(0.1)
LOOPS = {  # samx, the reference, base
    "lpf_sgd of four draws": (
        lambda: samx.lpf_sgd(SIGMA, 4),
        lambda: reference.lpf_sgd(of_filters(SIGMAS), DRAWS, 4),
        "adam",
    ),
    "lpf_sgd, Gaussian": (
        lambda: samx.lpf_sgd(num_microbatches=2, noise=gaussian_noise(0.1)),
        lambda: reference.lpf_sgd(reference.gaussian(0.1), DRAWS, 2),
        "nesterov",
    ),
    "lpf_sgd, root mean squares of filters": (
        lambda: samx.lpf_sgd(noise=gaussian_noise(SIGMA, filterwise("rms"))),
        lambda: reference.lpf_sgd(reference.gaussian(SIGMAS, rms), DRAWS, 1),
        "nesterov",
    ),
    "lpf_sgd, relative to each tensor": (
        lambda: samx.lpf_sgd(noise=gaussian_noise(0.1, per_tensor)),
        lambda: reference.lpf_sgd(reference.gaussian(0.1, per_tensor_by_hand), DRAWS, 1),
        "nesterov",
    ),
    "lpf_sgd, on a sphere with a metric": (
        lambda: samx.lpf_sgd(num_microbatches=2, noise=sphere_noise(3.0, per_tensor)),
        lambda: reference.lpf_sgd(reference.sphere(3.0, per_tensor_by_hand), DRAWS, 2),
        "momentum and decay",
    ),
    "rwp": (
        lambda: samx.rwp(SIGMA, 0.3),
        lambda: reference.rwp(of_filters(SIGMAS), DRAWS, 0.3),
        "adam",
    ),
    "rwp, Gaussian, a rising share": (
        lambda: samx.rwp(alpha=SHARE, noise=gaussian_noise(0.1)),
        lambda: reference.rwp(reference.gaussian(0.1), DRAWS, SHARES),
        "nesterov",
    ),
    "arwp, schedules": (
        lambda: samx.arwp(SIGMA, ETA, DECAY),
        lambda: reference.ARWP(DRAWS, SIGMAS, ETAS, DECAYS),
        "nesterov",
    ),
    "marwp": (
        lambda: samx.marwp(0.05, 0.1, 0.99, 0.3),
        lambda: reference.ARWP(DRAWS, *map(constant, (0.05, 0.1, 0.99, 0.3))),
        "adam",
    ),
    "marwp, schedules": (
        lambda: samx.marwp(SIGMA, ETA, DECAY, SHARE),
        lambda: reference.ARWP(DRAWS, SIGMAS, ETAS, DECAYS, SHARES),
        "nesterov",
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_noise_against_reference(name, monkeypatch):
    make, noisy_gradient, base = LOOPS[name]
    (tx, make_reference), loop = BASES[base], noisy_gradient()
    expected = reference.train_on_examples(make_reference(), loop, STEPS)
    patch_normals(DRAWS, monkeypatch)
    trajectory, fisher = watch(optax.chain(make(), tx), STEPS, "fisher")
    assert_same(trajectory, expected, 1e-12)
    if "arwp" in name:
        assert_same(fisher, reference._stack(loop.seen), 1e-11)


BSAM = {  # samx, the reference
    "four draws, no prior": (
        {"num_microbatches": 4, "prior_precision": 0.0, "b1": 0.5, "b2": 0.9, "damping": 0.01},
        {"num_microbatches": 4, "prior": 0.0, "b1": 0.5, "b2": 0.9, "damping": 0.01},
    ),
    "schedules, a strong prior": (
        {"num_microbatches": 2, "prior_precision": 6.4, "init_precision": 3.0, "b1": 0.95},
        {"num_microbatches": 2, "prior": 6.4, "start": 3.0, "b1": 0.95},
    ),
}


@pytest.mark.parametrize("name", BSAM)
def test_bsam_against_reference(name, monkeypatch):
    ours, theirs = BSAM[name]
    rate, rho = 0.05, 0.1
    if "schedules" in name:
        rate, rho = (lambda t: 0.3 / (1 + t)), (lambda t: 0.02 * (1 + t))
    patch_normals(DRAWS, monkeypatch)
    expected, precisions = reference.train_bsam(DRAWS, rate, rho, STEPS, num_examples=9.0, **theirs)
    trajectory, precision = watch(samx.bsam(rate, 9.0, rho, **ours), STEPS, "precision")
    assert_same(trajectory, expected, 1e-12)
    assert_same(precision, precisions, 1e-12)


def test_arwp_keeps_the_aux_at_the_moved_point(monkeypatch):
    """A gradient that is not finite does not enter its state."""
    params, batch = problem.make()[1], problem.batch_at(problem.make()[0], 0)
    patch_normals(DRAWS, monkeypatch)
    tx = samx.arwp(0.05, aux_like={"b1": params["b1"]})

    @jax.jit
    def update(factor, state):
        def value_fn(params):
            return factor * problem.losses_fn(params, batch).mean(), {"b1": params["b1"]}

        return tx.update(params, state, params, value_fn=value_fn)

    updates, state = update(1.0, tx.init(params))
    b1 = np.asarray(params["b1"])
    moved = b1 + 0.05 * np.linalg.norm(b1) * DRAWS["b1"][0, 0]
    np.testing.assert_allclose(state.aux["b1"], moved, rtol=1e-13)
    np.testing.assert_allclose(state.readings.grad_norm, reference.global_norm(updates), rtol=1e-6)
    assert float(state.readings.loss) == float(state.readings.sharp_loss)
    _, after = update(np.nan, state)
    assert int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after.fisher, state.fisher)
