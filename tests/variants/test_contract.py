"""What every variant guarantees: section "The contract" of the README."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import KINDS, VARIANTS
from checks import MOST_STEPS_BETWEEN

import samx

assert_finite = chex.assert_tree_all_finite

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_kind = pytest.mark.parametrize("name", KINDS)
# What optax and JAX guarantee for every program is tried on these: a chain, a branch, a base inside
# with examples in the state, an optimizer.
SOME = ("sam", "looksam", "sampa", "lightsam_adam")


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(*map(problem.as_numbers, (a, b)), rtol=rtol, atol=atol)


def fresh(dtype=np.float32):
    """Return the first batch and the parameters, in new buffers."""
    data, params = problem.make(dtype)
    return problem.batch_at(data, 0), params


@functools.cache
def first_updates(name):
    """Take one update of a row, outside `jit`."""
    return updates_of(VARIANTS[name].build(), fresh()[1], fresh()[0])


def updates_of(tx, params, batch, state=None, losses_fn=problem.losses_fn, **keywords):
    """Take one update as the contract writes it, outside `jit`."""

    def value_fn(p):
        return losses_fn(p, batch).mean()

    value, grads = jax.value_and_grad(value_fn)(params)
    keywords = {
        "value": value,
        "grad": grads,
        "value_fn": value_fn,
        "losses_fn": losses_fn,
        "batch": batch,
        **problem.further(batch, losses_fn),
    } | keywords
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, **keywords)


@every_kind
def test_jit_is_eager_and_compiles_once(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    step, state = problem.make_step(tx), tx.init(params)
    compiled = jax.jit(step)
    updates, slow = first_updates(name)
    fast = compiled(params, state, batch)
    assert_close(fast, (optax.apply_updates(params, updates), slow), rtol=1e-4)
    compiled(*fast, batch)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("name", SOME)
def test_scan(name):
    tx, (_, params) = VARIANTS[name].build(), fresh()
    data, _ = problem.make(np.float32)
    batches = jax.tree.map(lambda x: x.reshape(4, problem.BATCH_SIZE, *x.shape[1:]), data)
    step = problem.make_step(tx)
    carry, _ = jax.jit(
        lambda carry: jax.lax.scan(lambda c, b: (step(*c, b), None), carry, batches)
    )((params, tx.init(params)))
    loop, compiled = (params, tx.init(params)), jax.jit(step)
    for t in range(4):
        loop = compiled(*loop, problem.batch_at(data, t))
    assert_close(carry, loop, rtol=1e-4)


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


@pytest.mark.parametrize("name", SOME)
def test_donation(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    expected, _ = jax.jit(problem.make_step(tx))(params, tx.init(params), batch)
    donating = jax.jit(problem.make_step(tx), donate_argnums=(0, 1))
    carry = donating(params, tx.init(params), batch)
    assert_close(carry[0], expected)
    donating(*carry, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0]))


@every_variant
def test_map_params(name):
    tx, (_, params) = VARIANTS[name].build(), fresh()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    shaped = [
        (old, new)
        for old, new in zip(*map(jax.tree.leaves, (state, mapped)), strict=True)
        if old.shape == params["W1"].shape
    ]
    assert len(shaped) >= (VARIANTS[name].copies != -1)  # a state of two numbers
    for old, new in shaped:
        assert_close(new, old + 1)


@every_variant
def test_every_numeric_hyperparameter_can_be_injected(name):
    """The program reads every number that `optax.inject_hyperparams` keeps in the state."""
    case, (data, params) = VARIANTS[name], problem.make(np.float32)
    injected = case.build(inject=True)
    state = injected.init(params)
    arguments = params, state, problem.batch_at(data, 0)
    program = jax.make_jaxpr(problem.make_step(injected))(*arguments).jaxpr
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(arguments)]
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    for key in case.hyper:
        (number,) = [i for i, path in enumerate(paths) if path.endswith(f".hyperparams['{key}']")]
        assert id(program.invars[number]) in read, key


@every_kind
def test_float16_stays_finite(name):
    """That every row keeps its dtypes is one of `checks.py`."""
    tx, (batch, params) = VARIANTS[name].build(batch_like=fresh(jnp.float16)[0]), fresh(jnp.float16)
    assert_finite(jax.jit(functools.partial(updates_of, tx))(params, batch)[0])


@every_kind
def test_unknown_keywords_are_ignored(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    found = updates_of(tx, params, batch, unknown=object(), mine=None)
    assert_close(found, first_updates(name))


@every_variant
def test_missing_closures_are_named(name):
    case, (batch, params) = VARIANTS[name], fresh()
    tx = case.build()
    given = {"value_fn": lambda p: 0.0, "losses_fn": problem.losses_fn, "batch": batch}
    given |= problem.further(batch)
    for keyword in case.needs:
        derives = {"losses_fn", "batch"} if keyword == "value_fn" else set()
        keywords = {k: v for k, v in given.items() if k not in {keyword, *derives}}
        with pytest.raises(ValueError, match=rf"`{keyword}` is missing.*MultiSteps"):
            tx.update(params, tx.init(params), params, **keywords)
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.update(params, tx.init(params), None, value_fn=lambda p: 0.0)


@every_kind
def test_masked_parameters_are_refused(name):
    tx, (_, params) = VARIANTS[name].build(), fresh()
    masked = optax.masked(tx, {"W1": True, "b1": False, "W2": True, "b2": True})
    with pytest.raises(ValueError, match="on_leaves"):
        masked.init(params)
    holes = params | {"b1": optax.MaskedNode()}
    with pytest.raises(ValueError, match="on_leaves"):
        tx.update(holes, tx.init(params), holes, value_fn=lambda p: 0.0)


@every_kind
def test_integer_parameters_are_left_alone(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    with_table = params | {"table": jnp.arange(3)}
    with_flag = with_table | {"flag": jnp.array(True)}

    def losses_fn(params, batch):
        return problem.losses_fn(params, batch) * params["table"].sum()  # times 3

    grads = jax.grad(lambda p: losses_fn(p, batch).mean(), allow_int=True)(with_table)
    updates, _ = tx.update(
        grads,
        tx.init(with_table),
        with_table,
        value_fn=lambda p: losses_fn(p, batch).mean(),
        losses_fn=losses_fn,
        batch=batch,
        **problem.further(batch, losses_fn),
    )
    moved = optax.apply_updates(with_table, updates)
    np.testing.assert_array_equal(moved["table"], with_table["table"])
    assert moved["table"].dtype == with_table["table"].dtype

    def tripled(params, batch):
        return 3.0 * problem.losses_fn(params, batch)

    expected, _ = updates_of(tx, params, batch, losses_fn=tripled)
    assert_close({k: updates[k] for k in params}, expected)
    assert tx.init(with_flag) is not None


@every_kind
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


@pytest.mark.slow
@every_kind
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


# Rows that get no losses of examples see weights only through the loss, as SAM does.
@pytest.mark.parametrize(
    "name", ["sam", *(n for n in VARIANTS if "losses_fn" in VARIANTS[n].needs)]
)
def test_padding_has_no_weight(name):
    """A padded batch with weights takes the step of the batch without padding."""
    case, (batch, params) = VARIANTS[name], fresh()
    half = jax.tree.map(lambda x: x[:8], batch)
    padded = {"x": batch["x"].at[8:].set(7.0), "y": batch["y"]}
    weights = (jnp.arange(16) < 8).astype(jnp.float32)
    results = []
    one_group = {"num_groups": 1} if "num_groups" in case.static_args else {}
    for data, keywords in ((half, {}), (padded, {"weights": weights})):
        tx = case.build(batch_like=data, **one_group)
        closures = {"losses_fn": problem.losses_fn, "batch": data, **keywords}
        closures |= problem.further(data, weights=keywords.get("weights"))

        @jax.jit
        def step(params, state, tx=tx, closures=closures):
            grads = jax.grad(lambda p: problem.losses_fn(p, half).mean())(params)
            updates, state = tx.update(grads, state, params, **closures)
            return optax.apply_updates(params, updates), state

        results.append(step(*step(params, tx.init(params)))[0])
    assert_close(*results, rtol=1e-4)


@every_kind
def test_aux_is_dropped(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    expected, _ = first_updates(name)

    def losses_fn(p, b):
        return problem.losses_fn(p, b), {"statistics": b["x"].mean(0), "text": None}

    def value_fn(p):
        losses, aux = losses_fn(p, batch)
        return losses.mean(), aux

    grads = jax.grad(lambda p: value_fn(p)[0])(params)
    closures = {"losses_fn": losses_fn, "batch": batch, **problem.further(batch, losses_fn)}
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn, **closures)
    assert_close(updates, expected)


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


@every_kind
def test_line_search_as_base(name):
    """The base gets `value`, `grad` and a scalar `value_fn`, but none of samx's own keywords."""
    case, (batch, params) = VARIANTS[name], fresh()
    search = optax.chain(
        optax.sgd(1.0, momentum=0.9),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
    )
    if case.shape == "optimizer":
        return  # it has no base
    if case.shape == "wraps":
        tx = case.build(search)
    else:
        tx = samx.with_base(case.factory(**case.hyper), search)
    updates, _ = updates_of(tx, params, batch)
    assert_finite(updates)
