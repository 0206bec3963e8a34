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


def test_looksam_before_the_base_of_lookahead():
    """The README's recipe, against a loop by hand."""
    sam, base = samx.looksam(0.05, period=2, alpha=0.3), optax.sgd(0.02, momentum=0.9)
    lookahead = optax.lookahead(base, sync_period=3, slow_step_size=0.5)

    def loss(w):
        return (w**4).sum() + w[0] * w[1]

    @jax.jit
    def step(p, sam_state, state):
        g = jax.grad(loss)(p.fast)
        g, sam_state = sam.update(g, sam_state, p.fast, value_fn=loss)
        updates, state = lookahead.update(g, state, p)
        return optax.apply_updates(p, updates), sam_state, state

    def gradient(w):
        return 4 * w**3 + w[::-1]

    fast = slow = np.array([1.0, -2.0])
    p = optax.LookaheadParams.init_synced(jnp.array(fast))
    carry, buffer, part = (p, sam.init(p.fast), lookahead.init(p)), np.zeros(2), None
    for t in range(7):
        carry, g = step(*carry), gradient(fast)
        if t % 2 == 0:
            g_s = gradient(fast + 0.05 * g / np.linalg.norm(g))
            part = g_s - (g @ g_s) / (g @ g) * g
        else:
            g_s = g + 0.3 * np.linalg.norm(g) / np.linalg.norm(part) * part
        buffer = g_s + 0.9 * buffer
        fast = fast - 0.02 * buffer
        if t % 3 == 2:
            fast = slow = slow + 0.5 * (fast - slow)
        for found, expected in zip((carry[0].fast, carry[0].slow), (fast, slow), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)
