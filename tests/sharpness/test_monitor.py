"""The monitor measures on its steps, everywhere, and changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from costs import Counter
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from measured import net_loss
from regimes import DEVICES, mesh_of, place

import samx
from examples.common.programs import communicated_bytes
from samx import sharpness

pytestmark = pytest.mark.usefixtures("float64")
MEASURES = {
    "trace": lambda f, w: sharpness.trace(f, w, draws=2).mean,
    "ggn": lambda f, w: sharpness.trace(f, w, operator="ggn", draws=2),
}
LIKE = {"ggn": sharpness.Estimate(np.float64(0), np.float64(0))}
MONITOR = sharpness.monitor(MEASURES, every=2, values_like=LIKE)
BASE = optax.sgd(0.1, momentum=0.9)


def loss_on_logits(logits, batch):
    return problem.cross_entropy(logits, batch["y"])


PARTS = {"apply_fn": problem.logits_of, "loss_on_logits": loss_on_logits}


def update(tx, params, state, batch, weights=None):
    grads = jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)
    updates, state = tx.update(grads, state, params, batch=batch, weights=weights, **PARTS)
    return optax.apply_updates(params, updates), state


def train(tx, params, batches, weights=None):
    """Take a step on each batch; return the parameters before each, and what was monitored."""
    state, seen, step = tx.init(params), [], jax.jit(functools.partial(update, tx))
    for batch in batches:
        before = params
        params, state = step(params, state, batch, weights)
        seen.append((before, optax.tree.get(state, "monitored")))
    return seen


@jax.jit
def by_hand(params, batch, weights=None):
    f = net_loss(batch, weights=weights)
    return {name: measure(f, params) for name, measure in MEASURES.items()}


def batches(count=3):
    data, params = problem.make()
    return [problem.batch_at(data, t) for t in range(count)], params


def assert_close(found, wanted, rtol=1e-9):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), found, wanted)


OPTIMIZERS = {
    "first in a chain": lambda tx, batch: optax.chain(samx.looksam(0.1, 2), BASE, tx),
    "in front": lambda tx, batch: optax.chain(tx, samx.sam(0.1), BASE),
    "around a variant that wraps its base": lambda tx, batch: optax.chain(
        samx.sampa(BASE, batch_like=batch), tx
    ),
    "accumulated": lambda tx, batch: samx.accumulate(optax.chain(samx.sam(0.1), BASE, tx), 4),
    "skipping": lambda tx, batch: samx.skip_nonfinite(optax.chain(samx.sam(0.1), BASE, tx)),
}


FIRST = ("first in a chain", "accumulated")


@pytest.mark.parametrize(
    "where", [w if w in FIRST else pytest.param(w, marks=pytest.mark.slow) for w in OPTIMIZERS]
)
def test_values_are_those_of_the_step(where):
    data, params = batches()
    weights = jnp.arange(1.0, 17.0)
    seen = train(OPTIMIZERS[where](MONITOR, data[0]), params, data, weights)
    plain = train(OPTIMIZERS[where](MONITOR_OF_NOTHING, data[0]), params, data, weights)
    assert [int(monitored.at_step) for _, monitored in seen] == [0, 0, 2]
    for t in (0, 2):
        assert_close(dict(seen[t][1].values), by_hand(seen[t][0], data[t], weights))
    assert_close(seen[1][1], seen[0][1])
    assert_close(seen[2][0], plain[2][0])  # the parameters


MONITOR_OF_NOTHING = sharpness.monitor({"zero": lambda f, w: 0.0}, every=1)


def test_values_before_the_first_measurement_and_their_names():
    state = MONITOR.init(problem.make()[1])
    assert int(state.monitored.at_step) == -1
    assert optax.tree.get(state, "trace") == jnp.inf
    assert optax.tree.get(state, "ggn").stderr == jnp.inf
    single = MONITOR_OF_NOTHING.init(problem.make("float32")[1])
    assert single.monitored.values["zero"].dtype == jnp.float32


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_devices(check_vma):
    """Inside `data_parallel`, means are over the examples of all devices."""
    tx = samx.data_parallel(optax.chain(samx.sam(0.1), BASE, MONITOR), "data", ascent="local")
    data, params = problem.make()
    mesh = mesh_of()
    weights = place(jnp.arange(64.0), mesh, P("data"))
    step = jax.jit(
        jax.shard_map(
            functools.partial(update, tx),
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    _, state = step(params, tx.init(params), place(data, mesh, P("data")), weights)
    found = optax.tree.get(state, "monitored")
    assert_close(dict(found.values), by_hand(params, data, jnp.arange(64.0)))
    assert len(jax.devices()) >= DEVICES


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_are_not_gathered(axis_type):
    mesh = mesh_of(axis_type=axis_type)
    params = place({"a": jnp.ones((16, 3)), "b": jnp.ones((2, 24))}, mesh, P())
    specs = {"a": P("data"), "b": P(None, "data")}
    tx = optax.chain(optax.sgd(0.1), sharpness.monitor({"one": lambda f, w: 1.0}, every=2))
    with jax.set_mesh(mesh):
        params = place(params, mesh, specs)
        step = jax.jit(lambda p, s: tx.update(p, s, p, value_fn=lambda p: optax.tree.sum(p)))
        assert communicated_bytes(step.lower(params, tx.init(params)).compile()) == {}


@pytest.mark.parametrize("value", [lambda w: jnp.sum(w**2), jnp.sin])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_one_measure_waits_for_another(axis_type, value):
    """The compiled program compares a value with a number in front of the next measure."""
    mesh = mesh_of(axis_type=axis_type)
    names = ("first", "second", "third")

    def compiled(count):
        measures = {name: lambda f, w: value(w) for name in names[:count]}
        tx = sharpness.monitor(measures, 1, values_like={name: w for name in names[:count]})
        step = jax.jit(lambda w, state: tx.update(w, state, w, value_fn=jnp.sum))
        found = step.lower(w, tx.init(w)).compile()
        comparisons.append(found.as_text().count("direction=LT"))
        return found(w, tx.init(w))[1].monitored.values

    comparisons = []
    with jax.set_mesh(mesh):
        w = place(jnp.arange(16.0), mesh, P("data")) if value(jnp.ones(2)).ndim else jnp.ones(())
        for found in compiled(1), compiled(3):
            for x in found.values():
                np.testing.assert_allclose(x, value(w))
    assert comparisons[1] >= comparisons[0] + 2


def test_a_step_that_does_not_measure_costs_nothing():
    """Passes are counted while they run."""
    (batch, *_), params = batches()
    counter = Counter()

    def value_fn(params):
        return counter.watch(problem.losses_fn(params, batch))

    measures = {"loss": lambda f, w: f(w)}
    tx = optax.chain(optax.sgd(0.1), sharpness.monitor(measures, every=3))
    step, state = jax.jit(functools.partial(tx.update, value_fn=value_fn)), tx.init(params)
    counts = []
    for _ in range(5):
        _, state = step(params, state, params)
        jax.effects_barrier()
        counts.append(counter.passes["forward"])
    assert counts == [1, 1, 1, 2, 2]


def test_vmap_keeps_a_real_branch():
    (batch, *_), params = batches()
    tx = optax.chain(samx.sam(0.1), BASE, MONITOR)

    def lane(scale):
        scaled = optax.tree.scale(scale, params)
        return update(tx, scaled, tx.init(scaled), batch)[1]

    scales = jnp.array([1.0, 0.5])
    program = str(jax.make_jaxpr(jax.vmap(lane))(scales))
    assert re.search(r"cond\[", program)
    found = jax.jit(jax.vmap(lane))(scales)
    wanted = by_hand(optax.tree.scale(0.5, params), batch)
    assert_close(optax.tree.get(found, "monitored").values["trace"][1], wanted["trace"])


def test_normalized_logits_of_a_step():
    (batch, *_), params = batches()
    measures = {"loss": lambda f, w: sharpness.normalize_logits(f)(w)}
    tx = sharpness.monitor(measures, every=1)
    _, state = tx.update(params, tx.init(params), params, batch=batch, **PARTS)
    wanted = sharpness.normalize_logits(net_loss(batch))(params)
    np.testing.assert_allclose(state.monitored.values["loss"], wanted, rtol=1e-12)


def test_a_loss_of_one_number_is_enough():
    tx = sharpness.monitor({"trace": MEASURES["trace"]}, every=1)
    w = jnp.ones(3)
    _, state = tx.update(w, tx.init(w), w, value_fn=lambda w: (w @ w, "aux"))
    np.testing.assert_allclose(state.monitored.values["trace"], 6)


def step_of(measures, params=(1.0,), **keywords):
    tx = sharpness.monitor(measures, every=1)
    w = jnp.ones(3)
    return tx.update(w, tx.init(w), w if params else None, **keywords)


def w_squared(w):
    return w @ w


WRONG = {
    "nothing": (lambda: sharpness.monitor({}, 1), ValueError, "`measures`"),
    "a list": (lambda: sharpness.monitor([MEASURES["trace"]], 1), ValueError, "`measures`"),
    "a name": (lambda: sharpness.monitor({1: MEASURES["trace"]}, 1), TypeError, "`measures`"),
    "no function": (lambda: sharpness.monitor({"a": 1}, 1), TypeError, "measures['a']"),
    "of one": (lambda: sharpness.monitor({"a": w_squared}, 1), TypeError, "2 arguments"),
    "every": (lambda: sharpness.monitor(MEASURES, 0), ValueError, "`every`"),
    "every half": (lambda: sharpness.monitor(MEASURES, 0.5), TypeError, "`every`"),
    "like": (lambda: sharpness.monitor(MEASURES, 1, values_like={"b": 1}), ValueError, "['b']"),
    "params": (lambda: step_of(MEASURES, params=(), value_fn=w_squared), ValueError, "`params`"),
    "no loss": (lambda: step_of(MEASURES), ValueError, "monitor: `value_fn` is missing"),
    "a vector": (
        lambda: step_of({"v": lambda f, w: w}, value_fn=w_squared),
        ValueError,
        "'v' must return a value of shape (), got (3,)",
    ),
    "text": (lambda: step_of({"v": lambda f, w: "a"}, value_fn=w_squared), TypeError, "['v']"),
    "no logits": (lambda: step_of(MEASURES, value_fn=w_squared), ValueError, "needs the logits"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=re.escape(message)):
        call()
