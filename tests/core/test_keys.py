"""Seeds and random keys, as arguments of factories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samx.core.hyperparams import as_key, check_key


@pytest.mark.parametrize("key", [3, np.int64(3), np.array(3), jnp.array(3), jax.random.key(3)])
def test_a_seed_is_a_number_or_a_key(key):
    check_key(key)
    np.testing.assert_array_equal(
        jax.random.key_data(as_key(key)), jax.random.key_data(jax.random.key(3))
    )


@pytest.mark.parametrize("key", [None, True, 1.0, jnp.array(1.0), jnp.array([1, 2]), "3"])
def test_anything_else_is_refused(key):
    with pytest.raises(TypeError, match="`key` must be a seed or a key"):
        check_key(key)


def test_a_seed_has_64_bits():
    for seed in (2**63 - 1, -(2**63)):
        check_key(seed)
        as_key(seed)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="`key` must be a seed of 64 bits"):
            check_key(seed)


def test_keys_are_refused():
    with pytest.raises(ValueError, match=r"`key` must be one key, got keys of shape \(2,\)"):
        check_key(jax.random.split(jax.random.key(0)))
