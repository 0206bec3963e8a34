"""SAMPa: the limits of its share, its aux, its held batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import MOMENTUM, assert_same, batch_like, runner

import samx

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def train():
    """Return a function of steps, `rho` and `lam`; other tests have both forms."""
    return runner(lambda rho, lam: samx.sampa(MOMENTUM, rho, lam, batch_like=batch_like()))


def test_sampa_starts_with_the_step_of_its_base():
    expected = problem.train(MOMENTUM, 1)
    for lam in (0.0, 0.2, 1.0):
        assert_same(train()(1, rho=0.3, lam=lam), expected)


def test_sampa_at_lam_one_does_not_see_the_radius():
    assert_same(train()(rho=0.0, lam=1.0), train()(rho=0.5, lam=1.0))


def test_sampa_at_lam_zero_is_not_the_published_scripts_degenerate_case():
    """At lam=0 the script is the base optimizer on the previous batch, without a perturbation."""
    flat, sharp = (train()(rho=rho, lam=0.0)["W1"] for rho in (0.0, 0.5))
    assert_same(flat[:2], sharp[:2], atol=1e-2)
    assert np.abs(flat[2:] - sharp[2:]).max() > 1e-3


def test_sampa_keeps_the_aux_at_y_on_the_current_batch():
    def losses_fn(params, batch):
        return problem.losses_fn(params, batch), {"W1": params["W1"], "x": batch["x"].mean()}

    data, x = problem.make()
    base = optax.sgd(0.1)
    like = jax.eval_shape(lambda: losses_fn(x, batch_like())[1])
    for form in ("vmap", "separate"):
        tx = samx.sampa(base, 0.3, batch_like=batch_like(), aux_like=like, gradients=form)
        params, state = x, tx.init(x)
        update = jax.jit(functools.partial(tx.update, losses_fn=losses_fn))
        for t in range(3):
            y = optax.apply_updates(params, base.update(state.g_y, state.base, params)[0])
            batch = problem.batch_at(data, t)
            updates, state = update(params, state, params, batch=batch)
            aux = optax.tree.get(state, "aux")
            np.testing.assert_allclose(aux["W1"], y["W1"] if t else params["W1"], rtol=1e-12)
            np.testing.assert_allclose(aux["x"], batch["x"].mean(), rtol=1e-12)
            params = optax.apply_updates(params, updates)


def test_random_keys_in_the_batch_survive_the_hold():
    """Random keys of examples are `[B]` leaves of the batch; the held batch keeps them."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0) | {"key": jax.random.split(jax.random.key(0), 16)}

    def losses_fn(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(batch["key"])
        return problem.losses_fn(params, batch | {"x": batch["x"] + 0.1 * noise})

    for form in ("vmap", "separate"):
        tx = samx.sampa(MOMENTUM, batch_like=batch, gradients=form)
        state = tx.init(params)
        step = jax.jit(lambda p, s, b, tx=tx: tx.update(p, s, p, losses_fn=losses_fn, batch=b))
        for _ in range(2):
            updates, state = step(params, state, batch)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
        held = optax.tree.get(state, "previous").batch["key"]
        assert jnp.array_equal(jax.random.key_data(held), jax.random.key_data(batch["key"]))
