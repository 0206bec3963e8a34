"""Policies decide as plain Python would: clocks, draws and squared norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from decisions import decide, state_behind

from samx import policies

STEPS = np.arange(40)

CLOCKS = {
    "every step": (policies.every(1), STEPS >= 0),
    "every third": (policies.every(3), STEPS % 3 == 0),
    "every fifth from the second": (policies.every(5, first=2), STEPS % 5 == 2),
    "every third from the seventh": (policies.every(3, 7), (STEPS >= 7) & (STEPS % 3 == 1)),
    "always": (policies.between(), STEPS >= 0),
    "early": (policies.between(stop=10), STEPS < 10),
    "late": (policies.between(30), STEPS >= 30),
    "in the middle": (policies.between(5, 9), (STEPS >= 5) & (STEPS < 9)),
    "nowhere": (policies.between(5, 5), STEPS < 0),
    "late, on the clock of the whole training": (
        policies.between(10, policy=policies.every(4)),
        (STEPS >= 10) & (STEPS % 4 == 0),
    ),
    "two parts": (
        policies.between(2, 30, policies.between(20, policy=policies.every(2, first=1))),
        (STEPS >= 20) & (STEPS < 30) & (STEPS % 2 == 1),
    ),
    "joined: every fifth step, nowhere, every third step on the clock of the whole training": (
        policies.join_policies(
            [policies.every(5), policies.between(0, 0), policies.every(3)], [17, 26]
        ),
        np.where(STEPS < 17, STEPS % 5 == 0, (STEPS >= 26) & (STEPS % 3 == 0)),
    ),
}


@pytest.fixture(scope="module")
def clocks():
    """The decisions of all clocks, from one program."""

    def step(states, _):
        pairs = {name: policy.decide(1.0, states[name]) for name, (policy, _) in CLOCKS.items()}
        return {k: state for k, (_, state) in pairs.items()}, {k: x for k, (x, _) in pairs.items()}

    start = {name: policy.init(1.0) for name, (policy, _) in CLOCKS.items()}
    return jax.jit(lambda start: jax.lax.scan(step, start, STEPS)[1])(start)


@pytest.mark.parametrize("name", CLOCKS)
def test_clocks(name, clocks):
    np.testing.assert_array_equal(clocks[name], CLOCKS[name][1])


def test_averages_inside_another_policy_are_those_of_the_whole_training():
    gradients, late = np.random.default_rng(0).normal(size=60), np.arange(60) >= 20
    norm = policies.squared_norm()
    whole, _ = decide(norm, gradients)
    inside, _ = decide(policies.between(20, policy=norm), gradients)
    np.testing.assert_array_equal(inside, whole & late)
    joined, _ = decide(policies.join_policies([policies.every(1), norm], [20]), gradients)
    np.testing.assert_array_equal(joined, whole | ~late)


@pytest.mark.parametrize("others", [[], [policies.every(1)]])
def test_a_policy_inside_another_one_observes(others):
    gradients = np.random.default_rng(0).normal(size=(2, 30))
    quota = policies.quota(6, num_blocks=2, warmup_steps=6)
    _, plain = decide(quota, *gradients)
    around = (
        policies.join_policies([quota, *others], [30]) if others else policies.between(policy=quota)
    )
    _, inside = decide(around, *gradients)
    found = inside.policies[0] if others else inside.policy
    np.testing.assert_allclose(found.norms, plain.norms, rtol=1e-6)
    assert np.any(plain.norms)


DRAWS = 2000

PROBABILITIES = {
    "0.3": (0.3, np.full(DRAWS, 0.3)),
    "0.9": (0.9, np.full(DRAWS, 0.9)),
    "falling": (optax.linear_schedule(1.0, 0.2, DRAWS), np.linspace(1.0, 0.2, DRAWS)),
}


@pytest.mark.parametrize("name", PROBABILITIES)
def test_random_is_as_frequent_as_it_is_probable(name):
    probability, p = PROBABILITIES[name]
    decisions, _ = decide(policies.random(probability), np.ones(DRAWS))
    for half in np.split(np.arange(DRAWS), 2):
        deviation = np.sqrt((p[half] * (1 - p[half])).sum())
        assert abs(decisions[half].sum() - p[half].sum()) < 3 * deviation
        assert 0 < decisions[half].sum() < len(half)
    lag = np.corrcoef(decisions[1:] - p[1:], decisions[:-1] - p[:-1])[0, 1]
    assert abs(lag) < 3 / np.sqrt(DRAWS)  # successive draws are independent


def test_draws_are_made_of_the_key_and_the_step():
    def draws(key, **kwargs):
        return decide(policies.random(0.5, key), np.ones(100), **kwargs)

    decisions, states = draws(3)
    np.testing.assert_array_equal(draws(3)[0], decisions)
    np.testing.assert_array_equal(draws(jax.random.key(3))[0], decisions)
    np.testing.assert_array_equal(draws(3, state=state_behind(states, 39))[0][:60], decisions[40:])
    assert 20 < (draws(4)[0] != decisions).sum() < 80


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("threshold", [0.0, 0.7, optax.linear_schedule(1.5, -1.5, 200)])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_squared_norm_by_hand(threshold, decay):
    gradients = np.random.default_rng(0).normal(size=(200, 4)) * np.linspace(3, 1, 200)[:, None]
    mean, variance, expected = 0.0, np.exp(-10), []
    for t, s in enumerate((gradients**2).sum(axis=1)):
        mean = decay * mean + (1 - decay) * s
        variance = decay * variance + (1 - decay) * (s - mean) ** 2
        c = 1.5 - 3 * t / 200 if callable(threshold) else threshold
        expected.append(s >= mean + c * np.sqrt(variance))
    decisions, states = decide(policies.squared_norm(threshold, decay), gradients)
    np.testing.assert_array_equal(decisions, expected)
    np.testing.assert_allclose(states.mean[-1], mean, rtol=1e-12)
    np.testing.assert_allclose(states.variance[-1], variance, rtol=1e-12, atol=1e-300)
    assert decay == 0 or 0 < np.sum(expected) < 200


@pytest.mark.parametrize(("threshold", "is_sharp"), [(-jnp.inf, True), (jnp.inf, False)])
def test_squared_norm_of_zero_gradients_stays_a_number(threshold, is_sharp):
    decisions, states = decide(policies.squared_norm(threshold), np.zeros((2000, 3), np.float32))
    assert np.all(decisions == is_sharp)
    assert np.all(np.isfinite(states.variance))


@pytest.mark.parametrize("spike", [np.nan, np.inf, 1e25, 1e10, 1e4])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_one_spike_does_not_turn_the_squared_norm_off(spike, threshold):
    """70 steps later, it takes the sharp steps that it takes without the spike."""
    gradients = np.random.default_rng(0).normal(size=(200, 3))
    policy = policies.squared_norm(threshold)
    expected, _ = decide(policy, gradients)
    gradients[50] *= spike
    found, states = decide(policy, gradients)
    assert np.all(np.isfinite(states.mean))
    assert np.all(np.isfinite(states.variance))
    if not spike < 1e19:  # its square overflows
        np.testing.assert_array_equal(states.mean[50], states.mean[49])
    assert found[120:].sum() >= 0.8 * expected[120:].sum() > 5


def test_a_gradient_that_stays_long_is_learned():
    gradients = np.random.default_rng(0).normal(size=(300, 3))
    gradients[100:] *= 1e4
    found, states = decide(policies.squared_norm(), gradients)
    assert 0.3e8 < states.mean[-1] / states.mean[99] < 3e8
    assert 0.1 < found[150:].mean() < 0.9


def test_an_average_of_zeros_does_not_stay():
    gradients = np.zeros((60, 3))
    gradients[30:] = 1.0
    _, states = decide(policies.squared_norm(), gradients)
    np.testing.assert_allclose(states.mean[-1], 3.0, rtol=0.1)


def test_the_averages_begin_without_a_limit():
    """In the first 1 / (1 - decay) steps a squared norm may be 10,000 times its average."""
    gradients = np.full(12, 0.01)
    gradients[4] = 1.0
    _, states = decide(policies.squared_norm(decay=0.8), gradients)
    by_hand = 0.0
    for t, g in enumerate(gradients):
        by_hand = 0.8 * by_hand + 0.2 * g**2
        np.testing.assert_allclose(states.mean[t], by_hand, rtol=1e-5)
    gradients = np.roll(gradients, 1)  # one step later there is one
    _, states = decide(policies.squared_norm(decay=0.8), gradients)
    np.testing.assert_allclose(states.mean[5], (0.8 + 0.2 * 100) * states.mean[4], rtol=1e-5)
