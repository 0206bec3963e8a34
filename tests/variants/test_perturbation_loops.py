"""Variants that climb another direction, or another length, than SAM: independent loops.

No recorded run has these settings.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from loops import ALL, BASES, EVERYWHERE, WEIGHTS
from recorded import assert_same, patch_normals, watch

import samx
from samx import perturbations as geometry
from samx import policies, schedules

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 6


def always(t, g, look):
    return look()


def half(t, g, look):
    g_s = look()
    return {k: (g[k] + g_s[k]) / 2 for k in g}


def by_turns(ball, numbers):
    """Use one number per step."""
    balls = map(ball, numbers)
    return lambda params, g: next(balls)(params, g)


def falling(first):
    """A schedule, and its values."""
    return optax.linear_schedule(first, 0.0, 2 * STEPS), [
        first * (1 - t / (2 * STEPS)) for t in range(STEPS)
    ]


def magnitude_once(sigma, rho_max):
    """The line in the docstring of `loss_rise_ball`."""
    once = optax.stateless(lambda g, w: jax.tree.map(lambda g, w: abs(w) * g, g, w))
    return optax.chain(once, geometry.loss_rise_ball(sigma, rho_max))


def inverse(step):
    return 1 / (jnp.asarray(step, float) + 1)


SIGMA, SIGMAS = falling(0.1)
RHO, RADII = falling(0.3)
QUANTILE, QUANTILES = falling(0.9)
HOLD = schedules.warmup_hold_cosine(0.2, warmup=2, decay_from=3, end=5)
HELD = [0.0, 0.1, 0.2, 0.2, 0.1, 0.0]
WARM = optax.linear_schedule(0.0, 0.2, 4)
WARMED = [0.0, 0.05, 0.1, 0.15, 0.2, 0.2]
LOOPS = {  # samx, the reference's perturbation and combination, base
    "gcsam, centralized": (
        lambda: samx.gcsam(0.3, norm="centralized"),
        lambda: reference.centralized_ball(0.3, raw=False),
        always,
        "adam",
    ),
    "gcsam, adaptive": (
        lambda: samx.sharpness_aware(geometry.centralized_ball(0.5, EVERYWHERE)),
        lambda: reference.centralized_ball(0.5, ALL),
        always,
        "nesterov",
    ),
    "gcsam, centralized and adaptive, radius": (
        lambda: samx.sharpness_aware(
            geometry.centralized_ball(RHO, geometry.magnitude(0.0), norm="centralized")
        ),
        lambda: by_turns(lambda r: reference.centralized_ball(r, WEIGHTS, raw=False), RADII),
        always,
        "nesterov",
    ),
    "zsharp, quantile 0": (
        lambda: samx.zsharp(0.2, 0.0),
        lambda: reference.z_score_ball(0.2, 0.0, "leaf"),
        always,
        "nesterov",
    ),
    "zsharp, quantile 1": (
        lambda: samx.zsharp(0.2, 1.0),
        lambda: reference.z_score_ball(0.2, 1.0, "leaf"),
        always,
        "nesterov",
    ),
    "zsharp, schedules": (
        lambda: samx.zsharp(RHO, QUANTILE),
        lambda: by_turns(
            lambda i: reference.z_score_ball(RADII[i], QUANTILES[i], "leaf"), range(STEPS)
        ),
        always,
        "adam",
    ),
    "zsharp, global": (
        lambda: samx.zsharp(0.2, 0.5, norm="global"),
        lambda: reference.z_score_ball(0.2, 0.5, "global"),
        always,
        "nesterov",
    ),
    "zsharp, global, quantile 1": (
        lambda: samx.zsharp(0.2, 1.0, norm="global"),
        lambda: reference.z_score_ball(0.2, 1.0, "global"),
        always,
        "nesterov",
    ),
    "le_sam, minus the gradient, falling": (
        lambda: samx.le_sam(SIGMA, 0.1, alpha=0.3),
        lambda: by_turns(lambda s: reference.loss_rise_ball(s, 0.1), SIGMAS),
        reference.minus_gradient(0.3),
        "momentum and decay",
    ),
    "le_sam, its authors' schedule": (
        lambda: samx.le_sam(HOLD, None),
        lambda: by_turns(lambda s: reference.loss_rise_ball(s, np.inf), HELD),
        always,
        "nesterov",
    ),
    "le_sam, adaptive": (
        lambda: samx.le_sam(perturbation=magnitude_once(0.02, 0.2), alpha=0.2),
        lambda: reference.loss_rise_ball(0.02, 0.2, is_adaptive=True),
        reference.minus_gradient(0.2),
        "nesterov",
    ),
    "unified_sam, 1/t": (
        lambda: samx.unified_sam(0.2, inverse),
        lambda: by_turns(
            lambda t: reference.partly_normalized_step(0.2, 1 / t), itertools.count(1)
        ),
        always,
        "nesterov",
    ),
    "unified_sam, 1 - 1/t": (
        lambda: samx.unified_sam(RHO),
        lambda: by_turns(
            lambda t: reference.partly_normalized_step(RADII[t - 1], 1 - 1 / t), itertools.count(1)
        ),
        always,
        "adam",
    ),
    "unified_sam, adaptive": (
        lambda: samx.sharpness_aware(
            geometry.partly_normalized_step(0.5, 0.4, geometry.magnitude(0.1))
        ),
        lambda: reference.partly_normalized_step(0.5, 0.4, 0.1, WEIGHTS),
        always,
        "nesterov",
    ),
    "sagm, adaptive": (
        lambda: samx.sagm(perturbation=geometry.gradient_matching_step(0.5, 0.2, EVERYWHERE)),
        lambda: reference.gradient_matching_step(0.5, 0.2, ALL),
        half,
        "adam",
    ),
    "sagm, falling": (
        lambda: samx.sagm(RHO, 0.3),
        lambda: by_turns(lambda r: reference.gradient_matching_step(r, 0.3), RADII),
        half,
        "nesterov",
    ),
    "gnp, unit, warm radius": (
        lambda: samx.gnp(WARM, 0.7, clean="unit"),
        lambda: by_turns(reference.ball, WARMED),
        reference.on_unit(0.7),
        "nesterov",
    ),
    "gnp, nothing at first": (
        lambda: samx.perturb_if(policies.between(2), samx.gnp(0.2, 0.7)),
        lambda: reference.ball(0.2),
        reference.sometimes(lambda t, g: t >= 2, gamma=0.7),
        "nesterov",
    ),
    "gnp, adaptive": (
        lambda: samx.gnp(perturbation=geometry.metric_ball(0.5, EVERYWHERE), alpha=1.5),
        lambda: reference.adaptive_ball(0.5, 0.0, ALL),
        reference.sometimes(lambda t, g: True, gamma=1.5),
        "adam",
    ),
    "spectral_sam, global, sign": (
        lambda: samx.spectral_sam(0.3, norm="global", vectors="sign"),
        lambda: reference.spectral_ball(0.3, "global", "sign"),
        always,
        "nesterov",
    ),
    "spectral_sam, global": (
        lambda: samx.spectral_sam(RHO, norm="global"),
        lambda: by_turns(lambda r: reference.spectral_ball(r, "global"), RADII),
        always,
        "adam",
    ),
    "spectral_sam, zero": (
        lambda: samx.spectral_sam(0.1, vectors="zero"),
        lambda: reference.spectral_ball(0.1, vectors="zero"),
        always,
        "nesterov",
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_perturbations_against_reference(name):
    make, perturb, combine, base = LOOPS[name]
    tx, make_reference = BASES[base]
    expected, _ = reference.train_gated(make_reference(), perturb(), combine, STEPS)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected, 1e-11)


EIGEN = {  # arguments of both, of samx alone, steps
    "alpha 1": ({"rho": 0.1, "alpha": 1.0, "every": 2, "iterations": 3}, {}, 6),
    "several epochs": (
        {
            "rho": 0.2,
            "alpha": 0.4,
            "every": 2,
            "iterations": 1,
            "steps_per_epoch": 4,
            "before_refresh": "usam",
        },
        {},
        11,
    ),
}


@pytest.mark.parametrize("name", EIGEN)
def test_eigen_sam_against_reference(name):
    arguments, further, steps = EIGEN[name]
    tx, make_reference = BASES["nesterov"]
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=w.shape) for k, w in problem.make()[1].items()}
    expected, vectors = reference.train_eigen_sam(
        make_reference(), start=start, steps=steps, **arguments
    )
    with pytest.MonkeyPatch.context() as patch:
        patch_normals(start, patch)
        tx = optax.chain(samx.eigen_sam(**arguments, **further), tx)
        trajectory, found, spent = watch(tx, steps, "eigenvector", "extra_gradients")
    assert_same(trajectory, expected)
    assert_same(found, vectors)
    per_epoch = arguments.get("steps_per_epoch", steps)
    is_due = [t % per_epoch > 0 and t % per_epoch % 2 == 0 for t in range(steps)]
    np.testing.assert_array_equal(spent > 0, is_due)
    assert not any(x[0].any() for x in found.values())
