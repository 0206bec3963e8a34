"""The largest entries of all parameters together, by bisection on the bits of floats.

The result is exact. Only counts are combined across leaves and devices, so sharded leaves stay
sharded.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree

MOST_ENTRIES = 2**31 - 1  # the largest int32


def num_entries(name: str, params: Any) -> int:
    """Return the number of floating parameters; require that it fits in an int32."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if tree.is_inexact(leaf)]
    count = sum(jnp.size(leaf) for leaf in leaves)
    if count > MOST_ENTRIES:
        raise ValueError(
            f"{name}: `params` must have at most {MOST_ENTRIES} floating entries, got {count}"
        )
    return count


def check_mask(name: str, mask: Any, params: Any) -> None:
    """Require that a state's mask has one boolean for each entry of the parameters."""
    leaves, structure = jax.tree.flatten(mask)
    wanted = [(jnp.shape(w), jnp.dtype(bool)) for w in jax.tree.leaves(params)]
    found = [(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    if structure != jax.tree.structure(params) or found != wanted:
        shapes = jax.tree.map(lambda x: (jnp.result_type(x).name, *jnp.shape(x)), mask)
        raise ValueError(
            f"{name}: the state's `mask` must hold booleans shaped like the parameters, "
            f"{jax.tree.map(jnp.shape, params)}, got {shapes}"
        )


def rounded_down(count: Any) -> Any:
    """Round a count of entries down; in Python if possible, because float32 is less exact."""
    is_python = isinstance(count, int | float)
    return int(count) if is_python else jnp.floor(count).astype(jnp.int32)


def top_entries(scores: Any, count: Any, among: Any = None) -> Any:
    """Return a tree of booleans: where the `count` largest scores of all leaves are.

    Scores are compared by absolute value, also complex ones. `among` is a mask of the entries that
    may be chosen; if there are fewer than `count`, all of them are chosen. Ties go to the lower
    index, in the order of the leaves and of the entries in them. Integer leaves are never chosen.

    Every pass makes the keys and places of the entries again. The compiler would move them out of
    the loops, and store them. A barrier that also holds the loop's number prevents that.
    """
    dtype = tree.real_dtype(*jax.tree.leaves(scores))
    word = jnp.uint64 if dtype == jnp.float64 else jnp.uint32

    def keys_and_places(number):
        start = jnp.zeros((), jnp.uint32)
        held, is_in, start, _ = jax.lax.optimization_barrier((scores, among, start, number))
        keys = jax.tree.map(lambda x: _key(x, dtype, word), held)
        if among is not None:
            keys = jax.tree.map(lambda key, is_in: jnp.where(is_in, key, 0), keys, is_in)
        return keys, _places(keys, start)

    def is_above(key):
        return _count(lambda x, _: x >= key, *keys_and_places(key)) >= count

    smallest = _bisect(word, is_above)
    missing = count - _count(lambda x, _: x > smallest, *keys_and_places(smallest))

    def is_tie(x):
        return (x == smallest) & (x > 0)

    def is_enough(end):
        pairs = keys_and_places(end)
        return _count(lambda x, place: is_tie(x) & (place < end), *pairs) <= missing

    end = _bisect(jnp.uint32, is_enough)
    return jax.tree.map(
        lambda x, place: (x > smallest) | (is_tie(x) & (place < end)), *keys_and_places(end)
    )


def _bisect(dtype: Any, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Find the largest number for which `holds` is true, bit by bit; it must be true at 0."""
    bits = jnp.iinfo(dtype).bits

    def try_bit(i, number):
        larger = number | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        return jnp.where(holds(larger), larger, number)

    return jax.lax.fori_loop(0, bits, try_bit, jnp.zeros((), dtype))


def _count(holds: Callable[..., jax.Array], *trees: Any) -> jax.Array:
    """Count the entries of all leaves for which `holds` is true.

    Rows first, in 16 bits if that is enough: the CPU stores what it adds.
    """

    def in_leaf(*leaf):
        found = holds(*leaf)
        if found.ndim > 1:
            dtype = jnp.uint16 if found.shape[-1] < 2**16 else jnp.int32
            found = jnp.sum(found, axis=-1, dtype=dtype)
        return jnp.sum(found, dtype=jnp.int32)

    leaves = zip(*map(jax.tree.leaves, trees), strict=True)
    return sum((in_leaf(*leaf) for leaf in leaves), start=jnp.zeros((), jnp.int32))


def _key(x: Any, dtype: Any, word: Any) -> jax.Array:
    """Map scores to integers ≥ 1 that keep the order of magnitudes; 0 for an integer leaf."""
    if not tree.is_inexact(x):
        return jnp.zeros_like(x, word)
    return jax.lax.bitcast_convert_type(jnp.abs(tree.widen(x)).astype(dtype), word) + 1


def _places(tree: Any, start: jax.Array) -> Any:
    """Number all entries from `start` on, row by row and leaf by leaf."""
    leaves, structure = jax.tree.flatten(tree)
    places = []
    for leaf in leaves:
        place = start
        for axis in range(leaf.ndim):
            stride = math.prod(leaf.shape[axis + 1 :])
            place = place + stride * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        places.append(jnp.broadcast_to(place, leaf.shape))
        start = start + leaf.size
    return jax.tree.unflatten(structure, places)
