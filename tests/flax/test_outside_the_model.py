"""Random streams, modules and metrics beside an nnx model: a pass does not change them.

The oracles are steps in plain nnx, on clones that were made by hand.
"""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_runs import cross_entropy, in_float64

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")

RHO, RATE, STEPS = 0.05, 0.1, 3


def as_float64(node):
    nnx.update(node, in_float64(nnx.state(node)))
    return node


def climbed(model, grads, rho=RHO):
    """Move a model along its gradient."""
    scale = rho / jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    nnx.update(model, jax.tree.map(lambda w, g: w + scale * g, nnx.state(model, nnx.Param), grads))
    return model


def sgd_update(model, grads):
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda w, g: w - RATE * g, params, grads))


def optimizer_of(model, tx):
    return nnx.Optimizer(model, optax.chain(tx, optax.sgd(RATE)), wrt=nnx.Param)


def assert_same(*nodes):
    """Compare everything that nnx objects hold: parameters, statistics, counters and keys."""
    found, expected = (
        [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in jax.tree.leaves(nnx.as_pure(nnx.state(node)))
        ]
        for node in nodes
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- Flax's MNIST example: `model(images, rngs)`.


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 3, kernel_size=(3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.5)
        self.linear = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x, rngs):
        x = nnx.relu(self.dropout(self.norm(self.conv(x)), rngs=rngs))
        return self.linear(nnx.avg_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1))


def mnist_loss(model, rngs, batch):
    logits = model(batch["image"], rngs)
    return cross_entropy(logits, {"y": batch["label"]}).mean(), logits


def mnist(train_step, tx):
    """Return model, random streams and metrics after some steps."""
    model = as_float64(CNN(nnx.Rngs(0)))
    rngs, metrics = nnx.Rngs(1), nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    as_float64(metrics)
    optimizer, train_step = optimizer_of(model, tx), nnx.jit(train_step)
    draw = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = {"image": draw.normal(size=(4, 4, 4, 1)), "label": draw.integers(3, size=4)}
        train_step(model, optimizer, metrics, rngs, batch)
    return model, rngs, metrics


def test_flax_s_mnist_example():
    def with_samx(model, optimizer, metrics, rngs, batch):
        value_fn = samx.flax.closure(model, lambda model: mnist_loss(model, rngs, batch))
        value_and_grad = nnx.value_and_grad(mnist_loss, has_aux=True)
        (loss, _), grads = value_and_grad(model, rngs, batch)
        metrics.update(loss=loss)
        optimizer.update(model, grads, value=loss, value_fn=value_fn)

    def by_hand(model, optimizer, metrics, rngs, batch):
        sharp_model, sharp_rngs = nnx.clone(model), nnx.clone(rngs)
        value_and_grad = nnx.value_and_grad(mnist_loss, has_aux=True)
        (loss, _), grads = value_and_grad(model, rngs, batch)
        metrics.update(loss=loss)
        _, grads = value_and_grad(climbed(sharp_model, grads), sharp_rngs, batch)
        sgd_update(model, grads)

    for found, expected in zip(
        mnist(with_samx, samx.sam(RHO)), mnist(by_hand, optax.identity()), strict=True
    ):
        assert_same(found, expected)


# ---- Other things that a loss captures.


class Outside(nnx.Module):
    """Whatever a loss may change beside the model."""

    def __init__(self):
        self.head = nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(2))
        self.metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
        self.calls, self.rngs = nnx.Variable(jnp.zeros(())), nnx.Rngs(noise=3)
        as_float64(self)


def noisy_loss(model, head, metrics, calls, rngs, x):
    x = x + rngs.noise.normal(x.shape)
    loss = ((head(model(x)) - 1) ** 2).mean() + (model.kernel[...] ** 4).sum()
    metrics.update(loss=loss)
    calls[...] += 1
    return loss


def test_a_captured_module_metric_and_variable_change_once_per_step():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))

    def with_samx(model, optimizer, outside, x):
        head, others = outside.head, {"metrics": outside.metrics, "calls": outside.calls}

        def loss(model, rngs=outside.rngs):
            return noisy_loss(model, head, rngs=rngs, x=x, **others)

        value_fn = samx.flax.closure(model, loss)
        rest = outside.head, outside.metrics, outside.calls, outside.rngs, x
        _, grads = nnx.value_and_grad(noisy_loss)(model, *rest)
        optimizer.update(model, grads, value_fn=value_fn)

    def by_hand(model, optimizer, outside, x):
        sharp_model, copy = nnx.clone((model, outside))
        for moved, out in ((model, outside), (sharp_model, copy)):
            rest = out.head, out.metrics, out.calls, out.rngs, x
            _, grads = nnx.value_and_grad(noisy_loss)(moved, *rest)
            if out is outside:
                climbed(sharp_model, grads)
        sgd_update(model, grads)

    runs = []
    for step, tx in ((with_samx, samx.sam(RHO)), (by_hand, optax.identity())):
        model, outside = as_float64(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), Outside()
        optimizer, step = optimizer_of(model, tx), nnx.jit(step)
        for _ in range(STEPS):
            step(model, optimizer, outside, x)
        runs.append((model, outside))
    for found, expected in zip(*runs, strict=True):
        assert_same(found, expected)
    assert runs[0][1].calls[...] == STEPS


# ---- Ways to capture. The loss is linear in the parameters, so that its gradient is the mask.


class Weights(nnx.Module):
    def __init__(self, rngs=None):
        self.w, self.dropout = nnx.Param(jnp.ones(64)), nnx.Dropout(0.5)
        self.rngs = rngs


def masked_loss(model, rngs):
    return model.dropout(model.w[...], rngs=rngs).sum()


class Head(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs

    def loss(self, model):
        return masked_loss(model, self.rngs)


def nested(rngs):
    def inner(model):
        return masked_loss(model, rngs)

    return lambda model: inner(model)


def with_default(rngs):
    return lambda model, *, rngs=rngs: masked_loss(model, rngs)


def at_the_top_of_a_script(rngs):
    script = {"rngs": rngs, "masked_loss": masked_loss}
    exec("def inner(model): return masked_loss(model, rngs)\nfn = lambda m: inner(m)", script)
    return script["fn"]


WAYS = {
    "closure": lambda rngs: lambda model: masked_loss(model, rngs),
    "nested functions": nested,
    "default": with_default,
    "partial": lambda rngs: functools.partial(masked_loss, rngs=rngs),
    "partial of a partial": lambda rngs: functools.partial(
        functools.partial(lambda rngs, model: masked_loss(model, rngs), rngs)
    ),
    "method of a module": lambda rngs: Head(rngs).loss,
    "containers": lambda rngs: (
        lambda model, kept={"a": [(rngs,)]}: masked_loss(model, kept["a"][0][0])
    ),
    "globals": at_the_top_of_a_script,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_pass_draws_the_masks_of_the_caller_s_own(way):
    model, rngs = Weights(), nnx.Rngs(7)
    masked_loss(model, rngs)  # not at the start of the stream
    fn = WAYS[way](rngs)
    same, fresh = (samx.flax.closure(model, fn, masks=masks) for masks in ("same", "fresh"))
    own = nnx.clone(model).dropout(jnp.ones(64), rngs=nnx.clone(rngs))
    fn(model)
    count = rngs.default.count[...]
    assert count == 2
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    zeros = optax.tree.zeros_like(params)
    for value_fn in (same, fresh):
        clean = jax.grad(value_fn, has_aux=True)(params)[0]["w"]
        np.testing.assert_array_equal(clean, own)
    for value_fn in (same, fresh):
        sharp = samx.value_and_grad_at(value_fn, params, zeros)[1]["w"]
        assert np.array_equal(sharp, own) == (value_fn is same)
        assert set(np.asarray(sharp)) == {0.0, 2.0}
    assert rngs.default.count[...] == count


def test_streams_that_the_model_holds_too():
    """A draw of the model moves the stream outside, as it does in the caller's own pass."""

    def loss(model):
        return masked_loss(model, model.rngs) + masked_loss(model, rngs)

    rngs = nnx.Rngs(7)
    model = Weights(rngs)
    model.w[...] = jnp.arange(64.0) ** 2
    value_fn = samx.flax.closure(model, loss)
    grads, _ = jax.grad(value_fn, has_aux=True)(nnx.as_pure(nnx.state(model, nnx.Param)))
    assert rngs.default.count[...] == 0
    np.testing.assert_allclose(grads["w"] @ model.w[...], loss(model), rtol=1e-12)
    assert rngs.default.count[...] == 2
    assert set(np.asarray(grads["w"])) == {0.0, 2.0, 4.0}  # two masks


def test_the_model_itself_is_a_constant_where_it_is_captured():
    model = Weights()
    value_fn = samx.flax.closure(model, lambda m: ((m.w[...] - model.w[...]) ** 2).sum())
    moved = jax.tree.map(lambda w: w + 3, nnx.as_pure(nnx.state(model, nnx.Param)))
    model.w[...] += 100  # after the closure was made
    value, grads = jax.value_and_grad(value_fn, has_aux=True)(moved)
    assert value[0] == 9 * 64
    np.testing.assert_array_equal(grads["w"], 6.0)


def test_what_is_not_found_is_refused():
    model, holder = Weights(), types.SimpleNamespace(rngs=nnx.Rngs(0))
    value_fn = samx.flax.closure(model, lambda model: masked_loss(model, holder.rngs))
    message = r"did not find.*lambda model: loss\(model, batch, rngs\), or functools.partial"
    with pytest.raises(ValueError, match=message):
        jax.grad(value_fn, has_aux=True)(nnx.as_pure(nnx.state(model, nnx.Param)))
    assert holder.rngs.default.count[...] == 0
