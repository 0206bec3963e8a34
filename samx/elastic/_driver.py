"""What the driver of a training run does about its center and its workers."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from samx.elastic._center import described
from samx.elastic._engine import Engine
from samx.elastic._ledger import WorkerRecord
from samx.elastic._progress import Checkpoint, Progress
from samx.elastic._worker import Wire

NOT_READY = "no work was left before it was ready"


class DriversCenter:
    """The center as the driver sees it, and its newest copy in this process."""

    def __init__(
        self, engine: Engine, wire: Wire, params: Any, save: Callable | None, kept: Checkpoint
    ):
        self.engine, self.wire, self.params, self.save = engine, wire, params, save
        self.kept, self.saved = kept, "no checkpoint"

    def pull(self) -> Any:
        """Return the center as a tree like the parameters."""
        return self.wire.put_in(self.params, self.engine.pull().astype(self.wire.dtype))

    def progress(self) -> Progress:
        """Return how far the workers are."""
        seconds, records = self.engine.call("snapshot")
        return Progress(seconds, sum(record.exchanges for record in records), records, self.pull)

    def checkpoint(self) -> None:
        """Copy the center to this process, and save it; warn if it cannot be saved."""
        params = self.pull()
        counts = np.array([record.exchanges for record in self.progress().workers], np.int64)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            warn(f"the center is not finite, so it is not saved; {self.saved} is kept")
            return
        self.kept = Checkpoint(params, counts)
        if self.save is None:
            return
        after = f"after {counts.sum()} exchanges"
        try:
            self.save(self.kept)
        except Exception as error:  # training must not be lost because a disk is full
            what = described(error).splitlines()[0]
            warn(
                f"`save` has failed {after}: {what}; {self.saved} is kept, and the center is still "
                "in memory"
            )
        else:
            self.saved = f"the checkpoint {after}"


def end_the_silent(engine: Engine, seconds: float) -> None:
    """Declare workers dead that have not exchanged for too long."""
    for life in engine.call("silent", seconds):
        error = f"TimeoutError: no exchange for {seconds:g} s, and no end"
        engine.call("leave", life, error)
        engine.abandon(life)


def end_the_unfinished(engine: Engine, seen: Progress) -> None:
    """Declare workers dead that have not ended in time, or done if they were never ready."""
    for record in unfinished(seen):
        error = f"TimeoutError: no end {engine.grace:g} s after the last exchange"
        why = (error, "") if record.status == "running" else ("", NOT_READY)
        life = record.index, record.restarts
        engine.call("leave", life, *why)
        engine.abandon(life)


def report_deaths(engine: Engine, seen: Progress, max_restarts: int) -> None:
    """Warn of each death once, and start the worker again if it may."""
    for life, error in engine.deaths():
        engine.call("leave", life, error)
    for record in seen.workers:
        if record.status == "died" and not record.is_reported:
            is_again = record.restarts < max_restarts
            warn(
                f"worker {record.index} ({record.place}) died after {record.exchanges} exchanges"
                f"{' and is started again' if is_again else ''}: {record.error.splitlines()[0]}"
            )
            engine.call("report", record.index, is_again)
            if is_again:
                engine.launch((record.index, record.restarts + 1))


def unfinished(seen: Progress) -> list[WorkerRecord]:
    return [record for record in seen.workers if record.status not in ("done", "died")]


def shortfall_of(seen: Progress, num_exchanges: int) -> str:
    """Say why fewer exchanges than requested were made, if so."""
    if seen.exchanges >= num_exchanges:
        return ""
    ends = [
        f"worker {record.index} ended after {record.exchanges}: "
        f"{record.error.splitlines()[0] if record.status == 'died' else record.reason}"
        for record in seen.workers
    ]
    return f"{seen.exchanges} of {num_exchanges} exchanges were made; {'; '.join(ends)}"


def warn(what: str) -> None:
    warnings.warn(f"elastic: {what}", RuntimeWarning, 4)
