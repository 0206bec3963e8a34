"""`scale_loss` keeps gradients that would vanish; the scale grows and backs off."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from half_precision import (
    OVERFLOW,
    SAM,
    WRAPPERS,
    assert_close,
    assert_same,
    assert_skipped,
    batch_at,
    distance,
    every_arithmetic,
    every_program,
    four_steps,
    losses_in,
    needs_float16,
    program,
    roundings,
    signature,
    start,
    train,
)

import samx

# The factor of a loss; cotangents of single examples are below half of 6e-8.
VANISHING = 2.0**-22

FLOAT16_EPS = float(jnp.finfo(jnp.float16).eps)


@pytest.mark.slow
@every_arithmetic
def test_a_scale_changes_nothing_in_float32(name):
    history, expected = (four_steps(name, wrapper, jnp.float32) for wrapper in ("scale", "none"))
    for (params, state), wanted in zip(history, expected, strict=True):
        assert_close((params, state.inner.inner), wanted)


@pytest.mark.parametrize(
    ("name", "form"),
    [("sam", "value_fn"), ("sampa", "weights")],
)
def test_every_form_of_the_loss(name, form):
    """The incoming gradient is not read in any of them."""
    batch, losses_fn = batch_at(0), losses_in(jnp.float32)
    weights = jnp.arange(16.0) if form == "weights" else jnp.ones(16)

    def value_fn(params):
        return jnp.average(losses_fn(params, batch), weights=weights)

    keywords = {"losses_fn": losses_fn, "batch": batch, "weights": weights}
    if form == "value_fn":
        keywords = {"value_fn": value_fn}
    plain, scaled = (program(name, wrapper, jnp.float32)[0] for wrapper in ("none", "scale"))

    @jax.jit
    def both(params):
        value, g = jax.value_and_grad(value_fn)(params)
        expected = plain.update(g, plain.init(params), params, value=value, **keywords)
        return scaled.update(params, scaled.init(params), params, **keywords), expected

    (updates, state), expected = both(start())
    assert_close((updates, state.inner.inner), expected)


@functools.cache
def vanishing_gradient(name, wrapper, dtype):
    """Return the gradients that the base got, as its momentum holds them, and the state."""
    factors = (1, VANISHING)
    *_, (_, state) = train(name, wrapper, dtype, [batch_at(0, clean=factors, sharp=factors)] * 2)
    return optax.tree.get(state, "trace"), state


@needs_float16
@pytest.mark.parametrize(
    "name", ["sam", "sampa", pytest.param("looksam", marks=pytest.mark.slow), "esam"]
)
def test_gradients_that_vanish_in_float16_are_kept_by_a_scale(name):
    vanished, _ = vanishing_gradient(name, "skip", jnp.float16)
    assert not any(map(np.any, vanished.values()))
    kept, _ = vanishing_gradient(name, "scale", jnp.float16)
    expected, state = vanishing_gradient(name, "none", jnp.float32)
    bound = roundings(name, state) * FLOAT16_EPS * float(optax.tree.norm(expected))
    assert distance(kept, expected) < bound


@needs_float16
@pytest.mark.parametrize("name", ["sam", "sampa"])
def test_around_accumulate(name):
    """Every microbatch is scaled, and one that overflows skips the step."""
    kept, _ = vanishing_gradient(name, "scale, accumulate", jnp.float16)
    expected, _ = vanishing_gradient(name, "none", jnp.float32)
    assert distance(kept, expected) < 2 * FLOAT16_EPS * float(optax.tree.norm(expected))
    bad = batch_at(0, example=6, sharp=OVERFLOW["backward"])
    (_, before), (_, after) = train(name, "scale, accumulate", jnp.float16, [bad])
    assert_skipped(after, before)


def test_inside_accumulate_it_raises():
    tx, params = samx.accumulate(samx.scale_loss(SAM), 4), start()
    arguments = {"losses_fn": losses_in(jnp.float32), "batch": batch_at(0)}
    with pytest.raises(ValueError, match="scale_loss: stands inside accumulate; put it around"):
        jax.eval_shape(lambda: tx.update(params, tx.init(params), params, **arguments))


@every_program
def test_map_params(name):
    tx, params = program(name, "scale", jnp.float32)[0], start()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert signature(mapped) == signature(state)
    assert_same(optax.tree.get(mapped, "trace"), optax.tree.ones_like(params))
    assert float(mapped.loss_scale) == float(state.loss_scale)


@needs_float16
def test_scan_and_donation():
    """SAMPa has the largest state."""
    tx, step = program("sampa", "scale", jnp.float16)
    batches = [batch_at(0), batch_at(1, sharp=OVERFLOW["backward"]), batch_at(2)]
    *_, expected = train("sampa", "scale", jnp.float16, batches)
    params = start()
    carry = params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, batches):
        return jax.lax.scan(lambda carry, batch: (step(*carry, batch), None), carry, batches)[0]

    found = run(carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0]))


@needs_float16
@pytest.mark.parametrize("name", ["sam", "sampa", "looksam", "sl_sam"])
def test_a_scale_that_is_far_too_large_comes_down(name):
    """Every backward pass overflows for about twenty steps; then training goes on."""
    batches = [batch_at(t) for t in range(32)]
    history = train(name, "scale", jnp.float16, batches, loss_scale=jnp.float32(2**40))
    is_taken = [int(state.inner.skipped_in_a_row) == 0 for _, state in history[1:]]
    skipped = 32 - sum(is_taken)
    assert not any(is_taken[:15])
    assert sum(is_taken) > 4
    assert int(history[-1][1].inner.skipped_steps) == skipped
    assert float(history[-1][1].loss_scale) == 2.0 ** (40 - skipped)
    taken = [batch for batch, is_taken in zip(batches, is_taken, strict=True) if is_taken]
    *_, expected = train(name, "scale", jnp.float16, taken)
    assert_close(history[-1][0], expected[0], rtol=1e-3, atol=1e-3)


# ---- The scale from step to step.


def quadratic(tx):
    """Compile a step on a quadratic loss; an infinite `factor` breaks the loss."""

    @jax.jit
    def step(w, state, factor):
        updates, state = tx.update(w, state, w, value_fn=lambda w: factor * (w @ w))
        return optax.apply_updates(w, updates), state

    return step


def follow(tx, factors, **state):
    step, w = quadratic(tx), jnp.array([0.25, -0.5])
    history = [(w, optax.tree.set(tx.init(w), **state))]
    for factor in factors:
        history.append(step(*history[-1], factor))
    return history


def test_the_scale_grows_and_backs_off():
    tx = samx.scale_loss(SAM, 8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    history = follow(tx, [jnp.inf if sign == "-" else 1.0 for sign in "++-+++++--+++"])
    scales = [8.0, 8, 24, 6, 6, 18, 18, 54, 54, 13.5, 3.375, 3.375, 10.125, 10.125]
    assert [float(state.loss_scale) for _, state in history] == scales
    counts = [int(state.finite_steps) for _, state in history]
    assert counts == [0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert int(history[-1][1].inner.skipped_steps) == 3


def test_the_scale_stays_a_number_whose_inverse_is_one():
    """The scale stops at 2^126 and 2^-126; a step with the largest scale is still right."""
    tx = samx.scale_loss(SAM, growth_interval=1)
    *_, (w, state) = follow(tx, [1.0] * 4, loss_scale=jnp.float32(2.0**124))
    assert float(state.loss_scale) == 2.0**126
    *_, (expected, _) = follow(samx.scale_loss(SAM, 1.0, growth_factor=1.0), [1.0] * 4)
    assert_close(w, expected)
    *_, (w, state) = follow(tx, [jnp.inf] * 4, loss_scale=jnp.float32(2.0**-124))
    assert float(state.loss_scale) == 2.0**-126
    assert np.isfinite(1 / state.loss_scale)


def test_a_fixed_scale():
    tx = samx.scale_loss(SAM, 5.0, growth_factor=1.0, backoff_factor=1.0, growth_interval=1)
    history = follow(tx, [1.0, jnp.inf, 1.0])
    assert [float(state.loss_scale) for _, state in history] == [5.0] * 4
    assert [int(state.inner.skipped_steps) for _, state in history] == [0, 0, 1, 1]


def test_vmap():
    """Each seed has its own scale; only the seed that overflows skips its step."""
    tx = samx.scale_loss(SAM)
    w = jnp.ones((3, 2))
    state = jax.vmap(tx.init)(w)
    new, state = jax.jit(jax.vmap(quadratic(tx)))(w, state, jnp.array([1.0, jnp.inf, 2.0]))
    assert state.inner.skipped_steps.tolist() == [0, 1, 0]
    assert state.loss_scale.tolist() == [2.0**16, 2.0**15, 2.0**16]
    assert np.any(new != w, axis=1).tolist() == [True, False, True]


def test_injected_hyperparameters():
    make = optax.inject_hyperparams(samx.scale_loss, static_args=("growth_interval",))
    tx = make(SAM, 8.0, growth_factor=4.0, growth_interval=1)
    history = follow(tx, [1.0])
    hyperparams = history[-1][1].hyperparams
    assert set(hyperparams) == {"scale", "growth_factor", "backoff_factor"}
    assert float(optax.tree.get(history[-1][1], "loss_scale")) == 32.0
    changed = hyperparams | {"backoff_factor": jnp.float32(0.125)}
    _, (_, state) = follow(tx, [jnp.inf], hyperparams=changed)
    assert float(optax.tree.get(state, "loss_scale")) == 1.0


@pytest.mark.parametrize(
    ("keyword", "value", "error"),
    [
        ("scale", 0.0, ValueError),
        ("scale", -1.0, ValueError),
        ("scale", float("inf"), ValueError),
        ("scale", float("nan"), ValueError),
        ("scale", "large", TypeError),
        ("growth_factor", 0.5, ValueError),
        ("growth_factor", float("inf"), ValueError),
        ("growth_factor", None, TypeError),
        ("backoff_factor", 0.0, ValueError),
        ("backoff_factor", 1.5, ValueError),
        ("backoff_factor", None, TypeError),
        ("growth_interval", 0, ValueError),
        ("growth_interval", 2.0, TypeError),
        ("growth_interval", True, TypeError),
    ],
)
def test_bad_arguments(keyword, value, error):
    with pytest.raises(error, match=f"`{keyword}` must be"):
        samx.scale_loss(SAM, **{keyword: value})


# ---- What a variant may ask of a closure.


def test_second_derivatives_inside_a_variant():
    def update_fn(g, state, params, *, value_fn):
        return jax.jvp(jax.grad(value_fn), (params,), (g,))[1], state

    tx = samx.scale_loss(samx.closure_transformation(lambda params: (), update_fn))
    w = jnp.array([1.0, 2.0])
    step = jax.jit(lambda w: tx.update(w, tx.init(w), w, value_fn=lambda w: (w**4).sum())[0])
    assert_close(step(w), 12 * w**2 * 4 * w**3)


def test_a_step_is_differentiable_in_the_radius():
    def length(rho, wrap):
        tx, w = wrap(optax.chain(samx.sam(rho), optax.sgd(0.1))), jnp.array([1.0, 2.0])
        g = 4 * w**3
        return optax.tree.norm(tx.update(g, tx.init(w), w, value_fn=lambda w: (w**4).sum())[0])

    slope = jax.jit(jax.grad(length), static_argnums=1)
    slopes = [slope(0.05, wrap) for wrap in (WRAPPERS["none"], samx.scale_loss)]
    assert slopes[0] > 0
    assert_close(*slopes)


def test_integers_complex_numbers_and_leaves_that_the_loss_does_not_read():
    params = {
        "w": jnp.ones(2),
        "z": jnp.ones(2) + 1j,
        "table": jnp.arange(3),
        "unread": jnp.ones(2),
    }

    def value_fn(params):
        return (jnp.abs(params["z"]) ** 4).sum() * (params["w"] ** 2).sum() * params["table"].sum()

    @jax.jit
    def both(params):
        g = jax.grad(value_fn, allow_int=True)(params)
        g["z"] = jnp.conj(g["z"])
        return [
            tx.update(g, tx.init(params), params, value_fn=value_fn)[0]
            for tx in (SAM, samx.scale_loss(SAM))
        ]

    plain, scaled = both(params)
    assert_close(scaled, plain)
    assert signature(scaled) == signature(plain)


def test_there_is_no_nan_without_an_overflow():
    with jax.debug_nans(True):
        for name in ("sam", "l-infinity"):
            train(name, "scale", jnp.float32, [batch_at(0)])


def saf(**keywords):
    return samx.saf(num_examples=2, logits_like=jnp.zeros(2), lag=1, **keywords)


def mesa(**keywords):
    return samx.mesa(steps_per_epoch=1, **keywords)


@needs_float16
@pytest.mark.parametrize("make", [saf, mesa])
def test_the_gradient_of_a_teacher_is_kept(make):
    """It stands in a loss that a variant makes itself."""
    x = jnp.full((2, 1), 2.0**-12, jnp.float16)

    def apply_fn(w, batch):
        z = (batch["x"] @ w.astype(jnp.float16)).astype(jnp.float32)
        return jnp.stack([z, 3.0 + 0 * z], 1)

    closures = {
        "apply_fn": apply_fn,
        "loss_on_logits": lambda z, batch: 0 * z[:, 0],
        "teacher_fn": lambda w, batch: 2.0**11 * apply_fn(w, batch),
        "batch": {"x": x},
        "index": jnp.arange(2),
    }
    w, found = jnp.ones(1), {}
    for name, wrap in (("plain", lambda tx: tx), ("scaled", samx.scale_loss)):
        tx = wrap(make(lam=2.0**-14, start=-1))
        found[name], _ = jax.jit(functools.partial(tx.update, **closures))(w, tx.init(w), w)
    assert float(found["plain"][0]) == 0
    assert float(found["scaled"][0]) != 0
