"""An overflow in any pass skips the step, and nothing else."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regimes
from cases import VARIANTS
from half_precision import (
    A_GROUP,
    OVERFLOW,
    SAM,
    WRAPPERS,
    assert_close,
    assert_same,
    assert_skipped,
    batch_at,
    every_program,
    infinite_gradient,
    losses_in,
    needs_float16,
    start,
    train,
)

import samx

one_pass = pytest.mark.parametrize("kind", ["clean", "sharp"])

somewhere = pytest.mark.parametrize("where", OVERFLOW)


def has_the_pass(name, kind, batches):
    """Return whether a row has this pass. SAMPa has no clean one; policies can skip sharp ones."""
    if kind == "clean":
        return name not in ("sampa", "sampa, separate", "momentum_sam", "tsam", "msassha")
    *_, (_, state) = train(name, "scale", jnp.float16, batches)
    return bool(optax.tree.get(state, "is_sharp"))


@needs_float16
@every_program
@one_pass
@somewhere
def test_an_overflow_is_as_if_its_batch_had_never_come(name, kind, where):
    good = [batch_at(t) for t in range(3)]
    bad = batch_at(3, example=A_GROUP, **{kind: OVERFLOW[where]})
    *_, before, after, last = train(name, "scale", jnp.float16, [*good[:2], bad, good[2]])
    if not has_the_pass(name, kind, [*good[:2], batch_at(3)]):
        assert int(last[1].inner.skipped_steps) == 0
        return
    assert_same(after[0], before[0])
    assert_skipped(after[1], before[1])
    *_, expected = train(name, "scale", jnp.float16, good)
    assert_close((last[0], last[1].inner.inner), (expected[0], expected[1].inner.inner))
    assert int(last[1].inner.skipped_steps) == 1
    assert int(last[1].inner.skipped_in_a_row) == 0
    assert int(last[1].finite_steps) == 1


@needs_float16
@pytest.mark.parametrize("name", ["sam", "sampa", "looksam", "esam"])
@one_pass
@somewhere
def test_skip_nonfinite_needs_no_scale_for_it(name, kind, where):
    bad = batch_at(1, example=A_GROUP, **{kind: OVERFLOW[where]})
    _, before, after = train(name, "skip", jnp.float16, [batch_at(0), bad])
    has_it = has_the_pass(name, kind, [batch_at(0), batch_at(1)])
    assert int(after[1].skipped_steps) == has_it
    if has_it:
        assert_same((after[0], after[1].inner), (before[0], before[1].inner))


HIDING = {
    "sign": optax.sign_sgd(0.1),
    "lion": optax.lion(0.1),
    "clip": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
}


@needs_float16
@pytest.mark.parametrize("base", HIDING)
@pytest.mark.parametrize("first", ["plain", "sam", "l-infinity"])
def test_no_sign_and_no_clipping_hides_an_overflow(base, first):
    ball = samx.sharpness_aware(samx.perturbations.linf_ball(0.01))
    first = {"plain": optax.identity(), "sam": samx.sam(0.05), "l-infinity": ball}[first]
    tx, w = samx.scale_loss(optax.chain(first, HIDING[base])), jnp.ones(2)

    @jax.jit
    def update(w):
        return tx.update(w, tx.init(w), w, value_fn=lambda w: infinite_gradient(w))

    updates, state = update(w)
    assert int(state.inner.skipped_steps) == 1
    assert not np.any(updates)


@needs_float16
def test_skip_nonfinite_looks_at_moments():
    """Lion takes the sign of its momentum, so an infinite momentum gives finite updates."""
    tx, w = samx.skip_nonfinite(optax.lion(0.1)), jnp.ones(2)
    updates, state = tx.update(jax.grad(infinite_gradient)(w), tx.init(w), w)
    assert int(state.skipped_steps) == 1
    assert not np.any(updates)
    assert not np.any(optax.tree.get(state, "mu"))


def test_infinities_that_break_nothing():
    """An infinite mask in a held batch, or an unknown (infinite) loss, skips no step."""
    batch = {"x": jnp.ones((2, 2)), "mask": jnp.array([0.0, -jnp.inf])}
    keywords = {"losses_fn": lambda w, b: jax.nn.relu(b["x"] @ w + b["mask"]), "batch": batch}
    w, sampa = jnp.ones(2), samx.sampa(optax.sgd(0.1), batch_like=batch)
    for tx in (samx.skip_nonfinite(sampa), samx.skip_nonfinite(SAM)):
        state = tx.init(w)
        for value in ({"value": 1.0}, {}):
            step = jax.jit(functools.partial(tx.update, **keywords, **value))
            updates, state = step(w, state, w)
            assert int(state.skipped_steps) == 0
            assert np.any(updates)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_infinite_gradient_is_no_direction(compiled):
    """The compiler must not replace 0 · x by 0: a step of the L∞ ball along infinity is NaN."""
    ball, g = samx.perturbations.linf_ball(0.5), jnp.array([jnp.inf, -2.0, 0.0])
    climb = jax.jit(ball.update) if compiled else ball.update
    np.testing.assert_array_equal(climb(g, ball.init(g), g)[0], [np.nan, -0.5, 0.0])


@needs_float16
@pytest.mark.parametrize("ball", ["metric_ball", "linf_ball"])
def test_skip_nonfinite_sees_an_infinity_that_was_climbed(ball):
    """The infinity is in the clean pass alone; the sharp gradient is finite."""
    ball = getattr(samx.perturbations, ball)(0.05)
    tx, w = samx.skip_nonfinite(samx.sharpness_aware(ball)), jnp.ones(2)
    g = 2 * w + jax.grad(infinite_gradient)(w)
    assert np.all(np.isposinf(g))
    updates, state = tx.update(g, tx.init(w), w, value_fn=lambda w: w @ w)
    assert int(state.skipped_steps) == 1
    assert not np.any(updates)


@needs_float16
def test_a_leaf_that_is_not_perturbed_may_overflow_in_the_clean_pass():
    """Only a reading uses the infinite number. In the sharp pass, the overflow skips the step."""
    ball = samx.perturbations.metric_ball(0.05)
    ball = samx.perturbations.on_leaves(ball, lambda path, leaf: path[-1].key == "W")
    tx = samx.scale_loss(optax.chain(samx.sharpness_aware(ball), optax.sgd(0.1)))
    params = {"W": jnp.ones(2), "b": jnp.ones(2)}

    def one_step(clean, sharp):
        def value_fn(params):
            factor = sharp if samx.is_sharp_pass() else clean
            return params["W"] @ params["W"] + factor * infinite_gradient(params["b"])

        updates, state = tx.update(params, tx.init(params), params, value_fn=value_fn)
        return updates, int(state.inner.skipped_steps), optax.tree.get(state, "grad_norm")

    *expected, grad_norm = one_step(0.0, 0.0)
    assert np.isfinite(grad_norm)
    *found, grad_norm = one_step(1.0, 0.0)
    assert_same(found, expected)
    assert not np.isfinite(grad_norm)
    assert one_step(0.0, 1.0)[1] == 1


# ---- On several devices.


@functools.cache
def mapped(regime, name, is_scaled, examples, **keywords):
    """Return `(params, state, value)` after each step; `examples` can add a bad batch."""
    batches = [batch_at(t, np.float64) for t in range(2)]
    if examples == "one overflows":
        batches.insert(1, batch_at(2, np.float64, example=5, sharp=(1, 1e308)))
    history = getattr(regimes, regime)(
        lambda like: WRAPPERS["scale" if is_scaled else "none"](
            VARIANTS[name].build(batch_like=like)
        ),
        start(np.float64),
        [(batch,) for batch in batches],
        losses_fn=losses_in(np.float64),
        **keywords,
    )
    return jax.tree.map(np.asarray, history)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "regime", "keywords"),
    [
        ("sam", "shard_map", {"check_vma": True}),
        ("sam", "shard_map", {"check_vma": False}),
        ("sam", "shard_map", {"check_vma": True, "ascent": "local"}),
        ("two ascent steps", "shard_map", {"check_vma": True}),
        ("sampa", "shard_map", {"check_vma": True}),
        ("sam", "pmap", {}),
    ],
)
def test_an_overflow_on_one_device_skips_the_step_on_all(name, regime, keywords):
    """The other steps equal those without a scale; `regimes` compares the replicas."""
    history = mapped(regime, name, True, "one overflows", **keywords)
    reference = (regime, keywords) if "ascent" in keywords else ("single", {})
    *_, (*expected, _) = mapped(reference[0], name, False, "good", **reference[1])
    (_, before, _), (_, after, _), (params, state, _) = history
    assert_skipped(after, before)
    chex.assert_trees_all_close(
        (params, state.inner.inner), tuple(expected), rtol=1e-12, atol=1e-12
    )
    assert int(state.inner.skipped_steps) == 1
