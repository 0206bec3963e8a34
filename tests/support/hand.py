"""The steps that samx should take, in plain jax and optax: nothing here calls samx."""

import jax
import jax.numpy as jnp
import numpy as np


def on_sphere(rho, g):
    """Return rho g / ‖g‖, with one norm over all leaves."""
    length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
    return jax.tree.map(lambda leaf: rho * leaf / jnp.where(length == 0, 1, length), g)


def add(w, step, scale=1.0):
    return jax.tree.map(lambda x, y: x + scale * y, w, step)


def sam_gradient(grad, w, rho):
    """Return the gradient at w + rho g / ‖g‖, where `grad` is the gradient of the loss."""
    return grad(add(w, on_sphere(rho, grad(w))))


# ---- Training. `one_pass(w, statistics, batch)` returns the gradient and the moved statistics.


def sam(one_pass, base, rho, w, statistics, batches):
    state = base.init(w)
    for batch in batches:
        g, moved = one_pass(w, statistics, batch)
        g_s, _ = one_pass(add(w, on_sphere(rho, g)), statistics, batch)
        updates, state = base.update(g_s, state, w)
        w, statistics = add(w, updates), moved
        yield w, statistics


def sampa(one_pass, base, rho, lam, w, statistics, batches):
    state, g_y, previous = base.init(w), jax.tree.map(jnp.zeros_like, w), batches[0]
    for t, batch in enumerate(batches):
        y = add(w, base.update(g_y, state, w)[0]) if t else w
        g_s, _ = one_pass(add(w, on_sphere(rho, g_y)), statistics, previous)
        g_y, statistics = one_pass(y, statistics, batch)
        mixed = add(jax.tree.map(lambda x: (1 - lam) * x, g_s), g_y, lam)
        updates, state = base.update(mixed, state, w)
        w, previous = add(w, updates), batch
        yield w, statistics


def momentum_sam(one_pass, base, rho, momenta, w, statistics, batches):
    """Each leaf of `momenta` is `(decay, factor)`: v ← decay v + factor g."""
    state, v = base.init(w), jax.tree.map(jnp.zeros_like, w)
    for batch in batches:
        g, statistics = one_pass(add(w, on_sphere(-rho, v)), statistics, batch)
        v = jax.tree.map(lambda v, g, how: how[0] * v + how[1] * g, v, g, momenta)
        updates, state = base.update(g, state, w)
        w = add(w, updates)
        yield w, statistics


def assert_same(history, expected, tolerance=1e-10):
    """Compare the leaves of two trainings step by step, whatever their containers are."""
    history, expected = list(history), list(expected)
    assert len(history) == len(expected) > 0
    for step, wanted in zip(history, expected, strict=True):
        for x, y in zip(*map(jax.tree.leaves, (step, wanted)), strict=True):
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
