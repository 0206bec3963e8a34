"""What tests of training need from the processor."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="session")
def float16():
    """Skip on x86 processors without float16 (F16C); any other error is one."""
    try:
        jax.jit(lambda x: x.astype(jnp.float16).astype(jnp.float32))(jnp.ones(3))
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" not in str(error):
            raise
        pytest.skip("XLA has no float16 for this processor")
