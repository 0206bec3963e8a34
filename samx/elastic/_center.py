"""The center of elastic averaging in host memory: numpy and locks, no jax.

A process that holds only the center imports only this file, so it never touches an accelerator.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from samx.core.hyperparams import as_count

BLOCK = 1 << 16  # elements that stay in the cache while they are processed


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
        restarts: How many times the worker was started again.
        place: Where the worker runs.
        error: Why the worker died, if it did.
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
    restarts: int = 0
    place: str = ""
    error: str = ""
    is_reported: bool = False


class CenterLost(RuntimeError):
    """The center is lost, with everything since the last checkpoint.

    Example:
        >>> from samx import elastic
        >>> issubclass(elastic.CenterLost, RuntimeError)
        True
    """


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
    """Which workers take part, which may exchange, and what is left to do. Safe for threads."""

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
        self.is_stopped = False
        self.changed = threading.Condition()

    def join(self, index: int, place: str) -> int:
        """Record where a worker runs; return the number of its exchanges so far."""
        with self.changed:
            self.records[index].place = place
            return self.records[index].exchanges

    def wait_for_start(self, index: int) -> None:
        """Record that a worker is ready; return when every expected worker is ready or died."""
        with self.changed:
            self.records[index].status = "running"
            self._open_if_all_are_there()
            self.changed.wait_for(lambda: self.opened is not None or self.is_stopped)
            if self.records[index].status == "running":
                self.last[index] = self.exchanges

    def open(self) -> None:
        """Start now, without the workers that are not ready."""
        with self.changed:
            self.opened = self.opened or time.monotonic()
            self.changed.notify_all()

    def _open_if_all_are_there(self):
        if all(record.status != "starting" for record in self.records.values()):
            self.opened = self.opened or time.monotonic()
        self.changed.notify_all()

    def admit(self, index: int, loss: float) -> bool | None:
        """Count an exchange once the bound allows it.

        Returns whether the worker is the leader, or None when no work is left.
        """
        with self.changed:
            record = self.records[index]
            self.changed.wait_for(
                lambda: (
                    self.is_over
                    or record.status == "died"  # it died while its last request waited here
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
        """Whether no work is left."""
        return self.is_stopped or self.exchanges >= self.num_exchanges

    def leave(self, index: int, error: str = "") -> None:
        """Record that a worker has ended or died; the others no longer wait for it."""
        with self.changed:
            self.last.pop(index, None)
            self.best.pop(index, None)
            record = self.records[index]
            if record.status not in ("died", "done"):
                record.status, record.error = ("died", error) if error else ("done", "")
            self._open_if_all_are_there()

    def report(self, index: int, is_again: bool) -> None:
        """Record that a death was reported; with `is_again` the worker is being restarted."""
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
        """Return the seconds since the start and a copy of all records.

        When no work is left, the seconds count up to the last exchange.
        """
        with self.changed:
            records = [replace(record) for record in self.records.values()]
            if self.opened is None:
                return 0.0, records
            return (self.latest if self.is_over else time.monotonic()) - self.opened, records


class Shard:
    """A contiguous part of the center, or all of it: one flat array, updated in place."""

    def __init__(self, values: np.ndarray, weight: float, leader: float, is_elastic: bool):
        self.values = np.array(values)
        self.weight, self.leader_weight, self.is_elastic = weight, leader, is_elastic
        self.leader = np.array(values) if leader else None
        self.lock = threading.Lock()

    def exchange(self, sent: np.ndarray, is_leader: bool = False) -> np.ndarray:
        """Apply what a worker sent; return the move to subtract, or the values to start from.

        Moves are rounded to the dtype of what was sent before they are added. So both sides move
        by the same amount.
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
        """Return a copy of the values."""
        with self.lock:
            return self.values.copy()


class Center:
    """The center in this process. Its workers call `join`, `pull`, `exchange` and `leave`."""

    def __init__(self, ledger: Ledger, shard: Shard):
        self.ledger, self.shard = ledger, shard

    def join(self, index: int, place: str) -> tuple[int, np.ndarray]:
        """Return the number of exchanges of this worker so far, and the values to start from."""
        return self.ledger.join(index, place), self.shard.pull()

    def wait_for_start(self, index: int) -> None:
        """Return when all workers have compiled."""
        self.ledger.wait_for_start(index)

    def exchange(self, index: int, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """Return the reply to what a worker sends, or None when no work is left."""
        is_leader = self.ledger.admit(index, loss)
        return None if is_leader is None else self.shard.exchange(sent, is_leader)

    def leave(self, index: int, error: str = "") -> None:
        """Record that the worker has ended."""
        self.ledger.leave(index, error)

    def pull(self) -> np.ndarray:
        """Return a copy of the values."""
        return self.shard.pull()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the ledger."""
        return getattr(self.ledger, method)(*args)
