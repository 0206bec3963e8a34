"""What XLA can compute on this processor."""

import functools

import jax
import jax.numpy as jnp


@functools.cache
def has_float16():
    """Whether there is float16: not on x86 processors without F16C."""
    try:
        jax.jit(lambda x: x.astype(jnp.float16).astype(jnp.float32))(jnp.ones(3))
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" not in str(error):
            raise
        return False
    return True


def can_run(code):
    """Whether an example of the documentation can run."""
    return has_float16() or "float16" not in code.replace("bfloat16", "")
