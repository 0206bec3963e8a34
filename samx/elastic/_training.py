"""Asynchronous training: a loop that starts the workers, and watches them and their center."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.hyperparams import as_count, check_floating, check_function, check_number
from samx.elastic._center import CenterLost
from samx.elastic._driver import (
    DriversCenter,
    end_the_silent,
    end_the_unfinished,
    report_deaths,
    shortfall_of,
    unfinished,
    warn,
)
from samx.elastic._engine import Engine, Job, Threads
from samx.elastic._ledger import check_staleness
from samx.elastic._progress import Checkpoint, Progress, Trained
from samx.elastic._rule import Rule
from samx.elastic._signals import Signals
from samx.elastic._worker import Wire, Worker

POLL = 0.05  # seconds between two checks of the workers


def train(
    make_worker: Callable[[int], Worker],
    params: Any,
    *,
    num_workers: int,
    num_exchanges: int,
    rule: Rule | None = None,
    engine: Engine | None = None,
    max_staleness: int | None = None,
    max_restarts: int = 0,
    start_timeout: float = 600.0,
    worker_timeout: float = 600.0,
    monitor: Callable[[Progress], None] | None = None,
    monitor_every: float = 1.0,
    save: Callable[[Checkpoint], None] | None = None,
    save_every: float = 600.0,
    resume: Checkpoint | None = None,
    center_dtype: Any = None,
) -> Trained:
    """Train with workers that do not wait for each other, around a common center.

        each worker, every `rule.period` local steps, without a barrier:
            d = α (w − z);  z += d  at once;  w −= d  after its next local step
        until all workers together have made `num_exchanges`

    With a sharpness-aware local step this is LSAM, with a plain one EASGD.

    Args:
        make_worker: `index -> Worker`, called where the worker runs.
        params: The center at the start, a pytree of arrays.
        num_workers: Number of workers, each with its own stream of batches.
        num_exchanges: Exchanges of all workers together, about `num_exchanges · rule.period` local
            steps. Then all workers end. A worker's first exchange finds it at the center and moves
            nothing. A worker's steps after its last exchange are lost.
        rule: How workers and center move towards each other; default `Rule()`.
        engine: `Threads()`, the default, or `Ray()`.
        max_staleness: Bound on the exchanges of other workers between two exchanges of a worker, at
            least `num_workers − 1`. Workers that are ahead wait. Default none.
        max_restarts: How many times each worker is started again when it dies; default 0. It starts
            at the center, with a new optimizer state.
        start_timeout: Seconds to wait at the start for workers that have not compiled yet; default
            600. Late workers start at the center, as it is then.
        worker_timeout: Seconds that a worker may compute without an exchange, once training has
            started; then it counts as dead. The start of a late or restarted worker is included,
            waits for other workers are not. Default 600.
        monitor: Called with a `Progress` in this thread, every `monitor_every` seconds and at the
            end.
        monitor_every: Seconds; default 1.
        save: Called with a `Checkpoint` in this thread, every `save_every` seconds and whenever
            training ends, also by an error, Ctrl-C or SIGTERM. If it raises an `Exception`, a
            RuntimeWarning says what failed and which checkpoint is kept, and training goes on.
        save_every: Seconds; default 600.
        resume: A `Checkpoint` to resume from; then `params` only gives structure and dtypes.
        center_dtype: dtype of the center; default that of the parameters, float32 at least. With
            float64 no sum of moves is rounded.

    Returns:
        A `Trained`: the center, and the last `Progress`.

    Raises:
        ValueError: If a number is out of range, `params` or `resume` are not finite, or `resume`
            has another number of workers or other parameters.
        TypeError: If a count is not a Python int, `params` has no real floating leaves, or another
            argument is not what it is called.
        RuntimeError: If every worker has died before all exchanges were made, with the traceback of
            one of them.
        CenterLost: If the center has died; `checkpoint` of the error is its newest copy.

    Example:
        >>> import itertools, jax, jax.numpy as jnp, optax, samx
        >>> from samx import elastic
        >>> tx = optax.chain(samx.sam(rho=0.05), optax.sgd(0.1))
        >>> @jax.jit
        ... def step(w, state, x):
        ...     value_fn = lambda w: ((w - x) ** 2).sum()
        ...     value, grads = jax.value_and_grad(value_fn)(w)
        ...     updates, state = tx.update(grads, state, w, value=value, value_fn=value_fn)
        ...     return optax.apply_updates(w, updates), state, value
        >>> batches = lambda n: itertools.repeat(jnp.ones(2))
        >>> worker = elastic.Worker(jnp.zeros(2), tx.init, step, batches)
        >>> trained = elastic.train(
        ...     lambda index: worker, jnp.zeros(2), num_workers=2, num_exchanges=40)
        >>> trained.progress.exchanges, bool(abs(trained.params - 1).max() < 0.1)
        (40, True)

    References:
        Teng, Zhang, "LSAM: Asynchronous Distributed Training with Landscape-Smoothed
        Sharpness-Aware Minimization", 2025, https://arxiv.org/abs/2509.03110; Zhang, Choromanska,
        LeCun, "Deep Learning with Elastic Averaging SGD", NeurIPS 2015,
        https://arxiv.org/abs/1412.6651

    Notes:
        Fidelity: **reconstructed**. LSAM's objective, a Gaussian-smoothed density of the SAM loss,
        and its asynchrony are known second-hand. Its update rule is not known. That the rule is
        elastic averaging with SAM's gradient is our derivation, from the objective and from both
        authors' earlier systems. With plain gradients it is their EASGD, whose code it follows.
        Runs are not reproducible: the order of the exchanges depends on the machine. `Simulation`
        is reproducible.
        Cost per exchange: the parameters to the center and back. Memory: the center once (twice
        with a leader), a flat copy of the parameters in each worker, and one copy in this process.
        What a worker sends must be finite, laid out like the parameters, and of a norm of at most a
        million times that of the center when the worker joined it (of 1, if the center is smaller).
        Anything else never reaches the center: the exchange is refused and counted, and the worker
        dies.
        Every death of a worker, by an exception of any class, a signal or a timeout, is reported by
        a RuntimeWarning and in `Progress.workers`; the others do its share. When all exchanges are
        made, workers have the engine's `grace` seconds to end. If fewer are made, because workers
        have died or their streams have ended, a RuntimeWarning and `Trained.shortfall` say why.
        SIGTERM ends training as Ctrl-C does, with a checkpoint, and raises `SystemExit(143)`.
    """
    check_function("make_worker", make_worker, 1)
    num_workers = as_count("num_workers", num_workers)
    num_exchanges = as_count("num_exchanges", num_exchanges)
    max_restarts = as_count("max_restarts", max_restarts, 0)
    check_staleness("train", max_staleness, num_workers)
    numbers = {"start_timeout": start_timeout, "worker_timeout": worker_timeout}
    numbers |= {"monitor_every": monitor_every, "save_every": save_every}
    for name, seconds in numbers.items():
        check_number(name, seconds, 0)
    for name, call in (("monitor", monitor), ("save", save)):
        if call is not None:
            check_function(name, call, 1)
    rule = Rule() if rule is None else rule
    engine = Threads() if engine is None else engine
    if not isinstance(rule, Rule):
        raise TypeError(f"train: `rule` must be a Rule, got {type(rule).__name__}")
    if not hasattr(engine, "launch"):
        got = type(engine).__name__
        raise TypeError(f"train: `engine` must be an engine, such as Threads(), got {got}")
    check_floating("center_dtype", center_dtype)
    tree.check_arrays("params", params)
    wire = Wire(params)
    before = {}
    if resume is not None:
        if not isinstance(resume, Checkpoint):
            raise TypeError(f"train: `resume` must be a Checkpoint, got {type(resume).__name__}")
        if np.shape(resume.exchanges) != (num_workers,):
            raise ValueError(
                f"train: `resume` must be of num_workers={num_workers} workers, got exchanges of "
                f"shape {np.shape(resume.exchanges)}"
            )
        tree.check_arrays("resume.params", resume.params)
        tree.check_like("resume.params", resume.params, "params", params)
        numbers = enumerate(np.asarray(resume.exchanges))
        before = {i: as_count("resume.exchanges", n, 0) for i, n in numbers}
    start, name = (params, "params") if resume is None else (resume.params, "resume.params")
    _check_finite(name, start)
    start = jax.tree.map(lambda w, like: jnp.asarray(w, jnp.result_type(like)), start, params)
    with np.errstate(over="ignore"):
        values = wire.flat(start).astype(center_dtype or wire.dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"train: `{name}` must be finite in `center_dtype`, {values.dtype}")
    shard = (rule.weight(num_workers), rule.leader, rule.smoothing == "elastic")
    ledger = (num_workers, num_exchanges, max_staleness, before)

    counts = np.array([before.get(i, 0) for i in range(num_workers)], np.int64)
    center = DriversCenter(engine, wire, params, save, Checkpoint(start, counts))

    begun = monitored = copied = time.monotonic()
    over = None  # when the last exchange was made
    signals = Signals()
    try:
        engine.start(Job(make_worker, rule, wire.layout.plain, values, shard, ledger))
        try:
            for index in range(num_workers):
                engine.launch((index, 0))
            while True:
                signals.raise_the_first()
                now = time.monotonic()
                end_the_silent(engine, worker_timeout)
                if center.progress().exchanges >= num_exchanges:
                    over = over or now
                    if now - over > engine.grace:
                        end_the_unfinished(engine, center.progress())
                report_deaths(engine, center.progress(), max_restarts if over is None else 0)
                seen = center.progress()
                if not unfinished(seen):
                    break
                if now - begun > start_timeout:
                    engine.call("open")
                if monitor is not None and now - monitored >= monitor_every:
                    monitored = now
                    monitor(seen)
                if now - copied >= save_every:
                    copied = now
                    center.checkpoint()
                time.sleep(POLL)
            shortfall = shortfall_of(seen, num_exchanges)
            if shortfall and all(record.status == "died" for record in seen.workers):
                raise RuntimeError(
                    f"elastic: every worker has died; {shortfall}\n\n{seen.workers[-1].error}"
                )
            if monitor is not None:
                monitor(seen)
        except CenterLost:
            raise
        except BaseException:
            engine.call("stop")
            center.checkpoint()
            raise
        center.checkpoint()
        final = center.pull()
        if shortfall:
            warn(shortfall)
        # The center ends now.
        return Trained(final, seen._replace(pull=lambda: final), shortfall)
    except CenterLost as error:
        error.checkpoint = center.kept
        error.add_note(
            "`checkpoint` of this error is its newest copy, after "
            f"{center.kept.exchanges.sum()} exchanges"
        )
        raise
    finally:
        signals.undo()
        engine.close()


def _check_finite(name: str, params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if tree.is_inexact(leaf) and not np.isfinite(np.asarray(leaf)).all():
            where = f"`{name}`{jax.tree_util.keystr(path)}"
            raise ValueError(f"train: {where} must be finite, got NaN or infinity in it")
