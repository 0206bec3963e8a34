"""Which workers take part in a training run, which may exchange, and what is left to do: no jax.

A process that holds only the center imports no more than this file and `_center`.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from samx.core.hyperparams import as_count

# A worker between its start and its end: its index, and how often it was restarted before.
Life = tuple[int, int]


@dataclass
class WorkerRecord:
    """What the center knows about a worker.

    Attributes:
        index: Index of the worker, from 0.
        status: "starting", "running", "done" or "died".
        exchanges: Exchanges with the center so far, including those before a restart.
        staleness: Exchanges of other workers between the last two exchanges of this worker.
        mean_staleness: Mean staleness since the training run began or was resumed. With equally
            fast workers it is the number of workers − 1.
        largest_staleness: Largest staleness so far.
        loss: Mean of the worker's losses between its last two exchanges; NaN before.
        refused: Exchanges that were refused, because what the worker sent was not finite, too
            large, or not like the parameters. A refused exchange ends the worker.
        restarts: How many times the worker was started again.
        place: Where the worker runs.
        reason: Why the worker is done: no work is left, or its stream has ended.
        error: Why the worker died, if it did: its last death.
        is_reported: Whether the death has been reported.

    Example:
        >>> from samx import elastic
        >>> elastic.WorkerRecord(index=0).status
        'starting'
    """

    index: int
    status: str = "starting"
    exchanges: int = 0
    staleness: int = 0
    mean_staleness: float = 0.0
    largest_staleness: int = 0
    loss: float = float("nan")
    refused: int = 0
    restarts: int = 0
    place: str = ""
    reason: str = ""
    error: str = ""
    is_reported: bool = False


def may_exchange(
    worker: int, version: int, last: Mapping[int, int], max_staleness: int | None
) -> bool:
    """Return whether all workers can still keep the bound after this worker exchanges.

    `last` holds the version at which each living worker exchanged last. Suppose that the others
    exchange next, the stalest first. Then the k-th of them (from 0) is `version + 1 + k − last`
    versions behind. The stalest worker of all may always exchange.
    """
    if max_staleness is None:
        return True
    others = sorted(seen for other, seen in last.items() if other != worker)
    return all(version + 1 + k - seen <= max_staleness for k, seen in enumerate(others))


def check_staleness(name: str, max_staleness: Any, num_workers: int) -> None:
    """Require None or a Python int that workers in turns can keep: at least num_workers − 1."""
    if max_staleness is None:
        return
    max_staleness = as_count("max_staleness", max_staleness, 0)
    if max_staleness < num_workers - 1:
        raise ValueError(
            f"{name}: `max_staleness` must be at least num_workers − 1 = {num_workers - 1}, the "
            f"staleness of workers that take turns, got {max_staleness}"
        )


def rank(loss: float) -> float:
    """Return the loss for comparisons; an unknown or non-finite loss ranks last."""
    return loss if np.isfinite(loss) else float("inf")


class Ledger:
    """Which workers take part, which may exchange, and what is left to do. Safe for threads.

    Every request names its life. A request of a life that has ended changes nothing: a thread
    that hung may wake up later, and a request may wait here when its process is killed.
    """

    def __init__(
        self,
        num_workers: int,
        num_exchanges: int,
        max_staleness: int | None = None,
        exchanges_before: Mapping[int, int] | None = None,
    ):
        self.before = before = {i: (exchanges_before or {}).get(i, 0) for i in range(num_workers)}
        self.records = {i: WorkerRecord(i, exchanges=before[i]) for i in range(num_workers)}
        self.num_exchanges, self.max_staleness = num_exchanges, max_staleness
        self.exchanges = sum(before.values())
        self.last: dict[int, int] = {}  # the version that each living worker has seen
        self.best: dict[int, float] = {}  # the loss of each living worker
        self.opened: float | None = None  # time of the start, on the clock of this process
        self.latest = time.monotonic()
        self.heard = dict.fromkeys(self.records, self.latest)  # when each worker was heard of last
        self.waiting: set[int] = set()  # workers that wait in a request, which is no silence
        self.is_stopped = False
        self.changed = threading.Condition()

    def join(self, life: Life, place: str) -> int | None:
        """Record where a worker runs; return its exchanges so far, or None if its life is over."""
        with self.changed:
            if not self._lives(life):
                return None
            record = self.records[life[0]]
            record.place, self.heard[record.index] = place, time.monotonic()
            return record.exchanges

    def wait_for_start(self, life: Life) -> bool:
        """Record that a worker is ready; return when every expected worker is ready or died.

        Returns whether the worker takes part.
        """
        with self.changed:
            if not self._lives(life):
                return False
            self.records[life[0]].status = "running"
            self._open_if_all_are_there()
            self._wait(life, lambda: self.opened is not None)
            if self.is_over or not self._lives(life):
                return False
            self.last[life[0]] = self.exchanges
            return True

    def open(self) -> None:
        """Start now, without the workers that are not ready."""
        with self.changed:
            self.opened = self.opened or time.monotonic()
            self.changed.notify_all()

    def _open_if_all_are_there(self):
        if all(record.status != "starting" for record in self.records.values()):
            self.opened = self.opened or time.monotonic()
        self.changed.notify_all()

    def _lives(self, life: Life) -> bool:
        """Whether this is the worker's present life, and has not ended."""
        index, number = life
        record = self.records[index]
        return record.restarts == number and record.status in ("starting", "running")

    def _wait(self, life: Life, is_ready: Callable[[], bool]) -> None:
        """Wait until `is_ready()`, the end of the work, or the end of this life."""
        self.waiting.add(life[0])
        self.changed.wait_for(lambda: self.is_over or not self._lives(life) or is_ready())
        if self._lives(life):
            self.waiting.discard(life[0])
            self.heard[life[0]] = time.monotonic()

    def admit(self, life: Life, loss: float) -> bool | None:
        """Count an exchange once the bound allows it.

        Returns whether the worker is the leader, or None when no work is left for it.
        """
        index = life[0]
        with self.changed:
            if not self._lives(life):
                return None
            self._wait(
                life,
                lambda: may_exchange(index, self.exchanges, self.last, self.max_staleness),
            )
            if self.is_over or not self._lives(life):
                return None
            record = self.records[index]
            record.staleness = self.exchanges - self.last.get(index, self.exchanges)
            record.largest_staleness = max(record.largest_staleness, record.staleness)
            record.loss, self.best[index] = loss, rank(loss)
            record.exchanges += 1
            count = record.exchanges - self.before[index]
            record.mean_staleness += (record.staleness - record.mean_staleness) / count
            self.exchanges += 1
            self.last[index] = self.exchanges
            self.latest = time.monotonic()
            self.changed.notify_all()
            return self.best[index] <= min(self.best.values())

    @property
    def is_over(self) -> bool:
        """Whether no work is left."""
        return self.is_stopped or self.exchanges >= self.num_exchanges

    def leave(
        self, life: Life, error: str = "", reason: str = "", is_refused: bool = False
    ) -> None:
        """Record that a life has ended, and why; the others no longer wait for the worker."""
        with self.changed:
            if not self._lives(life):
                return
            record = self.records[life[0]]
            for of_workers in (self.last, self.best):
                of_workers.pop(life[0], None)
            self.waiting.discard(life[0])
            record.status, record.reason = "died" if error else "done", reason
            record.error = error or record.error
            record.refused += is_refused
            self._open_if_all_are_there()

    def report(self, index: int, is_again: bool) -> None:
        """Record that a death was reported; with `is_again` the worker is being restarted."""
        with self.changed:
            record = self.records[index]
            record.is_reported = not is_again
            if is_again:
                record.status, record.place = "starting", ""
                record.restarts += 1
                self.heard[index] = time.monotonic()

    def silent(self, seconds: float) -> list[Life]:
        """Return the lives that have computed for longer than this since they were heard of."""
        with self.changed:
            if self.opened is None:
                return []
            return [
                (i, record.restarts)
                for i, record in self.records.items()
                if record.status in ("starting", "running")
                and i not in self.waiting
                and time.monotonic() - max(self.heard[i], self.opened) > seconds
            ]

    def stop(self) -> None:
        """Let every worker end at its next exchange."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()

    def snapshot(self) -> tuple[float, list[WorkerRecord]]:
        """Return the seconds since the start and a copy of all records.

        When no work is left, the seconds count up to the last exchange.
        """
        with self.changed:
            records = [replace(record) for record in self.records.values()]
            if self.opened is None:
                return 0.0, records
            return (self.latest if self.is_over else time.monotonic()) - self.opened, records
