"""What Ray's processes run: sent to them by value, so that the center's imports numpy only."""

import pickle
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from samx.elastic._center import CenterLost, Ledger, Shard


class ShardActor:
    """A shard in a process of its own; the first one holds the ledger, too. Safe for threads."""

    def __init__(self, values: np.ndarray, shard: tuple[Any, ...], ledger: tuple[Any, ...] | None):
        self.shard = Shard(values, *shard)
        self.ledger = Ledger(*ledger) if ledger else None

    def exchange(self, sent: np.ndarray, is_leader: bool) -> np.ndarray:
        """Take this shard's part of what an admitted worker sent; return the reply."""
        return self.shard.exchange(sent, is_leader)

    def admit_and_exchange(self, index: int, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """Both at once, for a center of one shard; None when there is nothing left to do."""
        is_leader = self.call("admit", index, loss)
        return None if is_leader is None else self.shard.exchange(sent, is_leader)

    def pull(self) -> np.ndarray:
        """The values, a copy."""
        return self.shard.pull()

    def call(self, method: str, *args: Any) -> Any:
        """A method of the ledger; records as what every process knows."""
        result = getattr(self.ledger, method)(*args)
        if method == "snapshot":
            seconds, records = result
            return seconds, [asdict(record) for record in records]
        return result

    def live(self) -> None:
        """Return never: who waits for it is told when the process ends."""
        threading.Event().wait()


class WorkerActor:
    """A process for a worker, which finds the modules that the driver finds."""

    def __init__(self, path: Sequence[str]):
        sys.path.extend(folder for folder in path if folder not in sys.path)

    def run(self, pickled: bytes, index: int, shards: Sequence[Any]) -> None:
        """The life of a worker."""
        pickle.loads(pickled)(index, shards)


class Client:
    """The center as a worker sees it, through its actors: what `Center` offers in one process."""

    def __init__(self, shards: Sequence[Any]):
        self.shards = shards

    def join(self, index: int, place: str) -> tuple[int, np.ndarray]:
        """How many exchanges the worker's number has had, and the values to begin at."""
        return get(self.shards[0].call.remote("join", index, place)), self.pull()

    def wait_for_start(self, index: int) -> None:
        """Return when all workers have compiled."""
        get(self.shards[0].call.remote("wait_for_start", index))

    def exchange(self, index: int, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """The reply to what a worker sends, None when there is nothing left to do."""
        first = self.shards[0]
        if len(self.shards) == 1:
            return get(first.admit_and_exchange.remote(index, sent, loss))
        # Only who is admitted may move anything, in any shard.
        is_leader = get(first.call.remote("admit", index, loss))
        if is_leader is None:
            return None
        parts = np.array_split(sent, len(self.shards))
        pairs = zip(self.shards, parts, strict=True)
        return joined(get([shard.exchange.remote(w, is_leader) for shard, w in pairs]))

    def leave(self, index: int, error: str = "") -> None:
        """The worker has ended."""
        get(self.shards[0].call.remote("leave", index, error))

    def pull(self) -> np.ndarray:
        """The values, a copy."""
        return joined(get([shard.pull.remote() for shard in self.shards]))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all parts, without a copy if it is the only one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def get(refs: Any, timeout: float | None = None) -> Any:
    """What actors of the center answer."""
    import ray
    from ray import exceptions

    try:
        return ray.get(refs, timeout=timeout)
    except exceptions.RayActorError as error:
        raise CenterLost("elastic: the center is lost, a process of it has ended") from error
    except exceptions.GetTimeoutError as error:
        raise CenterLost(f"elastic: the center has not answered for {timeout:g} s") from error
