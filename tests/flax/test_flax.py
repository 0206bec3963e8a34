"""Flax loops take the steps of loops written by hand, and update the model once per step."""

import functools
import pickle
from functools import partial
from zlib import crc32

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS
from flax import core, nnx, serialization
from jax.sharding import PartitionSpec as P

import samx
import samx.flax

STEPS, KEY = 8, 5
pytestmark = pytest.mark.usefixtures("float64")


def batches(steps=STEPS):
    data, _ = problem.make()
    return [problem.batch_at(data, t) for t in range(steps)]


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def in_float64(tree):
    return jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, tree)


# ---- One small model with BatchNorm and dropout, in linen and in nnx.


class Linen(nn.Module):
    rate: float = 0.5
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=False)(jnp.tanh(x)))


class Nnx(nnx.Module):
    def __init__(self, rate=0.5, axis_name=None):
        rngs = nnx.Rngs(0, dropout=KEY)
        self.first, self.last = nnx.Linear(10, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, axis_name=axis_name, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        nnx.update(self, in_float64(nnx.state(self)))

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def losses_of(model, batch):
    return cross_entropy(model(batch["x"]), batch)


@functools.cache
def linen_variables():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return in_float64(Linen().init(keys, batches(1)[0]["x"]))


# ---- By hand: `(params, memory, t, batch) -> (loss, gradient, memory)`. A pass updates `memory`,
# whose first entry holds the BatchNorm statistics.


def key_of_device(key):
    return jax.random.fold_in(key, jax.lax.axis_index("data"))


def linen_pass(rate, is_mapped=False):
    def one_pass(params, memory, t, batch):
        key = jax.random.key(KEY)
        key = jax.random.fold_in(key_of_device(key) if is_mapped else key, t)
        rngs = {"dropout": jax.random.fold_in(key, crc32(b"dropout"))}

        def loss(params):
            variables = {"params": params, "batch_stats": memory[0]}
            logits, moved = Linen(rate).apply(variables, batch["x"], rngs=rngs, mutable=True)
            return cross_entropy(logits, batch).mean(), moved["batch_stats"]

        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, grads, (statistics,)

    variables = linen_variables()
    return one_pass, variables["params"], (variables["batch_stats"],)


def nnx_pass(model, wrt=nnx.Param):
    def split(model):
        graph, params, *memory = nnx.split(model, wrt, nnx.BatchStat, ...)
        return graph, nnx.as_pure(params), nnx.as_pure(tuple(memory))

    graph, *start = split(model)

    def one_pass(params, memory, t, batch):
        model = nnx.merge(graph, params, *memory, copy=True)
        value_and_grad = nnx.value_and_grad(
            lambda model: losses_of(model, batch).mean(), argnums=nnx.DiffState(0, wrt)
        )
        value, grads = value_and_grad(model)
        return value, nnx.as_pure(grads), split(model)[2]

    return one_pass, *start


def climb(name, params, g):
    def metric(path, w):
        return np.abs(w) + 0.01 if "bias" not in str(path[-1]) else np.ones_like(w)

    rho = {"asam": 0.5, "sampa": 0.1, "momentum_sam": 0.3}.get(name, 0.05)
    t = jax.tree.map(np.ones_like, params)
    if name == "asam":
        t = jax.tree_util.tree_map_with_path(metric, params)
    length = np.sqrt(sum(np.sum((t * g) ** 2) for t, g in zip(*map(leaves, (t, g)), strict=True)))
    return jax.tree.map(lambda t, g: rho * t * t * g / (length + 1e-12), t, g)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def add(x, y, scale=1.0):
    return jax.tree.map(lambda x, y: np.asarray(x) + scale * np.asarray(y), x, y)


def by_hand(name, one_pass, params, memory, batches):
    """Return `(params, statistics, loss)` after every step of SGD with momentum 0.9."""
    buffer = g_y = jax.tree.map(np.zeros_like, params)
    previous, history = batches[0], []
    for t, batch in enumerate(batches):
        if name == "sampa":
            y = add(params, add(g_y, buffer, 0.9), -0.1) if t else params
            x = add(params, climb(name, params, g_y))
            _, g_x, _ = one_pass(x, memory, t, previous)
            loss, g_y, memory = one_pass(y, memory, t, batch)
            g, previous = add(g_x, add(g_y, g_x, -1), 0.2), batch
        elif name == "momentum_sam":
            point = add(params, climb(name, params, buffer), -1)
            loss, g, memory = one_pass(point, memory, t, batch)
        else:
            loss, g, moved = one_pass(params, memory, t, batch)
            point = params
            ascent_steps = {"two ascent steps": 2, "periodic": 1 - t % 2}.get(name, 1)
            for _ in range(ascent_steps):
                point = add(point, climb(name, point, g))
                _, g, _ = one_pass(point, memory, t, batch)
            memory = moved
        buffer = add(g, buffer, 0.9)
        params = add(params, buffer, -0.1)
        history.append((params, memory[0], loss))
    return history


# ---- With samx: one training step for all variants, `(state, batch) -> (state, loss)`.


def linen_training(build, batch_like, rate=0.5, axis_name=None, is_mapped=False):
    model, variables = Linen(rate, axis_name), linen_variables()
    state = samx.flax.TrainState.create(
        apply_fn=model.apply,
        **variables,
        key=jax.random.key(KEY),
        tx=build(batch_like, variables["batch_stats"]),
    )

    def step(state, batch):
        own = state.replace(key=key_of_device(state.key)) if is_mapped else state

        def losses_fn(params, batch):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, moved = state.apply_fn(
                variables, batch["x"], rngs=own.rngs("dropout"), mutable=["batch_stats"]
            )
            return cross_entropy(logits, batch), moved["batch_stats"]

        def value_fn(params):
            losses, statistics = losses_fn(params, batch)
            return losses.mean(), statistics

        value_and_grad = partial(samx.value_and_grad, axis_name="data")
        value_and_grad = value_and_grad if is_mapped else jax.value_and_grad
        (value, statistics), grads = value_and_grad(value_fn, has_aux=True)(state.params)
        statistics = samx.axis_mean(statistics, "data") if is_mapped else statistics
        closures = {"losses_fn": losses_fn, "batch": batch, "index": index_of(batch)}
        state = state.apply_gradients(grads=grads, value=value, batch_stats=statistics, **closures)
        return state, optax.tree.get(state.opt_state, "loss")

    return step, state, lambda state: (state.params, state.batch_stats)


def index_of(batch):
    return jnp.arange(len(jax.tree.leaves(batch)[0]))


def nnx_training(build, batch_like, rate=0.5, axis_name=None, is_mapped=False):
    model = Nnx(rate, axis_name)
    tx = build(batch_like, samx.flax.statistics(model))
    training = model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, *state = nnx.split(training, nnx.Param, nnx.BatchStat, ...)

    def step(state, batch):
        model, optimizer = nnx.merge(graph, *state, copy=True)
        losses_fn = samx.flax.closure(model, losses_of)
        value, grads = nnx.value_and_grad(lambda model: losses_of(model, batch).mean())(model)
        if is_mapped:
            nnx.update(model, samx.axis_mean(samx.flax.statistics(model), "data"))
        closures = {"losses_fn": losses_fn, "batch": batch, "index": index_of(batch)}
        optimizer.update(model, grads, value=value, **closures)
        samx.flax.keep_aux(model, optimizer)
        _, *state = nnx.split((model, optimizer), nnx.Param, nnx.BatchStat, ...)
        return nnx.as_pure(state), optax.tree.get(nnx.as_pure(optimizer.opt_state), "loss")

    return step, nnx.as_pure(state), lambda state: (state[0][0], state[1][0])


PASSES = {"linen": linen_pass, "nnx": lambda rate, is_mapped=False: nnx_pass(Nnx(rate))}
TRAININGS = {"linen": linen_training, "nnx": nnx_training}


KEEPS_AUX = ("sampa", "momentum_sam", "ausam", "sl_sam")


def variant(name, wrap=lambda tx: tx, **changes):
    def build(batch_like, statistics):
        aux_like = {"aux_like": statistics} if name in KEEPS_AUX else {}
        return wrap(VARIANTS[name].build(batch_like=batch_like, **aux_like, **changes))

    return build


def run(step, state, read, batches):
    history = []
    for batch in batches:
        state, loss = step(state, batch)
        history.append((*read(state), loss))
    return history


def assert_same(history, expected):
    for step, tolerance in ((0, 1e-12), (-1, 1e-10)):
        found, wanted = leaves(history[step]), leaves(expected[step])
        chex.assert_trees_all_close(found, wanted, rtol=tolerance, atol=tolerance)


@functools.cache
def hand_pass(api, rate):
    one_pass, params, memory = PASSES[api](rate)
    return jax.jit(one_pass), jax.tree.map(np.asarray, params), memory


@functools.cache
def hand_run(api, name, rate):
    return by_hand(name, *hand_pass(api, rate), batches())


@functools.cache
def samx_run(api, name):
    step, state, read = TRAININGS[api](variant(name), batches(1)[0])
    return run(jax.jit(step), state, read, batches())


every_api = pytest.mark.parametrize("api", TRAININGS)


@every_api
@pytest.mark.parametrize(
    "name", ["sam", "asam", "sampa", "two ascent steps", "periodic", "momentum_sam"]
)
def test_losses_parameters_and_statistics_are_those_of_a_loop_by_hand(api, name):
    assert_same(samx_run(api, name), hand_run(api, name, 0.5))


@every_api
@pytest.mark.parametrize(
    ("name", "changes"),
    [("ausam", {"fraction": 1.0, "num_groups": 1}), ("sl_sam", {"groups": 1})],
)
def test_on_everything_they_keep_what_sam_is_given(api, name, changes):
    """They equal SAM, including the statistics, which they take from their own clean pass."""
    step, state, read = TRAININGS[api](variant(name, **changes), batches(1)[0])
    assert_same(run(jax.jit(step), state, read, batches()), samx_run(api, "sam"))


@every_api
def test_statistics_are_those_of_plain_training_at_the_same_parameters(api):
    one_pass, params, memory = hand_pass(api, 0.5)
    for t, (batch, (new_params, statistics, loss)) in enumerate(
        zip(batches(), samx_run(api, "sam"), strict=True)
    ):
        plain_loss, _, memory = one_pass(params, memory, t, batch)
        found, expected = leaves((statistics, loss)), leaves((memory[0], plain_loss))
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)
        params = jax.tree.map(np.asarray, new_params)


# ---- On several devices.


def by_path(tree):
    """Return the specs of a state: the examples that SAMPa holds are sharded over the devices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P("data") if "previous" in jax.tree_util.keystr(path) else P(), tree
    )


def run_mapped(training, regime, build, **model):
    """Run the training in one regime on 8 devices, and check the replicas."""
    is_mapped = regime != "jit"
    data = batches(4)
    like = data[0] if regime != "pmap" else jax.tree.map(lambda x: x[:2], data[0])
    step, state, read = training(build, like, is_mapped=is_mapped, **model)
    if regime == "pmap":
        data = jax.tree.map(lambda x: np.reshape(x, (8, -1, *x.shape[1:])), data)
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), state)
        state, data = regimes.place((state, data), regimes.mesh_of(), P("data"))
        history = run(jax.pmap(step, axis_name="data"), state, read, data)
        history = jax.tree.map(np.asarray, history)
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * 8)), history)
        return jax.tree.map(lambda x: x[0], history)
    mesh, specs = regimes.mesh_of(), by_path(state)
    if is_mapped:
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, P("data")),
            out_specs=(specs, P()),
            check_vma=regime == "shard_map",
        )
    history = run(
        jax.jit(step),
        regimes.place(state, mesh, specs),
        read,
        regimes.place(data, mesh, P("data")),
    )
    regimes.check_replicas(history, [P()] * len(history))
    return history


def data_parallel(tx):
    return samx.data_parallel(tx, "data")


MAPPED = ["shard_map", "shard_map, no vma", "pmap"]


@pytest.mark.parametrize(("api", "name"), [("linen", "sam"), ("nnx", "sampa")])
@pytest.mark.parametrize("regime", MAPPED)
def test_synchronized_statistics_give_the_run_of_one_device(regime, api, name):
    history = run_mapped(
        TRAININGS[api], regime, variant(name, data_parallel), rate=0.0, axis_name="data"
    )
    assert_same(history, hand_run(api, name, 0.0)[:4])


@pytest.mark.parametrize(("api", "name"), [("linen", "sam"), ("nnx", "sampa")])
def test_under_jit_statistics_and_masks_are_those_of_the_whole_batch(api, name):
    history = run_mapped(TRAININGS[api], "jit", variant(name))
    assert_same(history, hand_run(api, name, 0.5)[:4])


@functools.cache
def mapped_hand_run(api, name):
    """Each device has its own statistics and, in linen, masks; results of a pass are averaged."""
    one_pass, params, memory = PASSES[api](0.5, is_mapped=True)
    mesh = regimes.mesh_of()

    def mean(x):
        return jax.lax.pmean(x, "data") if jnp.issubdtype(x.dtype, jnp.floating) else x

    fn = jax.shard_map(
        lambda *args: jax.tree.map(mean, one_pass(*args)),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    params, memory = jax.tree.map(np.asarray, params), regimes.place(memory, mesh, P())
    return by_hand(name, jax.jit(fn), params, memory, batches(4))


@pytest.mark.parametrize(("api", "name"), [("linen", "sampa"), ("nnx", "sam")])
@pytest.mark.parametrize("regime", MAPPED)
def test_statistics_and_masks_of_each_device(regime, api, name):
    history = run_mapped(TRAININGS[api], regime, variant(name, data_parallel))
    assert_same(history, mapped_hand_run(api, name))


# ---- Masks: if the loss is linear in the parameters, its gradient is the mask.


def keep():
    """A transformation whose state is the last gradient that it saw."""
    return optax.GradientTransformation(lambda params: params, lambda g, state, params=None: (g, g))


def masked_linen(tx, masks):
    state = samx.flax.TrainState.create(
        apply_fn=nn.Dropout(0.5, deterministic=False).apply,
        params={"w": jnp.ones(64)},
        key=jax.random.key(KEY),
        tx=tx,
    )

    def step(state, batch):
        def losses_fn(params, batch):
            rngs = state.rngs("dropout", masks=masks)
            return batch * state.apply_fn({}, params["w"], rngs=rngs).sum()

        own = state.apply_fn({}, jnp.ones(64), rngs=state.rngs("dropout"))
        grads = jax.grad(lambda params: losses_fn(params, batch).mean())(state.params)
        state = state.apply_gradients(grads=grads, losses_fn=losses_fn, batch=batch)
        return state, (own, state.opt_state[0]["w"], state.opt_state[2]["w"])

    return step, state


class Masked(nnx.Module):
    def __init__(self):
        self.w, self.dropout = nnx.Param(jnp.ones(64)), nnx.Dropout(0.5, rngs=nnx.Rngs(KEY))


def masked_nnx(tx, masks):
    model = Masked()
    graph, state = nnx.split((model, nnx.Optimizer(model, tx, wrt=nnx.Param)))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state, copy=True)

        def losses(model, batch):
            return batch * model.dropout(model.w[...]).sum()

        own = nnx.clone(model).dropout(jnp.ones(64))
        losses_fn = samx.flax.closure(model, losses, masks=masks)
        grads = nnx.grad(lambda model: losses(model, batch).mean())(model)
        optimizer.update(model, grads, losses_fn=losses_fn, batch=batch)
        seen = nnx.as_pure(optimizer.opt_state)
        return nnx.as_pure(nnx.state((model, optimizer))), (own, seen[0]["w"], seen[2]["w"])

    return step, nnx.as_pure(state)


def mapped_over_devices(step):
    spec = P("data")
    return jax.shard_map(step, mesh=regimes.mesh_of(), in_specs=(P(), spec), out_specs=P())


PLACES = {
    "eager": (lambda tx: tx, lambda step: step),
    "jit": (lambda tx: tx, jax.jit),
    "accumulate": (lambda tx: samx.accumulate(tx, 2), jax.jit),
    "data_parallel": (
        lambda tx: samx.data_parallel(samx.accumulate(tx, 2), "data"),
        lambda step: jax.jit(mapped_over_devices(step)),
    ),
}


@functools.cache
def masks_seen(api, masks, place):
    """Return the masks of the caller's pass, the clean pass and the sharp pass: [3 steps, 3]."""
    wrap, compiled = PLACES[place]
    tx = wrap(optax.chain(keep(), samx.sam(0.1), keep(), optax.sgd(0.1)))
    step, state = {"linen": masked_linen, "nnx": masked_nnx}[api](tx, masks)
    if place == "data_parallel":
        state = regimes.place(state, regimes.mesh_of(), P())
    step, seen = compiled(step), []
    for _ in range(3):
        state, three = step(state, jnp.ones(16))
        seen.append(three)
    return np.round(np.asarray(seen), 6)


@every_api
@pytest.mark.parametrize("place", PLACES)
def test_every_pass_of_a_step_has_the_same_mask(api, place):
    own, clean, sharp = np.moveaxis(masks_seen(api, "same", place), 1, 0)
    np.testing.assert_array_equal(clean, own)
    np.testing.assert_array_equal(sharp, own)
    assert len(np.unique(own, axis=0)) == 3
    assert set(own.flat) == {0.0, 2.0}


@every_api
@pytest.mark.parametrize("place", PLACES)
def test_fresh_masks_are_those_of_the_sharp_pass_alone(api, place):
    own, clean, sharp = np.moveaxis(masks_seen(api, "fresh", place), 1, 0)
    np.testing.assert_array_equal(clean, own)
    assert len(np.unique([*own, *sharp], axis=0)) == 6
    np.testing.assert_array_equal(own, masks_seen(api, "same", place)[:, 0])
    np.testing.assert_array_equal(sharp, masks_seen(api, "fresh", "jit")[:, 2])


@nnx.split_rngs(splits=2)
@nnx.vmap
def two_dropouts(rngs):
    return nnx.Dropout(0.5, rngs=rngs)


class Streams(nnx.Module):
    """Several streams of random numbers, one of them with two keys."""

    def __init__(self):
        self.w, self.rngs = nnx.Param(jnp.ones(4)), nnx.Rngs(dropout=1, noise=1)
        self.two = two_dropouts(nnx.Rngs(2))

    def numbers(self):
        many = nnx.vmap(lambda dropout: dropout.rngs.uniform(()))(self.two)
        return jnp.stack([self.rngs.dropout.uniform(()), self.rngs.noise.normal(()), *many])


@pytest.mark.parametrize("masks", ["same", "fresh"])
def test_nnx_streams_and_split_keys(masks):
    model = Streams()
    value_fn = samx.flax.closure(model, lambda m: m.w @ m.numbers(), masks=masks)
    params, expected = nnx.as_pure(nnx.state(model, nnx.Param)), model.numbers()
    clean = jax.grad(value_fn, has_aux=True)(params)[0]["w"]
    _, sharp = samx.value_and_grad_at(value_fn, params, optax.tree.zeros_like(params))
    np.testing.assert_array_equal(clean, expected)
    assert np.all((sharp["w"] == expected) == (masks == "same"))
    assert len(np.unique(sharp["w"])) == 4


def test_linen_keys_differ_between_names_and_steps():
    state = linen_training(variant("sam"), batches(1)[0])[1]
    keys = [state.replace(step=t).rngs("dropout", "noise") for t in range(3)]
    assert len({str(jax.random.key_data(key)) for step in keys for key in step.values()}) == 6
    assert state.rngs("noise")["noise"] == keys[0]["noise"]  # the same alone or with other names
    with pytest.raises(ValueError, match="the state has no `key`"):
        state.replace(key=None).rngs("dropout")


def test_masks_must_be_same_or_fresh():
    state = linen_training(variant("sam"), batches(1)[0])[1]
    for wrong in (
        lambda: state.rngs("dropout", masks="new"),
        lambda: samx.flax.closure(Masked(), lambda model: 0.0, masks=None),
    ):
        with pytest.raises(ValueError, match="`masks` must be 'same' or 'fresh', got"):
            wrong()


# ---- The model is updated once per step.


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
    chex.assert_trees_all_close(again, (value, moved), rtol=1e-12)
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


def sampa(statistics, batch):
    return samx.sampa(optax.sgd(0.1, momentum=0.9), batch_like=batch, aux_like=statistics)


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
    ("wrap", "freeze"), [(lambda tx: tx, core.freeze), (samx.skip_nonfinite, dict)]
)
def test_linen_statistics_are_the_aux_that_was_kept(wrap, freeze):
    step, state = averaging_state(freeze({"mean": jnp.ones(())}), wrap=wrap, freeze=freeze)
    for mean in (1.0, 2.0):
        state = step(state, jnp.full(4, mean), batch_stats={"mean": jnp.asarray(jnp.nan)})
        assert state.batch_stats == {"mean": mean}
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
    step, state = averaging_state(None)
    assert step(state, jnp.ones(4), batch_stats={"mean": jnp.ones(())}).batch_stats["mean"] == 1
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


# ---- What `TrainState` passes on and keeps.


def small_state(tx, cls=samx.flax.TrainState, freeze=dict, **fields):
    return cls.create(apply_fn=None, params=freeze({"w": jnp.ones(2)}), tx=tx, **fields)


GRADS = {"w": np.ones(2)}


def test_contract_keywords_reach_the_optimizer_and_unknown_ones_raise():
    seen = {}
    tx = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda g, state, params, **keywords: (g, seen.update(keywords) or ())
    )
    names = "value grad value_fn losses_fn batch weights ascent_fn validation_fn labels index"
    given = {name: i for i, name in enumerate(names.split())}
    state = small_state(tx).apply_gradients(grads=GRADS, **given, extra_args={"obj": 1})
    assert seen == given | {"obj": 1}
    assert state.tx is tx
    with pytest.raises(TypeError, match=r"\['batch_stat'\] are neither fields of TrainState nor"):
        state.apply_gradients(grads=GRADS, batch_stat={})
    plain = small_state(optax.scale(-1.0))  # takes no keywords
    assert plain.apply_gradients(grads=GRADS, **given).params["w"].tolist() == [0.0, 0.0]


def test_extra_args_are_for_the_base():
    def scaled(g, state, params=None, *, obj_fn, **_):
        return optax.tree.scale(-obj_fn(params), g), state

    base = optax.GradientTransformationExtraArgs(lambda params: (), scaled)
    for tx in (optax.chain(samx.sam(0.0), base), samx.with_base(samx.sam(0.0), base)):
        state = small_state(tx).apply_gradients(
            grads=GRADS, value_fn=lambda p: p["w"].sum(), extra_args={"obj_fn": lambda p: 3.0}
        )
        assert state.params["w"].tolist() == [-2.0, -2.0]


class Counting(samx.flax.TrainState):
    examples: int = 0


@pytest.mark.parametrize("freeze", [dict, core.freeze])
def test_a_state_goes_through_compiled_loops_and_files(freeze):
    """One program for all steps, also in `scan`; own fields; FrozenDicts; serialization."""
    tx = optax.chain(samx.sam(0.1), optax.adam(0.1))
    start = small_state(tx, Counting, freeze, key=jax.random.PRNGKey(0))

    def step(state, _=None):
        def value_fn(params):
            return jnp.sum(params["w"] ** 2)

        value, grads = jax.value_and_grad(value_fn)(state.params)
        state = state.apply_gradients(
            grads=grads, value=value, value_fn=value_fn, examples=state.examples + 4
        )
        return state, value

    start = start.replace(examples=jnp.zeros((), jnp.int32))
    assert (start.step.dtype, start.step.weak_type) == (jnp.int32, False)
    compiled, state = jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, start)
    for _ in range(3):
        state, _ = compiled(state)
    assert compiled._cache_size() == 1
    assert (int(state.step), int(state.examples)) == (3, 12)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    restored = serialization.from_bytes(start, serialization.to_bytes(state))
    pickled = pickle.loads(pickle.dumps(serialization.to_state_dict(state)))
    for same in (restored, serialization.from_state_dict(start, pickled)):
        chex.assert_trees_all_equal(same, state)
    by_scan, _ = jax.lax.scan(step, start, length=4)
    chex.assert_trees_all_close(by_scan, step(restored)[0], rtol=1e-12)


# ---- nnx models of all kinds.


class Tied(Nnx):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(2))
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        return self.last(self.dropout(self.two(jnp.tanh(self.one(self.norm(self.first(x)))))))


def with_lora():
    model = Nnx()
    model.last = nnx.LoRA(6, 2, 3, base_module=model.last, rngs=nnx.Rngs(1))
    return model


KINDS = {
    "LoRA": (with_lora, nnx.LoRAParam, "losses_fn"),
    "tied weights, one layer frozen": (
        Tied,
        nnx.All(nnx.Param, nnx.Not(nnx.PathContains("first"))),
        "value_fn",
    ),
}


def nnx_step(wrt, keyword="losses_fn"):
    """Make the README's loop, where the closures are extra arguments of `nnx.Optimizer.update`."""

    def step(model, optimizer, batch):
        def loss(model):
            return losses_of(model, batch).mean()

        closures = {"value_fn": samx.flax.closure(model, loss, wrt=wrt)}
        if keyword == "losses_fn":
            closures = {"losses_fn": samx.flax.closure(model, losses_of, wrt=wrt), "batch": batch}
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads, **closures)
        samx.flax.keep_aux(model, optimizer)
        return value

    return step


@pytest.mark.parametrize("kind", KINDS)
def test_nnx_models_of_all_kinds(kind):
    make, wrt, keyword = KINDS[kind]
    model = make()
    nnx.update(model, in_float64(nnx.state(model)))
    one_pass, *start = nnx_pass(nnx.clone(model), wrt)
    tx = optax.chain(samx.sam(0.05), optax.sgd(0.1, momentum=0.9))
    optimizer, step = nnx.Optimizer(model, tx, wrt=wrt), nnx.jit(nnx_step(wrt, keyword))
    history = []
    for batch in batches(3):
        value = step(model, optimizer, batch)
        _, params, statistics, _ = nnx.split(model, wrt, nnx.BatchStat, ...)
        history.append((nnx.as_pure(params), nnx.as_pure(statistics), value))
    assert_same(history, by_hand("sam", jax.jit(one_pass), *start, batches(3)))


def test_another_wrt_than_the_optimizer_s_is_refused():
    model, (batch,) = with_lora(), batches(1)
    optimizer = nnx.Optimizer(model, samx.sam(0.05), wrt=nnx.LoRAParam)
    value_fn = samx.flax.closure(model, lambda model: losses_of(model, batch).mean())
    with pytest.raises(ValueError, match="`wrt` chooses 8 arrays of the model, but 2 arrived"):
        optimizer.update(model, nnx.state(model, nnx.LoRAParam), value_fn=value_fn)


def test_a_closure_costs_nothing():
    """A step costs two gradients. If the aux is kept, XLA drops the caller's clean pass."""
    batch = {"x": jnp.ones((256, 64), jnp.float32), "y": jnp.zeros(256, int)}
    base = optax.with_extra_args_support(optax.scale(-0.1))

    def flops(build):
        first, last = (nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(2))
        model = nnx.Sequential(first, nnx.BatchNorm(64, rngs=nnx.Rngs(0)), jnp.tanh, last)
        optimizer = nnx.Optimizer(model, build(samx.flax.statistics(model)), wrt=nnx.Param)
        graph, state = nnx.split((model, optimizer))

        def step(state, batch):
            model, optimizer = nnx.merge(graph, state)
            nnx_step(nnx.Param)(model, optimizer, batch)
            return nnx.state((model, optimizer))

        return jax.jit(step).lower(state, batch).compile().cost_analysis()["flops"]

    plain = flops(lambda _: base)
    assert flops(lambda _: optax.chain(samx.sam(0.05), base)) < 2.1 * plain
    assert flops(lambda statistics: sampa(statistics, batch)) < 2.1 * plain
