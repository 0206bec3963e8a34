"""Variants that are the optimizer, against independent loops."""

import jax.numpy as jnp
import problem
import pytest
import reference
from loops import ALL, EVERYWHERE, STEPS
from recorded import assert_same

import samx
from samx.perturbations import (
    metric_ball,
)

pytestmark = pytest.mark.usefixtures("float64")

RATES = [0.05 * (1 - t / STEPS) for t in range(STEPS)]


def falling_to_zero(step):
    return 0.05 * (1 - jnp.asarray(step, float) / STEPS)


# Defaults, schedules and another geometry; the rows in `cases.py` have oracles of their own.
OPTIMIZERS = {  # samx, the reference's base and perturbation
    "lightsam_adam, schedules": (
        lambda: samx.lightsam_adam(falling_to_zero, falling_to_zero),
        lambda: (
            reference.RawAdam(RATES, 0.9, 0.999, 1e-8),
            reference.RawAdam(RATES, 0.9, 0.999, 1e-8),
        ),
    ),
    "adasam, adaptive": (
        lambda: samx.adasam(0.02, b2=0.8, perturbation=metric_ball(0.5, EVERYWHERE)),
        lambda: (
            reference.RawAdam(0.02, 0.9, 0.8, 1e-8, largest=True),
            reference.adaptive_ball(0.5, 0.0, ALL),
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_against_reference(name):
    make, make_reference = OPTIMIZERS[name]
    expected = reference.train_sam(*make_reference(), STEPS)
    assert_same(problem.train(make(), STEPS), expected)
