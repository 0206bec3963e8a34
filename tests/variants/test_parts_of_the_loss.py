"""Focal-SAM and ImbSAM against an independent loop."""

import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from formulations import BASES, EVERY_LEAF, EVERY_LEAF_BY_HAND, STEPS, train
from recorded import assert_same

import samx

pytestmark = pytest.mark.usefixtures("float64")

COUNTS = [28, 11, 25]  # class counts of the 64 examples


def vector_scaled(params, batch):
    counts = jnp.asarray(COUNTS, float)
    temperature = (counts.max() / counts) ** 0.3
    shift = jnp.log(counts / counts.sum())
    logits = problem.logits_of(params, batch) / temperature[None] + shift[None]
    return problem.cross_entropy(logits, batch["y"])


def focal(gamma, sharpness):
    c = sharpness * (1 - np.array(COUNTS) / sum(COUNTS)) ** gamma
    return 1 - c, c


SPLITS = {
    "focal, adaptive": (
        lambda: samx.focal_sam(COUNTS, perturbation=EVERY_LEAF),
        EVERY_LEAF_BY_HAND,
        focal(2.0, 0.8),
        problem.losses_fn,
        "momentum and decay",
    ),
    "focal, vector scaling, above 1": (
        lambda: samx.focal_sam(COUNTS, 0.2, 0.2, 1.3),
        reference.ball(0.2),
        focal(0.2, 1.3),
        vector_scaled,
        "sgd",
    ),
    "imbalanced, two classes": (
        lambda: samx.imbalanced_sam([1, 2], 0.2, 2.0),
        reference.ball(0.2),
        ([1, 0, 0], [0, 2, 2]),
        problem.losses_fn,
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_the_loss_against_reference(name):
    make, perturb, factors, losses_fn, base = SPLITS[name]
    tx, make_reference = BASES[base]
    expected = reference.train_split(make_reference(), perturb, factors, STEPS, losses_fn)
    (found,) = train(optax.chain(make(), tx), losses_fn=losses_fn)
    assert_same(found, expected)


def test_a_batch_without_tail_takes_the_step_of_the_base():
    (found,) = train(optax.chain(samx.imbalanced_sam([], 0.5), optax.adam(0.01)))
    assert_same(found, problem.train(optax.adam(0.01), STEPS))
