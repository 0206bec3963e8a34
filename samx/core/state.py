"""Data that a state holds from one step for the next: examples, and the aux of a pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class HeldBatch(NamedTuple):
    """Examples that a state holds for a later step; `state_specs` shards them like a batch.

    Attributes:
        batch: Pytree of arrays with leading axis `B`.
        weights: `float[B]`; ones if the caller passed no weights.

    Example:
        >>> import jax.numpy as jnp, optax, samx
        >>> tx = samx.sampa(optax.sgd(0.1), batch_like=jnp.ones((4, 2)))
        >>> optax.tree.get(tx.init(jnp.ones(2)), "previous").weights.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    batch: Any
    weights: jax.Array


def is_field(path: Any, value: Any) -> bool:
    """Return whether the path ends in a field of a state, not in a parameter of that name."""
    del value
    return isinstance(path[-1], optax.tree_utils.NamedTupleKey)


def first_aux(aux_like: Any) -> Any:
    """Return the aux of a state before the first pass: `aux_like`, with zeros for the shapes."""

    def first(x):
        is_shape = isinstance(x, jax.ShapeDtypeStruct)
        return jnp.zeros(x.shape, x.dtype) if is_shape else jnp.array(x, copy=True)

    try:
        return jax.tree.map(first, aux_like)
    except (TypeError, ValueError, OverflowError) as error:
        kinds = sorted({type(x).__name__ for x in jax.tree.leaves(aux_like)})
        raise TypeError(f"`aux_like` must be a tree of arrays, got leaves of {kinds}") from error


def as_like(name: str, keyword: str, value: Any, like: Any, fix: str) -> Any:
    """Return `value` in the containers of `like`, which a state holds.

    Its paths, shapes and dtypes must be the same. The containers need not be comparable.
    """

    def describe(tree):
        return [
            (jax.tree_util.keystr(path) or keyword, jnp.shape(x), str(jnp.result_type(x)))
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        ]

    if describe(value) != describe(like):
        raise ValueError(
            f"{name}: `{keyword}` must have the shapes and dtypes of `{keyword}_like`, "
            f"{describe(like)}, got {describe(value)}; {fix}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(value))


def kept_aux(name: str, aux: Any, aux_like: Any, held: Any, closure: str = "value_fn") -> Any:
    """Return the aux for a state, checked against `held`; `None` if `aux_like` is `None`."""
    aux = None if aux_like is None else aux
    return as_like(name, "aux", aux, held, f"it is the aux of `{closure}`")
