"""A worker: it takes local steps, and exchanges with the center every `period` steps."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.hyperparams import REAL
from samx.elastic._rule import Rule, scattered

END = object()
NO_WORK = "no work is left"
# An exchange is refused if its norm is above this many times that of the center, 1 at least.
LARGEST_GROWTH = 1e6


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


class StreamEnded(Exception):
    """A worker's stream of batches has ended."""


class ExchangeRefused(ValueError):
    """What a worker would send is not finite, too large, or not like the parameters."""


class Layout:
    """Paths, shapes and dtypes of the leaves of parameters."""

    def __init__(self, params: Any):
        self.treedef, self.leaves = _kinds(params)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        # Plain values, which mean the same in every process.
        self.plain = [
            (jax.tree_util.keystr(path), shape, str(dtype))
            for path, (shape, dtype) in zip(paths, self.leaves, strict=True)
        ]

    def check(self, params: Any) -> None:
        """Raise an `ExchangeRefused` if parameters have another layout."""
        if _kinds(params) != (self.treedef, self.leaves):  # fast; the rest names the difference
            difference = difference_of(Layout(params).plain, self.plain)
            if difference:
                raise ExchangeRefused(f"the step has changed the parameters: {difference}")


def _kinds(params):
    leaves, treedef = jax.tree.flatten(params)
    return treedef, [
        (leaf.shape, leaf.dtype)
        if isinstance(leaf, jax.Array)
        else (jnp.shape(leaf), jnp.result_type(leaf))
        for leaf in leaves
    ]


def difference_of(layout: list[Any], wanted: list[Any]) -> str:
    """Describe the first difference of two plain layouts; an empty text if there is none."""
    for one, other in itertools.zip_longest(layout, wanted):
        if one != other:
            got, want = (
                "no leaf"
                if leaf is None
                else f"{leaf[2]}{list(leaf[1])} at {leaf[0] or 'the root'}"
                for leaf in (one, other)
            )
            return f"got {got}, wanted {want}"
    return ""


class Wire:
    """Converts parameters to one flat array in host memory, and back.

    One array moves faster than many, and nothing is compiled for the tree as a whole, which would
    take minutes for thousands of leaves. Integers stay with the worker. Half precision is sent as
    float32.
    """

    def __init__(self, params: Any):
        self.layout = Layout(params)
        kinds, leaves = self.layout.leaves, jax.tree.leaves(params)
        self.floating = [i for i, leaf in enumerate(leaves) if tree.is_inexact(leaf)]
        dtypes = [kinds[i][1] for i in self.floating]
        if not dtypes or any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
            raise TypeError(
                "elastic: `params` must have real floating leaves, and no complex ones, got "
                f"{sorted({str(dtype) for _, dtype in kinds})}"
            )
        self.dtype = tree.real_dtype(*leaves)
        ends = np.cumsum([int(np.prod(kinds[i][0], dtype=int)) for i in self.floating]).tolist()
        self.size = ends[-1]
        self.slices = [slice(*both) for both in zip([0, *ends[:-1]], ends, strict=True)]

    def flat(self, params: Any) -> np.ndarray:
        """Return the floating leaves, one after the other; wait until they are computed."""
        leaves, flat = jax.tree.leaves(params), np.empty(self.size, self.dtype)
        values = jax.device_get([leaves[i] for i in self.floating])
        for part, value in zip(self.slices, values, strict=True):
            flat[part] = np.ravel(value)
        return flat

    def put_in(self, params: Any, flat: np.ndarray) -> Any:
        """Return `params` with these values, on the same devices."""
        leaves, parts = jax.tree.leaves(params), []
        for i, part in zip(self.floating, self.slices, strict=True):
            shape, dtype = self.layout.leaves[i]
            parts.append(flat[part].reshape(shape).astype(dtype))
        here = [leaves[i] for i in self.floating]
        is_committed = any(getattr(leaf, "committed", False) for leaf in here)
        shardings = [leaf.sharding for leaf in here] if is_committed else None
        for i, value in zip(self.floating, jax.device_put(parts, shardings), strict=True):
            leaves[i] = value
        return jax.tree.unflatten(self.layout.treedef, leaves)

    def take_off(self, params: Any, flat: np.ndarray) -> Any:
        """Return `params` minus these values."""
        return self.put_in(params, self.flat(params) - flat)


def check_sendable(sent: np.ndarray, limit: float) -> None:
    """Raise an `ExchangeRefused` if values are not finite, or their norm is above the limit."""
    norm = norm_of(sent)
    if not np.isfinite(norm) or norm > limit:
        what = "values that are not finite" if not np.isfinite(norm) else f"a norm of {norm:.3g}"
        raise ExchangeRefused(
            f"the worker would send {what}; the center takes finite values with a norm of at most "
            f"{limit:.3g}"
        )


def norm_of(values: np.ndarray) -> float:
    """Return the norm; it is not finite only if a value is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.dot(values, values))
        if np.isfinite(squares):
            return squares**0.5
        largest = float(np.max(np.abs(values)))  # NaN if there is one
        return (
            largest * float(np.linalg.norm(values / largest)) if np.isfinite(largest) else largest
        )


class Local:
    """A worker in a training run: its parameters, state, and position in its stream."""

    def __init__(self, worker: Worker, rule: Rule, index: int, params: Any, steps: int = 0):
        self.worker, self.rule, self.index, self.steps = worker, rule, index, steps
        self.layout = Layout(params)
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
        batch = next(self.batches, END)
        if batch is END:
            raise StreamEnded(f"its stream of batches has ended after {self.steps} local steps")
        self.params, self.opt_state, loss = taken(self.worker, self.params, self.opt_state, batch)
        self.layout.check(self.params)
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


def taken(worker: Worker, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any]:
    """Take a step of the worker, and require its three results."""
    result = worker.step(params, opt_state, batch)
    if not isinstance(result, tuple | list) or len(result) != 3:
        got = (
            f"{len(result)} results" if isinstance(result, tuple | list) else type(result).__name__
        )
        raise TypeError(f"`step` of a Worker must return (params, opt_state, loss), got {got}")
    return tuple(result)


def mean_of(losses: list[Any]) -> float:
    """Return the mean of the losses, NaN if there are none; wait until they are computed."""
    values = [np.asarray(loss) for loss in jax.device_get(losses)]
    for value in values:
        if not any(jnp.issubdtype(value.dtype, kind) for kind in REAL):
            raise TypeError(
                f"`step` of a Worker must return a real number as its loss, got {value.dtype}"
            )
    return float(np.mean([np.mean(value) for value in values])) if values else float("nan")


def work(
    make_worker: Callable[[int], Worker], rule: Rule, layout: Any, client: Any, place: str
) -> str:
    """Run a worker: start at the center, and continue until no work is left; return why it ended.

    `layout` is that of the center's parameters.
    """
    exchanges = client.join(place)
    if exchanges is None:
        return NO_WORK
    index, _ = client.life
    worker = make_worker(index)
    if not isinstance(worker, Worker):
        raise TypeError(f"`make_worker` must return a Worker, got a {type(worker).__name__}")
    wire = Wire(worker.params)
    if difference := difference_of(wire.layout.plain, layout):
        raise ValueError(f"`params` of the Worker must be like those of the center: {difference}")
    values = client.pull()
    limit = LARGEST_GROWTH * max(1.0, norm_of(values))
    params = wire.put_in(worker.params, values)
    warm_up(worker, params)
    if not client.wait_for_start():
        return NO_WORK
    if rule.smoothing == "elastic":  # others may have moved it meanwhile
        params = wire.put_in(params, client.pull())
    local = Local(worker, rule, index, params, exchanges * rule.period)
    del params, values  # otherwise these copies stay in memory
    exchanged = _elastic if rule.smoothing == "elastic" else _gaussian
    try:
        while exchanged(local, wire, client, limit):
            while not local.is_due:
                local.step()
    except StreamEnded as end:
        return str(end)
    return NO_WORK


def _elastic(local: Local, wire: Wire, client: Any, limit: float) -> bool:
    """Send w, take a local step while the center answers, subtract d."""
    sent, loss = wire.flat(local.params), local.mean_loss()
    check_sendable(sent, limit)
    local.step()
    move = client.exchange(sent, loss)
    if move is None:
        return False
    local.params = wire.take_off(local.params, move)
    return True


def _gaussian(local: Local, wire: Wire, client: Any, limit: float) -> bool:
    """Send what the steps have added, restart from a sample around the center, take a step."""
    sent = wire.flat(local.params) - wire.flat(local.start)
    check_sendable(sent, limit)
    values = client.exchange(sent, local.mean_loss())
    if values is None:
        return False
    local.begin_at(wire.put_in(local.params, values))
    local.step()
    return True


def copied(params: Any) -> Any:
    """Return a copy with its own memory."""
    return jax.device_put(params, may_alias=False)


def warm_up(worker: Worker, params: Any) -> None:
    """Compile the step, so that no worker gets ahead while others still compile."""
    batch = next(iter(worker.batches(0)), END)
    if batch is not END:
        params = copied(params)
        jax.block_until_ready(taken(worker, params, worker.init(params), batch))
