"""Low-rank adapters for parameters in any tree: a matrix W is used as W + scale · A B.

Only the adapters are trained. They are a tree of their own, so that the frozen weights are in no
gradient and in no optimizer state.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Adapters = dict[str, dict[str, jax.Array]]  # by the path of a matrix, such as "body/first/kernel"


def path_of(path: tuple[Any, ...]) -> str:
    """Return the path of a leaf as text, such as "blocks/attention/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_adapters(
    key: jax.Array, weights: Any, rank: int, is_adapted: Callable[[str, Any], bool]
) -> Adapters:
    """Return new adapters, with which the weights are what they were: A is drawn, B is 0.

    Args:
        key: A random key.
        weights: Parameters; matrices are `[..., in, out]`, leading axes are a stack of layers.
        rank: Of the product A B.
        is_adapted: `(path, leaf) -> bool`, for each leaf with two axes or more; the path is that of
            `path_of`.

    Returns:
        For the path of each adapted matrix "lora_a" `[..., in, rank]`, of standard deviation
        1/√in, and "lora_b" `[..., rank, out]`.
    """
    found = {}
    for path, w in jax.tree_util.tree_leaves_with_path(weights):
        name = path_of(path)
        if jnp.ndim(w) < 2 or not is_adapted(name, w):
            continue
        key, draw = jax.random.split(key)
        *stack, inputs, outputs = w.shape
        a = jax.random.normal(draw, (*stack, inputs, rank), w.dtype) / math.sqrt(inputs)
        found[name] = {"lora_a": a, "lora_b": jnp.zeros((*stack, rank, outputs), w.dtype)}
    return found


def merged(weights: Any, adapters: Adapters, scale: float = 1.0) -> dict[str, jax.Array]:
    """Return the adapted matrices with their products added, by path."""
    by_path = {path_of(path): w for path, w in jax.tree_util.tree_leaves_with_path(weights)}
    return {
        name: by_path[name] + scale * (pair["lora_a"] @ pair["lora_b"]).astype(by_path[name].dtype)
        for name, pair in adapters.items()
    }


def filled(weights: Any, matrices: dict[str, jax.Array]) -> Any:
    """Return the weights with the matrices at their paths; the others as they are."""
    return jax.tree_util.tree_map_with_path(lambda p, w: matrices.get(path_of(p), w), weights)


def merge(weights: Any, adapters: Adapters, scale: float = 1.0) -> Any:
    """Return all weights, with the products of the adapters added."""
    return filled(weights, merged(weights, adapters, scale))
