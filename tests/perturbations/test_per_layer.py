"""A stacked leaf moves as its layers would, each as a leaf of its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from samx import perturbations as geometry

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.RandomState(0)
LAYERS = [{"kernel": RNG.randn(4, 5), "bias": RNG.randn(5)} for _ in range(3)]
APART = {"blocks": LAYERS, "head": RNG.randn(5, 2)}
STACKED = {"blocks": jax.tree.map(lambda *x: np.stack(x), *LAYERS), "head": APART["head"]}
BALLS = {
    "metric_ball": geometry.metric_ball(0.1),
    "layerwise": geometry.metric_ball(0.1, geometry.layerwise()),
    "filterwise": geometry.metric_ball(0.1, geometry.filterwise()),
    "layer_steps": geometry.layer_steps(0.1),
    "spectral_ball": geometry.spectral_ball(0.1),
    "z_score_ball": geometry.z_score_ball(0.1, 0.5),
    "centralized_ball": geometry.centralized_ball(0.1),
    "chain": optax.chain(geometry.centralize(), geometry.subtract_ema(), geometry.linf_ball(0.1)),
}


def is_stacked(path, leaf):
    return path[0].key == "blocks"


def stacked(tree):
    return tree | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *tree["blocks"])}


@pytest.mark.parametrize("name", BALLS)
def test_layers_move_as_if_they_were_apart(name):
    whole, found = BALLS[name], geometry.per_layer(BALLS[name], is_stacked)

    @jax.jit
    def both(apart, params):
        g, moved = (jax.tree.map(jnp.sin, tree) for tree in (apart, params))
        states, steps = (whole.init(apart), found.init(params)), []
        for _ in range(2):
            (a, first), (b, second) = (
                whole.update(g, states[0], apart),
                found.update(moved, states[1], params),
            )
            states = first, second
            steps.append((stacked(a), b))
        return steps

    for a, b in both(APART, STACKED):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), a, b)


def test_a_perturbation_that_reads_the_losses():
    """Its closures get the stacked parameters."""
    mask = geometry.fisher_mask(geometry.metric_ball(0.1), 0.5, period=1)
    tx = optax.chain(samx.sharpness_aware(geometry.per_layer(mask, is_stacked)), optax.sgd(0.1))
    batch = jnp.asarray(RNG.randn(4, 4))

    def losses_fn(params, x):
        kernels, biases = params["blocks"]["kernel"], params["blocks"]["bias"]
        y = sum(jnp.tanh(x @ k + b[None]) for k, b in zip(kernels, biases, strict=True))
        return jnp.sum((y @ params["head"]) ** 2, axis=1)

    @jax.jit
    def step(params, state):
        g = jax.grad(lambda p: losses_fn(p, batch).mean())(params)
        updates, state = tx.update(g, state, params, losses_fn=losses_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    params, state = STACKED, tx.init(STACKED)
    for _ in range(2):
        params, state = step(params, state)
    kept = sum(int(x.sum()) for x in jax.tree.leaves(optax.tree.get(state, "mask")))
    assert kept == (3 * 25 + 10) // 2


def test_wrong_input():
    ball = geometry.per_layer(geometry.metric_ball(0.1), lambda path, leaf: True)
    with pytest.raises(
        ValueError, match=re.escape("`is_stacked` must choose leaves [layers, ...]")
    ):
        ball.init({"a": jnp.ones(())})
    with pytest.raises(TypeError, match="`perturbation`"):
        geometry.per_layer(0.1, is_stacked)
    with pytest.raises(TypeError, match="`is_stacked`"):
        geometry.per_layer(geometry.metric_ball(0.1), 3)
