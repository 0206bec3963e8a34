"""All averages at once, one inside the other: sharded as the parameters, with nothing sent."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import samx
from examples.common.checkpoints import Checkpoints
from examples.common.programs import communicated_bytes
from samx import averages

BASE = optax.chain(samx.sam(0.1), optax.sgd(0.1, momentum=0.9))
SPECS = {"W1": P(None, "data"), "b1": P("data"), "W2": P("data"), "b2": P()}
STEPS, SAVED = 5, 3


def all_averages(base=BASE):
    tx = averages.latest(averages.ema(averages.swa(base, 1), 0.5), 2)
    return averages.swad(tx, 2, 1, 0.5)


def read(state, params):
    """Return each of the four averages."""
    found = []
    for _ in range(4):
        found.append(averages.params(state._replace(base=()), params))
        state = state.base
    return found


def losses_fn(params, batch):
    """Gather the parameters, as in FSDP; on an Explicit mesh that has to be said."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        params = jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params)
    return problem.losses_fn(params, batch)


def make_step(tx):
    """Return a step with a checkpoint of SWAD in it."""
    inner = regimes.make_step(tx, losses_fn)

    def step(params, state, batch):
        params, state, value = inner(params, state, batch)
        return params, averages.end_segment(state, 1.0 + 0 * value), value

    return step


@functools.cache
def on_one_device():
    tx, params = all_averages(), problem.make()[1]
    step, state = jax.jit(make_step(tx)), jax.jit(tx.init)(params)
    history = regimes.run(step, params, state, regimes.batches(STEPS))
    return history, jax.jit(read)(*history[-1][1::-1])


class Sharded:
    """A training with parameters that are sharded over 8 devices."""

    def __init__(self, axis_type):
        self.mesh, self.tx = regimes.mesh_of(axis_type=axis_type), all_averages()
        with jax.set_mesh(self.mesh):
            self.params = regimes.place(problem.make()[1], self.mesh, SPECS)
            self.state = jax.jit(self.tx.init)(self.params)
            self.specs = samx.state_specs(self.tx, self.params, param_specs=SPECS)
            self.state = regimes.place(self.state, self.mesh, self.specs)  # as orbax will
            self.batches = regimes.place(regimes.batches(STEPS), self.mesh, P("data"))

    def run(self, step, steps):
        with jax.set_mesh(self.mesh):
            history = regimes.run(step, self.params, self.state, self.batches[steps])
        self.params, self.state, _ = history[-1]
        return history


def check_layout(tree, specs, mesh):
    def check(x, spec):
        assert x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), x.ndim)

    jax.tree.map(check, tree, specs)


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_sharded_parameters(axis_type, float64, tmp_path):
    """The values of one device, the layout of the parameters, and a resume with the same bits."""
    training = Sharded(axis_type)
    step = jax.jit(make_step(training.tx))
    assert training.specs.queue["W1"] == P(None, None, "data")
    assert training.specs.base.iterates["b1"] == P(None, "data")
    assert training.specs.base.base.mean == training.specs.base.base.base.mean == SPECS
    history = training.run(step, slice(STEPS))
    check_layout(training.state, training.specs, training.mesh)
    with jax.set_mesh(training.mesh):
        found = jax.jit(read)(training.state, training.params)
    check_layout(found, [SPECS] * 4, training.mesh)
    expected, averaged = on_one_device()
    chex.assert_trees_all_close(found, averaged, rtol=1e-11, atol=1e-11)
    chex.assert_trees_all_close(history[-1][:2], expected[-1][:2], rtol=1e-11, atol=1e-11)
    for place, (params, *_) in zip((0, 1), history[:-3:-1], strict=True):
        stored = jax.tree.map(lambda x, i=place: x[i], jax.device_get(training.state.base.iterates))
        chex.assert_trees_all_equal(stored, jax.device_get(params))

    resumed = Sharded(axis_type)
    resumed.run(step, slice(SAVED))
    with Checkpoints(tmp_path, "test") as checkpoints:
        checkpoints.save(SAVED, {"params": resumed.params, "state": resumed.state})
    del resumed
    again = Sharded(axis_type)
    with Checkpoints(tmp_path, "test") as checkpoints:
        kept, number = checkpoints.restore({"params": again.params, "state": again.state})
    assert number == SAVED
    again.params, again.state = kept["params"], kept["state"]
    again.run(step, slice(SAVED, STEPS))
    chex.assert_trees_all_equal(*(jax.device_get((t.params, t.state)) for t in (again, training)))


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_nothing_is_sent_for_an_average(axis_type):
    """Neither in a step, nor when it is read, nor when a segment is closed."""
    sent = []
    mesh = regimes.mesh_of(axis_type=axis_type)
    with jax.set_mesh(mesh):
        params = regimes.place(problem.make("float32")[1], mesh, SPECS)
        batch = regimes.place(problem.batch_at(problem.make("float32")[0], 0), mesh, P("data"))
        for tx in (optax.with_extra_args_support(BASE), all_averages()):
            specs = samx.state_specs(tx, params, param_specs=SPECS)
            state = regimes.place(jax.jit(tx.init)(params), mesh, specs)
            step = jax.jit(regimes.make_step(tx, losses_fn))
            sent.append(communicated_bytes(step.lower(params, state, batch).compile()))
        assert sent[0]
        assert sent[1] == sent[0]
        for fn, arguments in ((read, (params,)), (averages.end_segment, (1.0,))):
            assert not communicated_bytes(jax.jit(fn).lower(state, *arguments).compile())


@pytest.mark.parametrize("regime", ["shard_map", "shard_map, check_vma=False", "pmap"])
def test_inside_mapped_functions(regime, float64):
    """`data_parallel` around the averages: every device holds those of one device."""
    history = regimes.GLOBAL[regime](
        lambda _: averages.ema(averages.swa(BASE, 1), 0.5), problem.make()[1], regimes.batches(3)
    )
    tx = averages.ema(averages.swa(BASE, 1), 0.5)
    expected = regimes.single(lambda _: tx, problem.make()[1], regimes.batches(3))
    for a, b in zip(history, expected, strict=True):
        chex.assert_trees_all_close(
            *jax.tree.map(np.asarray, (a[1].mean, b[1].mean)), rtol=1e-11, atol=1e-11
        )
        chex.assert_trees_all_close(
            *jax.tree.map(np.asarray, (a[1].base.mean, b[1].base.mean)), rtol=1e-11, atol=1e-11
        )


def test_around_data_parallel(float64):
    mesh, params = regimes.mesh_of(), problem.make()[1]
    tx = averages.swa(samx.data_parallel(BASE, "data"), 0)
    specs = samx.state_specs(tx, params, batch_specs=P("data"))
    step = jax.shard_map(
        regimes.make_step(tx, axes=("data",)),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs, P()),
    )
    (batch,) = regimes.batches(1)[0]
    new, state, _ = jax.jit(step)(params, tx.init(params), batch)
    expected = regimes.single(lambda _: averages.swa(BASE, 0), params, regimes.batches(1))[0]
    chex.assert_trees_all_close(averages.params(state, params), expected[0], rtol=1e-12)
    chex.assert_trees_all_equal(averages.params(state, params), new)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_with_parameters_of_their_own(check_vma, float64):
    """Each averages what it holds: without `data_parallel`, or with shards of the parameters."""
    tx = all_averages(optax.identity())
    iterates = jax.random.normal(jax.random.key(0), (4, 8))
    mesh = regimes.mesh_of()

    def run(iterates):
        params = 0 * iterates[0]
        state = tx.init(params)
        for x in iterates:
            _, state = tx.update(x, state, params)
            state = averages.end_segment(state, 1.0)
        return read(state, params)

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=P(None, "data"), out_specs=P("data"), check_vma=check_vma
    )
    chex.assert_trees_all_close(jax.jit(mapped)(iterates), jax.jit(run)(iterates), rtol=1e-12)


def test_specs_of_stacked_leaves():
    """optax's L-BFGS stacks its memory; a scalar parameter has no axis to shard."""
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(())}
    specs = {"w": P("data"), "b": P()}
    tx = optax.scale_by_lbfgs(memory_size=3)
    found = samx.state_specs(tx, params, param_specs=specs)
    assert found.diff_params_memory == {"w": P(None, "data"), "b": P()}
    latest = averages.latest(optax.sgd(0.1), 4)
    found = samx.state_specs(latest, params, param_specs=specs)
    assert found.iterates == {"w": P(None, "data"), "b": P()}
    assert found.step == found.num_stored == P()


def test_donated_states():
    tx, params = all_averages(optax.sgd(0.1)), {"w": jnp.ones(3), "i": jnp.arange(2)}
    state = jax.jit(tx.init)(params)
    evaluated = averages.params(state._replace(base=()), params)
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=1)
    _, state = step(params, state)
    _, state = step(params, state)
    assert evaluated["w"].tolist() == [1.0] * 3
    assert evaluated["i"].tolist() == [0, 1]
