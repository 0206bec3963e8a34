"""`closure_transformation`: what a variant outside samx can rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx

DATA, PARAMS = problem.make("float32")
BATCH = problem.batch_at(DATA, 0)


def spy(update_fn):
    """Make a transformation from an `update_fn` that records the keywords it gets."""
    return samx.closure_transformation(lambda params: (), update_fn)


def test_undeclared_keywords_do_not_arrive():
    def mine(updates, state, params, *, value_fn, labels=None):
        return updates, (value_fn(params), labels)

    tx = spy(mine)
    keywords = {"value_fn": lambda p: p["W1"].sum(), "value": 1.0, "batch": BATCH, "other": 2}
    _, (loss, labels) = tx.update(PARAMS, (), PARAMS, labels=BATCH["y"], **keywords)
    np.testing.assert_allclose(loss, PARAMS["W1"].sum(), rtol=1e-6)
    assert labels is BATCH["y"]


def test_all_keywords_arrive_where_they_are_wanted():
    def mine(updates, state, params, *, value_fn, **keywords):
        return updates, set(keywords)

    _, arrived = spy(mine).update(PARAMS, (), PARAMS, value_fn=lambda p: 0.0, value=1.0, other=2)
    assert arrived == {"value", "other"}


def test_the_name_in_errors_is_the_factory_or_the_one_given():
    def my_variant():
        def update_fn(updates, state, params, *, ascent_fn):
            return updates, state

        return samx.closure_transformation(lambda params: (), update_fn)

    with pytest.raises(ValueError, match=r"test_the_name.*: `ascent_fn` is missing.*ascent_fn="):
        my_variant().update(PARAMS, (), PARAMS)

    def update_fn(updates, state, params, *, value_fn):
        return updates, state

    named = samx.closure_transformation(lambda params: (), update_fn, name="mine")
    with pytest.raises(ValueError, match="mine: `value_fn` is missing"):
        named.update(PARAMS, (), PARAMS)


@pytest.mark.parametrize("has_aux", [False, True])
def test_closures_have_one_form(has_aux):
    auxes = []

    def mine(updates, state, params, *, value_fn, losses_fn, batch):
        loss, aux = value_fn.with_aux(params)
        losses, losses_aux = losses_fn.with_aux(params, batch)
        auxes.extend([aux, losses_aux])
        return jax.grad(value_fn)(params), (loss, losses)

    def losses_fn(params, batch):
        losses = problem.losses_fn(params, batch)
        return (losses, "aux") if has_aux else losses

    @jax.jit
    def both(params):
        found = spy(mine).update(params, (), params, losses_fn=losses_fn, batch=BATCH)
        by_hand = jax.grad(lambda p: problem.losses_fn(p, BATCH).mean())(params)
        return found, (by_hand, problem.losses_fn(params, BATCH))

    (grads, (loss, losses)), (expected_grads, expected) = both(PARAMS)
    assert auxes == (["aux", "aux"] if has_aux else [None, None])
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(grads["W1"], expected_grads["W1"], rtol=1e-5, atol=1e-7)


def test_a_wrapped_variant_still_sees_the_aux():
    """Closures that an outer variant has checked keep their aux when an inner variant gets them."""

    def inner(updates, state, params, *, value_fn, losses_fn, batch):
        return updates, (value_fn.with_aux(params)[1], losses_fn.with_aux(params, batch)[1])

    inner_tx = spy(inner)

    def outer(updates, state, params, **keywords):
        return inner_tx.update(updates, state, params, **keywords)

    _, auxes = spy(outer).update(
        PARAMS,
        (),
        PARAMS,
        value_fn=lambda p: (0.0, "of value_fn"),
        losses_fn=lambda p, b: (problem.losses_fn(p, b), "of losses_fn"),
        batch=BATCH,
    )
    assert auxes == ("of value_fn", "of losses_fn")


def test_perturbations_may_need_closures_too():
    """A perturbation gets every keyword, so it can climb the gradient of another loss."""

    def climb_other(updates, state, params, *, ascent_fn, value_fn):
        ball = samx.perturbations.metric_ball(0.1)
        return ball.update(jax.grad(ascent_fn)(params), ball.init(params), params)

    perturbation = samx.closure_transformation(
        samx.perturbations.metric_ball(0.1).init, climb_other, name="climb_other"
    )
    tx = samx.sharpness_aware(perturbation)
    w, value_fn = jnp.array([1.0, 0.0]), lambda w: w @ w
    keywords = {"value_fn": value_fn, "ascent_fn": lambda w: w[1]}
    updates, _ = tx.update(jax.grad(value_fn)(w), tx.init(w), w, **keywords)
    np.testing.assert_allclose(updates, [2.0, 0.2], rtol=1e-6)
    with pytest.raises(ValueError, match="climb_other: `ascent_fn` is missing"):
        tx.update(w, tx.init(w), w, value_fn=value_fn)


def test_value_and_grad_at():
    def value_fn(w):
        return (w["a"] ** 2).sum() * w["n"], "aux"

    w = {"a": jnp.arange(3.0), "n": jnp.array(2)}
    eps = {"a": jnp.ones(3), "n": jnp.array(0)}
    (loss, aux), grads = samx.value_and_grad_at(value_fn, w, eps, has_aux=True)
    assert (float(loss), aux) == (28.0, "aux")
    np.testing.assert_allclose(grads["a"], [4.0, 8.0, 12.0])
    assert (grads["n"].dtype, int(grads["n"])) == (w["n"].dtype, 0)


def test_skip_nonfinite_counts_in_a_row():
    tx = samx.skip_nonfinite(optax.sgd(0.1))
    state, counts = tx.init(jnp.ones(2)), []
    for g in (1.0, jnp.nan, jnp.inf, 1.0, -jnp.inf):
        updates, state = tx.update(jnp.full(2, g), state, jnp.ones(2))
        counts.append((int(state.skipped_steps), int(state.skipped_in_a_row)))
        assert np.all(np.isfinite(updates))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
