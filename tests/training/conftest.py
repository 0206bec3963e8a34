"""What tests of training need from the processor."""

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="session")
def float16():
    """Skip where XLA cannot compile float16: on x86 processors without its instructions (F16C)."""
    try:
        jax.jit(lambda x: x.astype(jnp.float16).astype(jnp.float32))(jnp.ones(3))
    except jax.errors.JaxRuntimeError as error:
        pytest.skip(f"no float16 here: {str(error).splitlines()[0]}")
