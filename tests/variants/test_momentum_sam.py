"""Momentum-SAM climbs the momentum of each parameter, wherever the base keeps it.

By hand: v ← decay v + factor g for each parameter, and the gradient at `w − rho v / ‖v‖`.
"""

import hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import samx

pytestmark = pytest.mark.usefixtures("float64")

RHO, STEPS = 0.5, 5
X, Y = np.sin(np.arange(24.0)).reshape(8, 3), np.arange(8.0) % 3 - 1


@jax.jit
def loss(w, x, y):
    hidden = jnp.tanh(x @ w["body"]["kernel"] + w["body"]["bias"][None])
    return jnp.mean((hidden @ w["head"] - y) ** 2)


grad = jax.jit(jax.grad(loss))


def start():
    kernel = jnp.array([[0.5, 0.2], [-0.3, 0.1], [0.4, -0.2]])
    return {"body": {"kernel": kernel, "bias": jnp.zeros(2)}, "head": jnp.array([0.3, -0.2])}


def momenta(kernel, bias, head):
    return {"body": {"kernel": kernel, "bias": bias}, "head": head}


def each(how):
    return momenta(how, how, how)


SGD, SLOW, ADAM, NONE = (0.9, 1.0), (0.5, 1.0), (0.9, 0.1), (0.0, 0.0)
MOMENTUM = optax.sgd(0.1, momentum=0.9)
LABELS = {"body": "body", "head": "head"}  # a prefix of the parameters
KERNEL = {"body": {"kernel": True, "bias": False}, "head": False}


def parts(body, head):
    return optax.partition({"body": body, "head": head}, LABELS)


BASES = {  # the base, and decay and factor of each momentum
    "Muon": (contrib.muon(0.1), momenta((0.95, 0.05), ADAM, ADAM)),
    "Muon behind clipping": (
        optax.chain(optax.clip_by_global_norm(1e3), contrib.muon(0.1)),
        momenta((0.95, 0.05), ADAM, ADAM),
    ),
    "two learning rates and momenta": (
        parts(MOMENTUM, optax.sgd(0.01, momentum=0.5)),
        momenta(SGD, SGD, SLOW),
    ),
    "multi_transform of SGD and Adam": (
        optax.multi_transform({"body": MOMENTUM, "head": optax.adam(0.01)}, LABELS),
        momenta(SGD, SGD, ADAM),
    ),
    "a frozen body": (parts(optax.set_to_zero(), MOMENTUM), momenta(NONE, NONE, SGD)),
    "a head that moves without a momentum": (
        parts(MOMENTUM, optax.sgd(0.1)),
        momenta(SGD, SGD, NONE),
    ),
    "masked": (
        optax.chain(optax.masked(optax.trace(0.9), KERNEL), optax.scale(-0.1)),
        momenta(SGD, NONE, NONE),
    ),
    "two masks": (
        optax.chain(
            optax.masked(optax.trace(0.9), KERNEL),
            optax.masked(optax.trace(0.5), jax.tree.map(lambda kept: not kept, KERNEL)),
            optax.scale(-0.1),
        ),
        momenta(SGD, SLOW, SLOW),
    ),
    "named_chain": (  # a part called "trace" is no field called `trace`
        optax.named_chain(("trace", optax.clip_by_global_norm(1e3)), ("mu", MOMENTUM)),
        each(SGD),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(learning_rate=0.01, b1=0.5),
        each((0.5, 0.5)),
    ),
    "inject_hyperparams around parts": (
        optax.inject_hyperparams(lambda rate: parts(optax.sgd(rate, 0.9), optax.adam(rate)))(0.01),
        momenta(SGD, SGD, ADAM),
    ),
    "apply_if_finite around parts": (
        optax.apply_if_finite(parts(MOMENTUM, optax.set_to_zero()), 2),
        momenta(SGD, SGD, NONE),
    ),
}


def train(base):
    tx, w = samx.momentum_sam(base, RHO), start()
    state = tx.init(w)
    for x, y in batches():
        updates, state = tx.update(w, state, w, value_fn=lambda w, x=x, y=y: loss(w, x, y))
        w = optax.apply_updates(w, updates)
        yield w


def batches():
    return [(X[t % 2 :: 2], Y[t % 2 :: 2]) for t in range(STEPS)]


def one_pass(w, statistics, batch):
    return grad(w, *batch), statistics


@pytest.mark.parametrize("name", BASES)
def test_where_the_momentum_is(name):
    base, how = BASES[name]
    expected = hand.momentum_sam(one_pass, base, RHO, how, start(), None, batches())
    hand.assert_same(train(base), [w for w, _ in expected])


def test_a_base_that_accumulates():
    """The momentum moves on every second call, by the mean of two gradients."""

    def expected():
        w, v, sums = start(), jax.tree.map(jnp.zeros_like, start()), None
        for t, batch in enumerate(batches()):
            g = grad(hand.add(w, hand.on_sphere(-RHO, v)), *batch)
            sums = hand.add(sums, g) if t % 2 else g
            if t % 2:
                v = jax.tree.map(lambda v, s: 0.9 * v + s / 2, v, sums)
                w = hand.add(w, v, -0.1)
            yield w

    for base in (MOMENTUM, parts(MOMENTUM, MOMENTUM)):
        base = optax.MultiSteps(base, 2, accumulator_dtype=float)
        hand.assert_same(train(base), expected())


REFUSED = {
    "two momenta of one parameter": (
        optax.chain(optax.masked(optax.trace(0.9), KERNEL), parts(optax.adam(0.1), MOMENTUM)),
        r"found .*trace\['body'\]\['kernel'\], .*mu\['body'\]\['kernel'\]\. Give it one",
    ),
    "a frozen part, and one without a momentum": (
        parts(optax.set_to_zero(), optax.sgd(0.1)),
        "found none",
    ),
    "a field with something else": (optax.sm3(0.1), r"found .*mu\['body'\]\['bias'\]\[0\]"),
    "one momentum of all parameters": (optax.flatten(MOMENTUM), r"found \[0\]TraceState.trace\."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    base, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"`base` must have one momentum.*{message}"):
        samx.momentum_sam(base).init(start())
