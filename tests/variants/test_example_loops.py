"""Variants on some of the examples or some of the layers, against independent loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from loops import BASES, STEPS, WEIGHTS
from recorded import assert_same, watch

import samx
from samx.perturbations import (
    magnitude,
    metric_ball,
    subtract_ema,
)

pytestmark = pytest.mark.usefixtures("float64")


def esam_draws(key, steps):
    """The draws of `random_leaves`, from its definition, by name."""
    draws = [
        jax.random.uniform(jax.random.fold_in(jax.random.key(key), t), (4,))
        for t in range(1, steps + 1)
    ]
    return [dict(zip(("W1", "W2", "b1", "b2"), d.tolist(), strict=True)) for d in draws]


def gumbel_draw(t, p, m):
    """Gumbel top-k, from its definition."""
    noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(0), t), (problem.BATCH_SIZE,))
    return np.argsort(-(np.log(p) + np.asarray(noise)))[:m]


def ramp(t, low=0.2, high=0.9, steps=10):
    return low + (high - low) * min(t / steps, 1)


ON_EXAMPLES = {  # samx, the reference, base
    "ksam, adaptive": (
        lambda: samx.ksam(num_selected=4, perturbation=metric_ball(0.5, magnitude(0.01))),
        lambda: reference.ksam(reference.adaptive_ball(0.5, 0.01, WEIGHTS), 4),
        "momentum and decay",
    ),
    "msam, every example, adaptive": (
        lambda: samx.msam(
            num_microbatches=16, how="vmap", perturbation=metric_ball(0.5, magnitude(0.01))
        ),
        lambda: reference.msam(reference.adaptive_ball(0.5, 0.01, WEIGHTS), 16),
        "momentum and decay",
    ),
    "msam, with a memory": (
        lambda: samx.msam(
            num_microbatches=4, perturbation=optax.chain(subtract_ema(0.9, 0.8), metric_ball(0.2))
        ),
        lambda: reference.msam(reference.Friendly([reference.ball(0.2)], 0.9, 0.8, calls=4), 4),
        "nesterov",
    ),
    "esam, adaptive and strict": (
        lambda: samx.esam(
            perturbed_fraction=0.7,
            selected_fraction=0.5,
            select="strict",
            key=3,
            perturbation=metric_ball(0.5, magnitude(0.0, is_scaled=lambda path, leaf: True)),
        ),
        lambda: reference.esam(
            reference.adaptive_ball(0.5, 0.0, {"W1", "b1", "W2", "b2"}),
            *(0.7, 0.5, esam_draws(3, STEPS)),
            strict=True,
        ),
        "momentum and decay",
    ),
    "esam, the whole sharp pass": (
        lambda: samx.esam(0.1, 0.8, 0.75, sharp_pass="whole"),
        lambda: reference.esam(reference.ball(0.1), 0.8, 0.75, esam_draws(0, STEPS), strict=False),
        "nesterov",
    ),
    "ausam past its ramp": (
        lambda: samx.ausam(0.1, 0.75, 64, ramp_steps=10, low=0.2, high=0.9),
        lambda: reference.AUSAM(
            reference.ball(0.1), 0.75, gumbel_draw, 4, [ramp(t) for t in range(STEPS)], 0.2
        ),
        "adam",
    ),
}


@pytest.mark.parametrize("name", ON_EXAMPLES)
def test_on_examples_against_reference(name):
    make, sharp_gradient, base = ON_EXAMPLES[name]
    tx, make_reference = BASES[base]
    expected = reference.train_on_examples(make_reference(), sharp_gradient(), STEPS)
    trajectory, _ = watch(optax.chain(make(), tx), STEPS, "loss")
    assert_same(trajectory, expected)


def by_layer(path, leaf):
    return path[-1].key[1]


SL_SAM = {  # groups, what they hold
    "two layers": (by_layer, [["W1", "b1"], ["W2", "b2"]]),
    "every tensor": (4, [["W1"], ["W2"], ["b1"], ["b2"]]),
}


@pytest.mark.parametrize(("name", "base"), [*zip(SL_SAM, ("nesterov", "adam"), strict=True)])
def test_sl_sam_against_reference(name, base):
    groups, names = SL_SAM[name]
    tx, make_reference = BASES[base]

    def draw(t, p):
        key = jax.random.fold_in(jax.random.key(2), t)
        return int(jax.random.categorical(key, jnp.log(jnp.asarray(p, jnp.float32))))

    expected, drawn = reference.train_sl_sam(
        make_reference(), reference.ball(0.1), names, draw, 0.3, 0.4, STEPS
    )
    sl_sam = samx.sl_sam(tx, 0.1, groups, bandit_learning_rate=0.3, exploration=0.4, key=2)
    trajectory, found = watch(sl_sam, STEPS, "group")
    assert set(drawn) == set(range(len(names)))
    np.testing.assert_array_equal(found, drawn)
    assert_same(trajectory, expected)
