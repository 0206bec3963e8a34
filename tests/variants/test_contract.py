"""What every variant guarantees: section "The contract" of the README."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import CLOSURES, KINDS, VARIANTS, first_of_each
from checks import MOST_STEPS_BETWEEN

import samx

assert_finite = chex.assert_tree_all_finite

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_kind = pytest.mark.parametrize("name", KINDS)
# What optax and JAX guarantee for every program is tried on one row of each shape, and on a gated
# one.
SHAPES = first_of_each(lambda case: (case.shape, case.is_gated))
one_of_each_shape = pytest.mark.parametrize("name", SHAPES)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(*map(problem.as_numbers, (a, b)), rtol=rtol, atol=atol)


def fresh(dtype=np.float32):
    """Return the first batch and the parameters, in new buffers."""
    data, params = problem.make(dtype)
    return problem.batch_at(data, 0), params


@functools.cache
def compiled(name):
    """Return a row's optimizer and its compiled step."""
    tx = VARIANTS[name].build()
    return tx, jax.jit(problem.make_step(tx))


def updates_of(tx, params, batch, losses_fn=problem.losses_fn, **keywords):
    """Take one update as the contract writes it. The losses may have an aux."""

    def value_fn(p):
        losses = losses_fn(p, batch)
        return (losses[0].mean(), losses[1]) if isinstance(losses, tuple) else losses.mean()

    def loss(p):
        value = value_fn(p)
        return value[0] if isinstance(value, tuple) else value

    value, grads = jax.value_and_grad(loss, allow_int=True)(params)
    keywords = {
        "value": value,
        "grad": grads,
        "value_fn": value_fn,
        "losses_fn": losses_fn,
        "batch": batch,
        **problem.further(batch, losses_fn),
    } | keywords
    return tx.update(grads, tx.init(params), params, **keywords)


def test_jit_is_eager():
    tx, (batch, params) = VARIANTS["sam"].build(), fresh()
    update = functools.partial(updates_of, tx, losses_fn=jax.jit(problem.losses_fn))
    assert_close(jax.jit(update)(params, batch), update(params, batch), rtol=1e-4)


@one_of_each_shape
def test_scan_with_donated_arguments_and_one_program(name):
    (tx, step), (data, params) = compiled(name), problem.make(np.float32)
    batches = jax.tree.map(lambda x: x.reshape(4, problem.BATCH_SIZE, *x.shape[1:]), data)

    def train(carry, batches):
        whole = problem.make_step(tx)
        return jax.lax.scan(lambda carry, batch: (whole(*carry, batch), None), carry, batches)[0]

    expected = params, tx.init(params)
    for t in range(4):
        expected = step(*expected, problem.batch_at(data, t))
    assert step._cache_size() == 1
    given = jax.tree.map(jnp.copy, params), tx.init(params)
    found = jax.jit(train, donate_argnums=0)(given, batches)
    assert_close(found, expected, rtol=1e-4)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[0]))


@pytest.mark.slow
@every_kind
def test_vmap_over_hyperparameters_and_seeds(name):
    case, (batch, params) = VARIANTS[name], fresh()

    def run(scale, hyper):
        start = jax.tree.map(lambda x: x * scale, params)
        tx = case.build(**hyper)
        step = problem.make_step(tx)
        return step(*step(start, tx.init(start), batch), batch)[0]

    scales = jnp.array([0.9, 1.0, 1.1])
    hyper = {k: jnp.array([0.5, 1.0, 0.8]) * v for k, v in case.hyper.items()}
    together = jax.jit(jax.vmap(run))(scales, hyper)
    one = jax.jit(run)
    for i in range(3):
        alone = one(scales[i], {k: v[i] for k, v in hyper.items()})
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-4, atol=1e-5)


@every_variant
def test_map_params(name):
    tx, (_, params) = VARIANTS[name].build(), fresh()
    state = jax.eval_shape(tx.init, params)
    mapped = optax.tree.map_params(tx, lambda leaf: "mapped", state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    found = [
        leaf
        for old, leaf in zip(*map(jax.tree.leaves, (state, mapped)), strict=True)
        if old.shape == params["W1"].shape
    ]
    assert len(found) >= (VARIANTS[name].copies != -1)  # a state of two numbers
    assert set(found) <= {"mapped"}


@every_variant
def test_every_numeric_hyperparameter_can_be_injected(name):
    """`optax.inject_hyperparams` keeps every number in the state, and the program reads it."""
    case, (data, params) = VARIANTS[name], problem.make(np.float32)
    injected = case.build(inject=True)
    state = jax.eval_shape(injected.init, params)
    arguments = params, state, problem.batch_at(data, 0)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(arguments)]
    found = {
        key: [i for i, path in enumerate(paths) if path.endswith(f".hyperparams['{key}']")]
        for key in case.hyper
    }
    assert {len(numbers) for numbers in found.values()} <= {1}
    if name not in KINDS:  # `test_rows.py` has every row read its numbers
        return
    program = jax.make_jaxpr(problem.make_step(injected))(*arguments).jaxpr
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    for key, (number,) in found.items():
        assert id(program.invars[number]) in read, key


@every_variant
def test_strict_promotion(name):
    """No dtypes are mixed, for users who have this forbidden; bfloat16 mixes with float32 too."""
    batch, params = fresh(jnp.bfloat16)
    tx = VARIANTS[name].build(batch_like=batch)
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, params)
        update = functools.partial(updates_of, tx, losses_fn=losses_of_any_dtype)
        _, after = jax.eval_shape(update, params, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def losses_of_any_dtype(params, batch):
    with jax.numpy_dtype_promotion("standard"):
        return problem.losses_fn(params, batch)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [  # `keeps_dtypes` of `checks.py` tries bfloat16 on every row
        pytest.param(name, dtype, marks=[] if name in KINDS else pytest.mark.slow)
        for name, dtype in zip(
            VARIANTS, itertools.cycle([jnp.float8_e4m3fn, jnp.float4_e2m1fn]), strict=False
        )
    ],
)
def test_low_bit_leaves_keep_their_dtype(name, dtype):
    """JAX promotes them to nothing; they are trained like any other."""
    batch, params = fresh()
    params["b2"] = params["b2"].astype(dtype)
    tx = VARIANTS[name].build(batch_like=batch)

    def losses_fn(params, batch):
        return problem.losses_fn(params | {"b2": params["b2"].astype(jnp.float32)}, batch)

    updates, after = jax.eval_shape(
        functools.partial(updates_of, tx, losses_fn=losses_fn), params, batch
    )
    after_step = jax.eval_shape(optax.apply_updates, params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(after_step, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(tx.init, params))


@every_variant
def test_missing_closures_are_named(name):
    case, (batch, params) = VARIANTS[name], fresh()
    tx = case.build()
    given = {"value_fn": lambda p: 0.0, "losses_fn": problem.losses_fn, "batch": batch}
    given |= problem.further(batch)
    state = jax.eval_shape(tx.init, params)
    parts = {"apply_fn", "features_fn", "head_fn", "loss_on_logits"}
    for keyword in case.needs:
        derives = {
            "value_fn": {"losses_fn", "batch"},
            "losses_fn": parts,
            "apply_fn": {"features_fn", "head_fn"},
        }.get(keyword, set())
        keywords = {k: v for k, v in given.items() if k not in {keyword, *derives}}
        with pytest.raises(ValueError, match=rf"`{keyword}` is missing.*MultiSteps"):
            jax.eval_shape(functools.partial(tx.update, **keywords), params, state, params)
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.update(params, state, None, value_fn=lambda p: 0.0)


@every_kind
def test_masked_parameters_are_refused(name):
    tx, (_, params) = VARIANTS[name].build(), fresh()
    masked = optax.masked(tx, {"W1": True, "b1": False, "W2": True, "b2": True})
    with pytest.raises(ValueError, match="on_leaves"):
        masked.init(params)
    holes = params | {"b1": optax.MaskedNode()}
    with pytest.raises(ValueError, match="on_leaves"):
        tx.update(holes, jax.eval_shape(tx.init, params), holes, value_fn=lambda p: 0.0)


@every_kind
def test_integer_parameters_aux_and_unknown_keywords_change_nothing(name):
    """Integers do not move, the aux of the losses is dropped, and other keywords are ignored.

    One row of each set of closures runs; of the others, the shapes and dtypes must be right.
    """
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    with_table = params | {"table": jnp.arange(3)}

    def tripled(params, batch):
        return 3.0 * problem.losses_fn(params, batch)

    def losses_fn(params, batch):
        aux = {"statistics": batch["x"].mean(0), "text": None}
        return problem.losses_fn(params, batch) * params["table"].sum(), aux

    def update(with_table, batch):
        further = {"losses_fn": losses_fn, "unknown": object(), "mine": None}
        return updates_of(tx, with_table, batch, **further)[0]

    jax.eval_shape(tx.init, with_table | {"flag": jnp.array(True)})
    if name not in CLOSURES:
        moved = jax.eval_shape(
            lambda *args: optax.apply_updates(args[0], update(*args)), with_table, batch
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(moved, with_table)
        return

    @jax.jit
    def both(params, with_table, batch):
        expected = updates_of(tx, params, batch, losses_fn=tripled)[0]
        return expected, update(with_table, batch)

    expected, found = both(params, with_table, batch)
    moved = optax.apply_updates(with_table, found)
    np.testing.assert_array_equal(moved["table"], with_table["table"])
    assert moved["table"].dtype == with_table["table"].dtype
    assert_close({k: found[k] for k in params}, expected)


@one_of_each_shape
def test_skip_nonfinite_skips_a_broken_batch_and_recovers(name):
    tx, (batch, params) = samx.skip_nonfinite(VARIANTS[name].build()), fresh()
    broken = batch | {"x": batch["x"].at[2:4, 2].set(jnp.nan)}  # examples of one group
    step = jax.jit(problem.make_step(tx))
    before = step(params, tx.init(params), batch)
    after = step(*before, broken)
    assert_close(after[0], before[0], atol=0, rtol=0)
    assert_close(after[1].inner, before[1].inner, atol=0, rtol=0)
    assert (int(after[1].skipped_steps), int(after[1].skipped_in_a_row)) == (1, 1)
    again = step(*after, batch)
    assert_close(again[0], step(*before, batch)[0], atol=0, rtol=0)
    assert (int(again[1].skipped_steps), int(again[1].skipped_in_a_row)) == (1, 0)


# SAF and MESA have none. What logits-SAM calls at the perturbed point, its head, is finite here.
WITHOUT_SHARP_PASS = ("saf", "mesa", "logits_sam")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in KINDS if n not in WITHOUT_SHARP_PASS])
def test_skip_nonfinite_sees_the_sharp_pass_alone(name):
    tx, (batch, params) = samx.skip_nonfinite(VARIANTS[name].build()), fresh()
    whole = jax.jit(problem.make_step(tx))
    carry = whole(params, tx.init(params), batch)

    def cliff(start, p, batch):
        """Losses that are finite only at `start`; after any perturbation they are NaN."""
        is_moved = sum(jnp.sum(jnp.abs(p[k] - start[k])) for k in p) > 0
        return jnp.where(is_moved, jnp.nan, 1.0) * problem.losses_fn(p, batch)

    @jax.jit
    def over_the_cliff(params, state):
        return problem.make_step(tx, functools.partial(cliff, params))(params, state, batch)

    for _ in range(MOST_STEPS_BETWEEN):
        after = over_the_cliff(*carry)
        if after[1].skipped_steps:
            break
        carry = after  # a policy skipped the sharp pass
    assert_close(after[0], carry[0], atol=0, rtol=0)
    assert int(after[1].skipped_steps) == 1
    recovered = whole(*after, batch)
    assert_finite(recovered[0])
    assert np.abs(recovered[0]["W1"] - carry[0]["W1"]).max() > 0


@pytest.mark.slow
@every_kind
def test_apply_if_finite(name):
    tx, (batch, params) = optax.apply_if_finite(VARIANTS[name].build(), 5), fresh()
    assert_finite(problem.make_step(tx)(params, tx.init(params), batch)[0])


# Rows that get no losses of examples see weights only through the loss, as SAM does. Selections and
# microbatches have tests of their own: `test_selection.py`, `test_msam.py`, `test_sparse_sam.py`.
def is_padded_whole(case):
    chooses = {"num_groups", "num_microbatches"} & {*case.static_args}
    return "losses_fn" in case.needs and not chooses


@pytest.mark.parametrize("name", ["sam", *(n for n in VARIANTS if is_padded_whole(VARIANTS[n]))])
def test_padding_has_no_weight(name):
    """A padded batch with weights takes the step of the batch without padding."""
    case, (batch, params) = VARIANTS[name], fresh()
    half = jax.tree.map(lambda x: x[:8], batch)
    padded = {"x": batch["x"].at[8:].set(7.0), "y": batch["y"]}
    weights = (jnp.arange(16) < 8).astype(jnp.float32)

    def train(data, weights=None):
        """Take two steps; all that differs is what `update` gets."""
        tx = case.build(batch_like=data)
        closures = {"losses_fn": problem.losses_fn, "batch": data}
        closures |= problem.further(data, weights=weights)
        closures |= {} if weights is None else {"weights": weights}

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: problem.losses_fn(p, half).mean())(params)
            updates, state = tx.update(grads, state, params, **closures)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]

    assert_close(*jax.jit(lambda: (train(half), train(padded, weights)))(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "sampa", "looksam", "momentum_sam", "lets"])
def test_a_step_is_differentiable_in_the_radius(name):
    case = VARIANTS[name]
    with jax.enable_x64(True):
        batch, params = fresh(np.float64)

        @jax.jit
        def loss_after(rho):
            tx = case.build(batch_like=batch, rho=rho)
            step, carry = problem.make_step(tx), (params, tx.init(params))
            for _ in range(2):
                carry = step(*carry, batch)
            return problem.losses_fn(carry[0], batch).mean()

        rho, h = case.hyper.get("rho", 0.1), 1e-5
        slope = jax.jit(jax.grad(loss_after))(rho)
        difference = (loss_after(rho + h) - loss_after(rho - h)) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=1e-5)


# Every wrapper hands its base the keywords itself; for a chain, `with_base` does it.
@pytest.mark.parametrize("name", ["sam", *(n for n in KINDS if VARIANTS[n].shape == "wraps")])
def test_line_search_as_base(name):
    """The base gets `value`, `grad` and a scalar `value_fn`, but none of samx's own keywords."""
    case, (batch, params) = VARIANTS[name], fresh()
    search = optax.chain(
        optax.sgd(1.0, momentum=0.9),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
    )
    if case.shape == "wraps":
        tx = case.build(search)
    else:
        tx = samx.with_base(case.factory(**case.hyper), search)
    update = functools.partial(updates_of, tx)
    if name == "sam":
        assert_finite(jax.jit(update)(params, batch)[0])
    else:  # a keyword too few or too many is an error of any trace
        jax.eval_shape(update, params, batch)


@pytest.mark.parametrize(
    "name",
    [n if n in {*CLOSURES, *SHAPES} else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS],
)
def test_debug_infs(name):
    """`jax_debug_infs` finds no infinity, though a reading that is not known is infinite."""
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    with jax.debug_infs(True):
        state = jax.jit(tx.init)(params)
        carry = jax.jit(problem.make_step(tx))(params, state, batch)
    assert np.isfinite(float(optax.tree.get(carry[1], "loss")))
