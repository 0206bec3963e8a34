"""nnx models of all kinds: LoRA, tied weights, frozen layers; what a closure costs."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax_runs import Nnx, assert_same, batches, by_hand, in_float64, losses_of, nnx_pass, sampa

import samx
import samx.flax

pytestmark = pytest.mark.usefixtures("float64")


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
