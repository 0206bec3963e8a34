"""Variants that climb what an earlier step left, against independent loops."""

import jax
import numpy as np
import optax
import problem
import pytest
import reference
from loops import BASES, MOMENTUM, STEPS, WEIGHTS, linear
from recorded import assert_same, climbs_first, watch

import samx
from samx.perturbations import (
    magnitude,
    metric_ball,
)

pytestmark = pytest.mark.usefixtures("float64")


def adamw_decayed_behind(learning_rate, weight_decay):
    """The authors' AdamW: w ← (1 − lr·wd) (w + u)."""

    def update_fn(updates, state, params):
        return jax.tree.map(
            lambda u, w: u - learning_rate * weight_decay * (w + u), updates, params
        ), state

    decay = optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
    return optax.chain(optax.adam(learning_rate), decay)


MOMENTUM_BASES = {  # where the momentum is; the recorded run has a plain one
    "momentum and decay": BASES["momentum and decay"],
    "sgd of momentum 0": (optax.sgd(0.1, momentum=0.0), lambda: reference.SGD(0.1)),
    "adam, decay behind": (
        adamw_decayed_behind(0.01, 0.5),
        lambda: reference.Adam(0.01, 0.5, decay_behind=True),
    ),
}

RHO, RHOS = linear(0.2, 0.8, STEPS)


@pytest.mark.parametrize("base", MOMENTUM_BASES)
def test_momentum_sam_against_reference(base):
    tx, make_reference = MOMENTUM_BASES[base]
    balls = [reference.ball(rho) for rho in RHOS]
    expected = reference.train_momentum_sam(make_reference(), balls, STEPS)
    assert_same(problem.train(samx.momentum_sam(tx, RHO), STEPS), expected)


COSINE_RHO = optax.cosine_decay_schedule(0.3, STEPS)

ASYNC_SAM = {  # arguments, the reference's perturbation, b′, first, base
    "cosine rho": (
        {"rho": COSINE_RHO},
        [reference.ball(0.15 * (1 + np.cos(np.pi * t / STEPS))) for t in range(STEPS)],
        16,
        "plain",
        "nesterov",
    ),
    "the metric of ASAM": (
        {"perturbation": metric_ball(1.0, magnitude(0.05))},
        reference.adaptive_ball(1.0, 0.05, WEIGHTS),
        8,
        "sam",
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", ASYNC_SAM)
def test_async_sam_against_reference(name):
    arguments, perturb, ascent_size, first, base = ASYNC_SAM[name]
    tx, make_reference = BASES[base]
    expected = reference.train_async_sam(make_reference(), perturb, ascent_size, STEPS, first)
    async_sam = optax.chain(samx.async_sam(first=first, **arguments), tx)
    further = climbs_first(ascent_size)
    trajectory, _ = watch(async_sam, STEPS, "loss", further=further)
    assert_same(trajectory, expected)


def test_l2_inside_the_loss_is_the_decay_of_the_perturbed_weights():
    def losses_fn(params, batch):
        squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
        return problem.losses_fn(params, batch) + 0.5 * 1e-2 * squares

    tx, sgd = samx.momentum_sam(MOMENTUM, 0.5), reference.SGD(0.1, 0.9)
    expected = reference.train_momentum_sam(sgd, reference.ball(0.5), STEPS, decay=1e-2)
    assert_same(problem.train(tx, STEPS, losses_fn=losses_fn), expected)
