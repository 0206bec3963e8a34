"""Policies decide as plain Python would; a step that is not sharp calls no closure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from samx import policies
from samx.combinations import decaying, mix
from samx.perturbations import layer_steps


MOMENTUM = optax.sgd(0.1, momentum=0.9)


def decide(policy, gradients, sharp_gradients=None, state=None):
    """Return the decisions on a sequence of gradients, and the state after each step."""
    gradients = jnp.asarray(gradients)
    sharp_gradients = gradients if sharp_gradients is None else jnp.asarray(sharp_gradients)

    def step(state, pair):
        g, g_s = pair
        is_sharp, state = policy.decide(g, state)
        state = jax.lax.cond(is_sharp, lambda: policy.observe(g, g_s, state), lambda: state)
        return state, (is_sharp, state)

    start = policy.init(gradients[0]) if state is None else state
    scan = jax.jit(lambda state, pairs: jax.lax.scan(step, state, pairs)[1])
    decisions, states = scan(start, (gradients, sharp_gradients))
    return np.asarray(decisions), states


def state_behind(states, step):
    return jax.tree.map(lambda x: x[step], states)


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
}


@pytest.mark.parametrize("name", CLOCKS)
def test_clocks(name):
    policy, expected = CLOCKS[name]
    np.testing.assert_array_equal(decide(policy, np.ones(len(STEPS)))[0], expected)


def test_averages_inside_between_are_those_of_the_whole_training():
    gradients = np.random.default_rng(0).normal(size=60)
    whole, _ = decide(policies.squared_norm(), gradients)
    late, _ = decide(policies.between(20, policy=policies.squared_norm()), gradients)
    np.testing.assert_array_equal(late, whole & (np.arange(60) >= 20))


def test_between_lets_its_policy_observe():
    gradients = np.random.default_rng(0).normal(size=(2, 30))
    quota = policies.quota(6, num_blocks=2, warmup_steps=6)
    _, plain = decide(quota, *gradients)
    _, inside = decide(policies.between(policy=quota), *gradients)
    np.testing.assert_array_equal(inside.policy.norms, plain.norms)
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


def test_quota_draws_go_on_after_a_restart():
    g, g_s = np.random.default_rng(0).normal(size=(2, 100))
    policy = policies.quota(10, num_blocks=2, warmup_steps=12)
    decisions, states = decide(policy, g, g_s)
    resumed, _ = decide(policy, g[45:], g_s[45:], state=state_behind(states, 44))
    np.testing.assert_array_equal(resumed, decisions[45:])
    others = policies.quota(10, num_blocks=2, warmup_steps=12, key=1)
    assert np.any(decide(others, g, g_s)[0] != decisions)


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
    assert float(policy.decide(jnp.ones(2), state)[1].quota) == pytest.approx(2 * growth)


def test_norms_of_a_quota_are_those_of_the_measured_leaves():
    g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])}
    g_s = {"a": jnp.array([3.0, 6.0]), "b": jnp.array([50.0])}
    policy = policies.quota(is_measured=lambda path, leaf: path[-1].key == "a")
    state = policy.observe(g, g_s, policy.init(g))
    assert (float(state.norms[-1]), float(state.ratios[-1])) == (2.0, pytest.approx(0.4))


# `perturb_if`: what it calls, and what it passes on.


def sharp_gradient(make_eps):
    """A user-defined inner transformation, without state and readings."""

    def update_fn(g, state, params, *, value_fn):
        return samx.value_and_grad_at(value_fn, params, make_eps(g))[1], state

    return samx.closure_transformation(lambda params: (), update_fn, name="inner")


def from_examples():
    """One that reads only `losses_fn` and `batch`: it returns the gradient of the worst example."""

    def update_fn(g, state, params, *, losses_fn, batch):
        return jax.grad(lambda p: losses_fn(p, batch).max())(params), state

    return samx.closure_transformation(lambda params: (), update_fn, name="from_examples")


def loss(w):
    return 0.5 * jnp.sum(w**4)


def counted(calls, fn):
    def wrapped(w, *args):
        jax.debug.callback(lambda _: calls.append(None), w)
        return fn(w, *args)

    return wrapped


BATCH = jnp.linspace(0.5, 2.0, 4)
INNERS = {  # the transformation, and what it returns on a sharp step
    "sam": (
        lambda: samx.sam(0.5),
        lambda w, g, t: jax.grad(loss)(w + 0.5 * g / jnp.linalg.norm(g)),
    ),
    "without readings": (
        lambda: sharp_gradient(jnp.sign),
        lambda w, g, t: jax.grad(loss)(w + jnp.sign(g)),
    ),
    "from examples": (from_examples, lambda w, g, t: 2 * g),
    "a chain, whose memory is of all steps": (
        lambda: optax.chain(samx.sam(0.0), optax.scale(3.0), optax.trace(0.5)),
        lambda w, g, t: 6 * g * (1 - 0.5 ** (t + 1)),
    ),
}


@pytest.mark.parametrize("name", INNERS)
def test_a_skipped_step_calls_no_closure_and_takes_the_gradient(name):
    make, by_hand = INNERS[name]
    tx, calls = samx.perturb_if(policies.every(3), make()), []

    @jax.jit
    def step(w, state):
        g = jax.grad(loss)(w)
        g_s, state = tx.update(
            g,
            state,
            w,
            value_fn=counted(calls, loss),
            losses_fn=counted(calls, lambda w, batch: batch * loss(w)),
            batch=BATCH,
        )
        return g, g_s, state

    w, expected_calls = jnp.array([0.3, -0.7]), 0
    state = tx.init(w)
    for t in range(7):
        g, g_s, state = step(w, state)
        jax.block_until_ready(g_s)
        jax.effects_barrier()
        expected_calls += t % 3 == 0
        assert len(calls) == expected_calls
        if t % 3:
            np.testing.assert_array_equal(g_s, g)
        else:
            np.testing.assert_allclose(g_s, by_hand(w, g, t), rtol=1e-6)


def test_readings_of_a_skipped_step():
    tx = samx.perturb_if(policies.every(2), samx.sam(0.1))
    w = jnp.array([3.0, 4.0])
    g, state, spent = jax.grad(loss)(w), tx.init(w), 0
    update = jax.jit(lambda state: tx.update(g, state, w, value=loss(w), value_fn=loss))
    for t in range(4):
        _, state = update(state)
        readings = optax.tree.get(state, "readings")
        is_sharp = t % 2 == 0
        spent += 1 + is_sharp
        assert bool(readings.is_sharp) == is_sharp
        assert float(readings.gradients_spent) == spent
        assert float(readings.loss) == float(loss(w))
        assert float(readings.grad_norm) == pytest.approx(float(optax.tree.norm(g)))
        assert bool(jnp.isinf(readings.sharp_loss)) == (not is_sharp)
        for reading in (readings.perturbation_norm, readings.sharp_grad_norm, readings.cosine):
            assert (float(reading) == 0) == (not is_sharp)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("name", ["perturb_if", "looksam", "vsam"])
def test_a_gradient_of_another_dtype_than_the_parameters(name, dtypes):
    """Both kinds of steps give updates with the dtype of the parameters."""
    tx = {
        "perturb_if": samx.perturb_if(policies.every(2), samx.sam(0.05)),
        "looksam": samx.looksam(0.05, 2),
        "vsam": samx.vsam(policy=policies.quota(4, num_blocks=2, warmup_steps=1)),
    }[name]
    w, g = (jnp.ones(3, dtype) for dtype in dtypes)
    state = tx.init(w)
    for _ in range(2):
        updates, state = tx.update(
            g, state, w, value_fn=lambda w: (w.astype(jnp.float32) ** 4).sum()
        )
        assert updates.dtype == w.dtype


def test_readings_of_several_transformations_inside():
    inner = optax.chain(samx.sam(0.1), samx.sam(0.2))
    tx = samx.perturb_if(policies.every(2), optax.named_chain(("two", inner)))
    w = {"readings": jnp.ones(2)}  # a parameter with this name is not a reading
    state = tx.init(w)
    for is_sharp in (True, False):
        _, state = tx.update(w, state, w, value_fn=lambda w: (w["readings"] ** 4).sum())
        found = [bool(part.readings.is_sharp) for part in state.inner["two"]]
        assert found == [is_sharp] * 2


@pytest.mark.parametrize(
    "around", [lambda tx: samx.perturb_if(policies.every(2), tx), lambda tx: mix(tx, 2.0)]
)
@pytest.mark.parametrize(
    "inner", [samx.momentum_sam(MOMENTUM), samx.sampa(MOMENTUM, batch_like=np.ones((4, 2)))]
)
def test_a_variant_that_wraps_its_base_is_refused(around, inner):
    with pytest.raises(ValueError, match=r"`inner` must stand in front of a base.*SAM"):
        around(inner).init(jnp.ones(2))


def test_parameters_named_like_a_momentum():
    w = {"mu": jnp.ones(2), "trace": jnp.ones(1)}
    tx = samx.momentum_sam(optax.sgd(0.1, momentum=0.9), 0.1)
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(w, state, w, value_fn=lambda w: (w["mu"] ** 2).sum() + w["trace"][0])
    np.testing.assert_allclose(state.readings.perturbation_norm, 0.1, rtol=1e-5)


def test_an_inner_policy_runs_on_the_optimizers_clock():
    """A step is sharp if both policies want it; the inner policy counts all steps."""
    inner = samx.perturb_if(policies.every(3), samx.sam(0.1))
    tx, w, sharp = samx.perturb_if(policies.every(2), inner), jnp.array([3.0, 4.0]), []
    state = tx.init(w)
    update = jax.jit(lambda state: tx.update(w, state, w, value_fn=lambda w: 0.5 * w @ w))
    for _ in range(12):
        g_s, state = update(state)
        sharp.append(bool(jnp.any(g_s != w)))
    np.testing.assert_array_equal(sharp, np.arange(12) % 6 == 0)


def train_at(policy, calls, steps=6):
    """Make a training run with one radius, from `init` on, to be mapped over radii."""
    start, scales = jnp.array([0.3, -0.7]), jnp.linspace(0.5, 1.5, steps)

    def train(rho):
        tx = optax.chain(samx.perturb_if(policy, samx.sam(rho)), MOMENTUM)

        def step(carry, scale):
            w, state = carry

            def value_fn(w):
                return scale * loss(w - scale)

            g = jax.grad(value_fn)(w)
            updates, state = tx.update(g, state, w, value_fn=counted(calls, value_fn))
            return (optax.apply_updates(w, updates), state), None

        (w, state), _ = jax.lax.scan(step, (start, tx.init(start)), scales)
        return w, optax.tree.get(state, "gradients_spent")

    return train


MAPPED = {  # policy, whether it is still a branch under `vmap`
    "every": (policies.every(3), True),
    "random": (policies.random(0.5, key=1), True),
    "squared_norm": (policies.squared_norm(0.5, 0.5), False),
}


@pytest.mark.parametrize("name", MAPPED)
def test_under_vmap_the_branch_remains_where_the_decision_is_common(name):
    policy, is_common = MAPPED[name]
    radii, calls = jnp.array([0.01, 0.1, 0.3]), []
    train = train_at(policy, calls)
    mapped, spent = jax.jit(jax.vmap(train))(radii)
    jax.block_until_ready(mapped)
    jax.effects_barrier()
    sharp_steps = np.asarray(spent) - 6
    assert np.all((sharp_steps > 0) & (sharp_steps < 6))
    assert len(calls) == (sharp_steps.sum() if is_common else 6 * len(radii))
    assert ("cond[" in str(jax.make_jaxpr(jax.vmap(train))(radii))) == is_common
    alone = jax.jit(train)
    for i, rho in enumerate(radii):
        expected, spent_alone = alone(rho)
        assert spent_alone == spent[i]
        np.testing.assert_allclose(mapped[i], expected, rtol=1e-5)


ERRORS = {
    "period 0": (lambda: policies.every(0), ValueError, "`period` must be at least 1, got 0"),
    "period 1.5": (lambda: policies.every(1.5), TypeError, "`period` must be a Python int.*float"),
    "first": (lambda: policies.every(2, -1), ValueError, "`first` must be at least 0, got -1"),
    "period of looksam": (
        lambda: samx.looksam(period=0),
        ValueError,
        "`period` must be at least 1, got 0",
    ),
    "start": (lambda: policies.between(-1), ValueError, "`start` must be at least 0, got -1"),
    "stop before start": (
        lambda: policies.between(5, 4),
        ValueError,
        "`stop` must be at least 5, got 4",
    ),
    "policy of between": (
        lambda: policies.between(policy=3),
        TypeError,
        "between: `policy` must be a samx.policies.Policy.*got int",
    ),
    "probability 1.5": (
        lambda: policies.random(1.5),
        ValueError,
        r"`probability` must be in \[0, 1\], got 1.5",
    ),
    "negative probability": (
        lambda: policies.random(-0.1),
        ValueError,
        r"`probability` must be in \[0, 1\], got -0.1",
    ),
    "probability of no number": (
        lambda: policies.random("half"),
        TypeError,
        "`probability` must be a number or a schedule, got 'half'",
    ),
    "key": (
        lambda: policies.random(0.5, 1.5).init(jnp.ones(2)),
        TypeError,
        r"random: `key` must be a seed or a key from jax.random.key, got 1.5",
    ),
    "key of quota": (
        lambda: policies.quota(key=1.5).init(jnp.ones(2)),
        TypeError,
        r"quota: `key` must be a seed or a key.*got 1.5",
    ),
    "decay 2": (
        lambda: policies.squared_norm(decay=2),
        ValueError,
        r"`decay` must be in \[0, 1\], got 2",
    ),
    "decay of ae_sam": (lambda: samx.ae_sam(decay=2), ValueError, r"`decay` must be in \[0, 1\]"),
    "threshold": (lambda: samx.ae_sam(threshold="c"), TypeError, "`threshold` must be a number"),
    "blocks that do not divide": (
        lambda: policies.quota(10, num_blocks=4),
        ValueError,
        "`num_blocks` must cut `window`.*num_blocks=4 for window=10",
    ),
    "blocks of one": (
        lambda: policies.quota(window=10, num_blocks=10),
        ValueError,
        "`num_blocks`.*two or more.*num_blocks=10 for window=10",
    ),
    "inner of mix": (
        lambda: mix(0.05, 2.0),
        TypeError,
        "mix: `inner` must be an optax transformation, got float",
    ),
    "base of momentum_sam": (
        lambda: samx.momentum_sam(0.1),
        TypeError,
        "momentum_sam: `base` must be an optax transformation, got float",
    ),
    "reuse_steps": (
        lambda: samx.vsam(reuse_steps=-1),
        ValueError,
        "`reuse_steps` must be at least 0, got -1",
    ),
    "window 1": (lambda: policies.quota(1), ValueError, "`window` must be at least 2, got 1"),
    "max_fraction": (
        lambda: policies.quota(max_fraction=1.2),
        ValueError,
        r"`max_fraction` must be in \[0.02, 1\], got 1.2",
    ),
    "gain": (lambda: policies.quota(ratio_gain=-1), ValueError, "`ratio_gain`.*-1"),
    "no leaf measured": (
        lambda: (policy := policies.quota(is_measured=lambda path, leaf: False)).observe(
            jnp.ones(2), jnp.ones(2), policy.init(jnp.ones(2))
        ),
        ValueError,
        "quota: `is_measured` chooses none of the leaves",
    ),
    "policy": (
        lambda: samx.perturb_if(0.5, samx.sam()),
        TypeError,
        "perturb_if: `policy` must be a samx.policies.Policy.*got float",
    ),
    "policy of arsam": (
        lambda: samx.arsam(policy="every"),
        TypeError,
        "arsam: `policy` must be a samx.policies.Policy.*got str",
    ),
    "inner": (
        lambda: samx.perturb_if(policies.every(2), 0.05),
        TypeError,
        "perturb_if: `inner` must be an optax transformation, got float",
    ),
    "mixing": (
        lambda: samx.arsam(mixing=0.5),
        TypeError,
        r"arsam: `mixing` must be a function \(age, step\) -> weight, got 0.5",
    ),
    "decay of a mixing": (lambda: decaying(1.1), ValueError, r"`decay` must be in \[0, 1\]"),
    "last age": (lambda: decaying(last=-1), ValueError, "`last` must be at least 0, got -1"),
    "weight": (lambda: mix(samx.sam(), -1), ValueError, "`weight` must be at least 0, got -1"),
    "scaling": (
        lambda: layer_steps(0.1, scaling=2.0),
        TypeError,
        "layer_steps: `scaling` must be a function, got 2.0",
    ),
    "negative alpha": (
        lambda: samx.looksam(alpha=-0.1),
        ValueError,
        "`alpha` must be at least 0, got -0.1",
    ),
    "alpha of ae_looksam": (
        lambda: samx.ae_looksam(alpha=None),
        TypeError,
        "`alpha` must be a number or a schedule, got None",
    ),
    "no momentum": (
        lambda: samx.momentum_sam(optax.sgd(0.1)).init(jnp.ones(2)),
        ValueError,
        "momentum_sam: `base` must have one momentum.*found none.*`momentum=`",
    ),
    "two momenta": (
        lambda: samx.momentum_sam(optax.chain(optax.trace(0.9), optax.adam(0.1))).init(jnp.ones(2)),
        ValueError,
        r"momentum_sam: `base` must have one momentum.*trace.*mu",
    ),
    "momentum of another shape": (
        lambda: samx.momentum_sam(MOMENTUM, momentum=lambda state: jnp.ones(3)).init(jnp.ones(2)),
        ValueError,
        r"`momentum` must be shaped like the parameters, got \(3,\) for \(2,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    make, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        make()
