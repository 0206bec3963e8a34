"""A worker: it takes local steps, and exchanges with the center every `period` steps."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.elastic._rule import Rule, scattered


class Worker(NamedTuple):
    """What a worker does: your step, with any variant and base, on its own batches.

    Attributes:
        params: Parameters of the right structure, shapes and dtypes. Their values are not used:
            every worker starts at the center.
        init: `params -> opt_state`, usually `tx.init`. It is called at every start of the worker,
            also after a restart. A schedule inside the optimizer then starts again at step 0. To
            avoid this, send the learning rate with the batches, because `batches` knows n, and use
            it through `optax.inject_hyperparams` or your own scaling.
        step: `(params, opt_state, batch) -> (params, opt_state, loss)`. Compile it yourself, once
            for all workers of a process.
        batches: `n -> iterable of batches`: the worker's own stream from its n-th local step on.

    Example:
        >>> import itertools, jax, jax.numpy as jnp, optax, samx
        >>> from samx import elastic
        >>> tx = optax.chain(samx.sam(rho=0.05), optax.sgd(0.1))
        >>> @jax.jit
        ... def step(w, state, x):
        ...     value_fn = lambda w: ((x @ w - 1) ** 2).mean()
        ...     value, grads = jax.value_and_grad(value_fn)(w)
        ...     updates, state = tx.update(grads, state, w, value=value, value_fn=value_fn)
        ...     return optax.apply_updates(w, updates), state, value
        >>> data = jnp.eye(4).reshape(2, 2, 4)
        >>> batches = lambda n: (data[i % 2] for i in itertools.count(n))
        >>> worker = elastic.Worker(jnp.zeros(4), tx.init, step, batches)
        >>> next(iter(worker.batches(3))).shape
        (2, 4)
    """

    params: Any
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any, Any]]
    batches: Callable[[int], Iterable[Any]]


class Wire:
    """Converts parameters to one flat array in host memory, and back.

    One array moves faster than many. Integers stay with the worker. Half precision is sent as
    float32.
    """

    def __init__(self, params: Any):
        leaves, treedef = jax.tree.flatten(params)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        dtypes = [jnp.result_type(leaf) for leaf in leaves]
        floating = [i for i, leaf in enumerate(leaves) if tree.is_inexact(leaf)]
        if not floating or any(jnp.issubdtype(dtypes[i], jnp.complexfloating) for i in floating):
            raise TypeError(
                "elastic: `params` must have real floating leaves, and no complex ones, got "
                f"{sorted({str(dtype) for dtype in dtypes})}"
            )
        self.dtype = tree.real_dtype(*leaves)
        sizes = np.cumsum([0] + [int(np.prod(shapes[i], dtype=int)) for i in floating])
        self.size = int(sizes[-1])

        def parts(flat):
            """Return the leaves that are sent, by their position."""
            return {
                i: flat[start:stop].reshape(shapes[i])
                for i, start, stop in zip(floating, sizes[:-1], sizes[1:], strict=True)
            }

        def put_in(params, flat):
            leaves = jax.tree.leaves(params)
            for i, part in parts(flat).items():
                leaves[i] = part.astype(dtypes[i])
            return jax.tree.unflatten(treedef, leaves)

        def take_off(params, flat):
            leaves = jax.tree.leaves(params)
            moves = parts(flat)
            return jax.tree.unflatten(
                treedef,
                [
                    (tree.widen(leaf) - moves[i]).astype(dtypes[i]) if i in moves else leaf
                    for i, leaf in enumerate(leaves)
                ],
            )

        self._flat = jax.jit(
            lambda params: jnp.concatenate(
                [jax.tree.leaves(params)[i].astype(self.dtype).ravel() for i in floating]
            )
        )
        self._put_in, self._take_off = jax.jit(put_in), jax.jit(take_off)

    def flat(self, params: Any) -> np.ndarray:
        """Return the floating leaves, one after the other; wait until they are computed."""
        return np.asarray(self._flat(params))

    def put_in(self, params: Any, flat: np.ndarray) -> Any:
        """Return `params` with these values."""
        return self._put_in(params, flat)

    def take_off(self, params: Any, flat: np.ndarray) -> Any:
        """Return `params` minus these values."""
        return self._take_off(params, flat)


class Local:
    """A worker in a training run: its parameters, state, and position in its stream."""

    def __init__(self, worker: Worker, rule: Rule, index: int, params: Any, steps: int = 0):
        self.worker, self.rule, self.index, self.steps = worker, rule, index, steps
        self.params = copied(params)  # the step may donate its parameters
        self.start = copied(params) if rule.smoothing == "gaussian" else None
        self.opt_state = worker.init(self.params)
        self.batches = iter(worker.batches(steps))
        self.losses: list[Any] = []

    @property
    def is_due(self) -> bool:
        """Whether the next local step begins with an exchange."""
        return self.steps % self.rule.period == 0

    def step(self) -> None:
        """Take one local step; the loss is read later, when it is computed."""
        batch = next(self.batches)
        self.params, self.opt_state, loss = self.worker.step(self.params, self.opt_state, batch)
        self.losses.append(loss)
        self.steps += 1

    def mean_loss(self) -> float:
        """Return the mean of the losses since the last call."""
        losses, self.losses = self.losses, []
        return mean_of(losses)

    def begin_at(self, center: Any) -> None:
        """Restart from a sample around the center."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), self.index), self.steps)
        self.start = scattered(center, key, self.rule.deviation)
        self.params = copied(self.start)


def mean_of(losses: list[Any]) -> float:
    """Return the mean of the losses, NaN if there are none; wait until they are computed."""
    return float(np.mean([np.mean(loss) for loss in losses])) if losses else float("nan")


def work(make_worker: Callable[[int], Worker], rule: Rule, index: int, center: Any, place: str):
    """Run a worker: start at the center, and continue until no work is left."""
    worker = make_worker(index)
    if not isinstance(worker, Worker):
        raise TypeError(f"`make_worker` must return a Worker, got a {type(worker).__name__}")
    wire = Wire(worker.params)
    exchanges, values = center.join(index, place)
    if values.size != wire.size:
        raise ValueError(
            "`params` of the worker must be like those of the center, "
            f"with {values.size} entries, got {wire.size}"
        )
    params = wire.put_in(worker.params, values)
    warm_up(worker, params)
    center.wait_for_start(index)
    if rule.smoothing == "elastic":  # others may have moved it meanwhile
        params = wire.put_in(params, center.pull())
    local = Local(worker, rule, index, params, exchanges * rule.period)
    del params, values  # otherwise these copies stay in memory
    while True:
        try:
            is_exchanged = (_elastic if rule.smoothing == "elastic" else _gaussian)(
                local, wire, center
            )
            if not is_exchanged:
                return
            while not local.is_due:
                local.step()
        except StopIteration:
            return  # the stream has ended


def _elastic(local: Local, wire: Wire, center: Any) -> bool:
    """Send w, take a local step while the center answers, subtract d."""
    sent, loss = wire.flat(local.params), local.mean_loss()
    local.step()
    move = center.exchange(local.index, sent, loss)
    if move is None:
        return False
    local.params = wire.take_off(local.params, move)
    return True


def _gaussian(local: Local, wire: Wire, center: Any) -> bool:
    """Send what the steps have added, restart from a sample around the center, take a step."""
    sent = wire.flat(jax.tree.map(jnp.subtract, local.params, local.start))
    values = center.exchange(local.index, sent, local.mean_loss())
    if values is None:
        return False
    local.begin_at(wire.put_in(local.params, values))
    local.step()
    return True


def copied(params: Any) -> Any:
    """Return a copy with its own memory."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)


def warm_up(worker: Worker, params: Any) -> None:
    """Compile the step, so that no worker gets ahead while others still compile."""
    batch = next(iter(worker.batches(0)), None)
    if batch is not None:
        params = copied(params)
        jax.block_until_ready(worker.step(params, worker.init(params), batch))
