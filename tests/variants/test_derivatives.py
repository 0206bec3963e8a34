"""A step has derivatives, also where a gradient or a leaf is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import VARIANTS

import samx
from samx.perturbations import layerwise, metric_ball

pytestmark = pytest.mark.usefixtures("float64")

# One row of each kind of norm is fast.
FAST = {"sam", "layerwise", "fisher_sam", "look_layer_sam", "looksam", "gsam"}
ROWS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in VARIANTS
    # A table of integers has no derivative. bSAM and TSAM have gradients at their noisy points.
    if VARIANTS[name].copies is not None and name not in ("bsam", "tsam")
]


@pytest.mark.parametrize("name", ROWS)
def test_the_derivative_at_a_zero_gradient_is_that_of_the_base(name):
    """The loss is c |w|^2 at w = 0: nothing moves, whatever c is."""
    case, (data, params) = VARIANTS[name], problem.make()
    zeros, batch = optax.tree.zeros_like(params), problem.batch_at(data, 0)
    start = zeros if case.shape != "optimizer" else params  # Adam has no derivative at 0 / 0

    def after(c):
        def losses_fn(params, batch):
            square = optax.tree.norm(optax.tree.sub(params, start), squared=True)
            return c * square * jnp.ones(len(batch["y"]))

        tx = case.build(batch_like=batch)
        step, carry = problem.make_step(tx, losses_fn), (start, tx.init(start))
        for _ in range(2):
            carry = step(*carry, batch)
        return carry[0]

    _, moved = jax.jit(lambda c: jax.jvp(after, (c,), (jnp.ones(()),)))(jnp.asarray(1.3))
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("zero", ["kernel", "bias", "both"])
def test_the_derivative_at_a_leaf_of_zeros(zero):
    """Compare with differences: a kernel of zeros under the layer-wise metric."""
    params = {"kernel": jnp.array([[0.5, -1.0]]), "bias": jnp.array([0.3])}
    params |= {k: jnp.zeros_like(x) for k, x in params.items() if zero in (k, "both")}
    ball = metric_ball(0.5, layerwise(0.1, is_scaled=lambda path, leaf: True))
    tx = optax.chain(samx.sharpness_aware(ball), optax.sgd(0.1))

    def loss_after(shift):
        w = {"kernel": params["kernel"] * (1 + shift), "bias": params["bias"] * (1 - shift)}

        def value_fn(w):
            z = w["kernel"] @ jnp.array([1.0, 2.0]) + w["bias"] + 0.7 + shift
            return jnp.sum(z**4)

        value, g = jax.value_and_grad(value_fn)(w)
        updates, _ = tx.update(g, tx.init(w), w, value=value, value_fn=value_fn)
        return value_fn(optax.apply_updates(w, updates))

    @jax.jit
    def both(h=1e-6):
        return jax.grad(loss_after)(0.0), (loss_after(h) - loss_after(-h)) / (2 * h)

    slope, difference = both()
    assert abs(difference) > 0.1
    np.testing.assert_allclose(slope, difference, rtol=1e-5)
