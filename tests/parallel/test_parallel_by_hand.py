"""One step on 8 devices by hand, with various arguments of `update`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS
from jax.sharding import PartitionSpec as P
from regimes import (
    LOCAL,
    VALID,
    as_batch,
    assert_close,
    batches,
    build,
    first_batch,
    mapped,
    mean_loss,
    on_one_device,
)

import samx
from samx.core.devices import is_mapped

pytestmark = pytest.mark.usefixtures("float64")


def read_all(build):
    return lambda batch_like: samx.all_readings(build(batch_like))


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
    expected = jax.jit(jax.value_and_grad(lambda p: 2 * mean_loss(p, batch)))(params)
    assert_close((value, grads), expected)
    assert_close(total, batch["x"].sum())

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        return (weights * problem.losses_fn(params, batch)).sum() / weights.sum()

    assert_close(weighted, expected(params))


@pytest.mark.parametrize(("name", "regime"), [("sam", "pmap"), ("sampa", "shard_map")])
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


@pytest.mark.parametrize(
    ("name", "regime", "groups"),
    [("sam", "pmap", 8), ("usam", "shard_map", 8), ("usam", "shard_map", 2)],
)
def test_weights_count_examples_in_local_ascent(name, regime, groups):
    """By hand: each group climbs its own weighted mean, and counts by its sum of weights."""
    (_, params), ((batch, weights),) = problem.make(), batches(1, weights=VALID)
    changes = {"ascent": "local"}
    if groups == 2:
        names = ("outer", "inner")
        changes = {"ascent": ("inner",), "shape": (2, 4), "names": names, "axes": names}
    tx = read_all(build(name, base=optax.sgd(1.0), rho=0.05))
    history = LOCAL[regime](tx, params, [(batch, weights)], **changes)

    @jax.jit
    def step(shard, own):
        def loss(p):
            return (own * problem.losses_fn(p, shard)).sum() / jnp.maximum(own.sum(), 1e-30)

        g = jax.grad(loss)(params)
        length = 1.0 if name == "usam" else optax.tree.norm(g) + 1e-30
        eps = optax.tree.scale(0.05 / length, g)
        return jax.grad(loss)(optax.tree.add(params, eps)), optax.tree.norm(eps)

    expected, mean_norm, size = params, 0.0, len(weights) // groups
    for start in range(0, len(weights), size):
        shard = jax.tree.map(lambda x, i=start: x[i : i + size], batch)
        own = weights[start : start + size]

        g_s, norm = step(shard, own)
        share = own.sum() / weights.sum()
        expected = optax.tree.add_scale(expected, -share, g_s)
        mean_norm += share * norm
    assert_close(history[0][0], expected)
    norm = optax.tree.get(history[0][1], "perturbation_norm")  # no examples, no weight
    np.testing.assert_allclose(norm, mean_norm, rtol=1e-10)


def test_the_hypergradient_of_lets_with_local_ascent():
    """By hand: each device climbs its own gradient, and the step depends on all of them."""
    params, batch = first_batch()
    tx = samx.lets(optax.sgd(0.1), 0.3)
    history = regimes.shard_map(lambda _: tx, params, [(batch,)], check_vma=True, ascent="local")
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)

    @jax.jit
    def objective(rho):
        def sharp_gradient(shard):
            g = jax.grad(mean_loss)(params, shard)
            point = optax.tree.add_scale(params, rho / optax.tree.norm(g), g)
            return jax.grad(mean_loss)(point, shard)

        mean = jax.tree.map(lambda x: x.mean(0), jax.vmap(sharp_gradient)(shards))
        after = optax.tree.add_scale(params, -0.1, mean)
        held_out = problem.further(batch)["validation_fn"](after)
        return (held_out - mean_loss(after, batch)) ** 2 / 2

    slope = (objective(0.3 + 1e-5) - objective(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(optax.tree.get(history[0][1], "hypergradient"), slope, rtol=1e-6)


def scaled_gradient(order):
    """A user-defined variant, with `jax.grad` of the closure, or a Hessian-vector product."""

    def update_fn(g, state, params, *, value_fn):
        if order == 1:
            return jax.tree.map(lambda x: 2 * x, jax.grad(value_fn)(params)), state
        _, curvature = jax.jvp(jax.grad(value_fn), (params,), (g,))
        return curvature, state

    return samx.closure_transformation(lambda params: optax.EmptyState(), update_fn)


def test_a_variant_of_ones_own():
    params, batch = first_batch()
    orders = (1, 2)

    def fn(params, x, y):
        closures = {"losses_fn": problem.losses_fn, "batch": as_batch(x, y)}
        found = []
        for order in orders:
            for ascent in ("global", "local"):
                tx = samx.data_parallel(scaled_gradient(order), "data", ascent)
                found.append(tx.update(params, tx.init(params), params, **closures)[0])
        return found

    @jax.jit
    def on_one_device(params):
        g, expected = jax.grad(mean_loss)(params, batch), []
        for order in orders:
            tx = scaled_gradient(order)
            step = tx.update(g, tx.init(params), params, value_fn=lambda p: mean_loss(p, batch))
            expected += [step[0]] * 2
        return expected

    assert_close(mapped(fn, "shard_map", 2)(params, batch["x"], batch["y"]), on_one_device(params))


def test_one_broken_device_skips_the_step_on_all():
    params, batch = first_batch()
    broken = batch["x"].at[5, 2].set(jnp.nan)
    inner = optax.chain(samx.sam(0.05), optax.sgd(0.1, momentum=0.9))

    def fn(params, x, y):
        closures = {"losses_fn": problem.losses_fn, "batch": as_batch(x, y)}
        inside = samx.data_parallel(samx.skip_nonfinite(inner), "data")
        outside = samx.skip_nonfinite(samx.data_parallel(inner, "data"))
        return [tx.update(params, tx.init(params), params, **closures) for tx in (inside, outside)]

    step = mapped(fn, "shard_map", 2)
    for updates, state in step(params, broken, batch["y"]):
        assert_close(updates, optax.tree.zeros_like(params), 0)
        assert int(state.skipped_steps) == 1
    for updates, state in step(params, batch["x"], batch["y"]):
        assert int(state.skipped_steps) == 0
        assert_close(optax.apply_updates(params, updates), on_one_device("sam")[0][0])


def test_a_line_search_sees_the_mean_loss():
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

    @jax.jit
    def on_one_device(params):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        closures = {"losses_fn": problem.losses_fn, "batch": batch}
        tx = search()
        return tx.update(g, tx.init(params), params, value=value, grad=g, **closures)[0]

    assert_close(mapped(fn, "shard_map", 2)(params, batch["x"], batch["y"]), on_one_device(params))


def test_readings_of_local_ascent_are_means_over_the_devices():
    params, batch = first_batch()
    ((_, state, _),) = LOCAL["shard_map"](
        read_all(build("asam")), params, [(batch,)], ascent="local"
    )

    def alone(shard):
        loss, g = jax.value_and_grad(mean_loss)(params, shard)
        ball = samx.perturbations.metric_ball(0.5, samx.perturbations.magnitude(0.01))
        eps, _ = ball.update(g, ball.init(params), params)
        sharp_loss, g_s = jax.value_and_grad(mean_loss)(optax.tree.add(params, eps), shard)
        return (loss, sharp_loss, optax.tree.norm(g), optax.tree.norm(eps)), eps, g_s

    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    seen, steps, sharp = jax.tree.map(np.asarray, jax.jit(jax.vmap(alone))(shards))
    g_s = {key: x.mean(0) for key, x in sharp.items()}
    length = np.sqrt(sum((x**2).sum() for x in g_s.values()))
    along = sum((steps[key] * x[None]).reshape(8, -1).sum(1) for key, x in g_s.items())
    cosines = along / seen[3] / length
    loss, sharp_loss, grad_norm, perturbation_norm = (x.mean() for x in seen)
    expected = {
        "loss": loss,
        "sharp_loss": sharp_loss,
        "sharpness": sharp_loss - loss,
        "grad_norm": grad_norm,
        "sharp_grad_norm": length,
        "perturbation_norm": perturbation_norm,
        "cosine": cosines.mean(),
        "is_sharp": True,
        "gradients_spent": 2.0,
    }
    assert_close(optax.tree.get(state, "readings")._asdict(), expected)


def synchronized(params, batch):
    """Losses of a network whose hidden layer is normalized over the examples of all devices."""
    hidden = batch["x"] @ params["W1"] + params["b1"][None]

    def mean(x):
        x = x.mean(0, keepdims=True)
        return jax.lax.pmean(x, "data") if is_mapped("data") else x

    centered = hidden - mean(hidden)
    normalized = centered / jnp.sqrt(mean(centered**2) + 1e-3)
    logits = jnp.tanh(normalized) @ params["W2"] + params["b2"][None]
    return problem.cross_entropy(logits, batch["y"])


@pytest.mark.parametrize(
    ("name", "regime"),
    [
        ("sam", "shard_map"),
        ("sam", "pmap"),
        ("sampa", "shard_map, check_vma=False"),
        ("focal_sam", "pmap"),
        pytest.param("sampa", "shard_map", marks=pytest.mark.slow),
        pytest.param("momentum_sam", "pmap", marks=pytest.mark.slow),
        pytest.param("bisam", "shard_map, check_vma=False", marks=pytest.mark.slow),
        pytest.param("async_sam", "shard_map", marks=pytest.mark.slow),
        pytest.param("imbalanced_sam", "shard_map", marks=pytest.mark.slow),
    ],
)
def test_the_losses_of_one_device_depend_on_the_examples_of_another(name, regime):
    """Synchronized BatchNorm and unequal weights: the step of one device on the whole batch."""
    weights = [1, 1, 1, 0, 1, 1, 0.5, 0, 0, 1, 1, 1, 0.5, 2, 0, 3]
    params, weighted = problem.make()[1], batches(2, weights=weights)
    expected = regimes.single(build(name), params, weighted, synchronized)
    history = LOCAL[regime](build(name), params, weighted, losses_fn=synchronized)
    assert_close([p for p, *_ in history], [p for p, *_ in expected])


def test_accumulation_where_devices_depend_on_one_another():
    """A microbatch of a device is normalized together with those of the others."""
    params, weights = problem.make()[1], [1, 1, 1, 0, 1, 1, 0.5, 0, 0, 1, 1, 1, 0.5, 2, 0, 3]
    weighted = batches(1, weights=weights)
    tx = samx.accumulate(optax.chain(samx.sam(0.3), optax.sgd(0.1)), 2)
    expected = regimes.single(lambda _: tx, params, weighted, synchronized)
    found = LOCAL["shard_map"](lambda _: tx, params, weighted, losses_fn=synchronized)
    assert_close(found[0][0], expected[0][0])


@pytest.mark.parametrize("regime", LOCAL)
def test_value_and_grad_where_devices_depend_on_one_another(regime):
    """Three examples of eight count: the mean of (x w - mean(x) w)^2, by hand."""
    x, weights = jnp.arange(1.0, 9.0), jnp.array([1.0, 1.0, 1.0, 0, 0, 0, 0, 0])

    def fn(w, x, weights):
        def loss(w):
            losses = (w * x - jax.lax.pmean((w * x).mean(), "data")) ** 2
            return (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-30)

        return samx.value_and_grad(loss, "data", weights=weights)(w)

    value, grad = mapped(fn, regime, 2)(jnp.float64(0.5), x, weights)
    mean_square = np.mean((np.array([1.0, 2.0, 3.0]) - 4.5) ** 2)
    np.testing.assert_allclose([value, grad], [0.25 * mean_square, mean_square], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "lanes"),
    [
        ("sam", "fake_pmap"),
        ("sampa", "vmap"),
        ("ksam", "vmap"),
        pytest.param("focal_sam", "vmap", marks=pytest.mark.slow),
        pytest.param("fisher_sparse_sam", "vmap", marks=pytest.mark.slow),
    ],
)
def test_devices_that_are_lanes_of_one(name, lanes):
    """`jax.vmap` with an axis name, and chex's `fake_pmap`, which tests of pmap code use."""
    params, batch = first_batch()
    expected = on_one_device(name)[0]
    shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)

    def fn(shard):
        tx = samx.data_parallel(VARIANTS[name].build(batch_like=shard), "data")
        return regimes.make_step(tx, axes="data")(params, tx.init(params), shard)

    if lanes == "vmap":
        found = jax.jit(jax.vmap(fn, axis_name="data"))(shards)
    else:
        with chex.fake_pmap():
            found = jax.pmap(fn, axis_name="data")(shards)
    for lane in (0, 7):
        assert_close(jax.tree.map(lambda x, i=lane: x[i], found[0]), expected[0])
