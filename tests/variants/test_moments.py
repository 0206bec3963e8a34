"""The accumulators of LightSAM and AdaSAM, out of the range of squares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samx.variants import _moments

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("factor", [1e-200, 1.0, 1e200])
def test_adagrad_norm_accumulates_at_any_scale(factor):
    """√u grows from 3 to 5 to 13, in units of the factor."""
    tx = _moments.adagrad_norm(1e-300)
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for length, root in [(3, 3), (4, 5), (12, 13)]:
        updates, state = update(factor * length * jnp.array([0.6, 0.8]), state)
        np.testing.assert_allclose(state, factor * root, rtol=1e-12)
        np.testing.assert_allclose(updates, np.array([0.6, 0.8]) * length / root, rtol=1e-12)
