"""Seeds and random keys, as arguments of factories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samx.core.hyperparams import as_key


@pytest.mark.parametrize("key", [3, jnp.array(3), jax.random.key(3)])
def test_a_seed_is_a_number_or_a_key(key):
    np.testing.assert_array_equal(
        jax.random.key_data(as_key("any", key)), jax.random.key_data(jax.random.key(3))
    )


@pytest.mark.parametrize("key", [None, True, 1.0, jnp.array(1.0), jnp.array([1, 2]), "3"])
def test_anything_else_is_refused(key):
    with pytest.raises(TypeError, match="any: `key` must be a seed or a key"):
        as_key("any", key)
