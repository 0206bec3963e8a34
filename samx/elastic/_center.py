"""The center of elastic averaging in the memory of the host: numpy and locks, no jax.

A process that holds nothing but the center imports this file alone, so that it never touches an
accelerator.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BLOCK = 1 << 16  # numbers that stay in the cache while they are worked on


@dataclass
class WorkerRecord:
    """What the center knows of a worker.

    Attributes:
        index: Its number, from 0.
        status: "starting", "running", "done" or "died".
        exchanges: With the center so far, those before a restart included.
        staleness: Exchanges of others between the last two of this worker.
        mean_staleness: The mean since the training began or was resumed; of equal workers, their
            number − 1.
        largest_staleness: The largest so far.
        loss: Mean of its losses between the last two exchanges; NaN before.
        restarts: How many times it was started again.
        place: Where it runs.
        error: Why it died, if it did.
        is_reported: Whether the death has been told.

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
    restarts: int = 0
    place: str = ""
    error: str = ""
    is_reported: bool = False


class CenterLost(RuntimeError):
    """The center is gone, and with it what it held since the last checkpoint.

    Example:
        >>> from samx import elastic
        >>> issubclass(elastic.CenterLost, RuntimeError)
        True
    """


def may_exchange(
    worker: int, version: int, last: Mapping[int, int], max_staleness: int | None
) -> bool:
    """Whether an exchange of this worker leaves everyone able to keep the bound.

    `last` holds the version at which each living worker exchanged last. If the others come next,
    the stalest first, then the k-th of them (from 0) is `version + 1 + k − last` versions behind.
    The stalest of all may always.
    """
    if max_staleness is None:
        return True
    others = sorted(seen for other, seen in last.items() if other != worker)
    return all(version + 1 + k - seen <= max_staleness for k, seen in enumerate(others))


def check_staleness(name: str, max_staleness: Any, num_workers: int) -> None:
    """Refuse a bound that not even workers in turns could keep."""
    if max_staleness is None:
        return
    if isinstance(max_staleness, bool) or not isinstance(max_staleness, int):
        raise TypeError(f"{name}: `max_staleness` must be a Python int, got {max_staleness!r}")
    if max_staleness < num_workers - 1:
        raise ValueError(
            f"{name}: `max_staleness` must be at least num_workers − 1 = {num_workers - 1}, what "
            f"workers that take turns see, got {max_staleness}"
        )


def rank(loss: float) -> float:
    """A loss for comparisons: one that is not known, or not finite, is behind all others."""
    return loss if np.isfinite(loss) else float("inf")


class Ledger:
    """Who takes part, whose turn it is, and how much is left to do. Safe for threads."""

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
        self.last: dict[int, int] = {}  # of the living, the version that each has seen
        self.best: dict[int, float] = {}  # of the living, their losses
        self.opened: float | None = None  # when, on the clock of this process
        self.latest = time.monotonic()
        self.is_stopped = False
        self.changed = threading.Condition()

    def join(self, index: int, place: str) -> int:
        """A worker begins; the exchanges that its number has had."""
        with self.changed:
            self.records[index].place = place
            return self.records[index].exchanges

    def wait_for_start(self, index: int) -> None:
        """Ready; returns when every expected worker is, or has died."""
        with self.changed:
            self.records[index].status = "running"
            self._open_if_all_are_there()
            self.changed.wait_for(lambda: self.opened is not None or self.is_stopped)
            if self.records[index].status == "running":
                self.last[index] = self.exchanges

    def open(self) -> None:
        """Wait for nobody any longer."""
        with self.changed:
            self.opened = self.opened or time.monotonic()
            self.changed.notify_all()

    def _open_if_all_are_there(self):
        if all(record.status != "starting" for record in self.records.values()):
            self.opened = self.opened or time.monotonic()
        self.changed.notify_all()

    def admit(self, index: int, loss: float) -> bool | None:
        """Count an exchange, once the bound allows it: whether it leads, or None at the end."""
        with self.changed:
            record = self.records[index]
            self.changed.wait_for(
                lambda: (
                    self.is_over
                    or record.status == "died"  # while its last request waited here
                    or may_exchange(index, self.exchanges, self.last, self.max_staleness)
                )
            )
            if self.is_over or record.status == "died":
                return None
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
        """Whether nothing is left to do."""
        return self.is_stopped or self.exchanges >= self.num_exchanges

    def leave(self, index: int, error: str = "") -> None:
        """A worker has ended, well or not; nobody waits for it any longer."""
        with self.changed:
            self.last.pop(index, None)
            self.best.pop(index, None)
            record = self.records[index]
            if record.status not in ("died", "done"):
                record.status, record.error = ("died", error) if error else ("done", "")
            self._open_if_all_are_there()

    def report(self, index: int, is_again: bool) -> None:
        """A death has been told; with `is_again` a new worker of that number is on its way."""
        with self.changed:
            record = self.records[index]
            record.is_reported = not is_again
            if is_again:
                record.status, record.error = "starting", ""
                record.restarts += 1

    def stop(self) -> None:
        """Let every worker end at its next exchange."""
        with self.changed:
            self.is_stopped = True
            self.changed.notify_all()

    def snapshot(self) -> tuple[float, list[WorkerRecord]]:
        """Seconds from the start to now, or to the last exchange of all, and all records."""
        with self.changed:
            records = [replace(record) for record in self.records.values()]
            if self.opened is None:
                return 0.0, records
            return (self.latest if self.is_over else time.monotonic()) - self.opened, records


class Shard:
    """A contiguous part of the center, or all of it: one flat array, moved in place."""

    def __init__(self, values: np.ndarray, weight: float, leader: float, is_elastic: bool):
        self.values = np.array(values)
        self.weight, self.leader_weight, self.is_elastic = weight, leader, is_elastic
        self.leader = np.array(values) if leader else None
        self.lock = threading.Lock()

    def exchange(self, sent: np.ndarray, is_leader: bool = False) -> np.ndarray:
        """Take what a worker sent; return what it is to take off, or where to begin.

        Moves are rounded to the dtype of what was sent before they are added, so that both sides
        move by the same.
        """
        reply = np.empty_like(sent)
        with self.lock:
            if self.leader is not None and is_leader:
                self.leader[:] = sent
            for start in range(0, len(sent), BLOCK):
                part = slice(start, start + BLOCK)
                z, w, move = self.values[part], sent[part], reply[part]
                if self.is_elastic:
                    np.subtract(w, z, out=move, casting="same_kind")
                    move *= self.weight
                    z += move
                    if self.leader is not None:
                        move += (self.leader_weight * (w - self.leader[part])).astype(move.dtype)
                else:
                    np.multiply(w, self.weight, out=move, casting="same_kind")
                    z += move
                    move[:] = z
        return reply

    def pull(self) -> np.ndarray:
        """The values, a copy."""
        with self.lock:
            return self.values.copy()


class Center:
    """The center in this process: `join`, `pull`, `exchange` and `leave` for its workers."""

    def __init__(self, ledger: Ledger, shard: Shard):
        self.ledger, self.shard = ledger, shard

    def join(self, index: int, place: str) -> tuple[int, np.ndarray]:
        """How many exchanges the worker's number has had, and the values to begin at."""
        return self.ledger.join(index, place), self.shard.pull()

    def wait_for_start(self, index: int) -> None:
        """Return when all workers have compiled."""
        self.ledger.wait_for_start(index)

    def exchange(self, index: int, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """The reply to what a worker sends, None when there is nothing left to do."""
        is_leader = self.ledger.admit(index, loss)
        return None if is_leader is None else self.shard.exchange(sent, is_leader)

    def leave(self, index: int, error: str = "") -> None:
        """The worker has ended."""
        self.ledger.leave(index, error)

    def pull(self) -> np.ndarray:
        """The values, a copy."""
        return self.shard.pull()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the ledger."""
        return getattr(self.ledger, method)(*args)
