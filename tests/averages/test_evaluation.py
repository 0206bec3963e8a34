"""What is evaluated: an average found in any state, and BatchNorm's statistics for it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import regimes
from flax import nnx
from jax.sharding import PartitionSpec as P

import samx
import samx.flax
from samx import averages

W = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
BASE = optax.chain(samx.sam(0.05), optax.sgd(0.25))
X = jnp.eye(2)


def losses_fn(params, batch):
    return (batch @ params["w"] + params["b"]) ** 2


def loss(params):
    return losses_fn(params, X).mean()


WRAPPED = {
    "around a wrapper": averages.swa(samx.skip_nonfinite(BASE), 0),
    "inside a wrapper": samx.skip_nonfinite(averages.swa(BASE, 0)),
    "in a chain": optax.chain(averages.swa(BASE, 0)),
    "around SAMPa": averages.swa(samx.sampa(optax.sgd(0.25), batch_like=X), 0),
    "in MultiSteps": optax.MultiSteps(averages.swa(BASE, 0), 1),
    "inside accumulate": samx.accumulate(averages.swa(BASE, 0), 2),
    "with all readings": averages.swa(samx.all_readings(BASE), 0),
    "with frozen leaves": averages.swa(samx.freeze(BASE, {"w": False, "b": True}), 0),
    "injected": optax.inject_hyperparams(averages.swa, static_args=("tx", "start", "every"))(
        BASE, start=0
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_found_in_any_state(name):
    tx = WRAPPED[name]
    grads = jax.grad(loss)(W)
    updates, state = jax.jit(
        lambda s: tx.update(grads, s, W, value_fn=loss, losses_fn=losses_fn, batch=X)
    )(tx.init(W))
    found = averages.params(state, W)
    chex.assert_trees_all_close(found, optax.apply_updates(W, updates), rtol=1e-6)
    assert not jnp.allclose(found["w"], W["w"])


def test_in_flax_states():
    tx = averages.swa(BASE, 0)
    state = samx.flax.TrainState.create(apply_fn=None, params=W, tx=tx)
    state = state.apply_gradients(grads=jax.grad(loss)(W), value_fn=loss)
    chex.assert_trees_all_equal(averages.params(state.opt_state, W), state.params)
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, averages.latest(optax.sgd(0.1), 2), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer.update(model, nnx.state(model, nnx.Param))
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    found = averages.params(nnx.as_pure(optimizer.opt_state), nnx.as_pure(nnx.state(model)))
    wanted = jax.tree.map(lambda w: 0.9 * w, before)
    chex.assert_trees_all_close(nnx.to_pure_dict(found), wanted, rtol=1e-6)
    nnx.update(model, found)


def test_nested_averages_are_told_apart_by_the_part_that_is_passed():
    tx = averages.ema(averages.swa(optax.sgd(1.0), 1), 0.0)
    w, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    for _ in range(3):
        updates, state = tx.update(jnp.ones(()), state, w)
        w = optax.apply_updates(w, updates)
    with pytest.raises(ValueError, match="found 2 in a EMAState; pass the part"):
        averages.params(state, w)
    assert float(averages.params(state.base, w)) == -2.5
    assert float(averages.params(state._replace(base=()), w)) == -3.0


def test_no_buffer_is_shared_with_the_state_or_the_parameters():
    params = W | {"table": jnp.arange(3)}
    for tx in (averages.ema(BASE), averages.latest(BASE, 1), averages.swad(BASE)):
        state = tx.init(params)
        found = averages.params(state, params)
        leaves = jax.tree.leaves((found, params, state))
        assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


STATE = averages.swa(BASE, 0).init(W)
WRONG = {
    "no average": (BASE.init(W), W, ValueError, "must hold one state of samx.averages, found 0"),
    "two": ((STATE, STATE), W, ValueError, "found 2 in a tuple"),
    "a leaf less": (STATE, {"w": W["w"]}, ValueError, "`params` must have the structure"),
    "another shape": (STATE, W | {"b": jnp.ones(2)}, ValueError, r"`params`\['b'\] must have the"),
    "a text": (STATE, W | {"b": "x"}, TypeError, r"`params`\['b'\] must be an array"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_states_and_parameters(what):
    state, params, kind, match = WRONG[what]
    with pytest.raises(kind, match=match):
        averages.params(state, params)


@pytest.mark.parametrize("name", ["ema", "swa", "latest", "swad"])
def test_parameters_of_another_shape_are_refused_for_each_kind(name):
    more = {"swa": (0,), "latest": (2,)}.get(name, ())
    state = getattr(averages, name)(BASE, *more).init(W)
    with pytest.raises(ValueError, match=r"`params`\['w'\] must have the shape"):
        averages.params(state, W | {"w": jnp.ones(3)})


# BatchNorm.

BATCHES = [np.random.RandomState(i).randn(5 + i, 3) * (i + 1) + i for i in range(3)]


class Net(nn.Module):
    momentum: float = 0.99
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, is_training=True):
        x = nn.Dense(3, use_bias=False)(x)
        return nn.BatchNorm(not is_training, momentum=self.momentum, axis_name=self.axis_name)(x)


def linen(momentum=0.99, axis_name=None):
    net = Net(momentum, axis_name)

    def fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    variables = jax.jit(net.init)(jax.random.key(0), jnp.asarray(BATCHES[0]))
    return fn, variables["params"], variables["batch_stats"]


def by_hand(params, batches=BATCHES):
    """Every batch counts equally; the variance is that within batches."""
    values = [x @ np.asarray(params["Dense_0"]["kernel"]) for x in batches]
    means, variances = [x.mean(0) for x in values], [x.var(0) for x in values]
    return {"mean": np.mean(means, 0), "var": np.mean(variances, 0)}


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_exact_statistics(momentum, float64):
    """Whatever BatchNorm's momentum is, and whatever the statistics of the training were."""
    fn, params, stats = linen(momentum)
    stats = jax.tree.map(lambda s: s + 7, stats)
    found = averages.batch_stats(fn, params, stats, map(jnp.asarray, BATCHES))["BatchNorm_0"]
    for k, wanted in by_hand(params).items():
        np.testing.assert_allclose(found[k], wanted, rtol=1e-6)
        assert found[k].dtype == stats["BatchNorm_0"][k].dtype


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_in_float32(scale):
    """Statistics of 1e8, too, do not hide the momentum."""
    fn, params, stats = linen()
    batches = [np.float32(scale * x) for x in BATCHES]
    found = averages.batch_stats(fn, params, stats, batches)
    for k, wanted in by_hand(params, batches).items():
        size = np.abs(wanted).max()
        np.testing.assert_allclose(found["BatchNorm_0"][k], wanted, rtol=0, atol=2e-5 * size)


def test_what_a_pass_does_not_change_stays(float64):
    """Integers, such as counters, and leaves that no batch enters."""

    def fn(params, stats, x):
        moved = 0.9 * stats["mean"] + 0.1 * x.mean(0)
        return {"mean": moved, "fixed": stats["fixed"], "count": stats["count"] + 1}

    stats = {"mean": jnp.ones(3), "fixed": jnp.full(2, 7.0), "count": jnp.array(5)}
    found = averages.batch_stats(fn, (), stats, BATCHES)
    np.testing.assert_allclose(found["mean"], np.mean([x.mean(0) for x in BATCHES], 0))
    assert found["fixed"].tolist() == [7.0, 7.0]
    assert int(found["count"]) == 5


def test_half_precision_statistics():
    def fn(params, stats, x):
        return stats * jnp.bfloat16(0.9) + (1 - jnp.bfloat16(0.9)) * x.mean(0)

    found = averages.batch_stats(fn, (), jnp.ones(3, jnp.bfloat16), [np.float32(BATCHES[2])])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(float), BATCHES[2].mean(0), rtol=0.02)


def test_nnx():
    """Everything but the two kinds of variables is fixed."""
    model = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def fn(params, stats, x):
        copy = nnx.merge(graph, params, stats, copy=True)
        copy(x)
        return nnx.state(copy, nnx.BatchStat)

    found = averages.batch_stats(fn, params, stats, [np.float32(x) for x in BATCHES])
    nnx.update(model, found)
    np.testing.assert_allclose(
        model.mean[...], np.mean([x.mean(0) for x in BATCHES], 0), rtol=2e-5, atol=2e-5
    )


def test_on_devices(float64):
    """A sharded batch under jit, and BatchNorm over the axis or means over it in shard_map."""
    mesh = regimes.mesh_of()
    batches = [jnp.asarray(np.resize(x, (16, 3))) for x in BATCHES[:2]]
    fn, params, stats = linen(0.5)
    wanted = averages.batch_stats(fn, params, stats, batches)
    sharded = regimes.place(batches, mesh, P("data"))
    chex.assert_trees_all_close(
        averages.batch_stats(fn, params, stats, sharded), wanted, rtol=1e-12
    )
    synchronized, *_ = linen(0.5, "data")
    for check_vma in (True, False):
        mapped = jax.shard_map(
            lambda p, s, *xs: averages.batch_stats(synchronized, p, s, xs),
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
        chex.assert_trees_all_close(jax.jit(mapped)(params, stats, *sharded), wanted, rtol=1e-9)


def test_the_pass_is_compiled_once_for_each_function():
    calls = []

    def fn(params, stats, x):
        calls.append(1)
        return 0.5 * stats + 0.5 * x.mean()

    for _ in range(2):
        averages.batch_stats(fn, (), jnp.zeros(()), [jnp.ones(4)] * 3)
    assert len(calls) == 1


BAD = {
    "no batch": (lambda p, s, x: s, jnp.ones(2), [], ValueError, "must hold one batch or more"),
    "evaluation mode": (lambda p, s, x: s, jnp.ones(2), [X], ValueError, "in training mode"),
    "another structure": (lambda p, s, x: (s,), jnp.ones(2), [X], TypeError, r"`fn\(params, b"),
    "another shape": (lambda p, s, x: s[:1], jnp.ones(2), [X], ValueError, r"`fn\(params, b"),
    "no function": (0.5, jnp.ones(2), [X], TypeError, "`fn` must be a function"),
    "two arguments": (lambda p, s: s, jnp.ones(2), [X], TypeError, "a function of 3 arguments"),
    "a text": (lambda p, s, x: s, "x", [X], TypeError, "`batch_stats` must be an array"),
    "no iterable": (lambda p, s, x: s, jnp.ones(2), 3, TypeError, "`batches` must be an iterable"),
    "integers only": (lambda p, s, x: s, jnp.arange(2), [X], ValueError, "in training mode"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_functions_and_batches(what):
    fn, stats, batches, kind, match = BAD[what]
    with pytest.raises(kind, match=match):
        averages.batch_stats(fn, W, stats, batches)


class FrozenFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        return nn.BatchNorm(use_running_average=False, momentum=0.9, name="trained")(x)


def statistics_of(model):
    def fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    return fn


def test_a_frozen_layer_evaluates_with_its_own_statistics():
    x = 1000 + 10 * jax.random.normal(jax.random.key(0), (16, 3))
    model = FrozenFirst()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    frozen = {"mean": jnp.full(3, 1000.0), "var": jnp.full(3, 100.0)}
    stats = {"frozen": frozen, "trained": variables["batch_stats"]["trained"]}
    found = averages.batch_stats(statistics_of(model), variables["params"], stats, [x])
    chex.assert_trees_all_equal(found["frozen"], frozen)
    seen = (x - 1000) / np.sqrt(100 + 1e-5)
    np.testing.assert_allclose(found["trained"]["mean"], seen.mean(0), atol=1e-4)
    np.testing.assert_allclose(found["trained"]["var"], seen.var(0), rtol=1e-3)


def test_statistics_that_are_no_moving_average_are_refused():
    model = nn.SpectralNorm(nn.Dense(4))
    x = jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x, update_stats=False)

    def fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, update_stats=True, mutable=["batch_stats"])[1][
            "batch_stats"
        ]

    with pytest.raises(ValueError, match=r"`batch_stats`.* must be a moving average"):
        averages.batch_stats(fn, variables["params"], variables["batch_stats"], [x])


def test_one_array_is_no_list_of_batches():
    with pytest.raises(TypeError, match="`batches` must be an iterable of batches, got one array"):
        averages.batch_stats(lambda p, s, x: s, W, W, X)


def test_an_average_of_integers_only():
    w = {"i": jnp.arange(3)}
    for tx in (averages.swad(optax.sgd(0.1)), averages.latest(optax.sgd(0.1), 2)):
        _, state = tx.update(w, tx.init(w), w)
        if isinstance(tx, optax.GradientTransformation) and hasattr(state, "segments"):
            state = averages.end_segment(state, 1.0)
        chex.assert_trees_all_equal(averages.params(state, w), w)
