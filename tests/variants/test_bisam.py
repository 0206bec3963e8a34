"""BiSAM against an independent loop, and its losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from formulations import BASES, EVERY_LEAF, EVERY_LEAF_BY_HAND, STEPS, train
from recorded import assert_same

import samx
from samx import losses

pytestmark = pytest.mark.usefixtures("float64")


def of_logits(bound, **keywords):
    return lambda params, batch: bound(problem.logits_of(params, batch), batch["y"], **keywords)


def smoothed(params, batch):
    """The authors' descent loss: 0.1 is spread over the wrong classes."""
    targets = jnp.where(jax.nn.one_hot(batch["y"], 3) == 1, 0.9, 0.05)
    return optax.safe_softmax_cross_entropy(problem.logits_of(params, batch), targets)


def test_bisam_against_reference():
    """In another geometry, and with another loss than that of the recorded runs."""
    climbed = of_logits(losses.tanh_lower_bound, mu=1.0, alpha=0.3)
    tx, make_reference = BASES["adamw"]
    expected = reference.train_bisam(make_reference(), EVERY_LEAF_BY_HAND, climbed, STEPS, smoothed)

    def further(data, batch, t):
        return {"ascent_fn": lambda params: climbed(params, batch).mean()}

    bisam = samx.bisam(perturbation=EVERY_LEAF)
    (found,) = train(optax.chain(bisam, tx), further, losses_fn=smoothed)
    assert_same(found, expected)


@pytest.mark.parametrize("mu", [1.0, 10.0])
def test_lower_bounds_by_hand(mu):
    """Compared with the paper's formula; φ, a lower bound of the 0-1 loss, is 0 at 0."""
    logits, label = np.array([2.0, -0.5, 0.5]), 2  # margins that are not symmetric
    gamma = np.log(np.e - 1)
    for bound, phi in (
        (losses.tanh_lower_bound, lambda x: np.tanh(0.1 * x)),
        (losses.log_lower_bound, lambda x: 1 - np.log(1 + np.exp(gamma - x))),
    ):
        total = sum(np.exp(mu * phi(f - logits[label])) for f in logits)
        found = bound(jnp.asarray(logits), jnp.asarray(label), mu)
        np.testing.assert_allclose(found, np.log(total) / mu, rtol=1e-12)
        assert phi(0.0) == pytest.approx(0, abs=1e-15)


def test_lower_bounds_far_out_are_finite():
    """The bounds are finite even where exp overflows and PyTorch's softplus becomes linear."""
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 30.0]])
    for bound in (losses.tanh_lower_bound, losses.log_lower_bound):
        value, slope = jax.value_and_grad(lambda x, b=bound: b(x, jnp.zeros(3, int)).sum())(logits)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))
