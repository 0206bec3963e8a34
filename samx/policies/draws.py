"""The random draws of policies."""

import jax


def uniform_at(key: jax.Array, step: jax.Array) -> jax.Array:
    """The draw of a step from [0, 1), made of nothing else: a resumed run draws the same."""
    return jax.random.uniform(jax.random.fold_in(key, step))
