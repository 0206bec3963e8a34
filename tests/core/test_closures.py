"""What closures see: dtypes, keywords for the base, and one objective."""

import functools

import jax
import jax.numpy as jnp
import optax
import problem
import pytest

import samx
from samx.perturbations import magnitude

BATCH = problem.batch_at(problem.make("float32")[0], 0)


def test_dtype_failure_at_the_perturbed_point_names_the_way_out():
    w = jnp.ones(3, jnp.bfloat16)

    def strict(p):
        return jax.lax.dot(p, jnp.ones(3, jnp.bfloat16)).astype(jnp.float32) + jax.lax.add(
            p, jnp.ones(3, jnp.bfloat16)
        ).sum().astype(jnp.float32)

    def updates_of(tx, w, value_fn):
        return jax.eval_shape(lambda: tx.update(w, tx.init(w), w, value_fn=value_fn)[0])

    with pytest.raises(TypeError, match="perturb_dtype=None"):
        updates_of(samx.sam(0.5), w, strict)
    assert updates_of(samx.sam(0.5, perturb_dtype=None), w, strict).dtype == jnp.bfloat16

    def broken(p):
        raise TypeError("not a matter of precision")

    with pytest.raises(TypeError, match="not a matter of precision"):
        updates_of(samx.sam(), jnp.ones(3), broken)


def test_opting_out_of_float32_is_visible_in_the_readings():
    w = jnp.full(1000, 100.0, jnp.bfloat16)
    norms = {}
    for dtype in (jnp.float32, None):
        tx = samx.sam(0.05, perturb_dtype=dtype)
        update = functools.partial(tx.update, value_fn=lambda p: p.sum().astype(jnp.float32))
        _, state = jax.jit(update)(w, tx.init(w), w)
        norms[dtype] = float(optax.tree.get(state, "perturbation_norm"))
    assert norms[jnp.float32] == pytest.approx(0.05, rel=1e-2)
    assert norms[None] == 0.0


def test_missing_closures_of_different_objectives():
    _, params = problem.make("float32")
    given = {"losses_fn": problem.losses_fn, "batch": BATCH}
    samx.check_closures(params, value_fn=lambda p: problem.losses_fn(p, BATCH).mean(), **given)
    with pytest.raises(ValueError, match="must be the same objective"):
        samx.check_closures(params, value_fn=lambda p: problem.losses_fn(p, BATCH).sum(), **given)
    with pytest.raises(ValueError, match="must be the same objective"):
        samx.check_closures(
            params,
            value_fn=lambda p: problem.losses_fn(p, BATCH).mean(),
            weights=jnp.arange(16.0),
            **given,
        )


def test_with_base_hides_samx_keywords():
    seen = []

    def update_fn(updates, state, params=None, **keywords):
        seen.append((set(keywords), jnp.shape(keywords["value_fn"](params))))
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    _, params = problem.make("float32")
    closure = {"value_fn": lambda p: (problem.losses_fn(p, BATCH).mean(), "aux")}
    given = {"losses_fn": problem.losses_fn, "batch": BATCH, "index": jnp.arange(16), "mine": 1}
    for tx in (samx.with_base(samx.sam(), base), samx.sampa(base, batch_like=BATCH)):
        seen.clear()
        update = functools.partial(tx.update, value=1.0, **closure, **given)
        jax.eval_shape(update, params, tx.init(params), params)
        assert seen
        assert all(one == ({"value", "value_fn", "mine"}, ()) for one in seen)


def test_magnitude_scales_by_name():
    metric = magnitude(0.5)
    params = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1), "in_bias": jnp.zeros(1)}
    scales = metric(params | {"count": jnp.arange(2)})
    assert float(scales["kernel"][0]) == 0.5
    assert (scales["bias"], scales["in_bias"], scales["count"]) == (1.0, 1.0, 1.0)
