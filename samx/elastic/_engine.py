"""Engines run the workers and hold their center: the interface, and an engine with threads."""

import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from samx.core.hyperparams import as_list, check_number
from samx.elastic._center import Center, Ledger, Shard
from samx.elastic._rule import Rule
from samx.elastic._worker import Worker, work


class Job(NamedTuple):
    """What an engine has to run."""

    make_worker: Callable[[int], Worker]
    rule: Rule
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

    def start(self, job: Job) -> None:
        """Set up the center."""

    def launch(self, index: int) -> None:
        """Start a worker, or restart it."""

    def deaths(self) -> list[tuple[int, str]]:
        """Return workers that died since the last call without reporting it, and their errors."""
        ...

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the ledger; raise `CenterLost` if the center is gone."""

    def pull(self) -> np.ndarray:
        """Return the values of the center."""
        ...

    def close(self) -> None:
        """End everything that still runs, in bounded time."""


class Threads:
    """An engine without dependencies: workers are threads of this process, one for each device.

    Attributes:
        devices: Devices for the workers, assigned in turn; default all local devices.
        grace: Seconds that workers have to finish their local steps when training ends; default 60.

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
        self._threads: list[threading.Thread] = []

    def start(self, job: Job) -> None:
        """Set up the center in the memory of this process."""
        self._job, self._threads = job, []
        self._center = Center(Ledger(*job.ledger), Shard(job.values, *job.shard))
        # Each thread has its own setting, so the workers' threads must be given this one.
        self._is_x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    def launch(self, index: int) -> None:
        """Start a worker on its device."""
        devices = self.devices or jax.local_devices()
        device = devices[index % len(devices)]
        thread = threading.Thread(
            target=self._run, args=(index, device), name=f"worker {index}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _run(self, index, device):
        error = ""
        try:
            with jax.enable_x64(self._is_x64), jax.default_device(device):
                work(self._job.make_worker, self._job.rule, index, self._center, str(device))
        except Exception as exception:
            error = described(exception)
        self._center.leave(index, error)

    def deaths(self) -> list[tuple[int, str]]:
        """Return no workers: threads report their own deaths."""
        return []

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
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread.name for thread in self._threads if thread.is_alive()]
        if left:
            warnings.warn(
                f"elastic: {', '.join(left)} did not end within {self.grace:g} s", RuntimeWarning, 3
            )


def described(exception: BaseException) -> str:
    """Return a text: the error in the first line, the traceback below it."""
    first_line = f"{type(exception).__name__}: {exception}".splitlines()[0]
    return first_line + "\n\n" + "".join(traceback.format_exception(exception))
