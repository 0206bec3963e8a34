"""Ray: exchanges between processes are exact, whichever process dies. Ray starts once."""

import itertools
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import problem
import psutil
import pytest
from ray_runs import LONG, bounded, is_alive, loss_of, maker, wait_until

from samx import elastic
from samx.elastic import _actors, _center, _ledger, _ray, _ray_local
from samx.elastic._engine import Job


@pytest.fixture(autouse=True)
def bounded_test():
    with bounded():
        yield


@pytest.fixture(scope="module")
def cluster():
    """One cluster for all tests, and the engine that ends it."""
    handler = signal.getsignal(signal.SIGTERM)
    engine = elastic.Ray()
    engine._connect()
    assert signal.getsignal(signal.SIGTERM) is handler
    yield engine
    engine.close()


def tree_of(engine):
    """Return the processes of the engine's cluster."""
    helper = psutil.Process(engine._cluster.pid)
    return [helper, *helper.children(recursive=True)]


def pid_of(record):
    return int(re.search(r" pid (\d+)$", record.place)[1])


def in_center(engine, function, shard=0):
    """Call a function in a process of the center."""
    import ray

    return ray.get(engine._shards[shard].__ray_call__.remote(function), timeout=LONG)


@pytest.mark.parametrize(("num_shards", "num_exchanges"), [(1, 400), (3, 300)])
def test_no_exchange_is_lost(cluster, num_shards, num_exchanges):
    """Four processes exchange at once; the center moves by the sum of the moves that they get."""
    import ray

    num_workers, size = 4, 20_000
    start = np.random.default_rng(0).normal(size=size)

    def hammer(index, shards):
        rng, client = np.random.default_rng(index), _actors.Client(shards, (index, 0))
        count, total = 0, np.zeros(size)
        # Each process asks for more exchanges than it can get; the center ends this.
        while count < num_exchanges:
            sent = rng.normal(size=size).astype(np.float32)
            move = client.exchange(sent, 0.0)
            if move is None:
                break
            assert move.dtype == np.float32
            count, total = count + 1, total + move
        return count, total

    engine = elastic.Ray(num_shards=num_shards)
    try:
        ledger = (num_workers, num_exchanges, None, {})
        engine.start(Job(maker(), elastic.Rule(), [], start, (0.225, 0.0, True), ledger))
        with _ray._by_value(_actors, _center, _ledger):
            task = ray.remote(num_cpus=0)(hammer)
            refs = [task.remote(index, engine._shards) for index in range(num_workers)]
        counts, totals = zip(*ray.get(refs, timeout=LONG), strict=True)
        records = engine.call("snapshot")[1]
        assert sum(counts) == num_exchanges
        assert [record.exchanges for record in records] == list(counts)
        assert sum(count > 0 for count in counts) > 1  # on a busy machine one may come too late
        moved = engine.pull() - start
        assert np.abs(moved).max() > 0.1
        np.testing.assert_allclose(moved, sum(totals), rtol=0, atol=1e-10)
    finally:
        engine.close()


def test_parts_of_a_center_move_as_one(cluster):
    """This includes a leader: all parts must know who leads."""
    rng, size = np.random.default_rng(0), 10
    start, shard, ledger = rng.normal(size=size), (0.3, 0.2, True), (2, 6, None, {})
    whole = _center.Center(_ledger.Ledger(*ledger), _center.Shard(start, *shard))
    engine = elastic.Ray(num_shards=3)
    try:
        engine.start(Job(maker(), elastic.Rule(), [], start, shard, ledger))
        clients = [_actors.Client(engine._shards, (i, 0)) for i in (0, 1)]
        assert clients[0].join("here") == 0
        for index, loss in [(0, 2.0), (1, 1.0), (0, 3.0), (0, 0.5), (1, 1.0), (0, 0.1)]:
            sent = rng.normal(size=size)
            np.testing.assert_array_equal(
                clients[index].exchange(sent, loss),
                _center.Client(whole, (index, 0)).exchange(sent, loss),
            )
            np.testing.assert_array_equal(clients[index].pull(), whole.pull())
        before = engine.pull()
        assert clients[1].exchange(sent, 0.0) is None  # no exchange is left
        np.testing.assert_array_equal(engine.pull(), before)
        mine, theirs = engine.call("snapshot")[1], whole.call("snapshot")[1]
        assert [record.exchanges for record in mine] == [r.exchanges for r in theirs] == [4, 2]
    finally:
        engine.close()


def test_a_request_of_the_dead_is_not_counted():
    """A request may wait in the center for other workers while its own worker is killed."""
    ledger = _ledger.Ledger(2, 100, max_staleness=1)
    ledger.last = {0: 0, 1: 0}
    assert ledger.admit((0, 0), 1.0) is not None
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ledger.admit, (0, 0), 1.0)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        ledger.leave((0, 0), "killed")
        assert waiting.result(LONG) is None
    assert ledger.exchanges == 1
    assert ledger.last == {1: 0}


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """Train two workers and a center in two parts; also return what the monitor saw."""
    seen, engine = {}, elastic.Ray(num_shards=2)

    def monitor(progress):
        if progress.exchanges and not seen:
            seen["places"] = [record.place for record in progress.workers]
            processes = [psutil.Process(), *tree_of(cluster)]
            seen["sockets"] = [
                connection
                for process in processes
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            ]
            for shard in (0, 1):
                name = f"modules {shard}"
                seen[name] = in_center(engine, lambda _: set(sys.modules), shard)

    with bounded(), jax.enable_x64(True):
        trained = elastic.train(
            maker(0.005),
            problem.make(np.float32)[1],
            num_workers=2,
            num_exchanges=100,
            max_staleness=3,
            engine=engine,
            monitor=monitor,
            monitor_every=0.05,
        )
    return trained, seen


def test_training(undisturbed):
    trained, seen = undisturbed
    workers = trained.progress.workers
    assert trained.progress.exchanges == 100
    assert sum(record.exchanges for record in workers) == 100
    assert [record.status for record in workers] == ["done", "done"]
    assert max(record.largest_staleness for record in workers) <= 3
    assert len({pid_of(record) for record in workers} | {os.getpid()}) == 3
    assert seen["places"] == [record.place for record in workers]
    start = problem.make(np.float32)[1]
    assert loss_of(trained.params) < 0.5 * loss_of(start)
    # `pull` works after the center is gone, too.
    for one, other in zip(
        *map(jax.tree.leaves, (trained.progress.pull(), trained.params)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_nothing_but_loopback_is_listened_at(undisturbed):
    sockets = undisturbed[1]["sockets"]
    assert len(sockets) > 5
    assert {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets} <= {"127.0.0.1", "::1"}


def test_the_center_imports_no_jax(undisturbed):
    for shard in (0, 1):
        modules = undisturbed[1][f"modules {shard}"]
        assert "numpy" in modules
        assert not {"jax", "jaxlib", "optax", "samx"} & modules


def test_killed_workers(cluster, undisturbed, tmp_path):
    """The first killed worker is started again, the second is not; the other worker goes on."""
    pids, hurry = [], tmp_path / "hurry"

    def monitor(progress):
        record = progress.workers[0]
        is_new = record.status == "running" and record.place and pid_of(record) not in pids
        if is_new and len(pids) < 2 and record.exchanges >= 5 * (1 + len(pids)):
            pids.append(pid_of(record))
            os.kill(pids[-1], signal.SIGKILL)
        if len(pids) == 2:
            hurry.touch()

    with pytest.warns(RuntimeWarning, match="worker 0 .* pid .* died") as warned:
        trained = elastic.train(
            maker(0.01, hurry),
            problem.make(np.float32)[1],
            num_workers=2,
            num_exchanges=100,
            max_restarts=1,
            engine=elastic.Ray(),
            monitor=monitor,
            monitor_every=0.05,
        )
    one, other = trained.progress.workers
    first, second = (str(warning.message) for warning in warned)
    assert re.search(r"is started again: its process has ended: killed, crashed or out", first)
    assert re.search(r"exchanges: its process has ended: killed, crashed or out", second)
    assert len(pids) == 2
    assert (one.status, one.restarts, other.status, other.restarts) == ("died", 1, "done", 0)
    assert one.exchanges + other.exchanges == trained.progress.exchanges == 100
    assert abs(loss_of(trained.params) - loss_of(undisturbed[0].params)) < 0.2


def test_a_killed_center(cluster):
    """Even if it is the part without the ledger, nothing hangs and no worker is left."""
    engine, seen, saved = elastic.Ray(num_shards=2), {}, []

    def monitor(progress):
        if saved and saved[-1].exchanges[0] >= 3 and not seen:
            seen["workers"] = [pid_of(record) for record in progress.workers]
            seen["time"] = time.monotonic()
            os.kill(in_center(engine, lambda _: os.getpid(), 1), signal.SIGKILL)

    with pytest.raises(
        elastic.CenterLost, match="the center is lost, one of its processes has ended"
    ) as lost:
        elastic.train(
            maker(0.01),
            problem.make(np.float32)[1],
            num_workers=1,
            num_exchanges=10**6,
            engine=engine,
            monitor=monitor,
            monitor_every=0.05,
            save=saved.append,
            save_every=0.0,
        )
    kept = lost.value.checkpoint
    assert kept.exchanges.shape == (1,)
    assert kept is saved[-1]
    assert kept.exchanges[0] >= 3
    assert loss_of(kept.params) < loss_of(problem.make(np.float32)[1])
    assert f"after {kept.exchanges[0]} exchanges" in lost.value.__notes__[0]
    assert time.monotonic() - seen["time"] < 15
    wait_until(lambda: not any(map(is_alive, seen["workers"])), 15)
    engine.close()  # closing it again does no harm


def test_workers_that_fail_are_named_and_counted(cluster):
    """What is not finite never reaches the center, and SystemExit is a death like any other."""
    make, params = maker(0.01), problem.make(np.float32)[1]

    def make_failing(index):
        worker, calls = make(index), itertools.count()

        def step(*args):
            params, *rest = worker.step(*args)
            if index == 1 and next(calls) == 5:
                params = params | {"W1": params["W1"] * np.nan}
            if index == 2 and next(calls) == 5:
                raise SystemExit(0)
            return params, *rest

        return worker._replace(step=step)

    with pytest.warns(RuntimeWarning, match="worker . .* died") as warned:
        trained = elastic.train(
            make_failing,
            params,
            num_workers=3,
            num_exchanges=60,
            rule=elastic.Rule(period=2),
            max_staleness=4,
            engine=elastic.Ray(),
        )
    healthy, spoilt, gone = trained.progress.workers
    assert (healthy.status, spoilt.status, gone.status) == ("done", "died", "died")
    assert spoilt.error.startswith("ExchangeRefused: the worker would send values that are not fin")
    assert gone.error.startswith("SystemExit: 0")
    assert [record.refused for record in (healthy, spoilt, gone)] == [0, 1, 0]
    assert len(warned) == 2
    assert trained.progress.exchanges == 60
    assert loss_of(trained.params) < 0.5 * loss_of(params)


@pytest.mark.filterwarnings("ignore:elastic. worker 0:RuntimeWarning")
def test_a_worker_that_raises(cluster):
    def make_worker(index):
        raise FileNotFoundError(f"no data for {index}")

    params = problem.make(np.float32)[1]
    with pytest.raises(RuntimeError, match="no data for 0"):
        elastic.train(make_worker, params, num_workers=1, num_exchanges=1, engine=elastic.Ray())


def test_a_worker_that_hangs_is_killed(cluster):
    """A hanging worker cannot be asked to end."""
    params, saved, pids = problem.make(np.float32)[1], [], []

    def make_worker(index):
        return elastic.Worker(params, lambda _: None, lambda *_: time.sleep(1000), lambda n: [n])

    def monitor(progress):
        if progress.workers[0].place:
            pids.append(pid_of(progress.workers[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        elastic.train(
            make_worker,
            params,
            num_workers=1,
            num_exchanges=1,
            engine=elastic.Ray(grace=0.2),
            monitor=monitor,
            monitor_every=0.05,
            save=saved.append,
        )
    wait_until(lambda: not is_alive(pids[0]), 15)
    np.testing.assert_array_equal(saved[0].params["W1"], params["W1"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_shards": 0}, ValueError, "`num_shards` must be at least 1, got 0"),
        ({"num_shards": 1.5}, TypeError, "`num_shards` must be a Python int, got 1.5"),
        ({"num_cpus_per_worker": -1}, ValueError, "`num_cpus_per_worker` must be at least 0"),
        ({"num_gpus_per_worker": "all"}, TypeError, "`num_gpus_per_worker` must be a number"),
        ({"grace": float("nan")}, ValueError, "`grace` must be at least 0, got nan"),
        ({"grace": True}, TypeError, "`grace` must be a number, got True"),
        ({"address": 6379}, TypeError, "`address` must be HOST:PORT, got 6379"),
        ({"allow_unauthenticated": 1}, TypeError, "`allow_unauthenticated` must be True or False"),
        ({"worker_options": ["cpu"]}, TypeError, "`worker_options` must be a mapping"),
        ({"worker_options": {"num_cpus": 1}}, ValueError, "must not set num_cpus: .*per_worker"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        elastic.Ray(**options)


def test_more_parts_than_parameters(cluster):
    params = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"`num_shards` must be at most .* parameters, 2, got 3"):
        elastic.train(
            maker(), params, num_workers=1, num_exchanges=1, engine=elastic.Ray(num_shards=3)
        )


def test_a_cluster_that_anyone_can_reach_is_refused(monkeypatch, tmp_path):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = elastic.Ray(address="10.0.0.1:6379")
    message = "the cluster at 10.0.0.1:6379 has no token authentication"
    with pytest.raises(ValueError, match=message):
        engine._connect()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    hosts = [{"NodeManagerAddress": host} for host in ("127.0.0.1", "head.example.org")]
    monkeypatch.setattr(ray, "nodes", lambda: hosts)
    with pytest.raises(ValueError, match=r"the cluster of `ray.init` has no token authentication"):
        engine._connect()
    elastic.Ray(allow_unauthenticated=True)._connect()
    with monkeypatch.context() as then:
        then.setattr(ray, "nodes", lambda: hosts[:1])
        engine._connect()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with pytest.raises(ValueError, match="pass `allow_unauthenticated=True`"):
        engine._connect()
    monkeypatch.delenv("RAY_AUTH_MODE")
    engine._connect()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    engine._connect()


def test_a_token_that_is_there_is_used(monkeypatch):
    """Ray itself does not use it, if the address of the cluster is given."""
    import ray

    seen = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: seen.append(os.environ["RAY_AUTH_MODE"]))
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append("shutdown"))
    monkeypatch.setattr(_ray_local, "_reread", lambda: seen.append("reread"))
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    engine = elastic.Ray(address="10.0.0.1:6379")
    engine._connect()
    engine.close()
    assert seen == ["reread", "token", "shutdown", "reread"]
    assert "RAY_AUTH_MODE" not in os.environ


def test_a_cluster_that_does_not_start_says_why(monkeypatch, tmp_path):
    """And the environment is as before."""
    before = dict(os.environ)
    monkeypatch.setattr(_ray_local, "CLUSTER", tmp_path / "cluster.py")
    monkeypatch.setattr(_ray_local, "SETTINGS", {"SAMX_TEST": "1"})
    monkeypatch.setattr(_ray_local, "_reread", lambda: None)
    (tmp_path / "cluster.py").write_text("raise SystemExit('no room for a cluster')")
    with pytest.raises(RuntimeError, match=r"(?s)could be started on this .*no room for a cluster"):
        _ray_local.LocalCluster(0)
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["CPU", "GPU"])
def test_more_than_this_machine_has(cluster, monkeypatch, name):
    option = f"num_{name.lower()}s_per_worker"
    monkeypatch.setattr(cluster, option, 10_000)
    with pytest.raises(ValueError, match=f"`{option}` must be at most .*/2, .* got 10000"):
        cluster._check_resources(2)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'samx\[ray\]'"):
        elastic.Ray()
