"""Variants that take a sharp gradient on some steps only, against independent loops."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from loops import BASES, MOMENTUM, STEPS, WEIGHTS, every, linear
from recorded import assert_same, watch

import samx
from samx import policies
from samx.perturbations import (
    metric_ball,
    subtract_ema,
)

pytestmark = pytest.mark.usefixtures("float64")

ALPHA, ALPHAS = linear(0.0, 1.0, STEPS)

# The rows in `cases.py` have oracles of their own. Here the first sharp step comes later.
GATED = {  # samx, the reference's perturbation and combination, base
    "looksam with a schedule of alpha": (
        lambda: samx.looksam(0.1, 4, ALPHA, first=3),
        reference.ball(0.1),
        lambda: reference.LookSAM(every(4, 3), ALPHAS),
        "adam",
    ),
    "look_layer_sam with a rule": (
        lambda: samx.look_layer_sam(0.02, 4, 0.3, first=1, scaling=lambda w, g, total: w / g),
        reference.layer_steps(0.02, lambda w, g, total: w / g),
        lambda: reference.LookSAM(every(4, 1), 0.3),
        "adamw",
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_against_reference(name):
    make, perturb, combine, base = GATED[name]
    tx, make_reference = BASES[base]
    expected, is_sharp = reference.train_gated(make_reference(), perturb, combine(), STEPS)
    trajectory, sharp = watch(optax.chain(make(), tx), STEPS, "is_sharp")
    assert 3 <= sum(is_sharp) <= STEPS - 3
    np.testing.assert_array_equal(sharp, is_sharp)
    assert_same(trajectory, expected)


def test_vsam_against_reference_past_several_windows():
    steps, tx, make_reference = 66, *BASES["adam"]
    draws = np.random.default_rng(1).uniform(size=steps)
    variant = reference.VSAM(draws, (10, 2), 0.8, (0.5, 0.5), 0.7, 12, ["W1", "W2"])
    expected, is_sharp = reference.train_gated(
        make_reference(), reference.ball(0.1), variant, steps
    )
    controller = policies.quota(
        window=10,
        num_blocks=2,
        ratio_gain=0.5,
        variance_gain=0.5,
        warmup_steps=12,
        is_measured=lambda path, leaf: path[-1].key in WEIGHTS,
    )
    vsam = samx.vsam(0.1, policy=controller)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samx.policies.draws, "uniform_at", lambda key, step: jnp.asarray(draws)[step])
        trajectory, sharp, fractions, quotas, ages = watch(
            optax.chain(vsam, tx), steps, "is_sharp", "sharp_fraction", "quota", "age"
        )
    np.testing.assert_array_equal(sharp, is_sharp)
    np.testing.assert_allclose(fractions, np.cumsum(is_sharp) / np.arange(1, steps + 1), rtol=1e-5)
    np.testing.assert_allclose(quotas, variant.base_srs, rtol=1e-9)
    assert ages.max() > 7  # the reuse has expired
    assert len(set(quotas.astype(int))) > 1
    assert_same(trajectory, expected)


RADIUS, RADII = linear(0.05, 0.5, 15)

WITH_MEMORY = {
    "looksam": (
        lambda ball: samx.looksam(period=5, alpha=0.7, perturbation=ball),
        lambda: reference.LookSAM(every(5), 0.7),
    ),
    "periodic": (
        lambda ball: samx.perturb_if(policies.every(3), samx.sam(perturbation=ball)),
        lambda: reference.sometimes(every(3)),
    ),
}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_schedules_and_memories_go_on_where_no_sharp_gradient_is_taken(name):
    make, combine = WITH_MEMORY[name]
    ball = optax.chain(subtract_ema(0.9, 0.8), metric_ball(RADIUS))
    climb = reference.Friendly(map(reference.ball, RADII), 0.9, 0.8)
    expected, is_sharp = reference.train_gated(reference.SGD(0.1, 0.9), climb, combine(), 15)
    trajectory, sharp = watch(optax.chain(make(ball), MOMENTUM), 15, "is_sharp")
    assert not all(is_sharp)
    np.testing.assert_array_equal(sharp, is_sharp)
    assert_same(trajectory, expected)
