"""Every optimizer of optax behind SAM gets SAM's gradient, and takes the step that it takes alone.

By hand: the gradient at `w + rho g / ‖g‖`, given to the same optimizer without samx.
"""

import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hand import add, on_sphere, sam_gradient
from optax import contrib
from problem import as_numbers

import samx

pytestmark = pytest.mark.usefixtures("float64")

RHO, STEPS = 0.5, 3
X, Y = np.sin(np.arange(24.0)).reshape(8, 3), np.arange(8.0) % 3 - 1


@jax.jit
def loss(w):
    return jnp.mean((jnp.tanh(X @ w["W"]) @ w["b"] - Y) ** 2)


value_and_grad = jax.jit(jax.value_and_grad(loss))


def start():
    return {"W": jnp.array([[0.5, 0.2], [-0.3, 0.1], [0.4, -0.2]]), "b": jnp.array([0.3, -0.2])}


def grad(w):
    return value_and_grad(w)[1]


def has_a_learning_rate(value):
    return callable(value) and "learning_rate" in inspect.signature(value).parameters


OTHERS = (
    "scale_by_learning_rate",  # these three are parts
    "scale_by_rprop",
    "scale_by_madgrad",
    "optimistic_adam",  # deprecated
    "_deprecated_dpsgd",
    "dpsgd",  # takes a gradient for each example
)
ARGUMENTS = {
    "noisy_sgd": {"key": 1},
    "schedule_free": {"base_optimizer": optax.sgd(0.1)},
    "galore": {"rank": 1},
}
BASES = {
    name: partial(getattr(module, name), learning_rate=0.1, **ARGUMENTS.get(name, {}))
    for module in (optax, contrib)
    for name in filter(str.islower, dir(module))
    if has_a_learning_rate(getattr(module, name)) and name not in OTHERS
} | {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adafactor with momentum": lambda: optax.adafactor(0.1, momentum=0.9),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.1),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
    ),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau()),
    "mechanize": lambda: contrib.mechanize(optax.sgd(0.1)),
}


def test_there_are_many():
    assert len(BASES) > 45


@pytest.mark.parametrize("name", BASES)
def test_sam_in_front(name):
    base = BASES[name]()
    tx = optax.chain(samx.sam(RHO), base)
    base = optax.with_extra_args_support(base)
    w = start()
    state, base_state = tx.init(w), base.init(w)
    for _ in range(STEPS):
        value, g = value_and_grad(w)
        keywords = {"value": value, "grad": g, "value_fn": loss}
        keywords |= {"obj_fn": loss} if name == "sophia" else {}
        updates, state = tx.update(g, state, w, **keywords)
        g_s = sam_gradient(grad, w, RHO)
        expected, base_state = base.update(g_s, base_state, w, **keywords)
        chex.assert_trees_all_close(updates, expected, rtol=1e-10, atol=1e-10)
        w = optax.apply_updates(w, updates)
    chex.assert_trees_all_close(*map(as_numbers, (state[1], base_state)), rtol=1e-8, atol=1e-8)


def test_bases_that_use_signs_would_notice():
    """The sharp gradient has other signs than the plain gradient, and than the one downhill."""
    w = start()
    g = grad(w)
    for other in (g, grad(add(w, on_sphere(-RHO, g)))):
        signs = jax.tree.map(jnp.sign, (sam_gradient(grad, w, RHO), other))
        assert any(jnp.any(x != y) for x, y in zip(*map(jax.tree.leaves, signs), strict=True))
