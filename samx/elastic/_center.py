"""The center of elastic averaging in host memory: numpy and locks, no jax.

A process that holds only the center imports no more than this file and `_ledger`, so it never
touches an accelerator.
"""

import threading
import traceback
from typing import Any

import numpy as np

from samx.elastic._ledger import Ledger, Life

BLOCK = 1 << 16  # elements that stay in the cache while they are processed
LONGEST_ERROR = 20_000  # characters of an error that are kept


class CenterLost(RuntimeError):
    """The center is lost, with everything since its newest copy in this process.

    Attributes:
        checkpoint: That copy, a `Checkpoint` to resume from; `train` takes one every `save_every`
            seconds.

    Example:
        >>> from samx import elastic
        >>> elastic.CenterLost("its process has ended").checkpoint is None
        True
    """

    checkpoint: Any = None


def described(exception: BaseException) -> str:
    """Return a text: the error in the first line, the traceback below it."""
    try:
        lines = str(exception).splitlines()
    except BaseException:  # a worker's exception may do anything
        lines = ["its message cannot be printed"]
    first_line = f"{type(exception).__name__}: {lines[0] if lines else ''}"
    text = first_line + "\n\n" + "".join(traceback.format_exception(exception))
    return text[:LONGEST_ERROR]


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
    """The center in this process."""

    def __init__(self, ledger: Ledger, shard: Shard):
        self.ledger, self.shard = ledger, shard

    def pull(self) -> np.ndarray:
        """Return a copy of the values."""
        return self.shard.pull()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the ledger."""
        return getattr(self.ledger, method)(*args)


class Client:
    """The center in this process, as a worker in one of its lives sees it."""

    def __init__(self, center: Center, life: Life):
        self.center, self.life = center, life

    def join(self, place: str) -> int | None:
        """Return the number of exchanges of this worker so far, or None if its life is over."""
        return self.center.ledger.join(self.life, place)

    def wait_for_start(self) -> bool:
        """Return when all workers have compiled; whether this one takes part."""
        return self.center.ledger.wait_for_start(self.life)

    def exchange(self, sent: np.ndarray, loss: float) -> np.ndarray | None:
        """Return the reply to what the worker sends, or None when no work is left for it."""
        is_leader = self.center.ledger.admit(self.life, loss)
        return None if is_leader is None else self.center.shard.exchange(sent, is_leader)

    def leave(self, **why: Any) -> None:
        """Record that this life has ended; see `Ledger.leave`."""
        self.center.ledger.leave(self.life, **why)

    def pull(self) -> np.ndarray:
        """Return a copy of the values."""
        return self.center.pull()
