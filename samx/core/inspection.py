"""What `samx.preflight` measures inside a step; without a preflight nothing is measured."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samx.core import tree
from samx.core.closures import evaluate, in_two_parts, mean_loss

Numbers = dict[str, np.ndarray]


@dataclass
class Update:
    """One `update` of samx in the step, as it was traced.

    Attributes:
        name: Name of the transformation.
        paths: Key paths of the parameters.
        shapes: Shapes of the parameters.
        eps: Machine epsilon of the coarsest parameter.
        seen: For each device (or lane of `vmap`) what `_measured` returns.
        points: The same for each perturbed point.
    """

    name: str
    paths: list[Any]
    shapes: list[tuple[int, ...]]
    eps: float
    seen: list[Numbers] = field(default_factory=list)
    points: list[Numbers] = field(default_factory=list)


_UPDATES: ContextVar[list[Update] | None] = ContextVar("updates", default=None)
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)


@contextmanager
def inspecting() -> Iterator[list[Update]]:
    """Collect and measure the updates that are traced inside, but for those inside another one."""
    updates: list[Update] = []
    token = _UPDATES.set(updates)
    try:
        yield updates
    finally:
        _UPDATES.reset(token)


@contextmanager
def inside_update() -> Iterator[None]:
    """Mark the updates that are made inside as parts of this one."""
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def inspect_update(name: str, updates: Any, params: Any, given: dict[str, Any]) -> None:
    """Measure, in a preflight, what an update got: `updates`, unless it is `None`, and keywords."""
    found = _UPDATES.get()
    if found is None or _DEPTH.get():
        return
    leaves = jax.tree_util.tree_leaves_with_path(params)
    update = Update(
        name,
        [path for path, _ in leaves],
        [jnp.shape(leaf) for _, leaf in leaves],
        tree.coarsest_eps(params),
    )
    found.append(update)
    jax.debug.callback(partial(_store, update.seen), _measured(updates, params, given))


def inspect_point(params: Any, eps: Any, point: Callable[[], Any]) -> None:
    """Measure, in a preflight, how much of a perturbation arrives at `point()`."""
    updates = _UPDATES.get()
    if not updates:
        return
    moved = tree.subtract(point(), params)
    numbers = {
        "length": tree.norm(eps),
        "arrived": tree.ratio(tree.dot(eps, moved), tree.norm(eps)),
        "moves": jnp.stack([checksum(x) for x in jax.tree.leaves(moved)]),
    }
    jax.debug.callback(partial(_store, updates[-1].points), numbers)


def _measured(updates: Any, params: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of one update: losses, norms and products of gradients, checksums."""
    numbers = {"sums": jnp.stack([checksum(w) for w in jax.tree.leaves(params)])}
    if "value" in given:
        numbers["value"] = given["value"]
    if {"value_fn", "losses_fn", "batch"} <= given.keys():
        losses = mean_loss(given["losses_fn"], given["batch"], given.get("weights"))
        numbers["mean_of_losses"] = losses(params)
    if {"value_fn", "apply_fn", "loss_on_logits", "batch"} <= given.keys():
        losses_fn = in_two_parts("preflight", given["apply_fn"], given["loss_on_logits"])
        parts = mean_loss(losses_fn, given["batch"], given.get("weights"))
        numbers["mean_of_two_parts"] = parts(params)
    if "value_fn" in given:
        seen, _ = evaluate(given["value_fn"], params)
        g = seen["grad"]
        numbers |= {"loss": seen["value"], "norm": tree.norm(g)}
        if updates is not None:
            numbers |= {
                "incoming_norm": tree.norm(updates),
                "cosine": _cosine(updates, g),
                "cosine_of_conjugate": _cosine(tree.conj(updates), g),
                "difference": tree.norm(tree.subtract(updates, g)),
            }
    return numbers


def _cosine(a: Any, b: Any) -> jax.Array:
    return tree.ratio(tree.dot(a, b), tree.norm(a) * tree.norm(b))


def checksum(leaf: Any) -> jax.Array:
    """Return the sum of absolute values, 0 for what is not a number."""
    is_number = jnp.issubdtype(jnp.result_type(leaf), jnp.number)
    return jnp.sum(jnp.abs(leaf).astype(jnp.float32)) if is_number else jnp.zeros((), jnp.float32)


def _store(numbers: list[Numbers], new: Any) -> None:
    numbers.append(jax.tree.map(np.asarray, new))
