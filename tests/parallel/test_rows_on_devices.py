"""Rows whose step is more than a gradient at a point, on several devices: noise, sorts, matrices.

`test_parallel.py` takes one row of each kind. These rows are of known kinds, but do something on
each device that no other row does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import recorded
import reference
import reference_passes
import regimes
from cases import VARIANTS
from regimes import GLOBAL, LOCAL, VALID, assert_same, batches, build, on_one_device

import samx

pytestmark = pytest.mark.usefixtures("float64")

NOISY = ("lpf_sgd", "rwp", "arwp", "marwp")  # no device climbs anything
CLIMBING = ("gcsam", "zsharp", "le_sam", "gnp, unit", "spectral_sam", "eigen_sam")
CLIMBING += ("cr_sam", "xsam", "x_sam", "lookbehind_sam", "tsam", "sam_polyak", "sassha", "msassha")
CLIMBING += ("gam", "gam_exact")
# The others are slow; of bSAM, TSAM and SASSHA, one regime is in the default run of
# `test_parallel.py`, because they are of kinds of their own.
DEFAULT = {("zsharp", "shard_map")}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(default, pairs):
    return [
        pytest.param(*pair, id="-".join(pair)) if pair in default else slow(*pair) for pair in pairs
    ]


@pytest.mark.parametrize(
    ("name", "regime"),
    slow_but(DEFAULT, [(n, r) for n in ("bsam", *NOISY, *CLIMBING) for r in GLOBAL]),
)
def test_global_is_the_step_of_one_device(name, regime):
    history = GLOBAL[regime](build(name), problem.make()[1], batches())
    assert_same(history, on_one_device(name))


@pytest.mark.parametrize(("name", "regime"), slow_but((), [(n, r) for n in NOISY for r in LOCAL]))
def test_noise_is_the_same_with_local_ascent(name, regime):
    """The microbatches of all devices share their draws, and no device has a gradient to climb."""
    history = LOCAL[regime](build(name), problem.make()[1], batches(), ascent="local")
    assert_same(history, on_one_device(name))


@pytest.mark.parametrize(
    ("name", "regime"),
    slow_but(
        {("gnp, unit", "shard_map"), ("gam", "shard_map"), ("gam_exact", "pmap")},
        [(n, r) for n in CLIMBING if VARIANTS[n].is_mean_of_shards for r in LOCAL],
    ),
)
def test_local_is_the_mean_of_per_shard_steps(name, regime):
    tx = build(name)
    params = problem.make()[1]
    history = LOCAL[regime](tx, params, batches(), ascent="local")
    expected = regimes.per_shard(tx, params, batches())
    assert_same(history, expected, lambda state: optax.tree.get(state, "trace"))


def draws_of(num_microbatches, steps):
    """bSAM's own draws, one for each microbatch, by name `[steps, M, ...]`."""
    params, key = problem.make()[1], jax.random.key(0)
    trees = [
        [samx.core.draws.normal_like(key, t, params, j) for j in range(num_microbatches)]
        for t in range(steps)
    ]
    return {k: np.stack([[tree[k] for tree in row] for row in trees]) for k in params}


@pytest.mark.parametrize("regime", slow_but({("shard_map",)}, [(r,) for r in LOCAL]))
def test_each_device_climbs_its_own_gradient_in_bsam(regime):
    """By hand: microbatch j of each device is one example, and has the draw of j."""
    hyper, steps, count = VARIANTS["bsam"].hyper, 3, 2
    draws = {k: np.concatenate([x] * 8, 1) for k, x in draws_of(count, steps).items()}
    names = ("rho", "b1", "b2", "damping", "num_examples")
    expected, precision = reference.train_bsam(
        draws,
        hyper["learning_rate"],
        steps=steps,
        num_microbatches=8 * count,
        prior=0.0,
        **{name: hyper[name] for name in names},
    )
    history = LOCAL[regime](build("bsam"), problem.make()[1], batches(steps), ascent="local")
    for t, (params, state, _) in enumerate(history):
        found = optax.tree.get(state, "precision")
        for k in params:
            np.testing.assert_allclose(params[k], expected[k][t], rtol=0, atol=1e-12)
            np.testing.assert_allclose(found[k], precision[k][t], rtol=1e-12)


@pytest.mark.parametrize("regime", [slow("shard_map"), "pmap"])
def test_each_device_climbs_its_own_gradient_in_eigen_sam(regime):
    """By hand, one step: the vector is common to all, the gradient is the device's own."""
    params, batch = regimes.first_batch()
    v = jax.tree.map(jnp.cos, params)
    v = jax.tree.map(lambda x: x / optax.tree.norm(v), v)

    tx = optax.chain(samx.eigen_sam(0.3, 0.5), optax.sgd(1.0))

    def late(params):
        return optax.tree.set(tx.init(params), eigenvector=v)

    late = optax.GradientTransformationExtraArgs(late, tx.update)
    (found, *_) = LOCAL[regime](lambda like: late, params, [(batch,)], ascent="local")[0]

    @jax.jit
    def sharp(shard):
        g = regimes.gradient(params, shard)
        u = jax.tree.map(lambda x: x / optax.tree.norm(g), g)
        along = optax.tree.vdot(u, v)
        bend = 0.5 * jnp.sign(along)
        eps = jax.tree.map(lambda u, v: 0.3 * (u + bend * (v - along * u)), u, v)
        return regimes.gradient(optax.tree.add(params, eps), shard)

    shards = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in range(0, 16, 2)]
    mean = jax.tree.map(lambda *g: sum(g) / 8, *map(sharp, shards))
    regimes.assert_close(found, optax.tree.sub(params, mean))


class Shards:
    """Devices that climb on their own: their losses and gradients, and means of these."""

    def __init__(self, batch):
        parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in range(0, 16, 2)]
        self.parts = [reference_passes.Batch(part) for part in parts]

    def gradients(self, points):
        return [b.gradient(p) for b, p in zip(self.parts, points, strict=True)]

    def loss(self, points):
        return np.mean([b.loss(p) for b, p in zip(self.parts, points, strict=True)])


def mean_of(trees):
    return {k: np.mean([tree[k] for tree in trees], axis=0) for k in trees[0]}


def climbed(shards, points):
    """Each point after a climb of its device by 0.3."""
    unit, plus = reference_passes.unit, reference_passes.plus
    gradients = shards.gradients(points)
    return [plus(p, 0.3, unit(g)) for p, g in zip(points, gradients, strict=True)]


def lookbehind_by_hand(w, shards):
    points, fast = [w] * 8, w
    for _ in range(2):
        points = climbed(shards, points)
        fast = reference_passes.plus(fast, -0.1, mean_of(shards.gradients(points)))
    return fast


def sam_polyak_by_hand(w, shards):
    points = climbed(shards, [w] * 8)
    own = shards.gradients(points)
    slopes = [
        reference.inner(g, reference_passes.plus(p, -1, w))
        for g, p in zip(own, points, strict=True)
    ]
    g_s = mean_of(own)
    rate = (shards.loss(points) - np.mean(slopes)) / reference.inner(g_s, g_s)
    return reference_passes.plus(w, -rate, g_s)


def xsam_by_hand(w, shards):
    points = climbed(shards, [w] * 8)
    g_s = mean_of(shards.gradients(points))
    v_0 = reference_passes.unit(reference_passes.plus(mean_of(points), -1, w))
    turned = reference_passes.slerp(v_0, reference_passes.unit(g_s), 1.5)
    return reference_passes.plus(w, -reference.global_norm(g_s), turned)


def tsam_by_hand(w, shards):
    key, losses, gradients = jax.random.key(0), [], []
    for i in range(2):
        z = reference_passes.unit(samx.core.draws.normal_like(key, 0, w, i))
        points = climbed(shards, [reference_passes.plus(w, 0.4, z)] * 8)
        losses.append(shards.loss(points))
        gradients.append(mean_of(shards.gradients(points)))
    share = 1 / (1 + np.exp(losses[1] - losses[0]))
    mean = {k: share * g + (1 - share) * gradients[1][k] for k, g in gradients[0].items()}
    return reference_passes.plus(w, -1, mean)


BY_HAND = {
    "lookbehind_sam": (
        lambda: samx.lookbehind_sam(optax.sgd(0.1), 0.3, steps=2, alpha=1.0),
        lookbehind_by_hand,
    ),
    "sam_polyak": (lambda: samx.sam_polyak(0.3, 1e9, weight_decay=0.0), sam_polyak_by_hand),
    "xsam": (lambda: optax.chain(samx.xsam(0.3, alpha=1.5), optax.sgd(1.0)), xsam_by_hand),
    "tsam": (
        lambda: optax.chain(samx.tsam(0.3, samples=2, radius=0.4), optax.sgd(1.0)),
        tsam_by_hand,
    ),
}


@pytest.mark.parametrize(
    ("name", "regime"),
    slow_but({("lookbehind_sam", "shard_map")}, [(n, r) for n in BY_HAND for r in LOCAL]),
)
def test_each_device_climbs_its_own_gradient(name, regime):
    """By hand, one step: points are the device's own, steps are common to all."""
    make, by_hand = BY_HAND[name]
    params, batch = regimes.first_batch()
    (found, *_) = LOCAL[regime](lambda like: make(), params, [(batch,)], ascent="local")[0]
    regimes.assert_close(found, by_hand(jax.tree.map(np.asarray, params), Shards(batch)))


@pytest.mark.parametrize(
    ("name", "regime"),
    slow_but(
        {("bsam", "pmap")},
        [(n, r) for n in ("bsam", *NOISY) for r in ("shard_map", "pmap", "jit, explicit")],
    ),
)
def test_weights_count_examples_not_devices(name, regime):
    weighted = batches(3, weights=VALID)
    expected = regimes.single(build(name), problem.make()[1], weighted)
    assert_same(GLOBAL[regime](build(name), problem.make()[1], weighted), expected)


@pytest.mark.parametrize("name", ["bsam", "rwp", *map(slow, ("lpf_sgd", "arwp", "marwp"))])
def test_padding_does_not_count(name):
    """Examples of weight 0 are not seen, although they are in the halves and microbatches."""
    params, (batch, _) = problem.make()[1], batches(1, weights=VALID)[0]
    weights = jnp.asarray(VALID, float)
    broken = batch | {"x": jnp.where(weights[:, None] == 0, 1e3, batch["x"])}
    tx = build(name)(batch)
    step, state = jax.jit(regimes.make_step(tx)), tx.init(params)
    assert_same(
        [step(params, state, broken, weights)] * 2, [step(params, state, batch, weights)] * 2
    )


def with_aux(params, batch):
    """Return losses, and an aux that tells where it was taken, and on which examples."""
    aux = {"W1": params["W1"][0], "mean": batch["x"].mean(0), "size": jnp.int32(len(batch["y"]))}
    return problem.losses_fn(params, batch), aux


@pytest.mark.parametrize("name", ["lpf_sgd", "bsam"])
def test_aux_is_that_of_the_moved_points(name):
    """Its floating leaves are means over the microbatches and the devices."""
    params, data = problem.make()[1], batches(1)
    aux_like = jax.eval_shape(with_aux, params, data[0][0])[1]
    tx = build(name, aux_like=aux_like)
    expected = regimes.single(tx, params, data, losses_fn=with_aux)
    found = regimes.shard_map(tx, params, data, True, losses_fn=with_aux)
    found, expected = (optax.tree.get(history[0][1], "aux") for history in (found, expected))
    for k in ("W1", "mean"):
        np.testing.assert_allclose(found[k], expected[k], rtol=1e-12)
    np.testing.assert_allclose(expected["mean"], data[0][0]["x"].mean(0), rtol=1e-12)
    distance = np.abs(expected["W1"] - params["W1"][0]).max()
    assert 1e-4 < distance < 0.5
    draws, w = draws_of(2, 1), jax.tree.map(np.asarray, params)
    if name == "lpf_sgd":
        norms = reference.filter_norms(w)["W1"]
        wanted = w["W1"][0] + 0.01 * norms * draws["W1"][0].mean(0)[0]
        np.testing.assert_allclose(expected["W1"], wanted, rtol=1e-12)


ACCUMULATED = ("bsam", "lpf_sgd", "arwp", "eigen_sam", "lookbehind_sam", "tsam", "sassha", "gam")


@pytest.mark.parametrize("name", ["rwp", *map(slow, (*ACCUMULATED, "xsam", "gam_exact"))])
def test_accumulation(name):
    """Each gradient of a microbatch, a half or a Hessian is accumulated over two parts of it."""
    params = problem.make()[1]
    history = regimes.single(lambda like: samx.accumulate(build(name)(like), 2), params, batches(3))
    assert_same(history, on_one_device(name)[:3])


@pytest.mark.parametrize("regime", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_gnp_on_four_devices_takes_the_steps_of_its_authors_code(regime, monkeypatch):
    """Each device climbs and mixes its own gradients; the base clips their mean."""
    name = "gnp__sgdm_r0.1_a0.8_raw_dev4_nosync"
    (expected, _), run = problem.load(name), recorded.ON_DEVICES[name]
    monkeypatch.setattr(regimes, "DEVICES", 4)
    keywords = {"shape": (4,)} if regime == "shard_map" else {}
    history = LOCAL[regime](
        lambda batch_like: optax.chain(samx.gnp(**run.arguments), run.base),
        problem.make()[1],
        batches(problem.STEPS),
        ascent="local",
        **keywords,
    )
    for t, (params, *_) in enumerate(history):
        for k, w in params.items():
            np.testing.assert_allclose(w, expected[k][t], rtol=0, atol=1e-12)
