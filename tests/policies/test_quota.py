"""A quota: exact in every window, with the statistics that it grows by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decisions import decide, state_behind

import samx
from samx import policies


def test_quota_draws_go_on_after_a_restart():
    g, g_s = np.random.default_rng(0).normal(size=(2, 100))
    policy = policies.quota(10, num_blocks=2, warmup_steps=12)
    decisions, states = decide(policy, g, g_s)
    resumed, _ = decide(policy, g[45:], g_s[45:], state=state_behind(states, 44))
    np.testing.assert_array_equal(resumed, decisions[45:])
    others = policies.quota(10, num_blocks=2, warmup_steps=12, key=1)
    assert np.any(decide(others, g, g_s)[0] != decisions)


def windows(values, window, warmup_steps):
    """Return the full windows after the warm-up; the first one is a step short and left out."""
    values = np.asarray(values)[warmup_steps + window - 1 :]
    return values[: len(values) // window * window].reshape(-1, window, *values.shape[1:])


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_every_window_has_exactly_its_quota(num_blocks):
    """Over 40 windows, ‖h‖ falls and rises until the quota reaches both of its limits."""
    steps = np.arange(12 + 9 + 400)
    noise = np.random.default_rng(0).normal(size=len(steps))
    length = np.exp(0.1 * np.abs(steps % 200 - 100) + 0.05 * noise)
    g = np.ones((len(steps), 3))
    policy = policies.quota(
        10,
        num_blocks=num_blocks,
        max_fraction=0.75,
        ratio_gain=1.0,
        variance_gain=1.0,
        warmup_steps=12,
    )
    decisions, states = decide(policy, g, g + length[:, None])
    assert np.all(decisions[:12])
    assert not np.any(decisions[12 : 12 + 9])
    quotas = windows(states.quota, 10, 12)
    np.testing.assert_array_equal(quotas, np.broadcast_to(quotas[:, :1], quotas.shape))
    np.testing.assert_array_equal(
        windows(decisions, 10, 12).sum(axis=1), np.floor(quotas[:, 0]).astype(int)
    )
    assert len(quotas) == 40
    assert np.all((quotas >= 1) & (quotas <= 7))
    assert {1, 7} <= set(quotas[:, 0].astype(int))


@pytest.mark.parametrize(("draw", "where"), [(0.0, slice(-3, None)), (0.999, slice(0, 3))])
def test_a_quota_is_used_at_once_or_forced_at_the_end(draw, where, monkeypatch):
    monkeypatch.setattr(samx.policies.draws, "uniform_at", lambda key, step: jnp.asarray(draw))
    policy = policies.quota(8, num_blocks=2, ratio_gain=0.0, variance_gain=0.0, warmup_steps=3)
    start = policy.init(jnp.ones(2))._replace(quota=jnp.asarray(3.9))
    decisions, _ = decide(policy, np.ones((43, 2)), state=start)
    expected = np.zeros(8, bool)
    expected[where] = True
    for window in windows(decisions, 8, 3):
        np.testing.assert_array_equal(window, expected)


def test_quota_of_zero_gradients_stays_a_number():
    zeros = np.zeros((60, 2), np.float32)
    decisions, states = decide(policies.quota(10, num_blocks=2, warmup_steps=0), zeros)
    assert all(np.all(np.isfinite(leaf)) for leaf in states._replace(key=()) if len(leaf))
    np.testing.assert_array_equal(windows(decisions, 10, 0).sum(axis=1), 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_statistics_of_a_quota_by_hand(num_blocks):
    rng = np.random.default_rng(0)
    g, g_s = rng.normal(size=(2, 9, 4))
    policy = policies.quota(6, num_blocks=num_blocks, warmup_steps=9)
    _, states = decide(policy, g, g_s)
    norms, g_norms = np.linalg.norm(g_s - g, axis=1), np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(states.norms[-1], norms[-6:])
    np.testing.assert_allclose(states.ratios[-1], (norms / g_norms)[-6:])
    for past in range(3):
        blocks = np.split(np.sort(norms[3 - past : 9 - past]), num_blocks)
        variance = np.mean([np.var(block, ddof=1) for block in blocks])
        np.testing.assert_allclose(states.variances[-1][-1 - past], variance)


@pytest.mark.parametrize(
    ("ratios", "variances", "growth"),
    [
        ([1, 4, 16, 64], [1.0, 0.9, 0.81, 0.729], 1 + 0.5 * 1 - 2 * 0.1),  # 3 is clipped to 1
        ([8, 4, 2, 1], [0.0, 1.0, 1.1, 1.21], 1 - 0.5 * 0.5 + 2 * 0.2 / 3),  # from 0: no change
        ([0, 0, 0, 0], [0, 0, 0, 0], 1),
    ],
)
def test_a_quota_grows_with_the_relative_changes(ratios, variances, growth):
    policy = policies.quota(4, num_blocks=2, ratio_gain=0.5, variance_gain=2.0, warmup_steps=0)
    state = policy.init(jnp.ones(2))._replace(
        step=jnp.array(3, jnp.int32),
        quota=jnp.asarray(2.0),
        ratios=jnp.array(ratios, jnp.float32),
        variances=jnp.array(variances, jnp.float32),
    )
    assert float(jax.jit(policy.decide)(jnp.ones(2), state)[1].quota) == pytest.approx(2 * growth)


def test_norms_of_a_quota_are_those_of_the_measured_leaves():
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])}
    g_s = {"a": jnp.array([3.0, 6.0]), "b": jnp.array([50.0])}
    policy = policies.quota(is_measured=lambda path, leaf: path[-1].key == "a")
    state = policy.observe(g, g_s, policy.init(g))
    assert (float(state.norms[-1]), float(state.ratios[-1])) == (2.0, pytest.approx(0.4))


@pytest.mark.parametrize("factor", [1e-150, 1.0, 1e150])
def test_norms_of_a_quota_whose_squares_are_out_of_range(factor, float64):
    del float64
    policy, g = policies.quota(), factor * jnp.array([3.0, 4.0])
    state = policy.observe(g, 2 * g, policy.init(g))
    np.testing.assert_allclose(state.norms[-1], 5 * factor, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_sharp_gradient_does_not_turn_the_quota_off(bad):
    """What it measured there is left out; everything else is as without the bad step."""
    g, g_s = np.random.default_rng(0).normal(size=(2, 120, 3))
    policy = policies.quota(10, num_blocks=2, warmup_steps=12)
    expected, states = decide(policy, g, g_s)
    at = 12 + 10 + int(np.flatnonzero(expected[22:])[0])
    g_s[at] = bad
    found, poisoned = decide(policy, g, g_s)
    assert all(np.all(np.isfinite(x)) for x in poisoned if x.dtype == np.float32)
    np.testing.assert_array_equal(poisoned.norms[at], states.norms[at - 1])
    assert found[22:].sum() >= 0.8 * expected[22:].sum() > 6
