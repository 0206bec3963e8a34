"""Elastic averaging in threads: exact exchanges, speeds, faults, checkpoints and Ctrl-C."""

import contextlib
import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from elastic_runs import SHARP, Eamsgd, loss_of, make_worker, simulated, train
from ray_runs import wait_until

from samx import elastic
from samx.elastic._center import Center, Client, Shard
from samx.elastic._ledger import Ledger
from samx.elastic._worker import ExchangeRefused, Wire, check_sendable, copied, norm_of

pytestmark = pytest.mark.usefixtures("float64")


def test_threads_take_the_steps_of_the_simulation():
    """With one worker, the order of the events is known."""
    rule = elastic.Rule(beta=0.5, period=3)
    trained = train(SHARP, rule, 5, num_workers=1)
    history = simulated(SHARP, rule, [0], 13)  # the fifth exchange starts step 13
    chex.assert_trees_all_close(trained.params, history[-1][0], rtol=0, atol=1e-10)
    assert jax.tree.leaves(trained.params)[0].dtype == np.float64  # as in the caller's thread
    assert trained.progress.workers[0].exchanges == 5


def test_a_center_loses_no_update():
    """Four threads, 400 exchanges: the center has moved by the sum of all moves."""
    start = np.random.default_rng(0).normal(size=70_000)
    center = Center(Ledger(4, 400), Shard(start, 0.225, 0.0, True))
    moves = [np.zeros_like(start) for _ in range(4)]

    def run(i):
        rng = np.random.default_rng(i)
        sent = rng.normal(size=start.size).astype(np.float32)
        client = Client(center, (i, 0))
        client.join("here")
        client.wait_for_start()
        while (move := client.exchange(sent, 0.0)) is not None:
            moves[i] += move
            sent -= move
        client.leave()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert center.ledger.exchanges == 400
    records = center.ledger.snapshot()[1]
    assert sum(record.exchanges for record in records) == 400
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
    trained = train(SHARP, rule, 4, num_workers=1)
    center, _ = simulated(SHARP, rule, [0], 7)[-1]
    chex.assert_trees_all_close(trained.params, center, rtol=0, atol=1e-10)


def test_threads_are_exact_in_number_and_learn():
    seen = []
    trained = train(
        SHARP,
        elastic.Rule(period=2),
        60,
        num_workers=3,
        max_staleness=20,
        monitor=seen.append,
        monitor_every=0.0,
    )
    progress = trained.progress
    assert progress.exchanges == sum(worker.exchanges for worker in progress.workers) == 60
    assert all(worker.exchanges > 0 and worker.status == "done" for worker in progress.workers)
    assert len({worker.place for worker in progress.workers}) == 3  # one device per worker
    assert [p.exchanges for p in seen] == sorted(p.exchanges for p in seen)
    assert loss_of(trained.params) < 0.5 * loss_of(problem.make()[1])


def slowed(make, seconds):
    """Slow down the steps of the workers."""

    def make_slow(i):
        worker = make(i)

        def step(*args):
            time.sleep(seconds[i])
            return worker.step(*args)

        return worker._replace(step=step)

    return make_slow


def test_in_threads_a_slow_worker_holds_nobody_up():
    """While the third worker is inside one step, the other two take 40 steps."""
    make, steps = make_worker(SHARP, 3), []
    inside, others = threading.Event(), threading.Event()

    def make_held(i):
        worker, calls = make(i), itertools.count()

        def step(*args):
            is_first = next(calls) == 1  # after the warm-up
            if i == 2 and is_first:
                inside.set()
                assert others.wait(60)
            if i < 2:
                assert not is_first or inside.wait(60)
                steps.append(i)
                if len(steps) >= 42:
                    others.set()
            return worker.step(*args)

        return worker._replace(step=step)

    progress = train(SHARP, elastic.Rule(period=1), 60, num_workers=3, make=make_held).progress
    assert progress.exchanges == 60
    assert 1 <= progress.workers[2].exchanges <= 20


def test_in_threads_staleness_is_bounded():
    make = slowed(make_worker(SHARP, 3), [0.0, 0.0, 0.01])
    trained = train(SHARP, elastic.Rule(period=1), 60, num_workers=3, make=make, max_staleness=4)
    assert trained.progress.exchanges == 60
    assert 2 <= max(worker.largest_staleness for worker in trained.progress.workers) <= 4


def test_staleness_is_that_since_a_resumption():
    ledger = Ledger(2, 100, None, {0: 10, 1: 20})
    ledger.open()
    for i in (0, 1):
        ledger.wait_for_start((i, 0))
    for i in (0, 1, 1, 0, 1, 0):
        ledger.admit((i, 0), 0.0)
    one, other = ledger.snapshot()[1]
    assert (one.exchanges, one.mean_staleness) == (13, pytest.approx((0 + 2 + 1) / 3))
    assert (other.exchanges, other.mean_staleness) == (23, pytest.approx((1 + 0 + 1) / 3))


def test_nobody_waits_for_the_dead():
    ledger = Ledger(3, 20, 2)
    starts = [threading.Thread(target=ledger.wait_for_start, args=((i, 0),)) for i in range(3)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join(10)
    ledger.leave((2, 0), "lost")

    def alternate():
        for i in range(20):
            ledger.admit((i % 2, 0), 0.0)

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
    make = failing(make_worker(SHARP, 3), 1, 5)
    with pytest.warns(RuntimeWarning, match="worker 1 .* died after .*ValueError: out of cheese"):
        trained = train(
            SHARP, elastic.Rule(period=2), 60, num_workers=3, make=make, max_staleness=10
        )
    died = trained.progress.workers[1]
    assert died.status == "died"
    assert "out of cheese" in died.error
    assert trained.progress.exchanges == 60
    assert loss_of(trained.params) < 0.5 * loss_of(problem.make()[1])


def test_a_worker_is_started_again_from_the_center():
    started = []
    make = failing(make_worker(SHARP, 2), 1, 5)

    def make_seen(i):
        worker = make(i)

        def batches(n):
            started.append((i, n))
            return worker.batches(n)

        return worker._replace(batches=batches)

    with pytest.warns(RuntimeWarning, match="is started again"):
        trained = train(
            SHARP, elastic.Rule(period=2), 60, make=make_seen, max_restarts=1, max_staleness=10
        )
    again = trained.progress.workers[1]
    assert (again.status, again.restarts) == ("done", 1)
    assert trained.progress.exchanges == 60
    # It resumes at step 4, after two exchanges: calls 0 to 4 were the warm-up and steps 0 to 3.
    assert (1, 4) in started


def test_when_all_workers_die_the_last_ones_error_is_raised_and_the_center_saved():
    saved = []
    make = failing(make_worker(SHARP, 1), 0, 3)
    message = (
        "every worker has died; 2 of 60 exchanges were made; worker 0 ended after 2: ValueError"
    )
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=message):
        train(SHARP, elastic.Rule(period=1), 60, num_workers=1, make=make, save=saved.append)
    assert saved[-1].exchanges.tolist() == [2]


def test_a_run_goes_on_from_its_checkpoint():
    saved, rule = [], elastic.Rule(beta=0.5, period=2)
    first = train(SHARP, rule, 6, num_workers=1, save=saved.append)
    chex.assert_trees_all_equal(saved[-1].params, first.params)
    seen = []
    make = make_worker(SHARP, 1)

    def make_seen(i):
        worker = make(i)
        return worker._replace(batches=lambda n: (seen.append(n), worker.batches(n))[1])

    rest = train(SHARP, rule, 12, num_workers=1, make=make_seen, resume=saved[-1])
    assert rest.progress.exchanges == 12
    assert seen == [0, 12]  # a warm-up, then on from step 12
    expected = Eamsgd(1, 0.5, 2, rho=0.05)
    expected.z = {k: np.asarray(x) for k, x in saved[-1].params.items()}
    expected.w, expected.n = [dict(expected.z)], [12]
    for _ in range(11):
        expected.call(0)
    chex.assert_trees_all_close(rest.params, expected.z, rtol=0, atol=1e-10)


def test_ctrl_c_saves_the_center_and_ends_the_workers():
    """This holds even if the KeyboardInterrupt is swallowed."""
    saved, handler = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(progress):
        if progress.exchanges >= 3:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    make = slowed(make_worker(SHARP, 2), [0.02, 0.02])
    with pytest.raises(KeyboardInterrupt):
        train(
            SHARP,
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


def test_streams_that_end_are_a_shortfall_that_says_why():
    make = make_worker(SHARP, 2)

    def make_short(i):
        worker = make(i)
        return worker._replace(batches=lambda n: itertools.islice(worker.batches(n), 10 * i))

    with pytest.warns(RuntimeWarning, match="5 of 1000 exchanges were made") as warned:
        trained = train(SHARP, elastic.Rule(period=2), 1000, make=make_short)
    assert trained.progress.exchanges == 5  # every second of ten steps
    assert {worker.status for worker in trained.progress.workers} == {"done"}
    for text in (trained.shortfall, str(warned[0].message)):
        assert "worker 0 ended after 0: its stream of batches has ended after 0 local" in text
        assert "worker 1 ended after 5: its stream of batches has ended after 10 local" in text


def test_a_life_that_has_ended_changes_nothing():
    """A thread that hung may wake up after its worker was started again."""
    ledger = Ledger(1, 100)
    assert ledger.join((0, 0), "first") == 0
    assert ledger.wait_for_start((0, 0))
    assert ledger.admit((0, 0), 1.0) is not None
    ledger.leave((0, 0), "hung")
    ledger.report(0, True)
    assert ledger.join((0, 0), "woke up") is None
    assert ledger.join((0, 1), "second") == 1
    assert not ledger.wait_for_start((0, 0))
    assert ledger.wait_for_start((0, 1))
    assert ledger.admit((0, 0), 9.0) is None
    ledger.leave((0, 0), "raised")
    [record] = ledger.snapshot()[1]
    assert (record.status, record.exchanges, record.place) == ("running", 1, "second")
    assert (record.error, record.loss, record.restarts) == ("hung", 1.0, 1)


def test_only_workers_that_compute_are_silent():
    """Those that wait for others are not, and nobody is before training starts."""
    ledger = Ledger(3, 100, 2)
    ledger.join((0, 0), "")
    assert ledger.silent(0.0) == []
    ledger.open()
    time.sleep(0.01)
    assert ledger.silent(0.0) == [(0, 0), (1, 0), (2, 0)]
    assert ledger.silent(10.0) == []
    for i in range(3):
        ledger.wait_for_start((i, 0))
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: [ledger.admit((0, 0), 0.0) for _ in range(3)])
        try:
            wait_until(lambda: 0 in ledger.waiting)
            time.sleep(0.01)
            assert ledger.silent(0.0) == [(1, 0), (2, 0)]
        finally:
            ledger.stop()


def test_an_exchange_compiles_nothing():
    """Compiled leaf by leaf, a tree of a thousand shapes would take minutes to start."""
    params = {f"{i}": jnp.ones((i + 3, 2), "float32" if i % 2 else "bfloat16") for i in range(9)}
    wire, names = Wire(params | {"n": jnp.arange(3)}), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        params |= {"n": jnp.arange(3)}
        flat = wire.flat(params)
        moved = copied(wire.take_off(wire.put_in(params, 2 * flat), 0.5 * flat))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in names if "compile" in name]
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)
    want = {k: 1.5 * x if k != "n" else x for k, x in params.items()}
    chex.assert_trees_all_equal(moved, jax.tree.map(lambda w, x: w.astype(x.dtype), want, params))


@pytest.mark.parametrize("scale", [1.0, 1e30, 3e38])
def test_a_norm_is_finite_if_the_values_are(scale):
    values = np.array([0.6, -0.8], np.float32) * np.float32(scale)
    np.testing.assert_allclose(norm_of(values), scale, rtol=1e-6)
    check_sendable(values, 2 * scale)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ExchangeRefused, match="values that are not finite"):
            check_sendable(np.append(values, np.float32(bad)), np.inf)
    with pytest.raises(ExchangeRefused, match="a norm of"):
        check_sendable(values, 0.9 * scale)


def test_a_center_that_is_not_finite_is_not_saved(monkeypatch):
    """No worker can bring this about, so the test does."""
    saved, engine = [], elastic.Threads()
    monkeypatch.setattr(engine, "pull", lambda: np.full(engine._job.values.shape, np.nan))
    with pytest.warns(RuntimeWarning, match="the center is not finite, so it is not saved; no ch"):
        train(SHARP, elastic.Rule(), 4, num_workers=1, engine=engine, save=saved.append)
    assert saved == []


def test_every_worker_starts_at_once_when_its_exchanges_are_done():
    """A resumption of a finished training ends at once, at the same center."""
    center = problem.make()[1]
    resume = elastic.Checkpoint(center, np.array([3, 3]))
    trained = train(SHARP, elastic.Rule(), 6, resume=resume)
    assert (trained.progress.exchanges, trained.shortfall) == (6, "")
    chex.assert_trees_all_equal(trained.params, center)
