"""Workers and center in processes of their own, on one machine or on many: an engine with Ray."""

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samx.core.hyperparams import check_count, check_number
from samx.elastic import _actors, _center
from samx.elastic._actors import Client, get, joined
from samx.elastic._center import CenterLost, WorkerRecord
from samx.elastic._engine import Job, described
from samx.elastic._rule import Rule
from samx.elastic._worker import Worker, work

PATIENCE = 120.0  # seconds for what takes a moment, on a machine that does much else
CLUSTER = Path(__file__).with_name("_ray_cluster.py")
# Of this process, as its Ray remembers the first one.
TOKEN = secrets.token_hex(32)
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",  # `train` says so, in one line
    "RAY_AUTH_MODE": "token",  # other users of this machine stay outside
    "RAY_AUTH_TOKEN": TOKEN,
}


class Ray:
    """Center and workers are processes, of this machine or of a cluster: an engine with Ray.

    A worker that dies takes nothing else with it, and processes do not share an interpreter.

    Attributes:
        num_shards: Processes that the center is spread over, each with a contiguous part of the
            parameters; default 1. More than one when the center is what all wait for.
        num_cpus_per_worker: CPUs that Ray reserves for a worker, a float; default 0: none, so that
            any number of workers fits on this machine.
        num_gpus_per_worker: GPUs that it reserves and shows to a worker, a float; default 0. Give
            each worker 1 if there are any. With a fraction set XLA_PYTHON_CLIENT_PREALLOCATE=false
            in the environment before you start: else the first worker takes the memory.
        worker_options: Further options of Ray's actors for the workers: `resources`, `runtime_env`,
            `scheduling_strategy` and so on; default none.
        address: HOST:PORT of a cluster that is there; default None: one of this machine alone that
            is started, and ended at the end. If `ray.init` has been called, its cluster is used in
            any case, and goes on.
        grace: Seconds that a worker has to end its local steps when the others have, before it is
            killed; default 10.

    Example:
        >>> from samx import elastic
        >>> elastic.Ray(num_shards=2).grace
        10.0

    Raises:
        ImportError: If Ray is not installed: `pip install 'samx[ray]'`.
        ValueError: If a number is out of its range, or `worker_options` sets what has an argument.
        TypeError: If `num_shards` is not a Python int, or an option is of another type.

    Notes:
        `make_worker` travels by cloudpickle: functions of `__main__` and closures do. Workers find
        modules where this process does, by `sys.path`. They follow its `jax.enable_x64`, otherwise
        jax is configured by the environment. What they print goes to Ray's logs.
        A data set inside of it would travel, too: load it where it runs.
        Cost, measured on two shared cores: 6 s to start, 2 s more for each worker's jax. An
        exchange of 25 million float32 parameters takes 50 ms when nothing else runs, 70 to 130 ms
        beside other work; 1.5 ms of it whatever the size. Memory beside Ray's 350 MB: the center
        and one reply in its process, and messages, up to four copies of the parameters for each
        worker.
        The cluster that is started listens on the loopback interface only, and asks for a token
        that this process alone knows. Who may reach a cluster at `address` is its owner's affair:
        whoever can runs code there.
    """

    def __init__(
        self,
        *,
        num_shards: int = 1,
        num_cpus_per_worker: float = 0.0,
        num_gpus_per_worker: float = 0.0,
        worker_options: Mapping[str, Any] | None = None,
        address: str | None = None,
        grace: float = 10.0,
    ):
        check_count("num_shards", num_shards)
        numbers = {"num_cpus_per_worker": num_cpus_per_worker}
        numbers |= {"num_gpus_per_worker": num_gpus_per_worker, "grace": grace}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Ray: `{name}` must be a number, got {value!r}")
            check_number(name, value, 0)
        if address is not None and not isinstance(address, str):
            raise TypeError(f"Ray: `address` must be HOST:PORT, got {address!r}")
        if worker_options is not None and not isinstance(worker_options, Mapping):
            raise TypeError(f"Ray: `worker_options` must be a mapping, got {worker_options!r}")
        taken = {"num_cpus", "num_gpus", "max_restarts"} & set(worker_options or {})
        if taken:
            raise ValueError(
                f"Ray: `worker_options` must not set {', '.join(sorted(taken))}: that is "
                "`num_cpus_per_worker`, `num_gpus_per_worker` and `max_restarts` of `train`"
            )
        if importlib.util.find_spec("ray") is None:
            raise ImportError("samx.elastic.Ray needs Ray: pip install 'samx[ray]'")
        self.num_shards, self.address, self.grace = num_shards, address, grace
        self.num_cpus_per_worker = num_cpus_per_worker
        self.num_gpus_per_worker = num_gpus_per_worker
        self.worker_options = dict(worker_options or {})
        self._undo = contextlib.ExitStack()
        self._shards, self._workers, self._lives, self._helper = [], {}, [], None

    def start(self, job: Job) -> None:
        """Connect, and set the center up."""
        num_workers = job.ledger[0]
        if self.num_shards > job.values.size:
            raise ValueError(
                f"Ray: `num_shards` must be at most the number of parameters, {job.values.size}, "
                f"got {self.num_shards}"
            )
        self._shards, self._workers, self._lives, self._helper = [], {}, [], None
        # What each worker sends and gets, twice, as Ray frees a little late; and for this process.
        self._connect((4 * num_workers + 2) * job.values.nbytes)
        self._check_resources(num_workers)
        import ray

        is_x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        life = partial(_live, job.make_worker, job.rule, bool(is_x64))
        cloudpickle: Any = importlib.import_module("ray.cloudpickle")
        self._life = ray.put(cloudpickle.dumps(life))
        with _by_value(_actors, _center):
            actor = ray.remote(_actors.ShardActor).options(
                # Every worker may wait in one thread, and have died waiting in another.
                num_cpus=0,
                max_concurrency=2 * num_workers + 8,
            )
            for number, part in enumerate(np.array_split(job.values, self.num_shards)):
                ledger = None if number else job.ledger
                self._shards.append(actor.remote(part, job.shard, ledger))
            self._actor = ray.remote(_actors.WorkerActor).options(
                num_cpus=self.num_cpus_per_worker,
                num_gpus=self.num_gpus_per_worker,
                max_restarts=0,
                **self.worker_options,
            )
            self._lives = [shard.live.remote() for shard in self._shards]
            self.call("snapshot")

    def _connect(self, num_bytes: int = 0):
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            return
        address = self.address or self._start_cluster(num_bytes)
        import ray  # it reads some settings now

        handler = signal.getsignal(signal.SIGTERM)
        self._undo.callback(ray.shutdown)
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put one of its own there

    def _start_cluster(self, num_bytes: int) -> str:
        """Start a cluster in a process that ends with this one; its address."""
        self._undo.enter_context(_settings())
        with tempfile.TemporaryFile() as errors:
            self._helper = helper = subprocess.Popen(
                [sys.executable, "-P", str(CLUSTER), str(num_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for this process alone
            )
            self._undo.callback(_end, helper)
            assert helper.stdout is not None
            timer = threading.Timer(PATIENCE, helper.kill)
            timer.start()
            words = helper.stdout.readline().decode().split()
            timer.cancel()
            if words[:1] != ["address"]:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()
                raise RuntimeError(f"Ray: no cluster could be started on this machine:\n{said}")
            return words[1]

    def _check_resources(self, num_workers):
        """Refuse, of one's own machine, what it does not have: workers would wait forever."""
        import ray

        there = ray.cluster_resources()
        for name, each in (("CPU", self.num_cpus_per_worker), ("GPU", self.num_gpus_per_worker)):
            if num_workers * each > there.get(name, 0):
                text = (
                    f"Ray: `num_{name.lower()}s_per_worker` must be at most "
                    f"{there.get(name, 0):g}/{num_workers}, what there is for each worker, "
                    f"got {each}"
                )
                if self._helper is not None:
                    raise ValueError(text)
                warnings.warn(f"{text}: workers wait for more", RuntimeWarning, 4)

    def launch(self, index: int) -> None:
        """Start a worker in a new process."""
        with _by_value(_actors, _center):
            actor = self._actor.remote(sys.path)
        self._workers[index] = actor, actor.run.remote(self._life, index, self._shards)

    def deaths(self) -> list[tuple[int, str]]:
        """Workers that have ended since the last call, and of what."""
        import ray
        from ray import exceptions

        refs = {ref: index for index, (_, ref) in self._workers.items()}
        if not refs:
            return []
        ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        found = []
        for ref in ended:
            del self._workers[refs[ref]]
            try:
                ray.get(ref)
            except exceptions.RayActorError as error:
                what = "its process has ended: killed, crashed or out of memory"
                found.append((refs[ref], f"{what}\n\n{error}"))
            except Exception as error:
                found.append((refs[ref], described(error)))
        return found

    def call(self, method: str, *args: Any) -> Any:
        """A method of the ledger."""
        self._check_center()
        result = get(self._shards[0].call.remote(method, *args), PATIENCE)
        if method == "snapshot":
            seconds, records = result
            return seconds, [WorkerRecord(**record) for record in records]
        return result

    def pull(self) -> np.ndarray:
        """The values of the center."""
        self._check_center()
        return joined(get([shard.pull.remote() for shard in self._shards], PATIENCE))

    def _check_center(self):
        import ray

        if self._helper is not None and self._helper.poll() is not None:
            raise CenterLost("elastic: the center is lost, as Ray has ended on this machine")
        ended, _ = ray.wait(self._lives, num_returns=len(self._lives), timeout=0)
        if ended:
            get(ended[0], PATIENCE)

    def close(self) -> None:
        """Let workers end, kill the others, and end what was started."""
        with self._undo:
            self._undo.callback(self._kill)
        self._undo = contextlib.ExitStack()

    def _kill(self):
        import ray

        if self._helper is not None and self._helper.poll() is not None:
            return
        with contextlib.suppress(CenterLost):
            if self._workers:
                self.call("stop")
                refs = [ref for _, ref in self._workers.values()]
                ray.wait(refs, num_returns=len(refs), timeout=self.grace)
        for actor in [*(actor for actor, _ in self._workers.values()), *self._shards]:
            ray.kill(actor)
        self._shards, self._workers, self._lives, self._life = [], {}, [], None


def _live(
    make_worker: Callable[[int], Worker],
    rule: Rule,
    is_x64: bool,
    index: int,
    shards: Sequence[Any],
) -> None:
    """The life of a worker, in its process."""
    client, error = Client(shards), ""
    try:
        with jax.enable_x64(is_x64):
            work(make_worker, rule, index, client, f"{socket.gethostname()} pid {os.getpid()}")
    except Exception as exception:
        error = described(exception)
    client.leave(index, error)


@contextlib.contextmanager
def _by_value(*modules: Any) -> Iterator[None]:
    """Let what these modules define travel whole, not as a name to import."""
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """Let Ray in this process, and in those that it starts, keep to the loopback interface."""
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    is_allowed = _reread(False)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        _reread(is_allowed)


def _reread(is_cluster: bool | None) -> bool | None:
    """Let a Ray that may have been imported before see the environment as it is now.

    Returns whether it was to listen on other interfaces, too.
    """
    with contextlib.suppress(ImportError, AttributeError):  # other versions keep it elsewhere
        from ray._private import ray_constants

        raylet: Any = importlib.import_module("ray._raylet")
        before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, is_cluster
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        return before
    return None


def _end(helper: subprocess.Popen) -> None:
    """End the cluster."""
    for pipe in (helper.stdin, helper.stdout):
        if pipe is not None:
            pipe.close()
    try:
        helper.wait(PATIENCE / 4)
    except subprocess.TimeoutExpired:
        helper.kill()
        helper.wait()
