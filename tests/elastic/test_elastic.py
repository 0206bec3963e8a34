"""Elastic averaging: recorded runs, limits, speeds and faults; simulated, in threads, compiled."""

import contextlib
import functools
import itertools
import signal
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import regimes
from jax.sharding import PartitionSpec as P

import samx
from samx import elastic
from samx.elastic._center import Center, Ledger, Shard, may_exchange

pytestmark = pytest.mark.usefixtures("float64")

ROUNDS = 12


def sharp(rho=0.05, base=None):
    return optax.chain(samx.sam(rho), optax.sgd(0.1) if base is None else base)


def make_step(tx):
    def step(params, state, batch):
        def value_fn(params):
            return problem.losses_fn(params, batch).mean()

        value, grads = jax.value_and_grad(value_fn)(params)
        tx_update = optax.with_extra_args_support(tx).update
        updates, state = tx_update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, value

    return step


def make_worker(tx, step, num_workers):
    """Worker i takes batch n·P + i at its n-th local step, as in the recorded runs."""
    data, params = problem.make()

    def make(i):
        return elastic.Worker(
            params,
            tx.init,
            step,
            lambda n: (problem.batch_at(data, m * num_workers + i) for m in itertools.count(n)),
        )

    return make


def simulated(tx, rule, order, num_rounds=ROUNDS):
    """Return the center and the workers after every round of `order`."""
    num_workers = max(order) + 1
    make = make_worker(tx, jax.jit(make_step(tx), donate_argnums=(0, 1)), num_workers)
    workers = [make(i) for i in range(num_workers)]
    simulation, history = elastic.Simulation(workers, problem.make()[1], rule), []
    for event in elastic.in_order(order * num_rounds, rule.period):
        simulation.apply(event)
        if event.kind == "finish" and (event.time + 1) % len(order) == 0:
            locals_ = [jax.tree.map(np.asarray, local.params) for local in simulation.workers]
            history.append((jax.tree.map(np.asarray, simulation.center), locals_))
    return history


# --- Recorded runs of the authors' code ---

RECORDED = {
    "lsam_INFERRED__sgd_p2_tau4_a0.45_rho0.05": sharp,
    "aeasgd__sgd_p2_tau4_a0.45": lambda: optax.sgd(0.1),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs(name):
    expected, meta = problem.load(name)
    hyper = meta["hyper"]
    rule = elastic.Rule(beta=hyper["mva_alpha"] * hyper["P"], period=hyper["su_tau"])
    history = simulated(RECORDED[name](), rule, list(range(hyper["P"])))
    for t, (center, locals_) in enumerate(history):
        for key in center:
            np.testing.assert_allclose(center[key], expected[key][t], rtol=0, atol=1e-12)
            for i, params in enumerate(locals_):
                np.testing.assert_allclose(
                    params[key], expected[f"w{i}/{key}"][t], rtol=0, atol=1e-12
                )


class Eamsgd:
    """The loop of the authors' file; the pull does not enter the velocity."""

    def __init__(self, num_workers, weight, period, rho=0.0, momentum=0.0, decay=0.0, lr=0.1):
        self.data, self.z = problem.make()
        self.z = {k: np.asarray(x) for k, x in self.z.items()}
        self.w = [dict(self.z) for _ in range(num_workers)]
        self.v = [{k: np.zeros_like(x) for k, x in self.z.items()} for _ in range(num_workers)]
        self.n = [0] * num_workers
        self.num_workers, self.weight, self.period = num_workers, weight, period
        self.rho, self.momentum, self.decay, self.lr = rho, momentum, decay, lr

    def call(self, i):
        w, n = self.w[i], self.n[i]
        move = dict.fromkeys(w, 0.0)
        if n % self.period == 0:
            move = {k: self.weight * (w[k] - self.z[k]) for k in w}
            self.z = {k: self.z[k] + move[k] for k in w}
        batch = problem.batch_at(self.data, n * self.num_workers + i)
        u = {k: w[k] + self.momentum * self.v[i][k] for k in w}
        h = gradient(u, batch)
        if self.rho:
            eps = reference.ball(self.rho)(u, h)
            h = gradient({k: u[k] + eps[k] for k in u}, batch)
        h = {k: h[k] + self.decay * u[k] for k in h}
        self.v[i] = {k: self.momentum * self.v[i][k] - self.lr * h[k] for k in h}
        self.w[i] = {k: u[k] - self.lr * h[k] - move[k] for k in h}
        self.n[i] += 1


@jax.jit
def _gradient(params, batch):
    return jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)


def gradient(params, batch):
    return {k: np.asarray(g) for k, g in _gradient(params, batch).items()}


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
    tx, leader, losses = optax.sgd(0.1), None, {}
    (center, locals_), loop = simulated(tx, rule, [0, 1], 6)[-1], Eamsgd(2, 0.3, 2)
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
            since[i].append(float(problem.losses_fn(sent, batch).mean()))
            loop.call(i)
            if is_due:
                loop.w[i] = {k: loop.w[i][k] - 0.25 * (sent[k] - leader[k]) for k in sent}
    chex.assert_trees_all_close((center, locals_), (loop.z, loop.w), rtol=0, atol=1e-10)


# --- Limits ---


def alone(tx, steps):
    """Train one optimizer on the stream of a single worker; return its last parameters."""
    data, params = problem.make()
    state, step = tx.init(params), jax.jit(make_step(tx))
    for t in range(steps):
        params, state, _ = step(params, state, problem.batch_at(data, t))
    return params


def test_one_worker_with_weight_zero_is_sam():
    center, (params,) = simulated(sharp(), elastic.Rule(beta=0.0, period=3), [0])[-1]
    chex.assert_trees_all_equal(params, alone(sharp(), ROUNDS))
    chex.assert_trees_all_equal(center, problem.make()[1])


def test_radius_zero_is_easgd():
    rule = elastic.Rule(beta=0.9, period=2)
    zero, plain = (simulated(tx, rule, [0, 1])[-1] for tx in (sharp(0.0), optax.sgd(0.1)))
    chex.assert_trees_all_equal(zero, plain)


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
    center, _ = simulated(optax.sgd(0.1), rule, [0], 5)[-1]
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


# --- The synchronous form ---


def synchronous(regime, tx, num_workers, steps=ROUNDS):
    """Run `tx` with workers along a mapped axis; return the center and the workers at the end."""
    data, params = problem.make()
    step = without_loss(make_step(tx))
    params = jax.tree.map(lambda x: jnp.stack([x] * num_workers), params)
    state = jax.vmap(tx.init)(params)
    if regime == "vmap":
        step = jax.jit(functools.partial(jax.vmap, axis_name="worker")(step))
    elif regime == "pmap":
        step = jax.pmap(step, axis_name="worker")
    else:
        step = on_mesh(step, regimes.mesh_of((num_workers,), ("worker",)), regime == "shard_map")
    for t in range(steps):
        batches = [problem.batch_at(data, t * num_workers + i) for i in range(num_workers)]
        params, state = step(params, state, jax.tree.map(lambda *x: jnp.stack(x), *batches))
    centers = optax.tree.get(state, "center")
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x, i=i: x[i], centers) for i in (0, -1)))
    return jax.tree.map(lambda x: x[0], centers), params


def without_loss(step):
    return lambda *args: step(*args)[:2]


def on_mesh(step, mesh, check_vma):
    def own(params, state, batch):
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return jax.tree.map(lambda x: x[None], step(first(params), first(state), first(batch)))

    spec = P("worker")
    return jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    )


def synchronous_loop(num_workers, beta, period, rho, momentum, exchange, steps=ROUNDS):
    """All workers exchange at once; "after" as in Leader SGD: first the mean, then both pulls."""
    data, z = problem.make()
    z = {k: np.asarray(x) for k, x in z.items()}
    w = [dict(z) for _ in range(num_workers)]
    bases = [reference.SGD(0.1, momentum) for _ in range(num_workers)]
    for t in range(steps):
        stepped = []
        for i in range(num_workers):
            batch = problem.batch_at(data, t * num_workers + i)
            g = gradient(w[i], batch)
            eps = reference.ball(rho)(w[i], g)
            g = gradient({k: w[i][k] + eps[k] for k in g}, batch) if rho else g
            stepped.append(bases[i].step(w[i], g))
        seen, is_due = (
            (w, t % period == 0) if exchange == "before" else (stepped, (t + 1) % period == 0)
        )
        w = stepped
        if is_due:
            mean = {k: sum(x[k] for x in seen) / num_workers for k in z}
            alpha = beta / num_workers
            w = [
                {k: s[k] - alpha * (x[k] - z[k]) for k in z}
                for s, x in zip(stepped, seen, strict=True)
            ]
            z = {k: (1 - beta) * z[k] + beta * mean[k] for k in z}
    return z, w


SYNCHRONOUS = [
    ("vmap", "before", 4, 0.1),
    ("vmap", "after", 4, 0.0),
    ("shard_map", "before", 2, 0.1),
    ("shard_map, check_vma=False", "after", 2, 0.1),
    ("pmap", "before", 2, 0.1),
]


@pytest.mark.parametrize(("regime", "exchange", "num_workers", "rho"), SYNCHRONOUS)
def test_synchronous_form(regime, exchange, num_workers, rho):
    base = optax.sgd(0.1, momentum=0.9)
    tx = samx.lsam(base, rho, beta=0.43, period=3, worker_axis="worker", exchange=exchange)
    center, params = synchronous(regime, tx, num_workers)
    z, w = synchronous_loop(num_workers, 0.43, 3, rho, 0.9, exchange)
    chex.assert_trees_all_close(center, z, rtol=0, atol=1e-10)
    for i, expected in enumerate(w):
        own = jax.tree.map(lambda x, i=i: x[i], params)
        chex.assert_trees_all_close(own, expected, rtol=0, atol=1e-10)


def test_synchronous_form_beside_an_axis_of_data():
    """Two workers of four devices each; a worker's batch is split over its devices."""
    tx = samx.lsam(optax.sgd(0.1), 0.1, period=2, worker_axis="worker")
    expected = synchronous("vmap", tx, 2)
    data, params = problem.make()
    mesh = regimes.mesh_of((2, 4), ("worker", "data"))
    inner = without_loss(make_step(samx.data_parallel(tx, "data")))

    def own(params, state, batch):
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return jax.tree.map(lambda x: x[None], inner(first(params), first(state), first(batch)))

    specs = (P("worker"), P("worker"), P("worker", "data"))
    step = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P("worker")))
    params = jax.tree.map(lambda x: jnp.stack([x] * 2), params)
    state = jax.vmap(tx.init)(params)
    for t in range(ROUNDS):
        batches = [problem.batch_at(data, t * 2 + i) for i in range(2)]
        params, state = step(params, state, jax.tree.map(lambda *x: jnp.stack(x), *batches))
    center = jax.tree.map(lambda x: x[0], optax.tree.get(state, "center"))
    chex.assert_trees_all_close((center, params), expected, rtol=0, atol=1e-10)


def test_synchronous_form_sends_nothing_between_exchanges():
    """Every all-reduce is inside a branch."""
    tx = samx.lsam(optax.sgd(0.1), 0.1, worker_axis="worker")
    data, params = problem.make()
    mesh = regimes.mesh_of((2,), ("worker",))
    step = on_mesh(without_loss(make_step(tx)), mesh, True)
    params = jax.tree.map(lambda x: jnp.stack([x] * 2), params)
    state = jax.vmap(tx.init)(params)
    batch = jax.tree.map(lambda x: jnp.stack([x] * 2), problem.batch_at(data, 0))
    text = step.lower(params, state, batch).as_text()
    before, _, after = text.partition("stablehlo.case")
    assert "all_reduce" in after
    assert "all_reduce" not in before
    assert after.count("all_reduce") <= 2 * len(jax.tree.leaves(problem.make()[1]))


def test_one_worker_with_a_center():
    """Without a worker axis, `beta` is the pull of the center."""
    tx = samx.lsam(optax.sgd(0.1), 0.05, beta=0.5, period=2)
    state = problem.train(tx, 4)
    center, (params,) = simulated(sharp(), elastic.Rule(beta=0.5, period=2), [0], 4)[-1]
    del center
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[-1], state), params, rtol=0, atol=1e-12)


def test_nesterov_takes_the_gradient_ahead():
    """optax keeps the look-ahead parameters w + 0.9 v; both take the same steps."""
    ahead = problem.train(optax.sgd(0.1, momentum=0.9, nesterov=True), 6)
    tx = elastic.nesterov(optax.sgd(0.1), 0.9)
    data, params = problem.make()
    state, step = tx.init(params), jax.jit(make_step(tx))
    for t in range(6):
        params, state, _ = step(params, state, problem.batch_at(data, t))
    found = jax.tree.map(lambda w, v: w + 0.9 * v, params, state.velocity)
    chex.assert_trees_all_close(found, jax.tree.map(lambda x: x[-1], ahead), rtol=0, atol=1e-12)


# --- Time ---


def gradients_per_second(seconds_per_step, **changes):
    events = list(elastic.timeline(seconds_per_step, period=4, num_exchanges=400, **changes))
    finished = [event.time for event in events if event.kind == "finish"]
    return len(finished) / finished[-1]


def test_a_slow_worker_holds_nobody_up():
    seconds = [1.0, 1.0, 1.0, 4.0]
    own_speeds = sum(1 / s for s in seconds)
    assert gradients_per_second(seconds, latency=0.2) >= 0.98 * own_speeds
    assert len(seconds) / max(seconds) <= 0.31 * own_speeds  # if all waited for the slowest


def test_a_slow_center_does():
    """Workers wait for replies that take longer than a step, once per period."""
    assert gradients_per_second([1.0] * 2, latency=1.5) == pytest.approx(2 * 4 / 6, rel=0.02)
    waiting = gradients_per_second([1.0] * 2, latency=0.5, overlap=False)
    assert waiting == pytest.approx(2 * 4 / 5, rel=0.02)


def staleness(events):
    """Compute the staleness from the exchanges alone."""
    last, version, found = {}, 0, []
    for event in events:
        if event.kind == "join":
            last[event.worker] = version
        if event.kind == "exchange":
            found.append(version - last[event.worker])
            assert found[-1] == event.staleness
            version += 1
            last[event.worker] = version
    return found


def test_staleness_is_bounded_and_then_costs_time():
    seconds = [0.1, 0.3, 1.0, 4.0]
    free = list(elastic.timeline(seconds, period=2, num_exchanges=200))
    assert max(staleness(free)) > 20
    for bound in (3, 8):
        bounded = list(elastic.timeline(seconds, period=2, num_exchanges=200, max_staleness=bound))
        assert len(staleness(bounded)) == 200
        assert max(staleness(bounded)) <= bound
        assert bounded[-1].time > free[-1].time


def test_workers_die_join_and_lose_messages():
    changes = [(2.5, 0, "die"), (4.5, 2, "join"), (6.0, 0, "join")]
    events = list(
        elastic.timeline(
            [1.0] * 3, period=2, num_exchanges=12, changes=changes, drops={(1, 1)}, latency=0.1
        )
    )
    of = [[e for e in events if e.worker == i] for i in range(3)]
    assert [e.time for e in of[0] if e.kind in ("join", "die")] == [0.0, 2.5, 6.0]
    assert not any(2.5 < e.time < 6.0 for e in of[0])
    assert of[2][0].time == 4.5
    exchanged = [round(e.time, 1) for e in of[1] if e.kind == "exchange"]
    assert exchanged[:3] == [0.1, 4.1, 6.1]  # the exchange at 2.1 was lost
    assert sum(e.kind == "exchange" for e in events) == 12
    staleness(events)

    tx, rule = sharp(), elastic.Rule(beta=0.9, period=2)
    make = make_worker(tx, jax.jit(make_step(tx)), 3)
    simulation = elastic.Simulation([make(i) for i in range(3)], problem.make()[1], rule)
    for event in events:
        simulation.apply(event)
        if event.kind == "join":  # it starts at the center, in any case
            chex.assert_trees_all_equal(simulation.workers[event.worker].params, simulation.center)
    assert simulation.exchanges == 12
    assert loss_of(simulation.center) < 0.8 * loss_of(problem.make()[1])


def loss_of(params):
    return float(problem.losses_fn(params, problem.make()[0]).mean())


@pytest.mark.parametrize("num_workers", [2, 5])
def test_the_bound_lets_somebody_go_on_always(num_workers):
    """In any allowed order, some worker may go on, and no worker is staler than the bound."""
    rng = np.random.default_rng(0)
    for bound in (num_workers - 1, num_workers, 3 * num_workers):
        last = dict.fromkeys(range(num_workers), 0)
        for version in range(300):
            allowed = [i for i in last if may_exchange(i, version, last, bound)]
            assert min(last, key=last.get) in allowed
            mover = allowed[rng.integers(len(allowed))]
            assert version - last[mover] <= bound
            last[mover] = version + 1


# --- Threads ---


def train(tx, rule, num_exchanges, num_workers=2, make=None, **keywords):
    make = make or make_worker(tx, jax.jit(make_step(tx), donate_argnums=(0, 1)), num_workers)
    return elastic.train(
        make,
        problem.make()[1],
        num_workers=num_workers,
        num_exchanges=num_exchanges,
        rule=rule,
        **keywords,
    )


def test_threads_take_the_steps_of_the_simulation():
    """With one worker, the order of the events is known."""
    rule = elastic.Rule(beta=0.5, period=3)
    trained = train(sharp(), rule, 5, num_workers=1)
    history = simulated(sharp(), rule, [0], 13)  # the fifth exchange starts step 13
    chex.assert_trees_all_close(trained.params, history[-1][0], rtol=0, atol=1e-12)
    assert jax.tree.leaves(trained.params)[0].dtype == np.float64  # as in the caller's thread
    assert trained.progress.workers[0].exchanges == 5


def test_a_center_loses_no_update():
    """Four threads, 1000 exchanges: the center has moved by the sum of all moves."""
    start = np.random.default_rng(0).normal(size=70_000)
    center = Center(Ledger(4, 1000), Shard(start, 0.225, 0.0, True))
    moves = [np.zeros_like(start) for _ in range(4)]

    def run(i):
        rng = np.random.default_rng(i)
        sent = rng.normal(size=start.size).astype(np.float32)
        center.ledger.join(i, "here")
        center.wait_for_start(i)
        while (move := center.exchange(i, sent, 0.0)) is not None:
            moves[i] += move
            sent -= move
        center.leave(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert center.ledger.exchanges == 1000
    records = center.ledger.snapshot()[1]
    assert sum(record.exchanges for record in records) == 1000
    assert {record.status for record in records} == {"done"}
    np.testing.assert_allclose(center.pull() - start, sum(moves), rtol=0, atol=1e-10)


def test_the_center_in_numpy_follows_the_rule():
    """Leaders, and moves rounded to what was sent before they are added."""
    rng = np.random.default_rng(0)
    z, sent = rng.normal(size=100_000), rng.normal(size=(3, 100_000)).astype(np.float32)
    shard, leader = Shard(z, 0.3, 0.25, True), z
    for w, is_leader in zip(sent, (True, False, True), strict=True):
        leader = w if is_leader else leader
        move = (w - z).astype(np.float32) * np.float32(0.3)
        pull = np.float32(0.25) * (w - leader)
        np.testing.assert_allclose(shard.exchange(w, is_leader), move + pull, rtol=0, atol=1e-6)
        z = z + move
        np.testing.assert_array_equal(shard.pull(), z)
    gaussian = Shard(z, 0.3, 0.0, False)
    np.testing.assert_allclose(gaussian.exchange(sent[0]), z + 0.3 * sent[0], atol=1e-6)
    np.testing.assert_allclose(gaussian.pull(), z + 0.3 * sent[0], atol=1e-6)


def test_threads_smooth_as_the_simulation_does():
    rule = elastic.Rule(beta=0.5, period=2, smoothing="gaussian", deviation=0.1)
    trained = train(sharp(), rule, 4, num_workers=1)
    center, _ = simulated(sharp(), rule, [0], 7)[-1]
    chex.assert_trees_all_close(trained.params, center, rtol=0, atol=1e-12)


def test_threads_are_exact_in_number_and_learn():
    seen = []
    trained = train(
        sharp(), elastic.Rule(period=2), 60, num_workers=3, monitor=seen.append, monitor_every=0.0
    )
    progress = trained.progress
    assert progress.exchanges == sum(worker.exchanges for worker in progress.workers) == 60
    assert all(worker.exchanges > 0 and worker.status == "done" for worker in progress.workers)
    assert len({worker.place for worker in progress.workers}) == 3  # one device per worker
    assert [p.exchanges for p in seen] == sorted(p.exchanges for p in seen)
    assert loss_of(trained.params) < 0.5 * loss_of(problem.make()[1])


def slowed(make, seconds, spent=None):
    """Slow down the steps of the workers; their start and end times go into `spent`."""

    def make_slow(i):
        worker = make(i)

        def step(*args):
            start = time.perf_counter()
            time.sleep(seconds[i])
            result = jax.block_until_ready(worker.step(*args))
            if spent is not None:
                spent[i].append((start, time.perf_counter()))
            return result

        return worker._replace(step=step)

    return make_slow


def test_in_threads_a_slow_worker_holds_nobody_up():
    """Workers compute instead of waiting: they reach 0.9 of the sum of their own speeds."""
    tx, spent = sharp(), [[], [], []]
    make = slowed(make_worker(tx, jax.jit(make_step(tx)), 3), [0.1, 0.1, 0.4], spent)
    progress = train(tx, elastic.Rule(), 20, num_workers=3, make=make).progress
    own_speeds, speeds = [], []
    for times in (np.array(t[1:]) for t in spent):  # the first step was to compile
        own_speeds.append(1 / np.median(times[:, 1] - times[:, 0]))
        speeds.append(len(times) / (times[-1, 1] - times[0, 0]))
    assert sum(speeds) >= 0.9 * sum(own_speeds)
    assert 3 * min(own_speeds) <= 0.55 * sum(own_speeds)  # if all waited for the slowest
    by_fast, _, by_slow = (worker.exchanges for worker in progress.workers)
    assert by_fast >= 3 * by_slow


def test_in_threads_staleness_is_bounded():
    tx = sharp()
    make = slowed(make_worker(tx, jax.jit(make_step(tx)), 3), [0.0, 0.0, 0.03])
    trained = train(tx, elastic.Rule(period=1), 60, num_workers=3, make=make, max_staleness=4)
    assert trained.progress.exchanges == 60
    assert 2 <= max(worker.largest_staleness for worker in trained.progress.workers) <= 4


def test_staleness_is_that_since_a_resumption():
    ledger = Ledger(2, 100, None, {0: 10, 1: 20})
    ledger.open()
    for i in (0, 1):
        ledger.wait_for_start(i)
    for i in (0, 1, 1, 0, 1, 0):
        ledger.admit(i, 0.0)
    one, other = ledger.snapshot()[1]
    assert (one.exchanges, one.mean_staleness) == (13, pytest.approx((0 + 2 + 1) / 3))
    assert (other.exchanges, other.mean_staleness) == (23, pytest.approx((1 + 0 + 1) / 3))


def test_nobody_waits_for_the_dead():
    ledger = Ledger(3, 20, 2)
    starts = [threading.Thread(target=ledger.wait_for_start, args=(i,)) for i in range(3)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join(10)
    ledger.leave(2, "lost")

    def alternate():
        for i in range(20):
            ledger.admit(i % 2, 0.0)

    others = threading.Thread(target=alternate, daemon=True)
    others.start()
    others.join(10)
    assert not others.is_alive()
    assert ledger.exchanges == 20


def failing(make, index, after, times=1):
    """Make worker `index` raise in its local step `after`, at most `times` times."""
    left = itertools.count(times, -1)

    def make_failing(i):
        worker, count = make(i), itertools.count()

        def step(*args):
            if i == index and next(count) == after and next(left) > 0:
                raise ValueError("out of cheese")
            return worker.step(*args)

        return worker._replace(step=step)

    return make_failing


def test_a_worker_that_raises_stops_nobody():
    tx = sharp()
    make = failing(make_worker(tx, jax.jit(make_step(tx)), 3), 1, 5)
    with pytest.warns(RuntimeWarning, match="worker 1 .* died after .*ValueError: out of cheese"):
        trained = train(tx, elastic.Rule(period=2), 60, num_workers=3, make=make)
    died = trained.progress.workers[1]
    assert died.status == "died"
    assert "out of cheese" in died.error
    assert trained.progress.exchanges == 60
    assert loss_of(trained.params) < 0.5 * loss_of(problem.make()[1])


def test_a_worker_is_started_again_from_the_center():
    tx, started = sharp(), []
    make = failing(make_worker(tx, jax.jit(make_step(tx)), 2), 1, 5)

    def make_seen(i):
        worker = make(i)

        def batches(n):
            started.append((i, n))
            return worker.batches(n)

        return worker._replace(batches=batches)

    with pytest.warns(RuntimeWarning, match="is started again"):
        trained = train(tx, elastic.Rule(period=2), 60, make=make_seen, max_restarts=1)
    again = trained.progress.workers[1]
    assert (again.status, again.restarts) == ("done", 1)
    assert trained.progress.exchanges == 60
    # It resumes at step 4, after two exchanges: calls 0 to 4 were the warm-up and steps 0 to 3.
    assert (1, 4) in started


def test_when_all_workers_die_the_last_ones_error_is_raised_and_the_center_saved():
    tx, saved = sharp(), []
    make = failing(make_worker(tx, jax.jit(make_step(tx)), 1), 0, 3)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="out of cheese"):
        train(tx, elastic.Rule(period=1), 60, num_workers=1, make=make, save=saved.append)
    assert saved[-1].exchanges.tolist() == [2]


def test_a_run_goes_on_from_its_checkpoint():
    saved, rule = [], elastic.Rule(beta=0.5, period=2)
    first = train(sharp(), rule, 6, num_workers=1, save=saved.append)
    chex.assert_trees_all_equal(saved[-1].params, first.params)
    tx, seen = sharp(), []
    make = make_worker(tx, jax.jit(make_step(tx)), 1)

    def make_seen(i):
        worker = make(i)
        return worker._replace(batches=lambda n: (seen.append(n), worker.batches(n))[1])

    rest = train(tx, rule, 12, num_workers=1, make=make_seen, resume=saved[-1])
    assert rest.progress.exchanges == 12
    assert seen == [0, 12]  # a warm-up, then on from step 12
    expected = Eamsgd(1, 0.5, 2, rho=0.05)
    expected.z = {k: np.asarray(x) for k, x in saved[-1].params.items()}
    expected.w, expected.n = [dict(expected.z)], [12]
    for _ in range(11):
        expected.call(0)
    chex.assert_trees_all_close(rest.params, expected.z, rtol=0, atol=1e-12)


def test_ctrl_c_saves_the_center_and_ends_the_workers():
    """This holds even if the KeyboardInterrupt is swallowed."""
    saved, handler = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(progress):
        if progress.exchanges >= 3:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    tx = sharp()
    make = slowed(make_worker(tx, jax.jit(make_step(tx)), 2), [0.3, 0.3])
    with pytest.raises(KeyboardInterrupt):
        train(
            tx,
            elastic.Rule(period=1),
            1000,
            make=make,
            monitor=interrupt,
            monitor_every=0.0,
            save=saved.append,
        )
    assert 3 <= saved[-1].exchanges.sum() < 1000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker ")]
    assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler


def test_streams_may_end():
    tx = sharp()
    make = make_worker(tx, jax.jit(make_step(tx)), 2)

    def make_short(i):
        worker = make(i)
        return worker._replace(batches=lambda n: itertools.islice(worker.batches(n), 10))

    trained = train(tx, elastic.Rule(period=2), 1000, make=make_short)
    assert trained.progress.exchanges == 10  # two workers, every second of ten steps
    assert {worker.status for worker in trained.progress.workers} == {"done"}


# --- Bad input ---

BAD = {
    "beta": (lambda: elastic.Rule(beta=1.1), ValueError, "`beta` must be in"),
    "period": (lambda: elastic.Rule(period=0), ValueError, "`period` must be at least 1"),
    "smoothing": (lambda: elastic.Rule(smoothing="median"), ValueError, "'elastic' or 'gaussian'"),
    "deviation": (lambda: elastic.Rule(deviation=0.1), ValueError, "belongs to smoothing"),
    "leader": (lambda: elastic.Rule(leader=1.0), ValueError, "`leader` must be below 1"),
    "schedule": (lambda: elastic.Rule(beta=lambda t: 0.9), TypeError, "`beta` must be a number"),
    "staleness": (
        lambda: train(sharp(), elastic.Rule(), 4, num_workers=3, max_staleness=1),
        ValueError,
        "`max_staleness` must be at least num_workers − 1 = 2",
    ),
    "exchanges": (lambda: train(sharp(), elastic.Rule(), 0), ValueError, "`num_exchanges`"),
    "resume": (
        lambda: train(
            sharp(), elastic.Rule(), 4, resume=elastic.Checkpoint(None, np.array([1, 2, 3]))
        ),
        ValueError,
        "`resume` must be of num_workers=2",
    ),
    "params": (
        lambda: elastic.train(lambda i: None, {"n": jnp.arange(3)}, num_workers=1, num_exchanges=1),
        TypeError,
        "`params` must have real floating leaves",
    ),
    "event": (
        lambda: elastic.Simulation(
            [make_worker(optax.sgd(0.1), None, 1)(0)], problem.make()[1], elastic.Rule()
        ).apply(elastic.Event(0.0, 1, "begin")),
        ValueError,
        "a worker index below 1",
    ),
    "workers": (
        lambda: elastic.Simulation([], None, elastic.Rule()),
        ValueError,
        "`number of workers` must be at least 1",
    ),
    "seconds": (
        lambda: list(elastic.timeline([1.0, 0.0], period=1, num_exchanges=1)),
        ValueError,
        "`seconds_per_step` must be positive",
    ),
    "changes": (
        lambda: list(elastic.timeline([1.0], period=1, num_exchanges=1, changes=[(0.0, 1, "die")])),
        ValueError,
        "`changes` has",
    ),
    "worker_axis": (
        lambda: samx.lsam(optax.sgd(0.1), worker_axis=3),
        TypeError,
        "lsam: `worker_axis` must be the name",
    ),
    "exchange": (
        lambda: samx.lsam(optax.sgd(0.1), exchange="never"),
        ValueError,
        "lsam: `exchange` must be 'before' or 'after'",
    ),
    "momentum": (
        lambda: elastic.nesterov(optax.sgd(0.1), 1.5),
        ValueError,
        "`momentum` must be in",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
