"""`perturb_if`: what it calls, and what it passes on."""

import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from samx import policies
from samx.combinations import mix

MOMENTUM = optax.sgd(0.1, momentum=0.9)


def sharp_gradient(make_eps):
    """A user-defined inner transformation, without state and readings."""

    def update_fn(g, state, params, *, value_fn):
        return samx.value_and_grad_at(value_fn, params, make_eps(g))[1], state

    return samx.closure_transformation(lambda params: (), update_fn, name="inner")


def from_examples():
    """One that reads only `losses_fn` and `batch`: it returns the gradient of the worst example."""

    def update_fn(g, state, params, *, losses_fn, batch):
        return jax.grad(lambda p: losses_fn(p, batch).max())(params), state

    return samx.closure_transformation(lambda params: (), update_fn, name="from_examples")


def loss(w):
    return 0.5 * jnp.sum(w**4)


def counted(calls, fn):
    def wrapped(w, *args):
        jax.debug.callback(lambda _: calls.append(None), w)
        return fn(w, *args)

    return wrapped


BATCH = jnp.linspace(0.5, 2.0, 4)

INNERS = {  # the transformation, and what it returns on a sharp step
    "sam": (
        lambda: samx.sam(0.5),
        lambda w, g, t: jax.grad(loss)(w + 0.5 * g / jnp.linalg.norm(g)),
    ),
    "without readings": (
        lambda: sharp_gradient(jnp.sign),
        lambda w, g, t: jax.grad(loss)(w + jnp.sign(g)),
    ),
    "from examples": (from_examples, lambda w, g, t: 2 * g),
    "a chain, whose memory is of all steps": (
        lambda: optax.chain(samx.sam(0.0), optax.scale(3.0), optax.trace(0.5)),
        lambda w, g, t: 6 * g * (1 - 0.5 ** (t + 1)),
    ),
}


@pytest.mark.parametrize("name", INNERS)
def test_a_skipped_step_calls_no_closure_and_takes_the_gradient(name):
    make, by_hand = INNERS[name]
    tx, calls = samx.perturb_if(policies.every(3), make()), []

    @jax.jit
    def step(w, state):
        g = jax.grad(loss)(w)
        g_s, state = tx.update(
            g,
            state,
            w,
            value_fn=counted(calls, loss),
            losses_fn=counted(calls, lambda w, batch: batch * loss(w)),
            batch=BATCH,
        )
        return g, g_s, state

    w, expected_calls = jnp.array([0.3, -0.7]), 0
    state = tx.init(w)
    for t in range(7):
        g, g_s, state = step(w, state)
        jax.block_until_ready(g_s)
        jax.effects_barrier()
        expected_calls += t % 3 == 0
        assert len(calls) == expected_calls
        if t % 3:
            np.testing.assert_array_equal(g_s, g)
        else:
            np.testing.assert_allclose(g_s, by_hand(w, g, t), rtol=1e-6)


def test_readings_of_a_skipped_step():
    tx = samx.all_readings(samx.perturb_if(policies.every(2), samx.sam(0.1)))
    w = jnp.array([3.0, 4.0])
    g, state, spent = jax.grad(loss)(w), tx.init(w), 0
    update = jax.jit(lambda state: tx.update(g, state, w, value=loss(w), value_fn=loss))
    for t in range(4):
        _, state = update(state)
        readings = optax.tree.get(state, "readings")
        is_sharp = t % 2 == 0
        spent += 1 + is_sharp
        assert bool(readings.is_sharp) == is_sharp
        assert float(readings.gradients_spent) == spent
        np.testing.assert_allclose(readings.loss, loss(w), rtol=1e-6)
        assert float(readings.grad_norm) == pytest.approx(float(optax.tree.norm(g)), rel=1e-5)
        assert bool(jnp.isinf(readings.sharp_loss)) == (not is_sharp)
        assert bool(jnp.isinf(readings.sharpness)) == (not is_sharp)
        for reading in (readings.perturbation_norm, readings.sharp_grad_norm, readings.cosine):
            assert (float(reading) == 0) == (not is_sharp)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("name", ["perturb_if", "looksam", "vsam"])
def test_a_gradient_of_another_dtype_than_the_parameters(name, dtypes):
    """Both kinds of steps give updates with the dtype of the parameters, and the same state."""
    tx = {
        "perturb_if": samx.perturb_if(policies.every(2), samx.sam(0.05)),
        "looksam": samx.looksam(0.05, 2),
        "vsam": samx.vsam(policy=policies.quota(4, num_blocks=2, warmup_steps=1)),
    }[name]
    w, g = (jnp.ones(3, dtype) for dtype in dtypes)
    keywords = {"value_fn": lambda w: (w.astype(jnp.float32) ** 4).sum()}
    state = jax.eval_shape(tx.init, w)
    updates, after = jax.eval_shape(functools.partial(tx.update, **keywords), g, state, w)
    assert updates.dtype == w.dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_readings_of_several_transformations_inside():
    inner = optax.chain(samx.sam(0.1), samx.sam(0.2))
    tx = samx.perturb_if(policies.every(2), optax.named_chain(("two", inner)))
    w = {"readings": jnp.ones(2)}  # a parameter with this name is not a reading
    state = tx.init(w)
    for is_sharp in (True, False):
        _, state = tx.update(w, state, w, value_fn=lambda w: (w["readings"] ** 4).sum())
        found = [bool(part.readings.is_sharp) for part in state.inner["two"]]
        assert found == [is_sharp] * 2


@pytest.mark.parametrize(
    "around", [lambda tx: samx.perturb_if(policies.every(2), tx), lambda tx: mix(tx, 2.0)]
)
@pytest.mark.parametrize(
    "inner", [samx.momentum_sam(MOMENTUM), samx.sampa(MOMENTUM, batch_like=np.ones((4, 2)))]
)
def test_a_variant_that_wraps_its_base_is_refused(around, inner):
    with pytest.raises(ValueError, match=r"`inner` must stand in front of a base.*SAM"):
        around(inner).init(jnp.ones(2))


def test_parameters_named_like_a_momentum():
    w = {"mu": jnp.ones(2), "trace": jnp.ones(1)}
    tx = samx.all_readings(samx.momentum_sam(optax.sgd(0.1, momentum=0.9), 0.1))
    state = tx.init(w)
    for _ in range(2):
        _, state = tx.update(w, state, w, value_fn=lambda w: (w["mu"] ** 2).sum() + w["trace"][0])
    np.testing.assert_allclose(state.readings.perturbation_norm, 0.1, rtol=1e-5)


def test_an_inner_policy_runs_on_the_optimizers_clock():
    """A step is sharp if both policies want it; the inner policy counts all steps."""
    inner = samx.perturb_if(policies.every(3), samx.sam(0.1))
    tx, w, sharp = samx.perturb_if(policies.every(2), inner), jnp.array([3.0, 4.0]), []
    state = tx.init(w)
    update = jax.jit(lambda state: tx.update(w, state, w, value_fn=lambda w: 0.5 * w @ w))
    for _ in range(12):
        g_s, state = update(state)
        sharp.append(bool(jnp.any(g_s != w)))
    np.testing.assert_array_equal(sharp, np.arange(12) % 6 == 0)


def train_at(policy, calls, steps=6):
    """Make a training run with one radius, from `init` on, to be mapped over radii."""
    start, scales = jnp.array([0.3, -0.7]), jnp.linspace(0.5, 1.5, steps)

    def train(rho):
        tx = optax.chain(samx.perturb_if(policy, samx.sam(rho)), MOMENTUM)

        def step(carry, scale):
            w, state = carry

            def value_fn(w):
                return scale * loss(w - scale)

            g = jax.grad(value_fn)(w)
            updates, state = tx.update(g, state, w, value_fn=counted(calls, value_fn))
            return (optax.apply_updates(w, updates), state), None

        (w, state), _ = jax.lax.scan(step, (start, tx.init(start)), scales)
        return w, optax.tree.get(state, "gradients_spent")

    return train


MAPPED = {  # policy, whether it is still a branch under `vmap`
    "every": (policies.every(3), True),
    "random": (policies.random(0.5, key=1), True),
    "squared_norm": (policies.squared_norm(0.5, 0.5), False),
}


@pytest.mark.parametrize("name", MAPPED)
def test_under_vmap_the_branch_remains_where_the_decision_is_common(name):
    policy, is_common = MAPPED[name]
    radii, calls = jnp.array([0.01, 0.1, 0.3]), []
    train = train_at(policy, calls)
    traced = jax.jit(jax.vmap(train)).trace(radii)
    mapped, spent = traced.lower().compile()(radii)
    jax.block_until_ready(mapped)
    jax.effects_barrier()
    sharp_steps = np.asarray(spent) - 6
    assert np.all((sharp_steps > 0) & (sharp_steps < 6))
    assert len(calls) == (sharp_steps.sum() if is_common else 6 * len(radii))
    assert ("cond[" in str(traced.jaxpr)) == is_common
    alone = jax.jit(train)
    for i, rho in enumerate(radii):
        expected, spent_alone = alone(rho)
        assert spent_alone == spent[i]
        np.testing.assert_allclose(mapped[i], expected, rtol=1e-5)


def test_a_skipped_step_hands_on_the_linear_loss():
    """L(w) + ⟨g, v − w⟩, for every example too; integers do not move."""
    w, g = {"w": jnp.array([1.0, 2.0]), "n": jnp.array(3)}, {"w": jnp.array([0.5, -1.0]), "n": 0}
    moved = w | {"w": w["w"] + jnp.array([0.2, 0.3])}
    linear = sys.modules["samx.policies.perturb_if"]._linear
    closures = linear(g, w, jnp.array(7.0), {"losses_fn": None})
    np.testing.assert_allclose(closures["value_fn"](w), 7.0)
    np.testing.assert_allclose(closures["value_fn"](moved), 7.0 + 0.1 - 0.3, rtol=1e-6)
    losses = closures["losses_fn"](moved, jnp.zeros((4, 1)))
    np.testing.assert_allclose(losses, [6.8] * 4, rtol=1e-6)
