"""A preflight finds what is wrong with a step, and nothing where it is right."""

import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import samx
import samx.flax
from samx.perturbations import metric_ball, on_leaves

DATA, PARAMS = problem.make(np.float32)
BATCH = problem.batch_at(DATA, 0)


def mean_loss(params, batch):
    return problem.losses_fn(params, batch).mean()


def make_step(tx, loss=mean_loss, before=lambda g: g, value=lambda x: x, **keywords):
    """Make a step; `before` and `value` change what is passed to `update`."""

    @jax.jit
    def step(params, state, batch):
        def value_fn(params):
            return loss(params, batch)

        loss_value, g = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            before(g), state, params, value=value(loss_value), value_fn=value_fn, **keywords
        )
        return optax.apply_updates(params, updates), state, loss_value

    return step


def report(tx, params=PARAMS, **changes):
    return samx.preflight(make_step(tx, **changes), params, tx.init(params), BATCH)


SAM = optax.chain(samx.sam(0.05), optax.sgd(0.1, momentum=0.9))


@pytest.mark.parametrize(
    "tx",
    [
        SAM,
        optax.chain(samx.sam(0.05), optax.clip_by_global_norm(0.1), optax.adamw(0.1)),
        optax.apply_if_finite(SAM, 3),
        optax.MultiSteps(SAM, 2),
        samx.skip_nonfinite(SAM),
        samx.scale_loss(SAM),
        samx.with_base(samx.gsam(0.05), optax.sgd(0.1)),
        samx.wsam(optax.sgd(0.1), 0.1),
        samx.momentum_sam(optax.sgd(0.1, momentum=0.9), 0.3),
        optax.inject_hyperparams(lambda rho: optax.chain(samx.looksam(rho), optax.sgd(0.1)))(0.05),
    ],
)
def test_nothing_is_wrong_with_a_right_step(tx):
    assert report(tx) == []


def test_nothing_is_wrong_where_the_gradient_is_not_read():
    sampa = samx.sampa(optax.sgd(0.1), batch_like=BATCH)
    keywords = {"losses_fn": problem.losses_fn, "batch": BATCH}
    for tx in (sampa, samx.accumulate(SAM, 2)):
        assert report(tx, before=lambda g: optax.tree.scale(7, g), **keywords) == []


WRONG = {
    "a loss that was scaled by hand": (
        dict(before=lambda g: optax.tree.scale(1 / 1024, g)),
        r"is 0\.0009766 times .* samx\.scale_loss",
    ),
    "a sum for a mean": (dict(before=lambda g: optax.tree.scale(16, g)), "is 16 times"),
    "another gradient": (
        dict(before=lambda g: jax.tree.map(jnp.sign, g)),
        r"is not that of the closure \(cosine 0\.\d+, \d+\.\d+ times as long\)",
    ),
    "no gradient": (dict(before=optax.tree.zeros_like), "the incoming gradient is zero"),
    "a scaled value": (dict(value=lambda v: 3 * v), r"`value` is .*, but `value_fn` gives"),
    "two objectives": (
        dict(losses_fn=lambda p, b: 1 + problem.losses_fn(p, b), batch=BATCH),
        r"the mean of `losses_fn` is .*, but `value_fn` gives .*; they must be the same objective",
    ),
    "two parts of another objective": (
        dict(
            apply_fn=problem.logits_of,
            loss_on_logits=lambda z, b: 2 * problem.cross_entropy(z, b["y"]),
            batch=BATCH,
        ),
        "the mean of `loss_on_logits` after `apply_fn` is .*, but `value_fn` gives",
    ),
    "a mean that forgets its weights": (
        dict(losses_fn=problem.losses_fn, batch=BATCH, weights=jnp.arange(16.0)),
        "the mean of `losses_fn`",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found(wrong):
    changes, message = WRONG[wrong]
    (line,) = report(SAM, **changes)
    assert line.startswith("sam: ")
    assert "\n" not in line
    assert re.search(message, line)


def test_the_cosine_and_the_ratio_are_those_of_the_gradients():
    g = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(mean_loss))(PARAMS, BATCH))[0]
    (line,) = report(SAM, before=lambda g: jax.tree.map(jnp.sign, g))
    cosine = g @ jnp.sign(g) / (jnp.linalg.norm(g) * jnp.linalg.norm(jnp.sign(g)))
    ratio = jnp.linalg.norm(jnp.sign(g)) / jnp.linalg.norm(g)
    found = re.search(r"cosine (\S+), (\S+) times", line)
    np.testing.assert_allclose([float(x) for x in found.groups()], [cosine, ratio], rtol=2e-3)


IN_FRONT = {
    "an optimizer": (optax.sgd(0.1), r"is -0\.1 times .* Put samx first in the chain"),
    "clipping": (optax.clip_by_global_norm(1e-3), r"times the gradient of the closure"),
    "weight decay": (optax.add_decayed_weights(0.5), "is not that of the closure"),
    "Adam's scaling": (optax.scale_by_adam(), "is not that of the closure"),
}


@pytest.mark.parametrize("name", IN_FRONT)
def test_what_stands_in_front_is_found(name):
    transformation, message = IN_FRONT[name]
    (line,) = report(optax.chain(transformation, samx.sam(0.05), optax.sgd(0.1)))
    assert re.search(message, line)


def test_complex_gradients_that_are_not_conjugated():
    params = {"z": jnp.array([1.0 + 2.0j, -0.5j])}

    def loss(params, batch):
        return (jnp.abs(params["z"] - (3 + 1j)) ** 2).sum()

    (line,) = report(SAM, params, loss=loss)
    assert "jax.tree.map(jnp.conj, grads)" in line
    assert report(SAM, params, loss=loss, before=partial(jax.tree.map, jnp.conj)) == []


def mapped(tx, how, with_means):
    """A step on 2 devices whose caller averages the gradient."""
    axis = "data"

    def step(params, state, x, y):
        def value_fn(params):
            return mean_loss(params, {"x": x, "y": y})

        value, g = jax.value_and_grad(value_fn)(params)
        g = jax.lax.pmean(g, axis)
        updates, state = tx.update(g, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), jax.lax.pmean(value, axis)

    tx = samx.data_parallel(tx, axis) if with_means else tx
    state = tx.init(PARAMS)
    if how == "pmap":
        shards = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), BATCH)
        step = jax.pmap(step, axis, in_axes=(None, None, 0, 0), devices=jax.devices()[:2])
        return step, (PARAMS, state, shards["x"], shards["y"])
    mesh = jax.make_mesh((2,), (axis,), devices=jax.devices()[:2])
    specs = (P(), P(), P(axis), P(axis))
    step = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=how == "check_vma"
    )
    batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, P(axis)))
    return jax.jit(step), (PARAMS, state, batch["x"], batch["y"])


@pytest.mark.parametrize("how", [pytest.param("pmap", marks=pytest.mark.slow), "shard_map"])
def test_devices_without_means(how):
    step, args = mapped(SAM, how, with_means=False)
    (line,) = samx.preflight(step, *args)
    assert "all 2 devices got the same gradient, but each has another loss" in line
    assert "samx.data_parallel(tx, axis_name)" in line


@pytest.mark.parametrize("how", ["pmap", "shard_map", "check_vma"])
def test_devices_with_means(how):
    step, args = mapped(SAM, how, with_means=True)
    assert samx.preflight(step, *args) == []


def test_lanes_of_vmap_are_trainings_of_their_own():
    def one(seed, batch):
        params = jax.tree.map(lambda w: w + 0.01 * seed, PARAMS)
        return make_step(SAM)(params, SAM.init(params), batch)

    assert samx.preflight(jax.vmap(one, in_axes=(0, None)), jnp.arange(2.0), BATCH) == []


def test_a_perturbation_that_half_precision_swallows():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    swallowed = optax.chain(samx.sam(0.001, perturb_dtype=None), optax.sgd(0.1))
    (line,) = report(swallowed, half)
    assert "half precision rounds" in line
    assert report(optax.chain(samx.sam(0.001), optax.sgd(0.1)), half) == []


LABELS = {"W1": "freeze", "b1": "freeze", "W2": "train", "b2": "train"}
FROZEN = {name: label == "freeze" for name, label in LABELS.items()}
PARTS = optax.partition({"train": optax.sgd(0.1), "freeze": optax.set_to_zero()}, LABELS)


def test_frozen_leaves_that_are_climbed():
    climbing = optax.chain(samx.sam(0.05), PARTS)
    (line,) = report(climbing)
    assert line.startswith("sam: ['W1'], ['b1'] are perturbed, but the step does not train them")
    assert "samx.freeze(tx, mask)" in line
    assert report(samx.freeze(climbing, FROZEN)) == []
    on_trained = on_leaves(metric_ball(0.05), lambda path, _: not FROZEN[path[-1].key])
    assert report(optax.chain(samx.sam(perturbation=on_trained), PARTS)) == []


def test_a_leaf_without_a_gradient_is_not_climbed():
    assert report(SAM, loss=lambda p, b: mean_loss(p | {"b2": DATA["x"][0, :3]}, b)) == []


def test_a_flax_train_state():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), BATCH["x"])["params"]
    mask = {"Dense_0": True, "Dense_1": False}
    tx = optax.chain(samx.sam(0.05), optax.sgd(0.1), optax.freeze(mask))

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        def value_fn(params):
            logits = state.apply_fn({"params": params}, batch["x"])
            return problem.cross_entropy(logits, batch["y"]).mean()

        value, grads = jax.value_and_grad(value_fn)(state.params)
        return state.apply_gradients(grads=grads, value=value, value_fn=value_fn)

    state = samx.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    (line,) = samx.preflight(step, state, BATCH)
    assert "['Dense_0']['bias'], ['Dense_0']['kernel'] are perturbed" in line
    assert not jax.tree.leaves(state.params)[0].is_deleted()


def test_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(10, 4, rngs=rngs)
            self.second = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    model = Model(nnx.Rngs(0))
    mask = lambda params: nnx.map_state(lambda path, _: path[0] == "first", params)  # noqa: E731
    tx = optax.chain(samx.sam(0.05), optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            return problem.cross_entropy(model(batch["x"]), batch["y"]).mean()

        value_fn = samx.flax.closure(model, loss)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads, value=value, value_fn=value_fn)
        return value

    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    (line,) = samx.preflight(step, model, optimizer, BATCH)
    assert "first" in line
    assert "second" not in line
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    chex.assert_trees_all_equal(after, before)


def test_the_compiled_step_is_left_alone():
    """A step that has been compiled is traced again, and only for the preflight."""
    traced = []

    def loss(params, batch):
        traced.append(None)
        return mean_loss(params, batch)

    step, state = make_step(SAM, loss=loss), SAM.init(PARAMS)
    expected = step(PARAMS, state, BATCH)
    assert samx.preflight(step, PARAMS, state, BATCH) == []
    count = len(traced)
    chex.assert_trees_all_equal(step(PARAMS, state, BATCH), expected)
    assert len(traced) == count


def test_a_step_without_samx():
    sgd = optax.with_extra_args_support(optax.sgd(0.1))
    (line,) = samx.preflight(make_step(sgd), PARAMS, sgd.init(PARAMS), BATCH)
    assert "no update of samx" in line
    state = SAM.init(PARAMS)
    compiled = make_step(SAM).lower(PARAMS, state, BATCH).compile()
    (line,) = samx.preflight(compiled, PARAMS, state, BATCH)
    assert "not a compiled program" in line


def test_arguments():
    with pytest.raises(TypeError, match="`step` must be a function, got"):
        samx.preflight(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`rtol`"):
        samx.preflight(lambda: None, rtol=0.0)
