"""What a training run shows, keeps and returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from samx.elastic._ledger import WorkerRecord


class Checkpoint(NamedTuple):
    """What a training run resumes from: a pytree, to save with orbax or any other tool.

    Attributes:
        params: The center.
        exchanges: `int64[num_workers]`, exchanges of each worker. Each worker resumes its stream
            after the steps of these exchanges. Parameters and optimizer states of the workers are
            not saved.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from samx import elastic
        >>> int(elastic.Checkpoint(jnp.ones(2), np.array([3, 4])).exchanges.sum())
        7
    """

    params: Any
    exchanges: np.ndarray


class Progress(NamedTuple):
    """What `train` passes to its monitor, and returns at the end.

    Attributes:
        seconds: Seconds since all workers have compiled; 0 before.
        exchanges: Exchanges of all workers so far, including those before a resumption.
        workers: A `WorkerRecord` of each worker.
        pull: Returns the center as a tree like the parameters.

    Example:
        >>> from samx import elastic
        >>> elastic.Progress(0.0, 0, [elastic.WorkerRecord(0)], pull=lambda: None).exchanges
        0
    """

    seconds: float
    exchanges: int
    workers: list[WorkerRecord]
    pull: Callable[[], Any]


class Trained(NamedTuple):
    """What `train` returns.

    Attributes:
        params: The center at the end.
        progress: The last `Progress`.
        shortfall: Why fewer exchanges than `num_exchanges` were made; empty if all were made.

    Example:
        >>> from samx import elastic
        >>> elastic.Trained._fields
        ('params', 'progress', 'shortfall')
    """

    params: Any
    progress: Progress
    shortfall: str
