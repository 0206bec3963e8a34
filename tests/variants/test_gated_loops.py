"""Variants that take a sharp gradient on some steps only, against independent loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from loops import ALPHA, ALPHAS, BASES, MOMENTUM, STEPS, WEIGHTS, drawn, every, linear
from recorded import assert_same, watch

import samx
from samx import policies
from samx.combinations import mix
from samx.perturbations import (
    metric_ball,
    subtract_ema,
)

pytestmark = pytest.mark.usefixtures("float64")

THRESHOLD, THRESHOLDS = linear(1.5, -1.0, 48)

LOOK_LAYER = {  # rule, rho, base
    "relative": (lambda w, g, total: w / g, 0.02, "adamw"),
    "equal": (lambda w, g, total: 1 / g, 0.05, "nesterov"),
    "divided twice": (lambda w, g, total: w / g**2, 0.002, "adam"),
}

GATED = {  # samx, the reference's perturbation and combination, base, steps
    "looksam": (
        lambda: samx.looksam(0.2, 3, 0.3),
        reference.ball(0.2),
        lambda: reference.LookSAM(every(3), 0.3),
        "nesterov",
    ),
    "looksam with a schedule of alpha": (
        lambda: samx.looksam(0.1, 4, ALPHA, first=3),
        reference.ball(0.1),
        lambda: reference.LookSAM(every(4, 3), ALPHAS),
        "adam",
    ),
    "look_layer_sam": (
        lambda: samx.look_layer_sam(0.05, 4, 0.3, first=1),
        reference.layer_steps(0.05, lambda w, g, total: w / g / total),
        lambda: reference.LookSAM(every(4, 1), 0.3),
        "momentum and decay",
    ),
    **{
        f"look_layer_sam, {name}": (
            lambda rule=rule, rho=rho: samx.look_layer_sam(rho, 4, 0.3, scaling=rule),
            reference.layer_steps(rho, rule),
            lambda: reference.LookSAM(every(4), 0.3),
            base,
        )
        for name, (rule, rho, base) in LOOK_LAYER.items()
    },
    "periodic": (
        lambda: samx.perturb_if(policies.every(3, first=2), samx.sam(0.1)),
        reference.ball(0.1),
        lambda: reference.sometimes(every(3, 2)),
        "adamw",
    ),
    "rst": (
        lambda: samx.perturb_if(policies.random(0.4, key=3), samx.sam(0.2)),
        reference.ball(0.2),
        lambda: reference.sometimes(drawn(0.4, 3)),
        "nesterov",
    ),
    "g-rst, gamma 2": (
        lambda: samx.perturb_if(policies.random(0.5), mix(samx.sam(0.1), 2.0)),
        reference.ball(0.1),
        lambda: reference.sometimes(drawn(0.5, 0), gamma=2.0),
        "momentum and decay",
    ),
    "ae_sam": (
        lambda: samx.ae_sam(0.2, THRESHOLD, 0.8),
        reference.ball(0.2),
        lambda: reference.sometimes(reference.SquaredNorm(THRESHOLDS, 0.8)),
        "momentum and decay",
        48,
    ),
    "ae_looksam": (
        lambda: samx.ae_looksam(0.1, 0.3, 0.2, decay=0.5),
        reference.ball(0.1),
        lambda: reference.LookSAM(reference.SquaredNorm([0.3] * STEPS, 0.5), 0.2),
        "adam",
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_against_reference(name):
    make, perturb, combine, base, *rest = GATED[name]
    steps = rest[0] if rest else STEPS
    tx, make_reference = BASES[base]
    expected, is_sharp = reference.train_gated(make_reference(), perturb, combine(), steps)
    trajectory, sharp = watch(optax.chain(make(), tx), steps, "is_sharp")
    assert 3 <= sum(is_sharp) <= steps - 3
    np.testing.assert_array_equal(sharp, is_sharp)
    assert_same(trajectory, expected)


@pytest.mark.parametrize("base", ["momentum and decay", "adam"])
def test_vsam_against_reference_past_several_windows(base):
    steps, tx, make_reference = 66, *BASES[base]
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
        lambda ball: samx.looksam(period=5, perturbation=ball),
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

    states, sams = (
        watch(optax.chain(sharp, optax.sgd(0.0)), 7, "perturbation")[1]
        for sharp in (make(ball), samx.sam(perturbation=ball))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15), states, sams)
