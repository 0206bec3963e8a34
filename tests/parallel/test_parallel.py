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
    VALID,
    as_batch,
    assert_close,
    assert_same,
    batches,
    build,
    first_batch,
    mean_loss,
    on_one_device,
)

import samx
from samx import policies


def rows_and_regimes(regimes, rows):
    """Pair one row for each set of closures with every regime, and the other rows with one."""
    return [
        pytest.param(name, regime, id=f"{regime}-{name}")
        for i, name in enumerate(rows)
        for j, regime in enumerate(regimes)
        if name in CLOSURES or j == i % len(regimes)
    ]


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("name", "regime"), rows_and_regimes(GLOBAL, KINDS))
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


# Arguments for one of 8 devices, instead of the whole batch; and a bandit that does not learn.
SHARD = {"ksam": {"num_selected": 1, "num_groups": 1}, "esam": {"num_groups": 1}}
LINEAR = {"sl_sam": {"bandit_learning_rate": 0.0}}


@functools.cache
def on_every_shard(name, num_shards=regimes.DEVICES):
    changes = SHARD.get(name, {}) | LINEAR.get(name, {})
    return regimes.per_shard(build(name, **changes), problem.make()[1], batches(), num_shards)


LINEAR_ROWS = [name for name in KINDS if VARIANTS[name].is_mean_of_shards]


@pytest.mark.parametrize(("name", "regime"), rows_and_regimes(LOCAL, LINEAR_ROWS))
def test_local_is_the_mean_of_per_shard_steps(name, regime):
    tx = build(name, **LINEAR.get(name, {}))
    history = LOCAL[regime](tx, problem.make()[1], batches(), ascent="local")
    assert_same(history, on_every_shard(name), without_readings)


@pytest.mark.parametrize("regime", LOCAL)
def test_local_ascent_on_all_that_was_drawn(regime):
    """AUSAM on all examples is SAM, and the score table is the same on all devices."""
    history = LOCAL[regime](
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


@pytest.mark.parametrize(
    ("name", "regime"),
    [*(("sam", r) for r in GLOBAL), ("sampa", "shard_map"), ("msam", "jit, explicit")],
)
def test_weights_count_examples_not_devices(name, regime):
    weighted = batches(3, weights=VALID)
    history = GLOBAL[regime](build(name), problem.make()[1], weighted)
    assert_same(history, regimes.single(build(name), problem.make()[1], weighted))


@pytest.mark.parametrize("regime", LOCAL)
def test_weights_count_examples_in_local_ascent(regime):
    """By hand: each device climbs its own weighted mean, and counts by its sum of weights."""
    (_, params), ((batch, weights),) = problem.make(), batches(1, weights=VALID)
    history = LOCAL[regime](
        build("sam", base=optax.sgd(1.0)), params, [(batch, weights)], ascent="local"
    )
    expected = params
    for start in range(0, len(weights), 2):
        shard = jax.tree.map(lambda x, i=start: x[i : i + 2], batch)
        own = weights[start : start + 2]

        def loss(p, shard=shard, own=own):
            return (own * problem.losses_fn(p, shard)).sum() / jnp.maximum(own.sum(), 1e-30)

        g = jax.grad(loss)(params)
        eps = optax.tree.scale(0.05 / (optax.tree.norm(g) + 1e-12), g)
        g_s = jax.grad(loss)(optax.tree.add(params, eps))
        expected = optax.tree.add_scale(expected, -own.sum() / weights.sum(), g_s)
    assert_close(history[0][0], expected)
    norm = optax.tree.get(
        history[0][1], "perturbation_norm"
    )  # devices without examples do not count
    np.testing.assert_allclose(norm, 0.05, rtol=1e-10)


def test_the_hypergradient_of_lets_with_local_ascent():
    """By hand: each device climbs its own gradient, and the step depends on all of them."""
    params, batch = first_batch()
    tx = samx.lets(optax.sgd(0.1), 0.3)
    history = regimes.shard_map(lambda _: tx, params, [(batch,)], check_vma=True, ascent="local")
    shards = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in range(0, 16, 2)]
    directions = []
    for shard in shards:
        g = jax.grad(mean_loss)(params, shard)
        directions.append(optax.tree.scale(1 / optax.tree.norm(g), g))

    @jax.jit
    def objective(rho):
        after = params
        for shard, v in zip(shards, directions, strict=True):
            g_s = jax.grad(mean_loss)(optax.tree.add_scale(params, rho, v), shard)
            after = optax.tree.add_scale(after, -0.1 / len(shards), g_s)
        held_out = problem.further(batch)["validation_fn"](after)
        return (held_out - mean_loss(after, batch)) ** 2 / 2

    slope = (objective(0.3 + 1e-5) - objective(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(optax.tree.get(history[0][1], "hypergradient"), slope, rtol=1e-6)


def sampa(**keywords):
    base = optax.sgd(0.1, momentum=0.9)
    return lambda batch_like: samx.sampa(base, 0.1, 0.2, batch_like=batch_like, **keywords)


PAIRED = sampa(pair_sharding=P("pair"))


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


# ---- By hand: one step on 8 devices, with various arguments.


REPLICATED = P()


def mapped(fn, regime, num_args, out_specs=REPLICATED):
    """Map `fn(params, *examples)` in a regime; return the first result, since all are equal."""
    if regime == "pmap":

        def call(params, *examples):
            split = [x.reshape(regimes.DEVICES, -1, *x.shape[1:]) for x in examples]
            result = jax.pmap(fn, axis_name="data", in_axes=(None, *[0] * num_args))(params, *split)
            return jax.tree.map(lambda x: x[0], result)

        return call
    return jax.jit(
        jax.shard_map(
            fn,
            mesh=regimes.mesh_of(),
            in_specs=(P(), *[P("data")] * num_args),
            out_specs=out_specs,
            check_vma=regime == "shard_map",
        )
    )


@pytest.mark.parametrize("regime", LOCAL)
def test_value_and_grad(regime):
    params, batch = first_batch()
    weights = jnp.asarray(VALID)

    def fn(params, x, y, weights):
        def loss(params, batch, scale):
            return scale * mean_loss(params, batch), {"own": batch["x"].sum()}

        (value, aux), grads = samx.value_and_grad(loss, "data", has_aux=True)(
            params, as_batch(x, y), 2.0
        )
        total = jax.lax.psum(aux["own"], "data")  # the aux is the device's own

        def weighted(params):
            own = (weights * problem.losses_fn(params, as_batch(x, y))).sum()
            return own / jnp.where(weights.sum() == 0, 0.0, weights.sum())  # 0/0 without examples

        return value, grads, total, samx.value_and_grad(weighted, ["data"], weights=weights)(params)

    value, grads, total, weighted = mapped(fn, regime, 3)(params, batch["x"], batch["y"], weights)
    assert_close((value, grads), jax.value_and_grad(lambda p: 2 * mean_loss(p, batch))(params))
    assert_close(total, batch["x"].sum())

    def expected(params):
        return (weights * problem.losses_fn(params, batch)).sum() / weights.sum()

    assert_close(weighted, jax.value_and_grad(expected)(params))


@pytest.mark.parametrize("regime", LOCAL)
@pytest.mark.parametrize("name", ["sam", "sampa"])
def test_what_the_caller_computed_is_ignored(name, regime):
    """The step ignores the caller's values: a summed gradient, one device's loss, or nonsense."""
    params, batch = first_batch()
    whole = VARIANTS[name].build(batch_like=batch)
    specs = samx.state_specs(whole, params, batch_specs=P("data"))

    def fn(params, x, y):
        batch = as_batch(x, y)
        tx = samx.data_parallel(VARIANTS[name].build(batch_like=batch), "data")
        nonsense = jax.tree.map(lambda w: w * x.sum(), params)
        updates, state = tx.update(
            nonsense,
            tx.init(params),
            params,
            value=x.sum(),
            grad=nonsense,
            losses_fn=problem.losses_fn,
            batch=batch,
        )
        return optax.apply_updates(params, updates), state

    found = mapped(fn, regime, 2, (P(), specs))(params, batch["x"], batch["y"])
    expected = on_one_device(name)[0]
    assert_close(found[0], expected[0])
    assert_close(*(optax.tree.get(state, "readings") for state in (found[1], expected[1])))


def scaled_gradient(order):
    """A user-defined variant, with `jax.grad` of the closure, or a Hessian-vector product."""

    def update_fn(g, state, params, *, value_fn):
        if order == 1:
            return jax.tree.map(lambda x: 2 * x, jax.grad(value_fn)(params)), state
        _, curvature = jax.jvp(jax.grad(value_fn), (params,), (g,))
        return curvature, state

    return samx.closure_transformation(lambda params: optax.EmptyState(), update_fn)


@pytest.mark.parametrize("regime", LOCAL)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("ascent", ["global", "local"])
def test_a_variant_of_ones_own(regime, order, ascent):
    params, batch = first_batch()

    def fn(params, x, y):
        tx = samx.data_parallel(scaled_gradient(order), "data", ascent)
        return tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )[0]

    found = mapped(fn, regime, 2)(params, batch["x"], batch["y"])
    tx = scaled_gradient(order)
    g = jax.grad(mean_loss)(params, batch)
    expected, _ = tx.update(g, tx.init(params), params, value_fn=lambda p: mean_loss(p, batch))
    assert_close(found, expected)


@pytest.mark.parametrize("regime", LOCAL)
@pytest.mark.parametrize("order", ["inside", "outside"])
def test_one_broken_device_skips_the_step_on_all(regime, order):
    params, batch = first_batch()
    broken = batch["x"].at[5, 2].set(jnp.nan)

    def fn(params, x, y):
        inner = optax.chain(samx.sam(0.05), optax.sgd(0.1, momentum=0.9))
        tx = samx.data_parallel(samx.skip_nonfinite(inner), "data")
        if order == "outside":
            tx = samx.skip_nonfinite(samx.data_parallel(inner, "data"))
        updates, state = tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )
        return updates, state

    updates, state = mapped(fn, regime, 2)(params, broken, batch["y"])
    assert_close(updates, optax.tree.zeros_like(params), 0)
    assert int(state.skipped_steps) == 1
    updates, state = mapped(fn, regime, 2)(params, batch["x"], batch["y"])
    assert int(state.skipped_steps) == 0
    assert_close(optax.apply_updates(params, updates), on_one_device("sam")[0][0])


@pytest.mark.parametrize("regime", LOCAL)
def test_a_line_search_sees_the_mean_loss(regime):
    params, batch = first_batch()

    def search():
        search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=12)
        return samx.with_base(samx.sam(0.05), optax.chain(optax.sgd(20.0), search))

    def fn(params, x, y):
        tx = samx.data_parallel(search(), "data")
        updates, _ = tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )
        return updates

    value, g = jax.value_and_grad(mean_loss)(params, batch)
    tx = search()
    expected, _ = tx.update(
        g,
        tx.init(params),
        params,
        value=value,
        grad=g,
        losses_fn=problem.losses_fn,
        batch=batch,
    )
    assert_close(mapped(fn, regime, 2)(params, batch["x"], batch["y"]), expected)


def moving_ball():
    """A perturbation with a state: it climbs the momentum of the gradients."""
    return samx.sharpness_aware(
        optax.chain(optax.trace(0.9), samx.perturbations.metric_ball(0.05)), ascent_steps=2
    )


@pytest.mark.parametrize("regime", LOCAL)
def test_local_ascent_keeps_one_state(regime):
    """The direction is the device's own; the perturbation's state comes from the mean gradient."""
    history = LOCAL[regime](
        lambda batch_like: optax.chain(moving_ball(), optax.sgd(0.1)),
        problem.make()[1],
        batches(5),
        ascent="local",
    )  # also checks that replicas agree to the last bit
    trace = optax.tree.zeros_like(history[0][0])
    params = problem.make()[1]
    for (new_params, state, _), (batch,) in zip(history, batches(5), strict=True):
        g = jax.grad(mean_loss)(params, batch)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, g)
        assert_close(optax.tree.get(state, "trace"), trace, 1e-11)
        params = new_params


@pytest.mark.parametrize("regime", LOCAL)
def test_readings_of_local_ascent_are_means_over_the_devices(regime):
    params, batch = first_batch()
    (_, state, _) = LOCAL[regime](build("asam"), params, [(batch,)], ascent="local")[0]
    readings = optax.tree.get(state, "readings")
    seen, sharp = [], []
    for start in range(0, 16, 2):
        shard = jax.tree.map(lambda x, i=start: x[i : i + 2], batch)
        loss, g = jax.value_and_grad(mean_loss)(params, shard)
        ball = samx.perturbations.metric_ball(0.5, samx.perturbations.magnitude(0.01))
        eps, _ = ball.update(g, ball.init(params), params)
        sharp_loss, g_s = jax.value_and_grad(mean_loss)(optax.tree.add(params, eps), shard)
        seen.append((loss, sharp_loss, optax.tree.norm(g), eps))
        sharp.append(g_s)
    g_s = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *sharp)
    losses, sharp_losses, norms, steps = zip(*seen, strict=True)
    step_norms = [optax.tree.norm(eps) for eps in steps]
    cosines = [
        optax.tree.vdot(eps, g_s) / optax.tree.norm(eps) / optax.tree.norm(g_s) for eps in steps
    ]
    expected = {
        "loss": np.mean(losses),
        "sharp_loss": np.mean(sharp_losses),
        "grad_norm": np.mean(norms),
        "sharp_grad_norm": optax.tree.norm(g_s),
        "perturbation_norm": np.mean(step_norms),
        "cosine": np.mean(cosines),
        "is_sharp": True,
        "gradients_spent": 2.0,
    }
    assert_close(readings._asdict(), expected)


def with_statistics(params, batch):
    """Return losses, and an aux like that of a layer with statistics."""
    aux = {
        "mean": batch["x"].mean(0),
        "count": jnp.asarray(-3) + batch["y"].shape[0] * 0,
        "is_on": jnp.asarray(True),
        "key": jax.random.key(7),
    }
    return problem.losses_fn(params, batch), aux


@pytest.mark.parametrize("regime", [*LOCAL, "pair", "pair, no vma"])
def test_aux_in_the_state_is_common_to_all_devices(regime):
    params, data = problem.make()[1], batches(2)
    _, aux_like = with_statistics(params, data[0][0])

    def build(batch_like, pair_sharding=None):
        return samx.sampa(
            optax.sgd(0.1), batch_like=batch_like, aux_like=aux_like, pair_sharding=pair_sharding
        )

    if regime == "pmap":
        history = regimes.pmap(build, params, data, losses_fn=with_statistics)
    else:
        pair_sharding = P("pair") if "pair" in regime else None
        history = regimes.shard_map(
            functools.partial(build, pair_sharding=pair_sharding),
            params,
            data,
            check_vma="no vma" not in regime and "False" not in regime,
            shape=(2, 4) if "pair" in regime else (8,),
            names=("pair", "data") if "pair" in regime else ("data",),
            losses_fn=with_statistics,
        )
    expected = regimes.single(build, params, data, losses_fn=with_statistics)
    for found, wanted in zip(history, expected, strict=True):
        found, wanted = found[1].aux, wanted[1].aux
        assert found["key"] == wanted["key"]
        assert found["count"].dtype == wanted["count"].dtype
        del found["key"], wanted["key"]
        assert_close(found, wanted)


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
    assert float(optax.tree.get(history[-1][1], "perturbation_norm")) > 0.02


# ---- Wrong use.


def trace_step(tx):
    params, batch = first_batch()
    return jax.eval_shape(
        lambda: tx.update(params, tx.init(params), params, losses_fn=problem.losses_fn, batch=batch)
    )


def test_an_axis_that_is_not_mapped():
    params, batch = first_batch()
    tx = samx.data_parallel(samx.sam(0.05), "data")
    with pytest.raises(ValueError, match=r"data_parallel: `axis_name` .* 'data' is not.*jax.jit"):
        trace_step(tx)
    with pytest.raises(ValueError, match=r"value_and_grad: `axis_name` .* 'data' is not"):
        samx.value_and_grad(mean_loss, "data")(params, batch)


def test_wrapped_twice():
    params, batch = first_batch()
    tx = samx.data_parallel(samx.data_parallel(samx.sam(0.05), "data"), "data")

    def fn(params, x, y):
        return tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )[0]

    with pytest.raises(ValueError, match="inside another data_parallel"):
        mapped(fn, "shard_map", 2)(params, batch["x"], batch["y"])


def test_missing_closures_name_the_keyword():
    _, params = problem.make()
    tx = samx.data_parallel(samx.sam(0.05), "data")
    with pytest.raises(ValueError, match="data_parallel: `value_fn` is missing"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="data_parallel: `params` is missing"):
        tx.update(params, tx.init(params), None, value_fn=lambda p: 0.0)


@pytest.mark.parametrize("ascent", ["everywhere", "data", ("other",), ("data", "other")])
def test_unknown_ascent(ascent):
    with pytest.raises(ValueError, match=r"`ascent` must be 'global', 'local' or some of.*'data'"):
        samx.data_parallel(samx.sam(0.05), "data", ascent)


@pytest.mark.parametrize("axes", [None, 3, ("data", 1)])
def test_axes_are_names(axes):
    for make in (samx.data_parallel, samx.value_and_grad):
        with pytest.raises(TypeError, match=f"{make.__name__}: `axis_name` must be the name"):
            make(samx.sam(0.05), axes)
    with pytest.raises(TypeError, match="`ascent` must be the name"):
        samx.data_parallel(samx.sam(0.05), "data", 3)


def test_a_loss_that_is_no_scalar():
    params, batch = first_batch()

    def fn(params, x, y):
        return samx.value_and_grad(problem.losses_fn, "data")(params, as_batch(x, y))

    with pytest.raises(ValueError, match=r"`value_fn` must return a scalar.*\(2,\)"):
        mapped(fn, "shard_map", 2)(params, batch["x"], batch["y"])


@pytest.mark.parametrize(
    ("sharding", "error", "message"),
    [
        ("pair", TypeError, "must be a PartitionSpec or NamedSharding, got str"),
        (P(), ValueError, "must name one axis"),
        (P("pair", "data"), ValueError, "must name one axis"),
        (P(("pair", "data")), ValueError, "must name one axis"),
        (P(None), ValueError, "must name one axis"),
    ],
)
def test_pair_sharding_is_one_axis(sharding, error, message):
    with pytest.raises(error, match=f"sampa: `pair_sharding` {message}"):
        sampa(pair_sharding=sharding)(first_batch()[1])


def test_pair_sharding_is_one_call():
    with pytest.raises(ValueError, match=r"`pair_sharding`.*'vmap'"):
        sampa(pair_sharding=P("pair"), gradients="separate")(first_batch()[1])


def test_the_pair_axis_must_exist_and_have_size_2():
    params, batch = first_batch()
    tx = PAIRED(batch)
    with pytest.raises(ValueError, match=r"`pair_sharding` names the axis 'pair'.*set_mesh"):
        trace_step(tx)
    four = regimes.mesh_of((4,), ("pair",))
    named = sampa(pair_sharding=NamedSharding(four, P("pair")))(batch)
    with jax.set_mesh(regimes.mesh_of()), pytest.raises(ValueError, match=r"has the axes.*'data'"):
        trace_step(tx)
    for paired in (tx, named):
        with jax.set_mesh(four), pytest.raises(ValueError, match=r"'pair'.* size 2, got 4"):
            trace_step(paired)

    def fn(params, x, y):
        return tx.update(
            params, tx.init(params), params, losses_fn=problem.losses_fn, batch=as_batch(x, y)
        )[0]

    step = jax.shard_map(fn, mesh=four, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"'pair'.* size 2, got 4"):
        jax.eval_shape(step, params, batch["x"], batch["y"])
