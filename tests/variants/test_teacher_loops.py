"""SAF and MESA against an independent loop, whose backward pass is written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import regimes
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from recorded import MOMENTUM, assert_same

import samx
from examples.common.programs import communicated_bytes

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 24  # six epochs of four batches
LOGITS = jax.ShapeDtypeStruct((3,), np.float64)
PADDED = np.array([1.0] * 9 + [0.0] * 3 + [0.5, 2.0, 0.0, 1.0])


def rows_of(t):
    """Examples of a step; every epoch has its own order."""
    order = np.random.RandomState(t // 4).permutation(64)
    return order[(t % 4) * 16 : (t % 4) * 16 + 16]


def some_twice(t):
    """The last batch of an epoch shows examples of the first one again."""
    return rows_of(t if t % 4 < 3 else t - 3)


def saf(**changes):
    defaults = {"num_examples": 64, "logits_like": LOGITS}
    return optax.chain(samx.saf(**defaults | changes), MOMENTUM)


def mesa(**changes):
    return optax.chain(samx.mesa(**{"steps_per_epoch": 4} | changes), MOMENTUM)


def as_step(tx, further=lambda params, batch: {}):
    @jax.jit
    def step(params, state, batch, index, weights):
        updates, state = tx.update(
            params,
            state,
            params,
            **{"apply_fn": problem.logits_of, "loss_on_logits": problem.loss_on_logits},
            **{"batch": batch, "index": index, "weights": weights},
            **further(params, batch),
        )
        return optax.apply_updates(params, updates), state

    return step


def train(tx, rows_of=rows_of, weights=None, steps=STEPS, **keywords):
    data, params = problem.make()
    step, state, history, readings = as_step(tx, **keywords), tx.init(params), [], []
    for t in range(steps):
        rows = rows_of(t)
        batch = jax.tree.map(lambda x, rows=rows: x[rows], data)
        index = rows if weights is None else np.where(weights == 0, 999, rows)
        params, state = step(params, state, batch, jnp.asarray(index), weights)
        found = optax.tree.get(state, "readings")
        total = found.sharp_loss if found.is_sharp else found.loss
        rise = found.sharpness if found.is_sharp else 0.0
        np.testing.assert_allclose(total - found.loss, rise, atol=1e-12)
        readings.append((found.loss, rise, found.grad_norm, found.gradients_spent))
        history.append(params)
    return jax.tree.map(lambda *x: np.stack(x), *history), np.array(readings, float)


def between(start, end=99):
    return lambda epoch: start < epoch < end


def halved(params, batch):
    return {"teacher_fn": lambda v, batch: (0.5 * problem.logits_of(v, batch), "aux")}


# samx; then the teacher, the epochs with it, and lam and temperature of the loop; what differs.
CASES = {
    "saf, later": (
        lambda: saf(lam=0.7, temperature=1.0, lag=2, start=2, end=5),
        lambda: (reference.EarlierLogits(2), between(2, 5), 0.7, 1.0),
        {},
    ),
    "saf, uniform at first": (
        lambda: saf(lam=0.5, temperature=3.0, start=-1),
        lambda: (reference.EarlierLogits(3), between(-1), 0.5, 3.0),
        {"rows_of": some_twice},
    ),
    "saf, padding": (
        lambda: saf(lam=lambda t: 0.1 * t, lag=1, start=0, steps_per_epoch=4),
        lambda: (reference.EarlierLogits(1), between(0), lambda t: 0.1 * t, 5.0),
        {"weights": PADDED},
    ),
    "mesa, later": (
        lambda: mesa(lam=0.7, temperature=1.0, decay=0.7, start=1, end=4),
        lambda: (reference.AveragedWeights(0.7), between(1, 4), 0.7, 1.0),
        {"weights": PADDED},
    ),
    "mesa, another function": (
        lambda: mesa(decay=0.9, start=-1),
        lambda: (reference.AveragedWeights(0.9, temper=0.5), between(-1), 0.8, 5.0),
        {"further": halved},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_loop(name):
    make, make_reference, options = CASES[name]
    expected, of_steps = loop(
        *make_reference(), options.get("rows_of", rows_of), options.get("weights")
    )
    found, readings = train(make(), **options)
    assert_same(found, expected)
    np.testing.assert_allclose(readings, of_steps, rtol=1e-6, atol=1e-10)


def loop(teacher, window, lam, temperature, rows_of, weights=None):
    base = reference.SGD(0.1, 0.9)
    return reference.train_with_teacher(
        base, teacher, rows_of, STEPS, window, lam, temperature, weights
    )


# ---- Around the variants, and on devices.

WRAPPED = {
    "accumulate": lambda tx: samx.accumulate(tx, 4),
    "scale_loss": samx.scale_loss,
    "scale_loss, accumulate": lambda tx: samx.scale_loss(samx.accumulate(tx, 4)),
    "skip_nonfinite": samx.skip_nonfinite,
}


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("saf, padding", "scale_loss, accumulate"),
        ("mesa, later", "scale_loss, accumulate"),
        *(
            pytest.param(name, wrapper, marks=pytest.mark.slow)
            for name in ("saf, padding", "mesa, later")
            for wrapper in ("accumulate", "scale_loss", "skip_nonfinite")
        ),
    ],
)
def test_wrappers_change_nothing(name, wrapper):
    make, make_reference, options = CASES[name]
    expected, _ = loop(*make_reference(), rows_of, options["weights"])
    assert_same(train(WRAPPED[wrapper](make()), **options)[0], expected)


def on_devices(tx):
    """Take the positions from the batch, since `regimes` numbers the rows of a batch."""

    def update(g, state, params, *, batch, **keywords):
        return tx.update(g, state, params, **keywords | {"batch": batch, "index": batch["index"]})

    return lambda like: optax.GradientTransformationExtraArgs(tx.init, update)


def numbered_batches(weights=None):
    data, _ = problem.make()
    for t in range(STEPS):
        rows = jnp.asarray(rows_of(t))
        batch = jax.tree.map(lambda x, rows=rows: x[rows], data) | {"index": rows}
        yield (batch,) if weights is None else (batch, jnp.asarray(weights))


@pytest.mark.parametrize(
    "regime",
    [
        "shard_map",
        *(pytest.param(r, marks=pytest.mark.slow) for r in regimes.GLOBAL if r != "shard_map"),
    ],
)
def test_every_example_has_its_own_teacher_on_devices(regime):
    tx = saf(lam=0.7, temperature=1.0, lag=2, start=2, end=5)
    weights = np.where(PADDED == 0, 0, 1.0)
    expected, _ = loop(*CASES["saf, later"][1](), rows_of, weights)
    params, data = problem.make()[1], list(numbered_batches(weights))
    history = regimes.GLOBAL[regime](on_devices(tx), params, data)
    assert_same({k: np.stack([p[k] for p, *_ in history]) for k in params}, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_table_may_be_sharded_over_the_examples(axis_type):
    tx = saf(lam=0.7, temperature=1.0, lag=2, start=2, end=5)
    expected, _ = loop(*CASES["saf, later"][1](), rows_of)
    mesh, (_, params) = regimes.mesh_of(axis_type=axis_type), problem.make()
    tx_at, history = on_devices(tx)(None), []
    with jax.set_mesh(mesh):
        state = tx.init(params)
        table = regimes.place(optax.tree.get(state, "logits"), mesh, P(None, "data"))
        params, state = regimes.place(params, mesh, P()), optax.tree.set(state, logits=table)
        step = jax.jit(regimes.make_step(tx_at), donate_argnums=1)
        batches = regimes.place(list(numbered_batches()), mesh, P("data"))
        sent = communicated_bytes(step.lower(params, state, batches[0][0]).compile())
        assert sum(sent.values()) < 0.7 * table.nbytes
        for (batch,) in batches:
            params, state, _ = step(params, state, batch)
            history.append(params)
            spec = optax.tree.get(state, "logits").sharding.spec
            assert axis_type == AxisType.Auto or spec[:2] == (None, "data")
    assert_same({k: np.stack([p[k] for p in history]) for k in params}, expected)
