"""SAF and MESA: what is written, what the teacher is, what they refuse, and what stands around."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from jax.sharding import PartitionSpec as P

import samx
from samx.losses import trajectory_loss

INDEX = jnp.arange(problem.BATCH_SIZE)
PARTS = {"apply_fn": problem.logits_of, "loss_on_logits": problem.loss_on_logits}


def first_batch():
    data, params = problem.make("float32")
    return params, problem.batch_at(data, 0)


def test_the_first_teacher_of_mesa_is_the_model():
    """Whatever parameters `init` has seen: here zeros, before others are loaded."""
    params, batch = first_batch()
    tx = samx.mesa(decay=0.9, steps_per_epoch=1, start=-1)
    state = tx.init(jax.tree.map(jnp.zeros_like, params))
    _, state = jax.jit(lambda: tx.update(params, state, params, batch=batch, **PARTS))()
    assert abs(float(optax.tree.get(state, "sharpness"))) < 1e-6
    chex.assert_trees_all_equal(state.teacher, params)


def saf(**changes):
    fixed = {"num_examples": 64, "logits_like": jnp.zeros(3), "steps_per_epoch": 1}
    return samx.saf(**fixed | {"lag": 1, "start": 0} | changes)


def mesa(**changes):
    return samx.mesa(**{"decay": 0.9, "steps_per_epoch": 1, "start": 0} | changes)


def run(tx, steps, jit=True, **keywords):
    """Return updates and state after some steps at the same parameters."""
    params, batch = first_batch()
    keywords = {**PARTS, "batch": batch, "index": INDEX} | keywords
    update = functools.partial(tx.update, **keywords)
    update = jax.jit(update) if jit else update
    state, updates = tx.init(params), None
    for _ in range(steps):
        updates, state = update(params, state, params)
    return updates, state


# ---- The loss.


def test_the_loss_and_its_gradient_by_hand():
    rng = np.random.default_rng(0)
    z, teacher = rng.normal(size=(2, 4, 5, 3))  # examples, tokens, classes
    with jax.enable_x64(True):
        found = trajectory_loss(z, teacher, 2.0)
        p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (teacher, z))
        np.testing.assert_allclose(found, 4 * (p * np.log(p / q)).sum(-1).mean(-1), rtol=1e-12)
        slopes = jax.grad(lambda *args: trajectory_loss(*args, 2.0).sum(), (0, 1))(z, teacher)
        np.testing.assert_allclose(slopes[0], 2 * (q - p) / 5, rtol=1e-9, atol=1e-12)
        assert not np.any(slopes[1])


def test_a_class_that_is_masked_counts_for_nothing():
    z, teacher = jnp.array([[1.0, 2.0, -jnp.inf]]), jnp.array([[2.0, 1.0, -jnp.inf]])
    value, slope = jax.value_and_grad(lambda z: trajectory_loss(z, teacher).sum())(z)
    np.testing.assert_allclose(value, trajectory_loss(z[:, :2], teacher[:, :2])[0], rtol=1e-6)
    assert np.isfinite(slope).all()


def test_half_precision_is_compared_in_float32():
    z, teacher = (jax.random.normal(jax.random.key(i), (4, 3), jnp.bfloat16) for i in (0, 1))
    found = trajectory_loss(z, teacher)
    assert found.dtype == jnp.float32
    wide = trajectory_loss(z.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(3), jnp.ones(3)), "axis of examples and an axis of classes, got shape"),
        ((jnp.ones((2, 0)), jnp.ones((2, 0))), "axis of classes, got shape"),
        ((jnp.ones((2, 3)), jnp.ones((1, 3))), r"the shape of `logits`, \(2, 3\), got \(1, 3\)"),
        ((jnp.ones((2, 3)), jnp.ones((2, 3)), 0.0), "`temperature` must be above 0"),
    ],
)
def test_what_the_loss_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        trajectory_loss(*arguments)


# ---- SAF's table.


def test_masked_classes_and_skip_nonfinite():
    """Logits of −∞ are ordinary: they are written, and no step is skipped for them."""

    def masked(params, batch):
        return problem.logits_of(params, batch).at[:, 2].set(-jnp.inf)

    def loss_on_logits(logits, batch):
        return problem.cross_entropy(logits[:, :2], batch["y"] % 2)

    tx = samx.skip_nonfinite(optax.chain(saf(temperature=0.5), optax.sgd(0.1)))
    updates, state = run(tx, 3, apply_fn=masked, loss_on_logits=loss_on_logits)
    chex.assert_tree_all_finite((updates, optax.tree.get(state, "logits")))
    assert int(state.skipped_steps) == 0
    assert float(optax.tree.get(state, "sharpness")) == 0  # the same weights, the same logits


def test_logits_that_are_no_numbers_are_not_written():
    def broken(params, batch):
        bad = jnp.array([jnp.nan, jnp.inf])
        return problem.logits_of(params, batch).at[jnp.array([2, 5]), 1].set(bad)

    _, state = run(saf(), 1, apply_fn=broken)
    table = np.asarray(state.logits)
    assert np.isfinite(table).all()
    assert [row for row in range(16) if not table[0, row].any()] == [2, 5]
    assert not table[1].any()
    assert not table[0, 16:].any()


def test_a_table_in_half_precision():
    def large(params, batch):
        return 1e6 * problem.logits_of(params, batch)

    like = jax.ShapeDtypeStruct((3,), jnp.float16)
    _, state = run(saf(logits_like=like), 1, apply_fn=large)
    assert state.logits.dtype == jnp.float16
    assert np.isfinite(np.asarray(state.logits)).all()
    assert np.abs(state.logits).max() == 65504


def test_the_table_has_the_dtype_that_jax_would_store():
    """NumPy's numbers have 64 bits; nothing warns of it."""
    state = jax.eval_shape(saf(logits_like=np.zeros(3)).init, first_batch()[0])
    assert state.logits.dtype == jnp.float32


def test_logits_of_tokens():
    """Each token has its own teacher; the term is their mean."""

    def apply_fn(params, batch):
        logits = problem.logits_of(params, batch)
        return jnp.stack([logits, 2 * logits], 1)

    tx = saf(logits_like=jnp.zeros((2, 3)), lam=0.5, temperature=1.0)
    params, batch = first_batch()
    closures = {"apply_fn": apply_fn, "loss_on_logits": lambda z, b: z.mean((1, 2)), "batch": batch}
    update = jax.jit(functools.partial(tx.update, index=INDEX, **closures))
    _, state = update(params, tx.init(params), params)
    moved = jax.tree.map(lambda w: 1.5 * w, params)
    _, state = update(params, state, moved)
    pair = problem.logits_of(moved, batch), problem.logits_of(params, batch)
    terms = [0.5 * trajectory_loss(k * pair[0], k * pair[1], 1.0) for k in (1, 2)]
    expected = (terms[0] + terms[1]).mean() / 2
    np.testing.assert_allclose(optax.tree.get(state, "sharpness"), expected, rtol=1e-4)


def test_an_index_outside_the_table():
    padded = jnp.ones(16).at[5].set(0)
    for outside in (64, -1):
        index = INDEX.at[5].set(outside)
        updates, state = run(saf(), 1, index=index)
        assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(updates))
        assert not np.asarray(state.logits)[:, 16:].any()
        updates, state = run(saf(), 1, index=index, weights=padded)
        chex.assert_tree_all_finite(updates)
        assert not np.asarray(state.logits)[0, 5].any()
        with pytest.raises(ValueError, match=rf"saf: `index` must be in \[0, 64\).*got {outside}"):
            run(saf(), 1, jit=False, index=index)


# ---- MESA's teacher.


def test_the_average_moves_on_every_step():
    """Also on steps without the term, and on those that a policy skips; then nothing is written."""
    params, batch = first_batch()
    others = jax.tree.map(jnp.cos, params)
    closures = {**PARTS, "losses_fn": problem.losses_fn, "batch": batch, "value": 1.0}
    for tx in (mesa(start=9), samx.perturb_if(samx.policies.between(9), mesa())):
        update = functools.partial(tx.update, **closures)
        _, state = update(params, tx.init(params), params)
        chex.assert_trees_all_equal(optax.tree.get(state, "teacher"), params)
        _, state = update(params, state, others)
        expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, params, others)
        chex.assert_trees_all_close(optax.tree.get(state, "teacher"), expected, atol=1e-6)
    _, state = run(samx.perturb_if(samx.policies.between(9), saf()), 2)
    assert not np.any(optax.tree.get(state, "logits"))
    assert int(state.inner.step) == 2


def test_decay_one_keeps_the_first_weights():
    params, batch = first_batch()
    tx = mesa(decay=1.0)
    state, w = tx.init(params), params
    for _ in range(2):
        _, state = tx.update(w, state, w, **PARTS, batch=batch)
        w = jax.tree.map(jnp.cos, w)
    chex.assert_trees_all_equal(state.teacher, params)


def test_the_teacher_sees_the_dtypes_of_the_parameters():
    """The state is in float32, and integers are those of the step."""
    seen, (params, batch) = [], first_batch()
    params = {k: w.astype(jnp.bfloat16) for k, w in params.items()} | {"table": jnp.arange(3)}

    def teacher_fn(v, batch):
        seen.append({k: w.dtype for k, w in v.items()})
        return problem.logits_of(v, batch) * v["table"].sum()

    tx = mesa(start=-1)
    update = functools.partial(tx.update, **PARTS, batch=batch, teacher_fn=teacher_fn)
    _, state = jax.eval_shape(update, params, tx.init(params), params)
    assert seen == [{k: w.dtype for k, w in params.items()}]
    assert {str(x.dtype) for x in jax.tree.leaves(state.teacher)} == {"float32", "int32"}
    later = params | {"table": jnp.arange(1, 4)}
    _, state = update(params, tx.init(params), later)
    np.testing.assert_array_equal(state.teacher["table"], [1, 2, 3])


def test_a_batch_that_one_axis_replicates():
    """The teacher's logits, from averages that do not vary, must vary over devices as the model's.

    Types tell, so it is only traced.
    """
    params, batch = first_batch()
    mesh = regimes.mesh_of((2, 4), ("outer", "inner"))
    tx = samx.data_parallel(optax.chain(mesa(), optax.sgd(0.1)), ("outer", "inner"))

    def step(params, state, batch):
        return tx.update(params, state, params, **PARTS, batch=batch)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("outer")), out_specs=P())
    updates, _ = jax.eval_shape(jax.jit(mapped), params, tx.init(params), batch)
    chex.assert_trees_all_equal_shapes(updates, params)


def test_no_branch_where_all_epochs_have_the_term():
    params, batch = first_batch()

    def program(tx):
        update = functools.partial(tx.update, **PARTS, batch=batch)
        return str(jax.make_jaxpr(update)(params, tx.init(params), params))

    assert "cond[" in program(mesa())
    assert "cond[" not in program(mesa(start=-1))


# ---- Both.


def with_aux(params, batch):
    aux = {"mean": batch["x"].mean(0), "size": jnp.float32(len(batch["y"])), "W1": params["W1"][0]}
    return problem.logits_of(params, batch), aux


@pytest.mark.parametrize("make", [saf, mesa])
def test_aux_is_that_of_the_model(make):
    params, batch = first_batch()
    like = jax.eval_shape(lambda: with_aux(params, batch)[1])
    _, state = run(make(aux_like=like), 2, apply_fn=with_aux)
    aux = optax.tree.get(state, "aux")
    np.testing.assert_allclose(aux["mean"], batch["x"].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(aux["W1"], params["W1"][0])
    assert optax.tree.get(run(make(), 1, apply_fn=with_aux)[1], "aux") is None
    with pytest.raises(
        ValueError, match=r"`aux` must have the shapes.*it is the aux of `apply_fn`"
    ):
        run(make(aux_like=like), 1, jit=False)


@pytest.mark.parametrize("make", [saf, mesa])
def test_no_pass_sees_more_than_a_microbatch(make):
    sizes, (params, batch) = [], first_batch()

    def apply_fn(params, batch):
        sizes.append(len(batch["y"]))
        return problem.logits_of(params, batch)

    tx = samx.accumulate(optax.chain(make(), optax.sgd(0.1)), 4)
    closures = PARTS | {"apply_fn": apply_fn, "batch": batch, "index": INDEX}
    jax.eval_shape(lambda: tx.update(params, tx.init(params), params, **closures))
    assert set(sizes) == {4}


@pytest.mark.parametrize("make", [samx.saf, samx.mesa])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lam": -1.0}, ValueError, "`lam` must be at least 0"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be above 0"),
        ({"start": -2}, ValueError, "`start` must be at least -1, got -2"),
        ({"start": 3, "end": 4}, ValueError, "`end` must be at least 5, got 4"),
        ({"steps_per_epoch": 0}, ValueError, "`steps_per_epoch` must be at least 1"),
        ({"start": 1.5}, TypeError, "`start` must be a Python int"),
    ],
)
def test_what_both_refuse(make, changes, error, message):
    fixed = {"steps_per_epoch": 1}
    if make is samx.saf:
        fixed |= {"num_examples": 64, "logits_like": jnp.zeros(3)}
    with pytest.raises(error, match=message):
        make(**fixed | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lag": 0}, ValueError, "`lag` must be at least 1, got 0"),
        ({"num_examples": 0}, ValueError, "`num_examples` must be at least 1"),
        ({"logits_like": "3"}, TypeError, r"`logits_like` must be an array or a jax.*got a str"),
        ({"logits_like": [0.0, 1.0]}, TypeError, "must be an array or .*got a list"),
        ({"logits_like": None}, TypeError, r"`logits_like` must be .*got a NoneType"),
        ({"logits_like": jnp.zeros(())}, ValueError, r"one example, \[..., classes\], got shape"),
        ({"logits_like": jnp.zeros((2, 0))}, ValueError, "one example.*got shape"),
        ({"logits_like": jnp.zeros(3, int)}, TypeError, "real floating numbers, got int32"),
    ],
)
def test_what_saf_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        saf(**changes)


def test_decay_is_a_share():
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\], got 1.5"):
        mesa(decay=1.5)


@pytest.mark.parametrize(
    ("tx", "keywords", "error", "message"),
    [
        (saf(logits_like=jnp.zeros(4)), {}, ValueError, r"like `logits_like`, \(4,\), got \(3,\)"),
        (saf(), {"apply_fn": lambda p, b: [b["x"]]}, TypeError, "one array of logits, got a list"),
        (mesa(), {"apply_fn": lambda p, b: b["x"][:, 0]}, ValueError, r"\[B, ..., classes\], got"),
        (saf(), {"loss_on_logits": lambda z, b: z.mean()}, ValueError, "`loss_on_logits` must ret"),
        (
            mesa(),
            {"teacher_fn": lambda v, b: b["x"]},
            ValueError,
            r"`teacher_fn` must return logit",
        ),
        (mesa(), {"teacher_fn": 3}, TypeError, "`teacher_fn` must be a function, got int"),
        (mesa(), {"teacher_fn": lambda v: v}, TypeError, "`teacher_fn` must be a function of 2"),
        (mesa(), {"teacher_fn": lambda v, b: None}, TypeError, "`teacher_fn` must return one arr"),
        (saf(), {"index": INDEX[:3]}, ValueError, r"saf: `index` must have one position"),
        (saf(), {"index": 1.0 * INDEX}, TypeError, "saf: `index` must be of integers"),
    ],
)
def test_what_update_refuses(tx, keywords, error, message):
    with pytest.raises(error, match=message):
        run(tx, 1, jit=False, **keywords)
