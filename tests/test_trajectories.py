"""Every variant takes the very steps that the authors' own code took, in float64.

First the recorded runs, then configurations that were not recorded, against the independent loops
of `reference.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference

import samx
from samx.perturbations import layerwise, linf_ball, magnitude, metric_ball, on_leaves

pytestmark = pytest.mark.usefixtures("float64")

SGD, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
ADAMW = optax.adamw(0.01, weight_decay=0.01)
COSINE = (0.1, 0.075, 0.025)  # one learning rate for each epoch of four batches


def cosine(step):
    return jnp.asarray(COSINE)[step // 4]


def decayed(base, weight_decay=5e-4):
    return optax.chain(optax.add_decayed_weights(weight_decay), base)


def sampa(base, *args, **kwargs):
    batch_like = jax.eval_shape(lambda: problem.batch_at(problem.make()[0], 0))
    return samx.sampa(base, *args, batch_like=batch_like, **kwargs)


def normalization_only(path, leaf):
    return path[-1].key in ("g", "c")


RECORDED = {
    "base__sgd": lambda: SGD,
    "base__sgdm": lambda: MOMENTUM,
    "base__adamw": lambda: ADAMW,
    "sam__sgd_rho0.05": lambda: optax.chain(samx.sam(), SGD),
    "sam__sgdm_rho0.5": lambda: optax.chain(samx.sam(0.5), MOMENTUM),
    "sam__adamw_rho0.05": lambda: optax.chain(samx.sam(0.05), ADAMW),
    "asam__sgdm_rho0.5_eta0.01": lambda: optax.chain(samx.asam(), MOMENTUM),
    "samon__ln_sgdm": lambda: optax.chain(
        samx.sharpness_aware(on_leaves(metric_ball(0.5), normalization_only)), MOMENTUM
    ),
    "sampa__sgd_lam0.2_rho0.1": lambda: sampa(SGD),
    "sampa__sgdm_lam0.2_rho0.1": lambda: sampa(MOMENTUM, 0.1, 0.2),
    "sampa__sgdm_wd5e-4_cosine_lam0.2_rho0.1": lambda: sampa(
        decayed(optax.sgd(cosine, momentum=0.9))
    ),
}


def assert_same(trajectory, expected, tolerance=1e-10):
    assert trajectory.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(trajectory[name], expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_run_of_the_authors_code(name):
    expected, _ = problem.load(name)
    make = problem.make_layer_norm if name.startswith("samon") else problem.make
    assert_same(problem.train(RECORDED[name](), problem=make), expected)


def test_every_recorded_run_is_used():
    assert {file.stem for file in problem.TRAJECTORIES.glob("*.npz")} == set(RECORDED)


# Configurations that nobody recorded: optax base, its reference.
STEPS = 30
BASES = {
    "nesterov": (
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        lambda: reference.SGD(0.1, 0.9, nesterov=True),
    ),
    "adam": (optax.adam(0.01), lambda: reference.Adam(0.01)),
    "adamw": (ADAMW, lambda: reference.Adam(0.01, weight_decay=0.01)),
    "momentum and decay": (
        decayed(MOMENTUM),
        lambda: reference.SGD(0.1, 0.9, weight_decay=5e-4),
    ),
    "sgd, decay and cosine": (
        decayed(optax.sgd(optax.cosine_decay_schedule(0.1, STEPS))),
        lambda: reference.SGD(lambda t: 0.05 * (1 + np.cos(np.pi * t / STEPS)), weight_decay=5e-4),
    ),
}
WEIGHTS = {"W1", "W2"}
SAMS = {
    "sam 0.2": (lambda: samx.sam(0.2), reference.ball(0.2), 1),
    "asam 1.0, eta 0": (
        lambda: samx.asam(1.0, eta=0.0),
        reference.adaptive_ball(1.0, 0.0, WEIGHTS),
        1,
    ),
    "asam on every leaf": (
        lambda: samx.asam(2.0, eta=0.1, is_scaled=lambda path, leaf: True),
        reference.adaptive_ball(2.0, 0.1, WEIGHTS | {"b1", "b2"}),
        1,
    ),
    "two ascent steps": (
        lambda: samx.sharpness_aware(metric_ball(0.1), ascent_steps=2),
        reference.ball(0.1),
        2,
    ),
    "three adaptive ascent steps": (
        lambda: samx.sharpness_aware(metric_ball(0.2, magnitude(0.05)), ascent_steps=3),
        reference.adaptive_ball(0.2, 0.05, WEIGHTS),
        3,
    ),
    "l-infinity": (lambda: samx.sharpness_aware(linf_ball(0.01)), reference.sign_ball(0.01), 1),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", SAMS)
def test_sam_against_reference(variant, base):
    make, perturb, ascent_steps = SAMS[variant]
    tx, make_reference = BASES[base]
    expected = reference.train_sam(make_reference(), perturb, STEPS, ascent_steps)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


@pytest.mark.parametrize(
    ("lam", "gradients"), [(0.0, "vmap"), (0.2, "separate"), (0.5, "vmap"), (1.0, "separate")]
)
@pytest.mark.parametrize("base", BASES)
def test_sampa_against_reference(base, lam, gradients):
    tx, make_reference = BASES[base]
    expected = reference.train_sampa(make_reference(), 0.3, lam, STEPS)
    assert_same(problem.train(sampa(tx, 0.3, lam, gradients=gradients), STEPS), expected)


def test_l2_inside_the_loss_is_part_of_the_ascent():
    def losses_fn(params, batch):
        squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
        return problem.losses_fn(params, batch) + 0.5 * 1e-2 * squares

    base = reference.SGD(0.1, 0.9, nesterov=True)
    expected = reference.train_sam(base, reference.ball(0.1), STEPS, losses_fn=losses_fn)
    tx = optax.chain(samx.sam(0.1), BASES["nesterov"][0])
    assert_same(problem.train(tx, STEPS, losses_fn=losses_fn), expected)
    outside = problem.train(optax.chain(samx.sam(0.1), decayed(BASES["nesterov"][0], 1e-2)), STEPS)
    assert np.abs(outside["W1"] - expected["W1"]).max() > 1e-6


def test_schedules_follow_the_step():
    schedule = optax.linear_schedule(0.0, 0.3, STEPS)
    radii = [float(schedule(t)) for t in range(STEPS)]
    perturb = [reference.ball(rho) for rho in radii]
    expected = reference.train_sam(reference.SGD(0.1, 0.9), perturb, STEPS)
    assert_same(problem.train(optax.chain(samx.sam(schedule), MOMENTUM), STEPS), expected)
    expected = reference.train_sampa(reference.SGD(0.1, 0.9), radii, radii, STEPS)
    assert_same(problem.train(sampa(MOMENTUM, schedule, schedule), STEPS), expected)


def test_layerwise_metric_by_hand():
    """The SAM-ON code has T = ‖w‖ (1 + eta): our radius times (1 + eta), with eta = 0."""
    data, params = problem.make()
    g = jax.grad(lambda p: problem.losses_fn(p, problem.batch_at(data, 0)).mean())(params)
    g, w = jax.tree.map(np.asarray, (g, params))
    scales = {k: np.linalg.norm(w[k]) * 1.01 for k in w}
    length = np.sqrt(sum(scales[k] ** 2 * np.sum(g[k] ** 2) for k in g))
    ball = metric_ball(0.3 * 1.01, layerwise(is_scaled=lambda path, leaf: True))
    eps, _ = ball.update(g, ball.init(params), params)
    for name in g:
        expected = 0.3 * scales[name] ** 2 * g[name] / length
        np.testing.assert_allclose(eps[name], expected, rtol=1e-12)
