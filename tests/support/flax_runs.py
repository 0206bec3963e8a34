"""Loops with flax, and the same loops by hand: one small model with BatchNorm and dropout."""

import functools
from functools import partial
from zlib import crc32

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
from cases import VARIANTS
from flax import nnx

import samx
import samx.flax

STEPS, KEY = 8, 5


def batches(steps=STEPS):
    data, _ = problem.make()
    return [problem.batch_at(data, t) for t in range(steps)]


def cross_entropy(logits, batch):
    return problem.cross_entropy(logits, batch["y"])


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
    return in_float64(jax.jit(Linen().init)(keys, batches(1)[0]["x"]))


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


def climb(name, g):
    rho = {"sampa": 0.1, "momentum_sam": 0.3}.get(name, 0.05)
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in leaves(g)))
    return jax.tree.map(lambda g: rho * np.asarray(g) / (length + 1e-12), g)


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
            x = add(params, climb(name, g_y))
            _, g_x, _ = one_pass(x, memory, t, previous)
            loss, g_y, memory = one_pass(y, memory, t, batch)
            g, previous = add(g_x, add(g_y, g_x, -1), 0.2), batch
        elif name == "momentum_sam":
            point = add(params, climb(name, buffer), -1)
            loss, g, memory = one_pass(point, memory, t, batch)
        else:
            loss, g, moved = one_pass(params, memory, t, batch)
            point = params
            ascent_steps = {"two ascent steps": 2, "periodic": 1 - t % 2}.get(name, 1)
            for _ in range(ascent_steps):
                point = add(point, climb(name, g))
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


def keep():
    """A transformation whose state is the last gradient that it saw."""
    return optax.GradientTransformation(lambda params: params, lambda g, state, params=None: (g, g))


class Masked(nnx.Module):
    def __init__(self):
        self.w, self.dropout = nnx.Param(jnp.ones(64)), nnx.Dropout(0.5, rngs=nnx.Rngs(KEY))


def sampa(statistics, batch):
    return samx.sampa(optax.sgd(0.1, momentum=0.9), batch_like=batch, aux_like=statistics)
