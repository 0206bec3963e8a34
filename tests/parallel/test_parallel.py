"""Every regime takes the step of one device on the whole batch, or the mean of per-shard steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import regimes
from cases import CLOSURES, KINDS, VARIANTS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from regimes import (
    GLOBAL,
    LOCAL,
    PAIRED,
    VALID,
    assert_close,
    assert_same,
    batches,
    build,
    first_batch,
    gradient,
    on_one_device,
    sampa,
)

import samx
from samx import policies


def pairs(regimes):
    """Pair rows with regimes: SAM with all, one row of each kind with a mapped one.

    Variants that choose among the examples, or divide them, also run on an Explicit mesh; there
    samx has more to do than `jax.jit`. Some of them are slow.
    """
    regimes, slow = list(regimes), {"ausam", "bsam", "fisher_sparse_sam", "focal_sam"}
    found = [("sam", regime) for regime in regimes]
    for i, name in enumerate(name for name in KINDS if name != "sam"):
        found.append((name, ("shard_map", "pmap")[i % 2]))
        if "losses_fn" in VARIANTS[name].needs and "jit, explicit" in regimes:
            found.append((name, "jit, explicit"))
    return [
        pytest.param(
            *(name, regime),
            id=f"{regime}-{name}",
            marks=[pytest.mark.slow] if name in slow and regime == "jit, explicit" else [],
        )
        for name, regime in found
    ]


def climbing_alone(regimes):
    """Keep the pairs whose step is a mean over the shards; one for each set of closures is fast."""
    kept = [pair for pair in pairs(regimes) if VARIANTS[pair.values[0]].is_mean_of_shards]
    return [
        pair
        if pair.values[0] in CLOSURES
        else pytest.param(*pair.values, id=pair.id, marks=pytest.mark.slow)
        for pair in kept
    ]


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("name", "regime"), pairs(GLOBAL))
def test_global_is_the_step_of_one_device(name, regime):
    history = GLOBAL[regime](build(name), problem.make()[1], batches())
    assert_same(history, on_one_device(name))


def without_readings(state):
    """Clear the readings: with local ascent they are defined differently, as documented."""
    empty = jax.tree.map(lambda x: 0, optax.tree.get(state, "readings"))
    norms = {key: 0 for key in ("selected_loss", "largest_norm") if has(state, key)}
    return optax.tree.set(state, readings=empty, **norms)


def has(state, key):
    return optax.tree.get(state, key) is not None


# Arguments for one of 8 devices, instead of the whole batch.
SHARD = {"ksam": {"num_selected": 1, "num_groups": 1}}
LINEAR = {"sl_sam": {"bandit_learning_rate": 0.0}}  # a bandit that does not learn


@functools.cache
def on_every_shard(name, num_shards=regimes.DEVICES):
    tx = build(name, **SHARD.get(name, {}) | LINEAR.get(name, {}))
    return regimes.per_shard(tx, problem.make()[1], batches(), num_shards)


@pytest.mark.parametrize(("name", "regime"), climbing_alone(LOCAL))
def test_local_is_the_mean_of_per_shard_steps(name, regime):
    tx = build(name, **LINEAR.get(name, {}))
    history = LOCAL[regime](tx, problem.make()[1], batches(), ascent="local")
    assert_same(history, on_every_shard(name), without_readings)


def test_local_ascent_on_all_that_was_drawn():
    """AUSAM on all examples is SAM, and the score table is the same on all devices."""
    history = LOCAL["shard_map"](
        build("ausam", fraction=1.0), problem.make()[1], batches(), ascent="local"
    )
    sams = [params for params, _, _ in on_every_shard("sam")]
    assert_close([params for params, _, _ in history], sams, 1e-10)


DECISIONS = 14  # steps in which policies decide both ways


def combination(name):
    """Return the combination of a row, for the reference loop."""
    hyper, threshold = VARIANTS[name].hyper, [-0.2] * DECISIONS
    if name == "ae_sam":
        return reference.sometimes(reference.SquaredNorm(threshold, 0.9))
    if name == "vsam":
        draws = [
            float(samx.policies.draws.uniform_at(jax.random.key(0), t)) for t in range(DECISIONS)
        ]
        return reference.VSAM(draws, (4, 2), 0.8, (0.13, 0.13), 0.7, 4, ["W1", "b1", "W2", "b2"])
    every_second = reference.listed([t % 2 == 0 for t in range(DECISIONS)])
    return reference.LookSAM(every_second, hyper["alpha"])


@functools.cache
def local_loop(name):
    rho = VARIANTS[name].hyper["rho"]
    return reference.train_gated(
        reference.SGD(0.1, 0.9),
        reference.ball(rho),
        combination(name),
        DECISIONS,
        num_shards=regimes.DEVICES,
    )


@pytest.mark.parametrize(
    ("name", "regime"), [("ae_sam", "shard_map"), ("looksam", "pmap"), ("vsam", "shard_map")]
)
def test_local_ascent_decides_and_takes_apart_by_the_mean_gradient(name, regime):
    expected, are_sharp = local_loop(name)
    changes = {}
    if name == "vsam":  # the reference needs full statistics
        changes["policy"] = policies.quota(4, num_blocks=2, warmup_steps=4)
    history = LOCAL[regime](
        build(name, **changes), problem.make()[1], batches(DECISIONS), ascent="local"
    )
    found = [bool(optax.tree.get(state, "is_sharp")) for _, state, _ in history]
    assert found == [bool(x) for x in are_sharp]
    assert len(set(found)) == 2
    for step, tolerance in ((0, 1e-12), (-1, 1e-9)):
        for key, value in expected.items():
            np.testing.assert_allclose(history[step][0][key], value[step], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two ascent steps", "sampa"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("ascent", ["global", "groups"])
def test_several_axes(name, check_vma, ascent):
    """Two axes act like one, or the devices along the second axis climb together."""
    history = regimes.shard_map(
        build(name),
        problem.make()[1],
        batches(),
        check_vma,
        ascent="global" if ascent == "global" else ("inner",),
        shape=(2, 4),
        names=("outer", "inner"),
        axes=("outer", "inner"),
    )
    if ascent == "global":
        assert_same(history, on_one_device(name))
    else:
        assert_same(history, on_every_shard(name, 2), without_readings)


@functools.cache
def weighted_on_one_device(name):
    return regimes.single(build(name), problem.make()[1], batches(3, weights=VALID))


@pytest.mark.parametrize(
    ("name", "regime"),
    [
        ("sam", "shard_map"),
        ("sam", "pmap"),
        ("sampa", "shard_map, check_vma=False"),
        ("msam", "jit, explicit"),
    ],
)
def test_weights_count_examples_not_devices(name, regime):
    weighted = batches(3, weights=VALID)
    history = GLOBAL[regime](build(name), problem.make()[1], weighted)
    assert_same(history, weighted_on_one_device(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "shape", "weights"),
    [
        *itertools.product(
            ["auto", "explicit", "named", "shard_map", "no vma"], [(2,), (2, 4)], [VALID]
        ),
        ("pmap", (2,), VALID),  # pmap has one axis only
        ("auto", (2, 4), None),
        ("shard_map", (2, 4), None),
    ],
)
def test_each_group_computes_one_gradient_of_sampa(regime, shape, weights):
    params, data = problem.make()[1], batches(6, weights)
    names, spec = ("pair", "data")[: len(shape)], P("data") if len(shape) == 2 else P()
    axes = ("data",) if len(shape) == 2 else ()
    if regime in ("shard_map", "no vma"):
        history = regimes.shard_map(
            PAIRED, params, data, regime == "shard_map", shape=shape, names=names, axes=axes
        )
    elif regime == "pmap":
        history = regimes.pmap_pair(PAIRED, params, data)
    elif regime == "named":  # the sharding carries the mesh
        sharding = NamedSharding(regimes.mesh_of(shape, names), P("pair"))
        history = regimes.run_jit(sampa(pair_sharding=sharding), params, data, sharding.mesh, spec)
    else:
        axis_type = AxisType.Auto if regime == "auto" else AxisType.Explicit
        mesh = regimes.mesh_of(shape, names, axis_type)
        with jax.set_mesh(mesh):
            history = regimes.run_jit(PAIRED, params, data, mesh, spec)
    assert_same(history, regimes.single(sampa(), params, data))


def moving_ball():
    """A perturbation with a state: it climbs the momentum of the gradients."""
    return samx.sharpness_aware(
        optax.chain(optax.trace(0.9), samx.perturbations.metric_ball(0.05)), ascent_steps=2
    )


def test_local_ascent_keeps_one_state():
    """The direction is the device's own; the perturbation's state comes from the mean gradient."""
    history = LOCAL["shard_map, check_vma=False"](
        lambda batch_like: optax.chain(moving_ball(), optax.sgd(0.1)),
        problem.make()[1],
        batches(5),
        ascent="local",
    )  # also checks that replicas agree to the last bit
    trace, params = dict.fromkeys(history[0][0], 0.0), problem.make()[1]
    for (new_params, state, _), (batch,) in zip(history, batches(5), strict=True):
        g = jax.tree.map(np.asarray, gradient(jax.tree.map(np.asarray, params), batch))
        trace = {k: 0.9 * trace[k] + g[k] for k in g}
        assert_close(optax.tree.get(state, "trace"), trace, 1e-10)
        params = new_params


def with_statistics(params, batch):
    """Return losses, and an aux like that of a layer with statistics."""
    aux = {
        "mean": batch["x"].mean(0),
        "count": jnp.asarray(-3) + batch["y"].shape[0] * 0,
        "is_on": jnp.asarray(True),
        "key": jax.random.key(7),
    }
    return problem.losses_fn(params, batch), aux


def with_aux(batch_like, pair_sharding=None):
    params, batch = first_batch()
    aux_like = jax.eval_shape(with_statistics, params, batch)[1]
    return samx.sampa(
        optax.sgd(0.1), batch_like=batch_like, aux_like=aux_like, pair_sharding=pair_sharding
    )


@functools.cache
def with_aux_on_one_device():
    return regimes.single(with_aux, problem.make()[1], batches(2), losses_fn=with_statistics)


@pytest.mark.parametrize("regime", ["shard_map, check_vma=False", "pmap", "pair"])
def test_aux_in_the_state_is_common_to_all_devices(regime):
    params, data = problem.make()[1], batches(2)
    if regime == "pmap":
        history = regimes.pmap(with_aux, params, data, losses_fn=with_statistics)
    else:
        pair_sharding = P("pair") if "pair" in regime else None
        history = regimes.shard_map(
            functools.partial(with_aux, pair_sharding=pair_sharding),
            params,
            data,
            check_vma="False" not in regime,
            shape=(2, 4) if "pair" in regime else (8,),
            names=("pair", "data") if "pair" in regime else ("data",),
            losses_fn=with_statistics,
        )
    expected = with_aux_on_one_device()
    for found, wanted in zip(history, expected, strict=True):
        found, wanted = dict(found[1].aux), dict(wanted[1].aux)
        assert found["key"] == wanted["key"]
        assert found["count"].dtype == wanted["count"].dtype
        del found["key"], wanted["key"]
        assert_close(found, wanted)


def test_aux_of_microbatches_is_common_to_all_devices():
    """Their readings too: means over the examples of all devices."""
    params, data = problem.make()[1], batches(1)
    aux_like = jax.eval_shape(with_statistics, params, data[0][0])[1]

    def build(batch_like):
        del batch_like
        return optax.chain(samx.msam(0.05, 2, aux_like=aux_like), optax.sgd(0.1))

    expected = regimes.single(build, params, data, losses_fn=with_statistics)
    found = regimes.shard_map(build, params, data, True, losses_fn=with_statistics)
    for name in ("mean", "loss", "sharp_loss"):
        assert_close(*(optax.tree.get(history[0][1], name) for history in (found, expected)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["asam", "two ascent steps", "sampa"])
@pytest.mark.parametrize("ascent", ["global", "local"])
def test_in_a_scan_with_donated_arguments(name, ascent):
    params, data = problem.make()[1], batches(4)
    mesh, tx = regimes.mesh_of(), samx.data_parallel(build(name)(data[0][0]), "data", ascent)
    specs = samx.state_specs(tx, params, batch_specs=P("data"))
    step = regimes.make_step(tx, axes="data")

    def train(params, state, batches):
        return jax.lax.scan(lambda carry, b: (step(*carry, b)[:2], None), (params, state), batches)

    mapped = jax.shard_map(
        train,
        mesh=mesh,
        in_specs=(P(), specs, P(None, "data")),
        out_specs=((P(), specs), P()),
    )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(batch for (batch,) in data))
    layout = P(), specs, P(None, "data")
    arguments = regimes.place((params, tx.init(params), stacked), mesh, layout)
    expected = regimes.shard_map(build(name), params, data, True, ascent)[-1]
    found, _ = jax.jit(mapped, donate_argnums=(0, 1))(*arguments)
    assert_close(found, expected[:2])


@pytest.mark.parametrize("ascent", ["global", "local"])
def test_mapped_over_data_and_sharded_by_the_compiler(ascent):
    """The data axis is mapped; the compiler shards over the model axis."""
    (params, batch), mesh = first_batch(), regimes.mesh_of((4, 2), ("data", "model"))
    tx = samx.data_parallel(optax.chain(samx.asam(0.5), optax.sgd(0.1)), "data", ascent)

    def step(params, state, batch):
        return regimes.make_step(tx, axes="data")(params, state, batch)[:2]

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=(P(), P()),
        axis_names={"data"},
    )
    specs = {"W1": P(None, "model"), "b1": P("model"), "W2": P("model"), "b2": P()}
    arguments = regimes.place((params, tx.init(params), batch), mesh, (specs, P(), P("data")))
    found, _ = jax.jit(mapped)(*arguments)
    expected = optax.chain(samx.asam(0.5), optax.sgd(0.1))
    if ascent == "global":
        expected = regimes.single(lambda _: expected, params, [(batch,)])
    else:
        expected = regimes.per_shard(lambda _: expected, params, [(batch,)], num_shards=4)
    assert_close(found, expected[0][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "regime", "ascent"),
    [
        ("sam", "shard_map", "global"),
        ("sampa", "shard_map", "global"),
        ("sam", "pmap", "local"),
        ("two ascent steps", "shard_map", "local"),
    ],
)
def test_half_precision_and_integers(name, regime, ascent):
    """Dtypes stay, an integer table does not change, and replicas agree."""
    data, params = problem.make(jnp.bfloat16)
    data = [(problem.batch_at(data, t),) for t in range(3)]
    params["table"] = jnp.arange(3)

    def losses_fn(params, batch):
        return problem.losses_fn(params, batch) * params["table"].sum()

    history = LOCAL[regime](
        build(name, base=optax.sgd(0.1)), params, data, ascent=ascent, losses_fn=losses_fn
    )
    expected = regimes.single(build(name, base=optax.sgd(0.1)), params, data, losses_fn)
    for key, leaf in history[-1][0].items():
        assert leaf.dtype == params[key].dtype
        np.testing.assert_allclose(
            np.asarray(leaf, float), np.asarray(expected[-1][0][key], float), atol=0.1
        )
    np.testing.assert_array_equal(history[-1][0]["table"], params["table"])
    assert float(optax.tree.get(history[-1][1], "sharpness")) > 0
