"""The code that Ray's processes run.

It is sent to them by value, so that the center's process imports numpy only.
"""

import contextlib
import pickle
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from samx.elastic._center import CenterLost, Shard, described
from samx.elastic._ledger import Ledger, Life


class ShardActor:
    """A shard in its own process. The first shard also holds the ledger. Safe for threads."""

    def __init__(self, values: np.ndarray, shard: tuple[Any, ...], ledger: tuple[Any, ...] | None):
        self.shard = Shard(values, *shard)
        self.ledger = Ledger(*ledger) if ledger else None

    def exchange(self, sent: np.ndarray, is_leader: bool) -> np.ndarray:
        """Apply this shard's part of what an admitted worker sent, and return the reply."""
        return self.shard.exchange(sent, is_leader)

    def admit_and_exchange(self, life: Life, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """Do both in one call, for a center with one shard; return None at the end."""
        is_leader = self.call("admit", life, loss)
        return None if is_leader is None else self.shard.exchange(sent, is_leader)

    def pull(self) -> np.ndarray:
        """Return a copy of the values."""
        return self.shard.pull()

    def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        """Call a method of the ledger; return records as dicts, which every process can read."""
        result = getattr(self.ledger, method)(*args, **keywords)
        if method == "snapshot":
            seconds, records = result
            return seconds, [asdict(record) for record in records]
        return result

    def live(self) -> None:
        """Never return: a caller that waits for this call learns when the process ends."""
        threading.Event().wait()


class WorkerActor:
    """A process for one worker. It finds the same modules as the driver."""

    def __init__(self, path: Sequence[str]):
        sys.path.extend(folder for folder in path if folder not in sys.path)

    def run(self, pickled: bytes, life: Life, shards: Sequence[Any]) -> None:
        """Run a life from start to end; an error reaches the center as text, never pickled."""
        client = Client(shards, life)
        try:
            pickle.loads(pickled)(client)
        except BaseException as error:  # no module of the worker's code, or the center is lost
            with contextlib.suppress(BaseException):
                client.leave(error=described(error))


class Client:
    """The center as a worker sees it: `_center.Client`, through Ray's actors."""

    def __init__(self, shards: Sequence[Any], life: Life):
        self.shards, self.life = shards, life

    def join(self, place: str) -> int | None:
        """Return the number of exchanges of this worker so far, or None if its life is over."""
        return get(self.shards[0].call.remote("join", self.life, place))

    def wait_for_start(self) -> bool:
        """Return when all workers have compiled; whether this one takes part."""
        return get(self.shards[0].call.remote("wait_for_start", self.life))

    def exchange(self, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """Return the reply to what the worker sends, or None when no work is left for it."""
        first = self.shards[0]
        if len(self.shards) == 1:
            return get(first.admit_and_exchange.remote(self.life, sent, loss))
        # Ask the ledger first: only an admitted worker may change a shard.
        is_leader = get(first.call.remote("admit", self.life, loss))
        if is_leader is None:
            return None
        parts = np.array_split(sent, len(self.shards))
        pairs = zip(self.shards, parts, strict=True)
        return joined(get([shard.exchange.remote(w, is_leader) for shard, w in pairs]))

    def leave(self, **why: Any) -> None:
        """Record that this life has ended; see `Ledger.leave`."""
        get(self.shards[0].call.remote("leave", self.life, **why))

    def pull(self) -> np.ndarray:
        """Return a copy of the values."""
        return joined(get([shard.pull.remote() for shard in self.shards]))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return all parts as one array; a single part is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def get(refs: Any, timeout: float | None = None) -> Any:
    """Return the answers of the center's actors, or raise `CenterLost`."""
    import ray
    from ray import exceptions

    try:
        return ray.get(refs, timeout=timeout)
    except exceptions.RayActorError as error:
        raise CenterLost("elastic: the center is lost, one of its processes has ended") from error
    except exceptions.GetTimeoutError as error:
        raise CenterLost(f"elastic: the center has not answered for {timeout:g} s") from error
