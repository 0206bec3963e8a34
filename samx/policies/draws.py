"""Random draws of the policies."""

import jax


def uniform_at(key: jax.Array, step: jax.Array) -> jax.Array:
    """Draw from [0, 1) with the key and the step alone, so that a resumed run draws the same."""
    return jax.random.uniform(jax.random.fold_in(key, step))
