"""Where workers run, and where their center is: what an engine offers, and the one of threads."""

import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from samx.core.hyperparams import check_number
from samx.elastic._center import Center, Ledger, Shard
from samx.elastic._rule import Rule
from samx.elastic._worker import Worker, work


class Job(NamedTuple):
    """What an engine is to run."""

    make_worker: Callable[[int], Worker]
    rule: Rule
    values: np.ndarray  # of the center, flat
    shard: tuple[Any, ...]  # further arguments of a `Shard`
    ledger: tuple[Any, ...]  # arguments of the `Ledger`


class Engine(Protocol):
    """Where workers run, and where the center is: what `train` asks of it.

    Example:
        >>> from samx import elastic
        >>> hasattr(elastic.Threads(), "start")
        True
    """

    def start(self, job: Job) -> None:
        """Set the center up."""

    def launch(self, index: int) -> None:
        """Start a worker, or start it again."""

    def deaths(self) -> list[tuple[int, str]]:
        """Workers that have died since the last call without saying so themselves, and of what."""
        ...

    def call(self, method: str, *args: Any) -> Any:
        """A method of the ledger; `CenterLost` if there is no center any longer."""

    def pull(self) -> np.ndarray:
        """The values of the center."""
        ...

    def close(self) -> None:
        """End everything that still runs, in bounded time."""


class Threads:
    """Workers are threads of this process, one for each device: an engine without dependencies.

    Attributes:
        devices: Devices for the workers, in turns; default all local ones.
        grace: Seconds that a worker has to end its local steps when all others have; default 60.

    Example:
        >>> import jax
        >>> from samx import elastic
        >>> elastic.Threads(devices=jax.local_devices()[:1]).grace
        60.0
    """

    def __init__(self, devices: Sequence[Any] | None = None, grace: float = 60.0):
        check_number("grace", grace, 0)
        self.devices, self.grace = devices, grace
        self._threads: list[threading.Thread] = []

    def start(self, job: Job) -> None:
        """Set the center up, in the memory of this process."""
        self._job, self._threads = job, []
        self._center = Center(Ledger(*job.ledger), Shard(job.values, *job.shard))
        # Such a setting is a thread's own.
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
        """None: threads say so themselves."""
        return []

    def call(self, method: str, *args: Any) -> Any:
        """A method of the ledger."""
        return self._center.call(method, *args)

    def pull(self) -> np.ndarray:
        """The values of the center."""
        return self._center.pull()

    def close(self) -> None:
        """Let all threads end; one that does not in time is left behind."""
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
    """What has gone wrong in the first line, and below it where."""
    first_line = f"{type(exception).__name__}: {exception}".splitlines()[0]
    return first_line + "\n\n" + "".join(traceback.format_exception(exception))
