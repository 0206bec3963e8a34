"""Elastic averaging on a simulated clock: deterministic, the reference for every engine."""

import heapq
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.hyperparams import (
    as_count,
    as_iterator,
    as_list,
    check_choice,
    check_flag,
    check_static_number,
)
from samx.elastic._ledger import check_staleness, may_exchange, rank
from samx.elastic._rule import Rule, apply_move, exchange
from samx.elastic._worker import Local, StreamEnded, Worker, copied, mean_of


class Event(NamedTuple):
    """Something that happens to a worker.

    Attributes:
        time: Time of the event in seconds.
        worker: Index of the worker.
        kind: "join": the worker starts at the center. "begin": a local step begins; if an exchange
            is due, the worker sends its parameters. "exchange": the parameters reach the center.
            "finish": the step ends, and the move of the exchange is subtracted. "die": the worker
            ends.
        staleness: For "exchange": exchanges of other workers since the last one of this worker.

    Example:
        >>> from samx import elastic
        >>> [event.kind for event in elastic.in_order([0], period=4)]
        ['begin', 'exchange', 'finish']
    """

    time: float
    worker: int
    kind: Literal["join", "begin", "exchange", "finish", "die"]
    staleness: int = 0


class Simulation:
    """Workers and a center, driven by events.

    Attributes:
        center: The center z, a tree like the parameters.
        workers: Made from one `Worker` each: the worker's current `params`, `opt_state`, `steps`.
        rule: How workers and center move towards each other.
        exchanges: Exchanges so far.

    Example:
        Two workers, the second twice as fast:

        >>> import itertools, jax, jax.numpy as jnp, optax, samx
        >>> from samx import elastic
        >>> tx = optax.chain(samx.sam(rho=0.05), optax.sgd(0.1))
        >>> def step(w, state, x):
        ...     value_fn = lambda w: ((w - x) ** 2).sum()
        ...     value, grads = jax.value_and_grad(value_fn)(w)
        ...     updates, state = tx.update(grads, state, w, value=value, value_fn=value_fn)
        ...     return optax.apply_updates(w, updates), state, value
        >>> batches = lambda n: itertools.repeat(jnp.ones(2))
        >>> worker = elastic.Worker(jnp.zeros(2), tx.init, step, batches)
        >>> simulation = elastic.Simulation([worker] * 2, jnp.zeros(2), elastic.Rule(period=2))
        >>> for event in elastic.timeline([1.0, 0.5], period=2, num_exchanges=12):
        ...     simulation.apply(event)
        >>> [local.steps for local in simulation.workers], simulation.exchanges
        ([8, 16], 12)
    """

    def __init__(self, workers: Sequence[Worker], center: Any, rule: Rule):
        workers = as_list("workers", workers, "Workers")
        if not workers:
            raise ValueError("Simulation: `workers` must be one Worker or more, got none")
        if not all(isinstance(worker, Worker) for worker in workers):
            kinds = [type(worker).__name__ for worker in workers]
            raise TypeError(f"Simulation: `workers` must be Workers, got {kinds}")
        if not isinstance(rule, Rule):
            raise TypeError(f"Simulation: `rule` must be a Rule, got {type(rule).__name__}")
        tree.check_arrays("center", center)
        for worker in workers:
            tree.check_like("center", center, "worker.params", worker.params)
        self.rule, self.center, self.exchanges = rule, center, 0
        self.workers = [Local(worker, rule, i, center) for i, worker in enumerate(workers)]
        self._weight = rule.weight(len(workers))
        self._sent, self._moves = {}, {}  # for each worker between two events
        self._leader, self._losses = center, {}
        self._counts = [0] * len(workers)

    def apply(self, event: Event) -> None:
        """Apply an event.

        Args:
            event: An event from `timeline` or `in_order`, or your own.

        Raises:
            ValueError: If the worker or the kind of event does not exist, or the worker's stream of
                batches has ended.
        """
        happen = {
            "join": self._join,
            "begin": self._begin,
            "exchange": self._exchange,
            "finish": self._finish,
            "die": self._die,
        }
        if event.kind not in happen or not 0 <= event.worker < len(self.workers):
            raise ValueError(
                f"Simulation: `event` must have a kind in {list(happen)} and a worker index below "
                f"{len(self.workers)}, got {event}"
            )
        happen[event.kind](event.worker)

    def _join(self, i: int) -> None:
        steps = self._counts[i] * self.rule.period
        self.workers[i] = Local(self.workers[i].worker, self.rule, i, self.center, steps)

    def _begin(self, i: int) -> None:
        if self.workers[i].is_due:
            self._sent[i] = copied(self.workers[i].params)

    def _exchange(self, i: int) -> None:
        local, sent = self.workers[i], self._sent.pop(i)
        losses, local.losses = local.losses, []
        self.exchanges += 1
        self._counts[i] += 1
        if self.rule.smoothing == "gaussian":
            added = apply_move(sent, local.start)
            self.center = apply_move(self.center, jax.tree.map(lambda d: -self._weight * d, added))
            local.begin_at(self.center)
            return
        self.center, move = exchange(self.center, sent, self._weight)
        if self.rule.leader:
            self._losses[i] = rank(mean_of(losses))
            if self._losses[i] <= min(self._losses.values()):
                self._leader = sent
            _, to_leader = exchange(self._leader, sent, self.rule.leader)
            move = jax.tree.map(jnp.add, move, to_leader)
        self._moves[i] = move

    def _finish(self, i: int) -> None:
        local = self.workers[i]
        try:
            local.step()
        except StreamEnded as end:
            raise ValueError(f"Simulation: worker {i} cannot take a step: {end}") from None
        if i in self._moves:
            local.params = apply_move(local.params, self._moves.pop(i))

    def _die(self, i: int) -> None:
        for of_workers in (self._sent, self._moves, self._losses):
            of_workers.pop(i, None)


def in_order(order: Iterable[int], period: int) -> Iterator[Event]:
    """Yield the events of local steps in a given order, each with its exchange if one is due.

        for i in order:  begin, exchange (every `period` steps of i), finish

    Args:
        order: For each local step, the index of the worker that takes it.
        period: Local steps between two exchanges of a worker, as in `Rule`.

    Returns:
        An iterator of `Event`s for `Simulation.apply`. Their times count the steps.

    Raises:
        ValueError: If `period` is below 1.
        TypeError: If `period` or an index is not a Python int.

    Example:
        >>> from samx import elastic
        >>> [(event.worker, event.kind) for event in elastic.in_order([0, 1, 1], period=2)]
        ... # doctest: +NORMALIZE_WHITESPACE
        [(0, 'begin'), (0, 'exchange'), (0, 'finish'), (1, 'begin'), (1, 'exchange'),
         (1, 'finish'), (1, 'begin'), (1, 'finish')]

    References:
        `sixin-zh/mpiT`, whose recorded runs proceed in rounds.

    Notes:
        Cost: none.
    """
    period = as_count("period", period)
    steps, last, version = {}, {}, 0
    for time, index in enumerate(as_iterator("order", order, "indices of workers")):
        i = as_count("order", index, 0)
        yield Event(time, i, "begin")
        if steps.get(i, 0) % period == 0:
            yield Event(time, i, "exchange", version - last.get(i, version))
            version += 1
            last[i] = version
        yield Event(time, i, "finish")
        steps[i] = steps.get(i, 0) + 1


def timeline(
    seconds_per_step: Sequence[float],
    *,
    period: int,
    num_exchanges: int,
    latency: float = 0.0,
    max_staleness: int | None = None,
    changes: Sequence[tuple[float, int, Literal["die", "join"]]] = (),
    drops: Collection[tuple[int, int]] = (),
    overlap: bool = True,
) -> Iterator[Event]:
    """Yield the events of workers with different speeds, in order of time.

        a local step takes seconds_per_step[i]
        an exchange takes `latency` to the center, and its reply `latency` back to the worker
        a step that begins with an exchange ends when both have ended

    Args:
        seconds_per_step: Seconds per local step, one number for each worker.
        period: Local steps between two exchanges of a worker, as in `Rule`.
        num_exchanges: Exchanges of all workers together. A worker that would begin another one
            ends.
        latency: Seconds ≥ 0 from a worker to the center, and the same back; default 0.
        max_staleness: Bound on the exchanges of other workers between two exchanges of a worker, at
            least the number of workers − 1. Workers that are ahead wait. Default none.
        changes: Workers that die, or join at the center, as (seconds, worker, "die" or "join"). A
            worker whose first change is "join" is absent before. Default none.
        drops: Exchanges that are lost on the way, as (worker, number of its exchange from 0).
            Default none.
        overlap: Whether the step continues while the exchange is under way; default True. Use
            False for "gaussian".

    Returns:
        An iterator of `Event`s for `Simulation.apply`. Events of equal times are ordered by the
        index of the worker.

    Raises:
        ValueError: If a number is out of range, or a worker in `changes` does not exist.
        TypeError: If a count is not a Python int, or a sequence has a wrong element.

    Example:
        Gradients per second of four workers, one four times slower:

        >>> from samx import elastic
        >>> events = elastic.timeline([1, 1, 1, 4], period=4, num_exchanges=400, latency=0.1)
        >>> times = [event.time for event in events if event.kind == "finish"]
        >>> round(len(times) / times[-1], 2)
        3.23

    References:
        Liu et al., "Asynchronous Local-SGD Training for Language Modeling", 2024,
        https://arxiv.org/abs/2401.09135, whose simulator uses seconds per step too.

    Notes:
        Cost: none; no step is computed.
    """
    seconds_per_step = as_list("seconds_per_step", seconds_per_step, "numbers")
    num_workers = len(seconds_per_step)
    if not num_workers:
        raise ValueError("timeline: `seconds_per_step` must be of one worker or more, got none")
    period = as_count("period", period)
    num_exchanges = as_count("num_exchanges", num_exchanges)
    check_static_number("latency", latency, 0)
    check_staleness("timeline", max_staleness, num_workers)
    check_flag("overlap", overlap)
    for seconds in seconds_per_step:
        check_static_number("seconds_per_step", seconds, 0, excluded=0)
    changes = as_list("changes", changes, "(seconds, worker, kind)")
    for change in changes:
        if not isinstance(change, tuple | list) or len(change) != 3:
            raise TypeError(
                f"timeline: `changes` must hold (seconds, worker, kind), got {change!r}"
            )
        time, i, kind = change
        check_static_number("changes[:, 0]", time, 0)
        i = as_count("changes[:, 1]", i, 0)
        check_choice("changes[:, 2]", kind, ("die", "join"))
        if i >= num_workers:
            raise ValueError(
                f"timeline: `changes` has {(time, i, kind)}; it needs a worker index below "
                f"{num_workers}, got {i}"
            )
    drops = list(as_iterator("drops", drops, "pairs (worker, number of its exchange)"))
    if not all(isinstance(drop, tuple | list) and len(drop) == 2 for drop in drops):
        raise TypeError(
            f"timeline: `drops` must be pairs (worker, number of its exchange), got {drops!r}"
        )
    drops = {(as_count("drops", i, 0), as_count("drops", n, 0)) for i, n in drops}

    queue, numbers = [], itertools.count()
    lives = dict.fromkeys(range(num_workers), 0)  # events planned in an earlier life are void
    steps, sent = dict.fromkeys(lives, 0), dict.fromkeys(lives, 0)
    began: dict[int, float] = {}
    last: dict[int, int] = {}  # the version that each living worker has seen
    waiting: list[int] = []
    version = 0

    def plan(time, i, kind):
        heapq.heappush(queue, (time, i, next(numbers), kind, lives[i]))

    def plan_finish(i, time):
        """Plan the end of the step: when the step and the reply to an exchange at `time` end."""
        if overlap:
            plan(max(began[i] + seconds_per_step[i], time + latency), i, "finish")
        else:
            plan(time + latency + seconds_per_step[i], i, "finish")

    first = {}
    for time, i, kind in sorted(changes, key=lambda change: change[0]):
        first.setdefault(i, kind)
        heapq.heappush(queue, (time, i, next(numbers), kind, None))
    for i in range(num_workers):
        if first.get(i) != "join":
            heapq.heappush(queue, (0.0, i, next(numbers), "join", None))

    while queue:
        time, i, _, kind, life = heapq.heappop(queue)
        if life not in (None, lives[i]):
            continue
        if kind == "exchange" and version >= num_exchanges:
            last.pop(i, None)  # the worker ends
        elif kind == "exchange" and (i, sent[i]) in drops:
            sent[i] += 1
            plan_finish(i, time)
        elif kind == "exchange":
            if i not in waiting:
                waiting.append(i)
        else:
            if kind == "join" and i in last:
                continue  # the worker is already there
            yield Event(time, i, kind)
            if kind in ("join", "die"):
                lives[i] += 1
                waiting = [other for other in waiting if other != i]
                last.pop(i, None)
            if kind == "join":
                last[i] = version
                steps[i] = sent[i] * period  # a new start begins with an exchange
                plan(time, i, "begin")
            if kind == "begin":
                began[i] = time
                is_due = steps[i] % period == 0
                plan(
                    time + (latency if is_due else seconds_per_step[i]),
                    i,
                    "exchange" if is_due else "finish",
                )
            if kind == "finish":
                steps[i] += 1
                plan(time, i, "begin")
        while ready := [j for j in waiting if may_exchange(j, version, last, max_staleness)]:
            j = ready[0]
            waiting.remove(j)
            if version >= num_exchanges:
                last.pop(j, None)
                continue
            yield Event(time, j, "exchange", version - last[j])
            version += 1
            last[j] = version
            sent[j] += 1
            plan_finish(j, time)
