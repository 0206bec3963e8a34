"""Where the sharp gradient is taken, at which radius, and how it is combined: independent loops."""

import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from loops import ALL, BASES, EVERYWHERE, STEPS, WEIGHTS
from recorded import assert_same

import samx
from samx.perturbations import (
    magnitude,
    metric_ball,
    unnormalized_step,
)

pytestmark = pytest.mark.usefixtures("float64")

SCALES = {"W1": 3.0, "b1": 2.5, "W2": 0.5, "b2": 1.0}

LAYERWISE = {k: s / 3**0.5 for k, s in SCALES.items()}


def always(t, g, look):
    return look()


def friendly_ball(sigma, decay, *balls):
    return reference.Friendly(balls, sigma, decay)


# Other geometries and forms than those of the rows in `cases.py`, which have oracles of their own.
FORMULATIONS = {  # samx, the reference's perturbation and combination, base
    "gsam, adaptive": (
        lambda: samx.gsam(alpha=1.0, perturbation=metric_ball(1.0, EVERYWHERE)),
        lambda: reference.adaptive_ball(1.0, 0.0, ALL),
        reference.gsam(1.0),
        "adamw",
    ),
    "coupled_wsam, adaptive": (
        lambda: samx.coupled_wsam(gamma=0.3, perturbation=metric_ball(0.5, magnitude(0.1))),
        lambda: reference.adaptive_ball(0.5, 0.1, WEIGHTS),
        reference.weighted(0.3),
        "momentum and decay",
    ),
    "stable_sam, normalized": (
        lambda: samx.stable_sam(0.2, normalize=True),
        lambda: reference.ball(0.2),
        reference.renormalized,
        "nesterov",
    ),
    "un-normalized, adaptive": (
        lambda: samx.usam(perturbation=unnormalized_step(2.0, EVERYWHERE)),
        lambda: reference.adaptive_step(2.0, 0.0, ALL),
        always,
        "momentum and decay",
    ),
    "friendly_sam, adaptive": (
        lambda: samx.friendly_sam(perturbation=metric_ball(0.5, EVERYWHERE)),
        lambda: friendly_ball(1.0, 0.9, reference.adaptive_ball(0.5, 0.0, ALL)),
        always,
        "momentum and decay",
    ),
    "mup_sam, layerwise": (
        lambda: samx.mup_sam(0.2, SCALES, normalization="layerwise", width=3.0),
        lambda: reference.mup_ball(0.2, SCALES, LAYERWISE),
        always,
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", FORMULATIONS)
def test_formulations_against_reference(name):
    make, perturb, combine, base = FORMULATIONS[name]
    tx, make_reference = BASES[base]
    expected, _ = reference.train_gated(make_reference(), perturb(), combine, STEPS)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


def test_the_papers_order_of_friendly_sam_is_another_sigma():
    """As the docstring says: d = g − σ (λ m + (1 − λ) g), except for its length."""
    sigma, decay = 0.5, 0.8
    m, g = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    papers = g - sigma * (decay * m + (1 - decay) * g)
    ours = g - sigma * decay / (1 - sigma * (1 - decay)) * m
    np.testing.assert_allclose(papers / ours, 1 - sigma * (1 - decay), rtol=1e-12)


WSAMS = {  # base, learning rate, both ours and the reference's
    "adam": (BASES["adam"], 0.01, 0.01),
    "cosine": (
        BASES["sgd, decay and cosine"],
        lambda step: 0.05 * (1 + jnp.cos(jnp.pi * step / STEPS)),
        lambda t: 0.05 * (1 + np.cos(np.pi * t / STEPS)),
    ),
}


@pytest.mark.parametrize("name", WSAMS)
def test_wsam_against_reference(name):
    (tx, make_reference), ours, theirs = WSAMS[name]
    perturb = reference.adaptive_ball(0.5, 0.0, ALL)
    expected = reference.train_wsam(make_reference(), theirs, perturb, 0.8, STEPS)
    wsam = samx.wsam(tx, ours, gamma=0.8, perturbation=metric_ball(0.5, EVERYWHERE))
    assert_same(problem.train(wsam, STEPS), expected)
