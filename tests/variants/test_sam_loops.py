"""SAM in several geometries, and SAMPa, against independent loops, over all bases."""

import jax
import numpy as np
import optax
import problem
import pytest
import reference
from loops import BASES, MOMENTUM, STEPS, WEIGHTS, in_turn
from recorded import BATCH_LIKE, assert_same, decayed

import samx
from samx.perturbations import (
    layerwise,
    linf_ball,
    magnitude,
    metric_ball,
)

pytestmark = pytest.mark.usefixtures("float64")


def sampa(base, *arguments, **keywords):
    return samx.sampa(base, *arguments, batch_like=BATCH_LIKE, **keywords)


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


@pytest.mark.parametrize(("variant", "base"), in_turn(SAMS, "sam 0.2"))
def test_sam_against_reference(variant, base):
    make, perturb, ascent_steps = SAMS[variant]
    tx, make_reference = BASES[base]
    expected = reference.train_sam(make_reference(), perturb, STEPS, ascent_steps)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


@pytest.mark.parametrize(
    ("lam", "gradients", "base"),
    [
        (*row, base)
        for row, base in in_turn(
            [(0.0, "vmap"), (0.2, "separate"), (0.5, "vmap"), (1.0, "separate")], (0.5, "vmap")
        )
    ],
)
def test_sampa_against_reference(lam, gradients, base):
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
    """The SAM-ON code has T = ‖w‖ (1 + eta). Here: eta = 0, and the radius times (1 + eta)."""
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
