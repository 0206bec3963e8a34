"""Low-rank adapters are trained, the weights that they adapt are frozen: only adapters are climbed.

By hand: the norm and the step are those of the adapters alone.
"""

import chex
import hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from flax import nnx
from flax_runs import in_float64
from optax import contrib

import samx
import samx.flax
from samx.perturbations import metric_ball, on_leaves

pytestmark = pytest.mark.usefixtures("float64")

RHO, STEPS = 0.3, 4
MOMENTUM = optax.sgd(0.1, momentum=0.9)
TRACE, AVERAGE = ({"a": how, "b": how} for how in ((0.9, 1.0), (0.95, 0.05)))


def batches():
    return [problem.batch_at(problem.make()[0], t) for t in range(STEPS)]


def start():
    """Return the adapters and the frozen weights, of a network with one adapted layer."""
    rng = np.random.RandomState(3)
    adapters = {"a": 0.3 * rng.randn(10, 2), "b": 0.1 * rng.randn(2, 16)}
    return jax.tree.map(jnp.asarray, adapters), problem.make()[1]


def losses_of(adapters, frozen, batch):
    kernel = frozen["W1"] + adapters["a"] @ adapters["b"]
    return problem.losses_fn(frozen | {"W1": kernel}, batch)


@jax.jit
def gradients(adapters, frozen, batch):
    return jax.grad(lambda *w: losses_of(*w, batch).mean(), argnums=(0, 1))(adapters, frozen)


def one_pass(adapters, frozen, batch):
    return gradients(adapters, frozen, batch)[0], frozen


def climb_all(adapters, frozen, batches):
    """Climb the frozen weights too, and move the adapters."""
    state = MOMENTUM.init(adapters)
    for batch in batches:
        eps = hand.on_sphere(RHO, gradients(adapters, frozen, batch))
        g_s, _ = gradients(*hand.add((adapters, frozen), eps), batch)
        updates, state = MOMENTUM.update(g_s, state, adapters)
        adapters = hand.add(adapters, updates)
        yield adapters, frozen


def sam_by_hand(*start):
    return hand.sam(one_pass, MOMENTUM, RHO, *start, batches())


def momentum_sam_by_hand(*start):
    return hand.momentum_sam(one_pass, MOMENTUM, RHO, TRACE, *start, batches())


def sampa_by_hand(*start):
    return hand.sampa(one_pass, MOMENTUM, RHO, 0.2, *start, batches())


ALONE = {
    "sam": (lambda: optax.chain(samx.sam(RHO), MOMENTUM), sam_by_hand),
    "sampa": (lambda: samx.sampa(MOMENTUM, RHO, batch_like=batches()[0]), sampa_by_hand),
    "momentum_sam": (lambda: samx.momentum_sam(MOMENTUM, RHO), momentum_sam_by_hand),
}


def train(tx, params, losses_fn):
    """Yield the parameters after each step."""
    state = tx.init(params)
    losses_fn = jax.jit(losses_fn)
    for batch in batches():
        g = jax.grad(lambda p, batch=batch: losses_fn(p, batch).mean())(params)
        updates, state = tx.update(g, state, params, losses_fn=losses_fn, batch=batch)
        params = optax.apply_updates(params, updates)
        yield params


@pytest.mark.parametrize("name", ALONE)
def test_the_adapters_are_the_parameters(name):
    build, by_hand = ALONE[name]
    adapters, frozen = start()
    found = train(build(), adapters, lambda adapters, batch: losses_of(adapters, frozen, batch))
    hand.assert_same(found, [adapters for adapters, _ in by_hand(adapters, frozen)])


BASE = optax.partition(
    {"trained": MOMENTUM, "frozen": optax.set_to_zero()},
    {"adapters": "trained", "frozen": "frozen"},
)
ADAPTERS = on_leaves(metric_ball(RHO), lambda path, leaf: path[0].key == "adapters")
TOGETHER = {
    "sam on the adapters": (
        lambda: optax.chain(samx.sam(perturbation=ADAPTERS), BASE),
        sam_by_hand,
    ),
    "sam on all leaves": (
        lambda: optax.chain(samx.sam(RHO), BASE),
        lambda *start: climb_all(*start, batches()),
    ),
    "momentum_sam": (lambda: samx.momentum_sam(BASE, RHO), momentum_sam_by_hand),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_adapters_and_frozen_weights_in_one_tree(name):
    build, by_hand = TOGETHER[name]
    adapters, frozen = start()
    found = train(
        build(),
        {"adapters": adapters, "frozen": frozen},
        lambda w, batch: losses_of(w["adapters"], w["frozen"], batch),
    )
    expected = [{"adapters": w, "frozen": frozen} for w, frozen in by_hand(adapters, frozen)]
    hand.assert_same(found, expected)


class Adapted(nnx.Module):
    def __init__(self, adapters, frozen):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(10, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        self.first = nnx.LoRA(10, 2, 16, base_module=self.first, rngs=rngs)
        nnx.update(self, in_float64(nnx.state(self)))
        self.first.lora_a[...], self.first.lora_b[...] = adapters["a"], adapters["b"]
        first, last = self.first.base_module, self.last
        first.kernel[...], first.bias[...] = frozen["W1"], frozen["b1"]
        last.kernel[...], last.bias[...] = frozen["W2"], frozen["b2"]

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


NNX = {name: ALONE[name] for name in ("sam", "momentum_sam")} | {
    "momentum_sam of Muon": (
        lambda: samx.momentum_sam(contrib.muon(0.1), RHO),
        lambda *start: hand.momentum_sam(
            one_pass, contrib.muon(0.1), RHO, AVERAGE, *start, batches()
        ),
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    build, by_hand = NNX[name]
    model = Adapted(*start())
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before = jax.tree.map(np.array, nnx.as_pure(nnx.state(model, frozen)))
    optimizer = nnx.Optimizer(model, build(), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            return problem.cross_entropy(model(batch["x"]), batch["y"]).mean()

        value_fn = samx.flax.closure(model, loss, wrt=nnx.LoRAParam)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads, value_fn=value_fn)

    history = []
    for batch in batches():
        step(model, optimizer, batch)
        history.append([model.first.lora_a[...], model.first.lora_b[...]])
    hand.assert_same(history, [adapters for adapters, _ in by_hand(*start())])
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state(model, frozen)), before)
