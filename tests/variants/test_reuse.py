"""Parts of a sharp gradient that later steps use again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import MOMENTUM, assert_same

import samx
from samx import policies
from samx.combinations import decaying

pytestmark = pytest.mark.usefixtures("float64")


def test_vsam_is_arsam_whose_reuse_ends():
    """They agree over two windows; ARSAM's default never drops h."""
    controller = {"window": 12, "num_blocks": 2, "warmup_steps": 4, "key": 1}

    def arsam(mixing=None):
        return samx.arsam(0.2, policy=policies.quota(**controller), mixing=mixing)

    runs = [
        problem.train(optax.chain(tx, MOMENTUM), 30)
        for tx in (
            samx.vsam(0.2, policy=policies.quota(**controller)),
            arsam(decaying(0.7, last=6)),
            arsam(),
        )
    ]
    assert_same(*runs[:2])
    same = [
        np.allclose(a, b, rtol=1e-10, atol=1e-10)
        for a, b in zip(runs[0]["W1"], runs[2]["W1"], strict=True)
    ]
    assert same == [True] * 10 + [False] * 20  # four steps of warm-up, six of reuse


def test_weight_of_a_reused_part():
    weight = decaying(optax.linear_schedule(1.0, 0.0, 10), last=2)
    steps, ages = jnp.arange(4), jnp.array([0, 1, 2, 3])
    np.testing.assert_allclose(jax.vmap(weight)(ages, steps), [1.0, 0.9, 0.64, 0.0])


def test_ratio_of_the_part_that_is_kept():
    curvature, w, tx = np.array([1.0, 5.0]), jnp.array([2.0, 1.0]), samx.looksam(0.5)

    @jax.jit
    def update(g, state):
        return tx.update(g, state, w, value_fn=lambda w: w @ (curvature * w) / 2)

    g = curvature * w
    g_s, state = update(g, tx.init(w))
    ratio = jnp.linalg.norm(g_s - (g @ g_s) / (g @ g) * g) / jnp.linalg.norm(g)
    np.testing.assert_allclose(state.part_ratio, ratio, rtol=1e-12)
    _, state = update(2 * g, state)
    np.testing.assert_allclose(state.part_ratio, ratio, rtol=1e-12)  # kept from the last sharp step


@pytest.mark.parametrize(("size", "dtype"), [(1, jnp.float32), (1000, jnp.bfloat16)])
def test_looksam_reuses_nothing_where_both_gradients_are_parallel(size, dtype):
    """The component orthogonal to `g` is only rounding; scaling would make it as long as `g`."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=size), dtype)
    tx = samx.looksam(0.05, period=5)

    def value_fn(w):
        return 1.7 * (w.astype(jnp.float32) ** 2).sum()

    @jax.jit
    def step(w, state):
        g = jax.grad(value_fn)(w)
        u, state = tx.update(g, state, w, value_fn=value_fn)
        return w - jnp.asarray(0.01, dtype) * u, state, g, u

    state = tx.init(w)
    for t in range(10):
        w, state, g, u = step(w, state)
        assert bool(state.readings.is_sharp) == (t % 5 == 0)
        assert np.array_equal(g, u) == (t % 5 != 0)
