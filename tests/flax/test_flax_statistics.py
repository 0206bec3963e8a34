"""BatchNorm statistics are updated once per step."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import core, nnx
from flax_runs import Nnx, keep, sampa

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")


def test_update_leaves_the_live_nnx_model_alone():
    """Outside `jit`, where a pass could change the model."""
    rngs, x = nnx.Rngs(0), jnp.arange(4, dtype=jnp.float32)
    model = nnx.Sequential(nnx.BatchNorm(1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.chain(samx.sam(0.1), optax.sgd(0.1)), wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(x[:, None]) - 1) ** 2)

    value_fn = samx.flax.closure(model, loss)
    value, grads = nnx.value_and_grad(loss)(model)
    moved = samx.flax.statistics(model)
    assert moved["layers"][1]["rngs"]["count"] == 1
    again = value_fn(nnx.state(model, nnx.Param))  # starts where the clean pass started
    chex.assert_trees_all_close(again, (value, moved), rtol=1e-6)
    optimizer.update(model, grads, value_fn=value_fn)
    samx.flax.keep_aux(model, optimizer)  # there is no aux
    chex.assert_trees_all_equal(samx.flax.statistics(model), moved)


def test_statistics_hold_no_parameters_and_no_keys():
    model = Nnx()
    model.seen = nnx.Intermediate(jnp.ones(3))
    expected = {"norm": {"mean": (6,), "var": (6,)}, "dropout": {"rngs": {"count": ()}}}
    for wrt in (nnx.Param, nnx.PathContains("last")):  # with the second, other layers are frozen
        found = samx.flax.statistics(model, wrt=wrt)
        assert jax.tree.map(jnp.shape, found) == expected


def averaging_state(aux_like, name="mean", wrap=lambda tx: tx, freeze=dict):
    """Make a step and a state: a parameter called `aux`, and the batch mean as its statistics."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch, **fields):
        def losses_fn(params, batch):
            mean = 0.0 * state.batch_stats["mean"] + batch.mean()
            return (params["aux"] - batch) ** 2, {name: mean}

        return state.apply_gradients(grads=state.params, losses_fn=losses_fn, batch=batch, **fields)

    state = samx.flax.TrainState.create(
        apply_fn=None,
        params={"aux": jnp.ones(())},
        batch_stats=freeze({"mean": jnp.zeros(())}),
        tx=wrap(sampa(aux_like, jnp.ones(4))),
    )
    return step, state


@pytest.mark.parametrize(
    ("wrap", "freeze", "freeze_aux"),
    [
        (lambda tx: tx, core.freeze, core.freeze),
        (samx.skip_nonfinite, dict, dict),
        (samx.skip_nonfinite, core.freeze, dict),
    ],
)
def test_linen_statistics_are_the_aux_that_was_kept(wrap, freeze, freeze_aux):
    step, state = averaging_state(freeze_aux({"mean": jnp.ones(())}), wrap=wrap, freeze=freeze)
    structure = jax.tree.structure(state)
    for mean in (1.0, 2.0):
        state = step(state, jnp.full(4, mean), batch_stats={"mean": jnp.asarray(jnp.nan)})
        assert state.batch_stats == {"mean": mean}
        assert jax.tree.structure(state) == structure  # FrozenDicts too
    with jax.disable_jit():
        state = step(state, jnp.full(4, 3.0))
    assert step(state, jnp.full(4, 4.0)).batch_stats == {"mean": 4.0}  # donates each buffer once


def test_a_skipped_first_step_keeps_the_statistics_of_the_start():
    start = {"mean": jnp.full((), 7.0)}
    step, state = averaging_state(start, wrap=samx.skip_nonfinite)
    assert step(state, jnp.full(4, jnp.nan)).batch_stats == {"mean": 7.0}


def test_accumulate_keeps_the_statistics_of_the_clean_pass():
    wrap = partial(samx.accumulate, num_microbatches=2, aux_like={"mean": jnp.ones(())})
    step, state = averaging_state(None, wrap=lambda _: wrap(keep()))
    for mean in (1.0, 2.0):
        state = step(state, jnp.full(4, mean))
        assert state.batch_stats == {"mean": mean}


def test_without_aux_like_nothing_is_kept():
    step, state = averaging_state(None, freeze=core.freeze)
    state = step(state, jnp.ones(4), batch_stats={"mean": jnp.ones(())})
    assert state.batch_stats == core.freeze({"mean": 1})
    assert isinstance(state.batch_stats, core.FrozenDict)
    step, state = averaging_state(None)
    assert step(state, jnp.ones(4)).batch_stats["mean"] == 0


def test_a_wrong_aux_is_refused():
    step, state = averaging_state({"average": jnp.ones(())}, "average")
    structures = r"give it their structure.*\{'mean': \*\}.*got PyTreeDef\(\{'average': \*\}\)"
    with pytest.raises(ValueError, match=structures):
        step(state, jnp.ones(4))
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sampa(jnp.ones(3), jnp.ones(4)), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"'mean': \*, 'var': \*.*got PyTreeDef\(\*\)"):
        samx.flax.keep_aux(model, optimizer)
