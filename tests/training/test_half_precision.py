"""With parameters in half precision, the closure still sees the ascent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import VARIANTS
from half_precision import (
    distance,
    every_program,
    four_steps,
    needs_float16,
    roundings,
    start,
)

import samx


@functools.cache
def wide(dtype):
    """20 000 parameters and a gradient: a step of length 0.005 moves each by 3.5e-5."""
    rng = np.random.default_rng(0)
    shapes = {"W1": (100, 100), "b1": (100,), "W2": (100, 99)}
    scales = (0.02, 1.0)
    return [
        {k: jnp.asarray(scale * rng.standard_normal(shape), dtype) for k, shape in shapes.items()}
        for scale in scales
    ]


def share_of_the_ascent(name, dtype, **changes):
    """Return <g, Δ> / <g, ε>: Δ is the step seen by the closure, ε the step by hand in float64."""
    case, (w, g) = VARIANTS[name], wide(dtype)
    rho = case.hyper["rho"] / 10
    changes |= {"rho": rho} | ONE_EXAMPLE.get(name, {})
    tx = case.build(optax.sgd(0.0, momentum=0.0), batch_like=jnp.ones(1), **changes)
    tx = samx.all_readings(tx)
    point, slope = ({k: np.asarray(x, float) for k, x in tree.items()} for tree in (w, g))
    seen = []

    def losses_fn(params, batch):
        jax.debug.callback(seen.append, params)
        return batch * sum((g[k] * params[k].astype(jnp.float32)).sum() for k in g)

    @jax.jit
    def step(state):
        return tx.update(g, state, w, losses_fn=losses_fn, batch=jnp.ones(1))[1]

    state = tx.init(w)
    # Not every step is sharp, and the first one may not be.
    while float(optax.tree.get(state, "perturbation_norm")) == 0:
        seen.clear()
        state = step(state)
        jax.effects_barrier()

    def climbed(step):
        return sum(np.vdot(slope[k], step[k]) for k in slope)

    moves = [{k: np.asarray(p[k], float) - point[k] for k in point} for p in seen]
    return max(map(climbed, moves)) / climbed(BY_HAND[name](rho, slope, point))


def in_metric(scale):
    """`ε = ρ T² g / ‖T g‖` with `T = scale(name, leaf)`."""

    def by_hand(rho, g, w):
        scales = {k: scale(k, w[k]) for k in w}
        norm = norm_of({k: scales[k] * g[k] for k in g})
        return {k: rho * scales[k] ** 2 * g[k] / norm for k in g}

    return by_hand


def norm_of(g):
    return np.sqrt(sum(np.sum(x**2) for x in g.values()))


euclidean = in_metric(lambda k, x: 1.0)

BY_HAND = {
    "sam": euclidean,
    "asam": in_metric(lambda k, x: 1.0 if k == "b1" else np.abs(x) + 0.01),
    "sampa": euclidean,
    "two ascent steps": lambda rho, g, w: euclidean(2 * rho, g, w),  # both have the same slope
    "l-infinity": lambda rho, g, w: {k: rho * np.sign(g[k]) for k in g},
    "looksam": euclidean,
    "usam": lambda rho, g, w: {k: rho * g[k] for k in g},
    "friendly_sam": euclidean,  # on the first step
    "monge_sam": lambda rho, g, w: euclidean(rho / np.hypot(1, norm_of(g)), g, w),
    "msam": euclidean,
    "lightsam_adam": lambda rho, g, w: {
        k: rho * 0.1 * g[k] / np.sqrt(0.99 * 0.1**2 + 0.01 * g[k] ** 2) for k in g
    },
    "momentum_sam": lambda rho, g, w: euclidean(-rho, g, w),
    "esam": lambda rho, g, w: euclidean(rho / 0.6, g, w),  # the first step perturbs all tensors
    "sl_sam": lambda rho, g, w: euclidean(rho, {k: g[k] * (k == "W1") for k in g}, w),
}

ONE_EXAMPLE = {"esam": {"num_groups": 1}, "msam": {"num_microbatches": 1}}


@pytest.mark.parametrize("name", BY_HAND)
def test_half_precision_parameters_see_the_ascent(name):
    np.testing.assert_allclose(share_of_the_ascent(name, jnp.bfloat16), 1, atol=0.02)


@needs_float16
@pytest.mark.parametrize("name", ["sam", "asam", "sampa", "l-infinity", "lightsam_adam"])
def test_float16_parameters_see_the_ascent(name):
    np.testing.assert_allclose(share_of_the_ascent(name, jnp.float16), 1, atol=0.02)


@pytest.mark.parametrize("name", ["sam", "asam", "sampa"])
def test_bfloat16_would_round_the_ascent_away(name):
    """The same test fails if the perturbed point has the dtype of the parameters."""
    assert abs(share_of_the_ascent(name, jnp.bfloat16, perturb_dtype=None) - 1) > 0.02


@pytest.mark.slow
@every_program
@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_half_precision_compute_stays_close(name, dtype):
    """Roundings of half an eps add up to a few eps of the distance that the parameters moved."""
    *_, (expected, _) = four_steps(name, "none", jnp.float32)
    *_, (found, state) = four_steps(name, "skip", dtype)
    way = distance(expected, start())
    assert (
        0 < distance(found, expected) < roundings(name, state) * float(jnp.finfo(dtype).eps) * way
    )
    assert int(state.skipped_steps) == 0
