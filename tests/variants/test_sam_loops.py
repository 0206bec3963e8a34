"""SAM in several geometries, and SAMPa, against independent loops, with several bases."""

import jax
import numpy as np
import optax
import problem
import pytest
import reference
from identities import gradient
from loops import BASES, STEPS, WEIGHTS
from recorded import BATCH_LIKE, assert_same

import samx
from samx.perturbations import (
    layerwise,
    magnitude,
    metric_ball,
)

pytestmark = pytest.mark.usefixtures("float64")


SAMS = {  # samx, the reference's perturbation, ascent steps, base
    "sam 0.2": (lambda: samx.sam(0.2), reference.ball(0.2), 1, "sgd, decay and cosine"),
    "asam 1.0, eta 0": (
        lambda: samx.asam(1.0, eta=0.0),
        reference.adaptive_ball(1.0, 0.0, WEIGHTS),
        1,
        "adam",
    ),
    "asam on every leaf": (
        lambda: samx.asam(2.0, eta=0.1, is_scaled=lambda path, leaf: True),
        reference.adaptive_ball(2.0, 0.1, WEIGHTS | {"b1", "b2"}),
        1,
        "adamw",
    ),
    "three adaptive ascent steps": (
        lambda: samx.sharpness_aware(metric_ball(0.2, magnitude(0.05)), ascent_steps=3),
        reference.adaptive_ball(0.2, 0.05, WEIGHTS),
        3,
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", SAMS)
def test_sam_against_reference(name):
    make, perturb, ascent_steps, base = SAMS[name]
    tx, make_reference = BASES[base]
    expected = reference.train_sam(make_reference(), perturb, STEPS, ascent_steps)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


@pytest.mark.parametrize(
    ("lam", "gradients", "base"),
    [
        (0.0, "vmap", "adam"),
        (0.5, "separate", "momentum and decay"),
        (1.0, "vmap", "sgd, decay and cosine"),
    ],
)
def test_sampa_against_reference(lam, gradients, base):
    tx, make_reference = BASES[base]
    expected = reference.train_sampa(make_reference(), 0.3, lam, STEPS)
    sampa = samx.sampa(tx, 0.3, lam, batch_like=BATCH_LIKE, gradients=gradients)
    assert_same(problem.train(sampa, STEPS), expected)


def test_l2_inside_the_loss_is_part_of_the_ascent():
    def losses_fn(params, batch):
        squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
        return problem.losses_fn(params, batch) + 0.5 * 1e-2 * squares

    base = reference.SGD(0.1, 0.9, nesterov=True)
    expected = reference.train_sam(base, reference.ball(0.1), STEPS, losses_fn=losses_fn)
    tx = optax.chain(samx.sam(0.1), BASES["nesterov"][0])
    assert_same(problem.train(tx, STEPS, losses_fn=losses_fn), expected)
    base = reference.SGD(0.1, 0.9, nesterov=True, weight_decay=1e-2)
    outside = reference.train_sam(base, reference.ball(0.1), STEPS)
    assert np.abs(outside["W1"] - expected["W1"]).max() > 1e-6


def test_layerwise_metric_by_hand():
    """The SAM-ON code has T = ‖w‖ (1 + eta). Here: eta = 0, and the radius times (1 + eta)."""
    g, params = gradient()
    g, w = jax.tree.map(np.asarray, (g, params))
    scales = {k: np.linalg.norm(w[k]) * 1.01 for k in w}
    length = np.sqrt(sum(scales[k] ** 2 * np.sum(g[k] ** 2) for k in g))
    ball = metric_ball(0.3 * 1.01, layerwise(is_scaled=lambda path, leaf: True))
    eps, _ = jax.jit(ball.update)(g, ball.init(params), params)
    for name in g:
        expected = 0.3 * scales[name] ** 2 * g[name] / length
        np.testing.assert_allclose(eps[name], expected, rtol=1e-12)
