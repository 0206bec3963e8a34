"""Engines run the workers and hold their center: the interface, and an engine with threads."""

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from samx.core.hyperparams import as_list, check_number
from samx.elastic._center import Center, Client, Shard, described
from samx.elastic._ledger import Ledger, Life
from samx.elastic._rule import Rule
from samx.elastic._worker import ExchangeRefused, Worker, work


class Job(NamedTuple):
    """What an engine has to run."""

    make_worker: Callable[[int], Worker]
    rule: Rule
    layout: Any  # of the parameters
    values: np.ndarray  # values of the center, flat
    shard: tuple[Any, ...]  # further arguments of a `Shard`
    ledger: tuple[Any, ...]  # arguments of the `Ledger`


class Engine(Protocol):
    """What `train` needs from an engine, which runs the workers and holds the center.

    Example:
        >>> from samx import elastic
        >>> hasattr(elastic.Threads(), "start")
        True
    """

    grace: float

    def start(self, job: Job) -> None:
        """Set up the center."""

    def launch(self, life: Life) -> None:
        """Start a worker, or restart it."""

    def deaths(self) -> list[tuple[Life, str]]:
        """Return lives that ended since the last call without reporting it, and their errors."""
        ...

    def abandon(self, life: Life) -> None:
        """End a life that hangs, if this is possible, and do not wait for it."""

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the ledger; raise `CenterLost` if the center is gone."""

    def pull(self) -> np.ndarray:
        """Return the values of the center."""
        ...

    def close(self) -> None:
        """End everything that still runs, in about `grace` seconds."""


def live(job: Job, client: Any, place: str) -> None:
    """Run a life from start to end, and tell the center why it has ended, whatever happens."""
    try:
        why = {"reason": work(job.make_worker, job.rule, job.layout, client, place)}
    except BaseException as error:  # also SystemExit, which must not end a worker in silence
        why = {"error": described(error), "is_refused": isinstance(error, ExchangeRefused)}
    client.leave(**why)


class Threads:
    """An engine without dependencies: workers are threads of this process, one for each device.

    Attributes:
        devices: Devices for the workers, assigned in turn; default all local devices.
        grace: Seconds that workers have to finish their local steps when training ends; default 60.
            A thread that has not ended by then is left behind, with a warning: nothing can end it.

    Example:
        >>> import jax
        >>> from samx import elastic
        >>> elastic.Threads(devices=jax.local_devices()[:1]).grace
        60.0
    """

    def __init__(self, devices: Sequence[Any] | None = None, grace: float = 60.0):
        check_number("grace", grace, 0)
        if devices is not None:
            devices = as_list("devices", devices, "devices of JAX")
            if not all(isinstance(device, jax.Device) for device in devices):
                raise TypeError(f"Threads: `devices` must be devices of JAX, got {devices}")
        self.devices, self.grace = devices, grace
        self._threads: dict[Life, threading.Thread] = {}
        self._left: list[threading.Thread] = []

    def start(self, job: Job) -> None:
        """Set up the center in the memory of this process."""
        self._job, self._threads, self._left = job, {}, []
        self._center = Center(Ledger(*job.ledger), Shard(job.values, *job.shard))
        # Each thread has its own setting, so the workers' threads must be given this one.
        self._is_x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    def launch(self, life: Life) -> None:
        """Start a worker on its device."""
        devices = self.devices or jax.local_devices()
        device = devices[life[0] % len(devices)]
        thread = threading.Thread(
            target=self._run, args=(life, device), name=f"worker {life[0]}", daemon=True
        )
        self._threads[life] = thread
        thread.start()

    def _run(self, life, device):
        with jax.enable_x64(self._is_x64), jax.default_device(device):
            live(self._job, Client(self._center, life), str(device))

    def deaths(self) -> list[tuple[Life, str]]:
        """Return no lives: threads report their own deaths."""
        return []

    def abandon(self, life: Life) -> None:
        """Do not wait for a thread any more: nothing can end it. What it sends later is ignored."""
        self._left.append(self._threads.pop(life))

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the ledger."""
        return self._center.call(method, *args)

    def pull(self) -> np.ndarray:
        """Return the values of the center."""
        return self._center.pull()

    def close(self) -> None:
        """Let all threads end; one that does not end in time is left behind, with a warning."""
        self._center.call("stop")
        deadline = time.monotonic() + self.grace
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        threads = [*self._left, *self._threads.values()]
        if names := [thread.name for thread in threads if thread.is_alive()]:
            warnings.warn(
                f"elastic: the thread of {', '.join(names)} has not ended within {self.grace:g} s, "
                "and is left behind",
                RuntimeWarning,
                3,
            )
