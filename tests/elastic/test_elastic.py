"""The rule of elastic averaging: recorded runs, an independent loop, and limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from elastic_runs import (
    PLAIN,
    RECORDED,
    ROUNDS,
    SHARP,
    Eamsgd,
    compiled_step,
    gradient,
    loss_of,
    simulated,
)

import samx
from samx import elastic

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs(name):
    expected, meta = problem.load(name)
    hyper = meta["hyper"]
    rule = elastic.Rule(beta=hyper["mva_alpha"] * hyper["P"], period=hyper["su_tau"])
    history = simulated(RECORDED[name], rule, list(range(hyper["P"])))
    for t, (center, locals_) in enumerate(history):
        for key in center:
            np.testing.assert_allclose(center[key], expected[key][t], rtol=0, atol=1e-12)
            for i, params in enumerate(locals_):
                np.testing.assert_allclose(
                    params[key], expected[f"w{i}/{key}"][t], rtol=0, atol=1e-12
                )


# Not recorded: momentum, weight decay, unequal speeds, more workers.
UNSEEN = {
    "four workers": ([0, 1, 2, 3], dict(weight=0.225, period=2, rho=0.2), {}),
    "speeds": ([0, 1, 1, 2, 2, 2], dict(weight=0.3, period=2, rho=0.1), {}),
    "speeds, EASGD": ([0, 1, 1, 2, 2, 2], dict(weight=0.3, period=2), {}),
    "momentum": ([0, 1], dict(weight=0.45, period=4, rho=0.05), dict(momentum=0.9, lr=0.02)),
    "momentum, EAMSGD": ([0, 1], dict(weight=0.45, period=4), dict(momentum=0.9, decay=5e-4)),
    "decay": ([0, 1], dict(weight=0.45, period=1, rho=0.1), dict(decay=0.01)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_runs_equal_an_independent_loop(name):
    order, shared, local = UNSEEN[name]
    num_workers = max(order) + 1
    lr, momentum = local.get("lr", 0.1), local.get("momentum", 0.0)
    tx = optax.chain(optax.add_decayed_weights(local.get("decay", 0.0)), optax.sgd(lr))
    tx = optax.chain(samx.sam(shared["rho"]), tx) if "rho" in shared else tx
    tx = elastic.nesterov(tx, momentum) if momentum else tx
    rule = elastic.Rule(beta=shared["weight"] * num_workers, period=shared["period"])
    loop = Eamsgd(num_workers, **shared, **local)
    for center, locals_ in simulated(tx, rule, order):
        for i in order:
            loop.call(i)
        chex.assert_trees_all_close((center, locals_), (loop.z, loop.w), rtol=0, atol=1e-10)


def test_leaders_are_pulled_at():
    """Elastic averaging with one more pull, to the worker with the smallest losses."""
    rule = elastic.Rule(beta=0.6, period=2, leader=0.25)
    leader, losses = None, {}
    (center, locals_), loop = simulated(PLAIN, rule, [0, 1], 6)[-1], Eamsgd(2, 0.3, 2)
    since = [[], []]
    for _ in range(6):
        for i in (0, 1):
            sent, is_due = loop.w[i], loop.n[i] % 2 == 0
            if is_due:
                losses[i] = np.mean(since[i]) if since[i] else np.inf
                since[i] = []
                if losses[i] <= min(losses.values()):
                    leader = sent
            batch = problem.batch_at(loop.data, loop.n[i] * 2 + i)
            since[i].append(loss_of(sent, batch))
            loop.call(i)
            if is_due:
                loop.w[i] = {k: loop.w[i][k] - 0.25 * (sent[k] - leader[k]) for k in sent}
    chex.assert_trees_all_close((center, locals_), (loop.z, loop.w), rtol=0, atol=1e-10)


# --- Limits ---


def alone(tx, steps):
    """Train one optimizer on the stream of a single worker; return its last parameters."""
    data, params = problem.make()
    state, step = tx.init(params), compiled_step(tx)
    for t in range(steps):
        params, state, _ = step(params, state, problem.batch_at(data, t))
    return params


def test_one_worker_with_weight_zero_is_sam():
    """To the last bit: one program takes both, and a move of zero adds nothing."""
    center, (params,) = simulated(SHARP, elastic.Rule(beta=0.0, period=3), [0])[-1]
    chex.assert_trees_all_equal(params, alone(SHARP, ROUNDS))
    chex.assert_trees_all_equal(center, problem.make()[1])


def test_radius_zero_is_easgd():
    rule, still = elastic.Rule(beta=0.9, period=2), optax.chain(samx.sam(0.0), PLAIN)
    zero, plain = (simulated(tx, rule, [0, 1])[-1] for tx in (still, PLAIN))
    chex.assert_trees_all_close(zero, plain, rtol=0, atol=1e-10)


def test_an_exchange_keeps_the_sum():
    center, params = jnp.array([1.0, -2.0]), jnp.array([3.0, 5.0])
    new, move = elastic.exchange(center, params, 0.3)
    np.testing.assert_allclose(new + elastic.apply_move(params, move), center + params, rtol=1e-15)
    np.testing.assert_allclose(move, 0.3 * (params - center), rtol=1e-15)


def test_integers_stay_with_the_worker():
    center = {"w": jnp.zeros(2, jnp.bfloat16), "n": jnp.array(3)}
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.array(7)}
    new, move = elastic.exchange(center, params, 0.5)
    assert new["w"].dtype == move["w"].dtype == jnp.bfloat16
    assert (int(new["n"]), int(elastic.apply_move(params, move)["n"])) == (3, 7)


def test_gaussian_smoothing_begins_around_the_center():
    """With deviation 0 and one worker, the center moves by α times the worker's steps."""
    rule = elastic.Rule(beta=0.5, period=2, smoothing="gaussian")
    center, _ = simulated(PLAIN, rule, [0], 5)[-1]
    data, z = problem.make()
    for t in range(0, 4, 2):  # the last exchange is at step 4
        w = z
        for s in (t, t + 1):
            g = gradient(w, problem.batch_at(data, s))
            w = {k: w[k] - 0.1 * g[k] for k in w}
        z = {k: z[k] + 0.5 * (w[k] - z[k]) for k in z}
    chex.assert_trees_all_close(center, z, rtol=0, atol=1e-12)


def test_gaussian_smoothing_has_its_deviation():
    from samx.elastic._rule import scattered

    params = {"w": jnp.ones(20_000), "n": jnp.array(3)}
    sample = scattered(params, jax.random.key(1), 0.1)
    assert float(sample["w"].std()) == pytest.approx(0.1, rel=0.03)
    assert float(sample["w"].mean()) == pytest.approx(1.0, abs=0.003)
    assert int(sample["n"]) == 3
