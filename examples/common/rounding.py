"""Round weights to few bits, as for a model that is deployed: to the nearest, per output unit."""

from typing import Any

import jax
import jax.numpy as jnp


def rounded(weights: Any, bits: int) -> Any:
    """Round every matrix to integers of so many bits, with one scale for each output unit.

        scale = max |w| / (2^(bits − 1) − 1)       over the inputs of a unit
        w     = scale · round(w / scale)

    The levels are symmetric around 0. Biases and other vectors stay as they are.

    Args:
        weights: Parameters; matrices are `[..., in, out]`, so a stack of layers has a scale for
            each unit of each layer. Convolutions are `[..., height, width, in, out]` and count as
            stacks.
        bits: At least 2.
    """
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
    top = 2 ** (bits - 1) - 1

    def of_leaf(w):
        if jnp.ndim(w) < 2:
            return w
        largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True)
        scale = jnp.where(largest == 0, 1, largest) / top
        return (scale * jnp.round(w / scale)).astype(w.dtype)

    return jax.tree.map(of_leaf, weights)
