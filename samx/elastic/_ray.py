"""An engine with Ray: workers and center in separate processes, on one machine or on many."""

import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from samx.core.hyperparams import as_count, check_flag, check_static_number
from samx.elastic import _actors, _center, _ledger
from samx.elastic._actors import Client, get, joined
from samx.elastic._center import CenterLost, described
from samx.elastic._engine import Job, live
from samx.elastic._ledger import Life, WorkerRecord
from samx.elastic._ray_local import LocalCluster, environment

PATIENCE = 120.0  # timeout in seconds of calls that are short unless the machine is very busy
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Ray:
    """An engine with Ray: center and workers are processes, on this machine or in a cluster.

    A worker that dies does not affect other processes. Processes do not share an interpreter.

    Attributes:
        num_shards: Number of processes that hold the center, each with a contiguous part of the
            parameters; default 1. Use more if the workers wait for the center.
        num_cpus_per_worker: CPUs that Ray reserves for each worker, a float; default 0. With 0 any
            number of workers fits on this machine.
        num_gpus_per_worker: GPUs that Ray reserves for each worker and shows to it, a float;
            default 0. If there are GPUs, give each worker 1. With a fraction, set
            XLA_PYTHON_CLIENT_PREALLOCATE=false in the environment before you start. Otherwise the
            first worker takes the memory.
        worker_options: Further options of Ray's actors for the workers: `resources`, `runtime_env`,
            `scheduling_strategy` and so on; default none.
        address: HOST:PORT of an existing cluster; default None: a cluster on this machine alone,
            which is started, and ended at the end. If `ray.init` has been called, its cluster is
            used in any case, and keeps running.
        grace: Seconds that workers have to finish their local steps when training ends, before
            they are killed; default 10.
        allow_unauthenticated: Whether to use a cluster that listens beyond the loopback interface
            without token authentication; default False. Pass True only if a firewall protects it.

    Example:
        >>> from samx import elastic
        >>> elastic.Ray(num_shards=2).grace
        10.0

    Raises:
        ImportError: If Ray is not installed: `pip install 'samx[ray]'`.
        ValueError: If a number is out of range, or `worker_options` sets an option that has its
            own argument; when training starts, if the cluster can be reached without a token.
        TypeError: If `num_shards` is not a Python int, or another option has the wrong type.

    Notes:
        `make_worker` is sent by cloudpickle, so functions of `__main__` and closures work. A data
        set inside `make_worker` would be sent too: load the data where the worker runs. Workers
        find modules through the `sys.path` of this process. They use its `jax.enable_x64`
        setting; everything else in jax is configured by the environment. What workers print goes
        to Ray's logs.
        Cost, measured on two shared cores: 6 s to start, and 2 s more for each worker's jax. An
        exchange of 25 million float32 parameters takes 50 ms when nothing else runs, and 70 to
        130 ms beside other work; 1.5 ms of this do not depend on the size. Memory, in addition to
        Ray's 350 MB: the center and one reply in the center's process, and messages, up to four
        copies of the parameters for each worker.
        A center that does not answer for 120 s counts as lost.
        A cluster that this engine starts listens on the loopback interface only, and asks for a
        token that only this process knows. Any other cluster listens on the network interfaces of
        its hosts: on each host, Ray's node manager, object manager and agents, and one port for
        each worker, shard and driver; on the head also the store of the cluster's state (6379) and
        the dashboard (8265). Whoever may connect can run code there, as Ray unpickles what it
        receives. So this engine asks for Ray's token authentication: RAY_AUTH_MODE=token on every
        host, with the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
        Ray does not encrypt; for that, set its RAY_USE_TLS.
        Trust goes one way: workers run the driver's code. From workers, the center and the driver
        get arrays, numbers and text only; errors are sent as text.
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
        allow_unauthenticated: bool = False,
    ):
        num_shards = as_count("num_shards", num_shards)
        numbers = {"num_cpus_per_worker": num_cpus_per_worker}
        numbers |= {"num_gpus_per_worker": num_gpus_per_worker, "grace": grace}
        for name, value in numbers.items():
            check_static_number(name, value, 0)
        check_flag("allow_unauthenticated", allow_unauthenticated)
        if address is not None and not isinstance(address, str):
            raise TypeError(f"Ray: `address` must be HOST:PORT, got {address!r}")
        if worker_options is not None and not isinstance(worker_options, Mapping):
            raise TypeError(f"Ray: `worker_options` must be a mapping, got {worker_options!r}")
        taken = {"num_cpus", "num_gpus", "max_restarts"} & set(worker_options or {})
        if taken:
            raise ValueError(
                f"Ray: `worker_options` must not set {', '.join(sorted(taken))}: use "
                "`num_cpus_per_worker`, `num_gpus_per_worker` and `max_restarts` of `train`"
            )
        if importlib.util.find_spec("ray") is None:
            raise ImportError("samx.elastic.Ray needs Ray: pip install 'samx[ray]'")
        self.num_shards, self.address, self.grace = num_shards, address, grace
        self.num_cpus_per_worker = num_cpus_per_worker
        self.num_gpus_per_worker = num_gpus_per_worker
        self.worker_options = dict(worker_options or {})
        self.allow_unauthenticated = allow_unauthenticated
        self._undo = contextlib.ExitStack()
        self._shards, self._workers, self._lives = [], {}, []
        self._cluster: LocalCluster | None = None

    def start(self, job: Job) -> None:
        """Connect to Ray, and set up the center."""
        num_workers = job.ledger[0]
        if self.num_shards > job.values.size:
            raise ValueError(
                f"Ray: `num_shards` must be at most the number of parameters, {job.values.size}, "
                f"got {self.num_shards}"
            )
        self._shards, self._workers, self._lives, self._cluster = [], {}, [], None
        # Room for what each worker sends and gets, twice, because Ray frees memory a little late;
        # and room for this process.
        self._connect((4 * num_workers + 2) * job.values.nbytes)
        self._check_resources(num_workers)
        import ray

        is_x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        run = partial(_live, job._replace(values=None, shard=(), ledger=()), bool(is_x64))
        cloudpickle: Any = importlib.import_module("ray.cloudpickle")
        self._pickled = ray.put(cloudpickle.dumps(run))
        with _by_value(_actors, _center, _ledger):
            actor = ray.remote(_actors.ShardActor).options(
                # Each worker may wait in one thread; before a restart it may have died waiting in
                # another.
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
            hosts = {node["NodeManagerAddress"] for node in sys.modules["ray"].nodes()}
            if not hosts <= LOOPBACK:
                self._check_exposure("the cluster of `ray.init`")
            return
        address = self.address
        if address is None:
            self._cluster = cluster = LocalCluster(num_bytes)
            self._undo.callback(cluster.end)
            address = cluster.address
        else:
            self._check_exposure(f"the cluster at {address}")
            if "RAY_AUTH_MODE" not in os.environ and not self.allow_unauthenticated:
                # Ray does not use a token that it finds, if the address is given.
                self._undo.enter_context(environment({"RAY_AUTH_MODE": "token"}))
        import ray  # Ray reads some settings when it is imported

        handler = signal.getsignal(signal.SIGTERM)
        self._undo.callback(ray.shutdown)
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has installed its own handler

    def _check_exposure(self, cluster: str) -> None:
        """Require token authentication, unless the caller does without it."""
        mode, home = os.environ.get("RAY_AUTH_MODE"), Path("~/.ray/auth_token").expanduser()
        has_token = home.is_file() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        is_guarded = has_token if mode is None else mode.lower() == "token"
        if not is_guarded and not self.allow_unauthenticated:
            raise ValueError(
                f"Ray: {cluster} has no token authentication that this process knows of. Without "
                "it, whoever can reach the cluster can run code there, and each worker listens on "
                "the network interfaces of its host. Set RAY_AUTH_MODE=token on every host, and "
                "the cluster's token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. "
                "If a firewall protects the cluster, pass `allow_unauthenticated=True`"
            )

    def _check_resources(self, num_workers):
        """Require enough CPUs and GPUs: otherwise workers would wait for them.

        This raises an error if the cluster was started here, because workers would wait forever. On
        another cluster it is a warning.
        """
        import ray

        there = ray.cluster_resources()
        for name, each in (("CPU", self.num_cpus_per_worker), ("GPU", self.num_gpus_per_worker)):
            if num_workers * each > there.get(name, 0):
                text = (
                    f"Ray: `num_{name.lower()}s_per_worker` must be at most "
                    f"{there.get(name, 0):g}/{num_workers}, the number available for each worker, "
                    f"got {each}"
                )
                if self._cluster is not None:
                    raise ValueError(text)
                warnings.warn(f"{text}: workers wait until there are more", RuntimeWarning, 4)

    def launch(self, life: Life) -> None:
        """Start a worker in a new process."""
        with _by_value(_actors, _center, _ledger):
            actor = self._actor.remote(sys.path)
        self._workers[life] = actor, actor.run.remote(self._pickled, life, self._shards)

    def deaths(self) -> list[tuple[Life, str]]:
        """Return the lives that ended since the last call, and their errors."""
        import ray
        from ray import exceptions

        refs = {ref: life for life, (_, ref) in self._workers.items()}
        if not refs:
            return []
        ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        found = []
        for ref in ended:
            life = refs[ref]
            del self._workers[life]
            try:
                ray.get(ref)
            except exceptions.RayActorError as error:
                what = "its process has ended: killed, crashed or out of memory"
                found.append((life, f"{what}\n\n{error}"))
            except Exception as error:
                found.append((life, described(error)))
        return found

    def abandon(self, life: Life) -> None:
        """Kill the process of a worker."""
        import ray

        if life in self._workers:
            ray.kill(self._workers[life][0])

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the ledger."""
        self._check_center()
        result = get(self._shards[0].call.remote(method, *args), PATIENCE)
        if method == "snapshot":
            seconds, records = result
            return seconds, [WorkerRecord(**record) for record in records]
        return result

    def pull(self) -> np.ndarray:
        """Return the values of the center."""
        self._check_center()
        return joined(get([shard.pull.remote() for shard in self._shards], PATIENCE))

    def _check_center(self):
        import ray

        if self._cluster is not None and self._cluster.has_ended:
            raise CenterLost("elastic: the center is lost, because Ray has ended on this machine")
        ended, _ = ray.wait(self._lives, num_returns=len(self._lives), timeout=0)
        if ended:
            get(ended[0], PATIENCE)

    def close(self) -> None:
        """Let the workers end, kill those that do not end, and end a cluster started here."""
        with self._undo:
            self._undo.callback(self._kill)
        self._undo = contextlib.ExitStack()

    def _kill(self):
        import ray

        if self._cluster is not None and self._cluster.has_ended:
            return
        with contextlib.suppress(CenterLost):
            if self._workers:
                self.call("stop")
                refs = [ref for _, ref in self._workers.values()]
                ray.wait(refs, num_returns=len(refs), timeout=self.grace)
        for actor in [*(actor for actor, _ in self._workers.values()), *self._shards]:
            ray.kill(actor)
        self._shards, self._workers, self._lives, self._pickled = [], {}, [], None


def _live(job: Job, is_x64: bool, client: Client) -> None:
    """Run a life from start to end, in its process."""
    with jax.enable_x64(is_x64):
        live(job, client, f"{socket.gethostname()} pid {os.getpid()}")


@contextlib.contextmanager
def _by_value(*modules: Any) -> Iterator[None]:
    """Send what these modules define by value, not as a name to import."""
    cloudpickle: Any = importlib.import_module("ray.cloudpickle")
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
