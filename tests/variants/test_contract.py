"""What every variant guarantees: section "The contract" of the README."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import APART, VARIANTS

import samx

assert_finite = chex.assert_tree_all_finite

MOST_STEPS_BETWEEN = 7  # from one sharp step to the next, in any row
every_variant = pytest.mark.parametrize("name", VARIANTS)
# One row of each kind: chained, wrapping, an optimizer; with tables, keys, masks, examples.
SIMILAR = ("rst", "gsam", "bisam", "focal_sam", "esam")
KINDS = [name for name in APART if name not in SIMILAR]
every_kind = pytest.mark.parametrize("name", KINDS)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(*map(problem.as_numbers, (a, b)), rtol=rtol, atol=atol)


def fresh(dtype=np.float32):
    """Return the first batch and the parameters, in new buffers."""
    data, params = problem.make(dtype)
    return problem.batch_at(data, 0), params


@jax.jit
def mean_loss_and_grad(params, batch):
    return jax.value_and_grad(lambda p: problem.losses_fn(p, batch).mean())(params)


def signature(tree):
    """Return shapes and dtypes. If they change between steps, the program is compiled again."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, getattr(x, "weak_type", False)), tree)


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


@every_variant
def test_state_keeps_its_shapes_and_dtypes(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    state = jax.eval_shape(tx.init, params)
    new_params, new_state = jax.eval_shape(problem.make_step(tx), params, state, batch)
    assert signature(new_state) == signature(state)
    assert signature(new_params) == signature(params)


@every_kind
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


@every_kind
def test_donation(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    expected, _ = jax.jit(problem.make_step(tx))(params, tx.init(params), batch)
    donating = jax.jit(problem.make_step(tx), donate_argnums=(0, 1))
    carry = donating(params, tx.init(params), batch)
    assert_close(carry[0], expected)
    donating(*carry, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0]))


@every_kind
def test_eval_shape(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()
    state = jax.eval_shape(tx.init, params)
    assert signature_of_shapes(state) == signature_of_shapes(tx.init(params))
    new_params, new_state = jax.eval_shape(problem.make_step(tx), params, state, batch)
    assert signature_of_shapes(new_params) == signature_of_shapes(params)
    assert signature_of_shapes(new_state) == signature_of_shapes(state)


def signature_of_shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


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
    assert len(shaped) >= (name != "lightsam_norm")  # its state is two numbers
    for old, new in shaped:
        assert_close(new, old + 1)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in KINDS])
def test_every_numeric_hyperparameter_is_read(name):
    """For rows outside KINDS: the traced program reads every hyperparameter."""
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
def test_every_numeric_hyperparameter_is_injected(name):
    case, (data, params) = VARIANTS[name], problem.make(np.float32)
    injected = case.build(inject=True)
    state = as_left_by_a_step(injected, params)
    hyperparams = optax.tree.get(state, "hyperparams")
    assert set(case.hyper) <= set(hyperparams)
    step = jax.jit(problem.make_step(injected))

    def go_on(params, state):
        for t in range(1, 1 + MOST_STEPS_BETWEEN):
            params, state = step(params, state, problem.batch_at(data, t))
        return params, optax.tree.set(state, hyperparams=hyperparams)

    carry = step(params, state, problem.batch_at(data, 0))
    unchanged = go_on(*carry)
    expected = problem.train(case.build(), 1 + MOST_STEPS_BETWEEN, lambda: (data, params))
    assert_close(unchanged[0], {k: v[-1] for k, v in expected.items()}, rtol=1e-4)
    for key in case.hyper:
        halved = hyperparams | {key: hyperparams[key] * np.float32(0.5)}
        changed = optax.tree.set(carry[1], hyperparams=halved)
        moved = go_on(carry[0], changed)
        # Compare the state too: another threshold may lead to the same decisions.
        assert distance(moved, unchanged) > 1e-7, key


def as_left_by_a_step(tx, params):
    """Return the state of `init` with the types after a step; before, hyperparameters are weak."""

    def strong(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if is_key else jax.lax.convert_element_type(x, x.dtype)

    return jax.tree.map(strong, tx.init(params))


def distance(a, b):
    """Return the largest difference of two finite numbers at the same place."""
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return max(
        float(jnp.max(jnp.abs(x - y), initial=0.0, where=jnp.isfinite(x) & jnp.isfinite(y)))
        for x, y in pairs
        if jnp.issubdtype(x.dtype, jnp.floating)
    )


@every_kind
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes_are_kept(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx, (batch, params) = VARIANTS[name].build(batch_like=fresh(dtype)[0]), fresh(dtype)
        update = functools.partial(updates_of, tx)
        updates, state = jax.eval_shape(update, params, batch)
        assert {leaf.dtype for leaf in updates.values()} == {jnp.dtype(dtype)}
        assert signature_of_shapes(state) == signature_of_shapes(tx.init(params))
        if dtype == jnp.float16:
            assert_finite(jax.jit(update)(params, batch)[0])


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


# Also rows that divide by another quantity.
@pytest.mark.parametrize(
    "name",
    [
        *(*APART, "layerwise", "look_layer_sam", "stable_sam", "monge_sam", "mup_sam"),
        *("lightsam_norm", "lightsam_adagrad", "adasam"),
    ],
)
def test_zero_gradient_is_finite(name):
    tx, (batch, params) = VARIANTS[name].build(), fresh()

    def flat(params, batch):
        return 0.0 * problem.losses_fn(params, batch)

    carry, step = (params, tx.init(params)), jax.jit(problem.make_step(tx, flat))
    for _ in range(2):
        carry = step(*carry, batch)
    readings = optax.tree.get(carry[1], "readings")
    no_loss = readings._replace(sharp_loss=jnp.zeros(()))  # infinite if no step was sharp
    state = optax.tree.set(carry[1], readings=no_loss)
    assert_finite((carry[0], problem.as_numbers(state)))
    assert_close(carry[0], params, atol=0, rtol=0)
    assert float(readings.perturbation_norm) == 0.0


@every_kind
def test_learning_rate_zero_moves_nothing(name):
    tx, (batch, params) = VARIANTS[name].at_rest(), fresh()
    step, carry = jax.jit(problem.make_step(tx)), (params, tx.init(params))
    for _ in range(20):
        carry = step(*carry, batch)
    assert_close(carry[0], params, atol=0, rtol=0)


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
    inner, (batch, params) = VARIANTS[name].build(), fresh()
    tx = samx.skip_nonfinite(inner)
    broken = batch | {"x": batch["x"].at[2:4, 2].set(jnp.nan)}  # examples of one group
    step = jax.jit(problem.make_step(tx))
    before = step(params, tx.init(params), batch)
    after = step(*before, broken)
    assert_close(after[0], before[0], atol=0, rtol=0)
    assert_close(after[1].inner, before[1].inner, atol=0, rtol=0)
    assert (int(after[1].skipped_steps), int(after[1].skipped_in_a_row)) == (1, 1)
    again = step(*after, batch)
    expected = jax.jit(problem.make_step(inner))(before[0], before[1].inner, batch)
    assert_close(again[0], expected[0])
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


@every_variant
def test_readings(name):
    case, (data, params) = VARIANTS[name], problem.make(np.float32)
    tx = case.build()
    start = optax.tree.get(tx.init(params), "readings")
    assert not bool(start.is_sharp)
    assert float(start.gradients_spent) == 0

    carry, step, spent, are_sharp = (params, tx.init(params)), jax.jit(problem.make_step(tx)), 0, []
    for t in range(6):
        before, batch = carry[0], problem.batch_at(data, t)
        carry = step(*carry, batch)
        readings = optax.tree.get(carry[1], "readings")
        are_sharp.append(bool(readings.is_sharp))
        sharp = case.spent(t, carry[1]) if case.spent else case.gradients
        spent += sharp if readings.is_sharp else 1
        assert float(readings.gradients_spent) == pytest.approx(spent, rel=1e-6)
        assert float(optax.tree.get(carry[1], "sharp_loss")) == float(readings.sharp_loss)
        if case.climbs:
            loss, grads = mean_loss_and_grad(before, batch)
            np.testing.assert_allclose(readings.loss, loss, rtol=1e-5)
            np.testing.assert_allclose(readings.grad_norm, optax.tree.norm(grads), rtol=1e-5)
        if not readings.is_sharp:
            assert float(readings.sharp_loss) == float("inf")
            assert float(readings.perturbation_norm) == float(readings.cosine) == 0
        elif case.climbs or t > 0:
            assert float(readings.perturbation_norm) > 0
            assert 0 < abs(float(readings.cosine)) <= 1 + 1e-6
        if readings.is_sharp and case.climbs:
            assert float(readings.cosine) > 0
            assert float(readings.sharp_loss) > float(readings.loss)
    assert set(are_sharp) == ({True, False} if case.is_gated else {True})


@every_kind
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


WITH_RADIUS = [name for name in APART if "rho" in VARIANTS[name].hyper]


@pytest.mark.parametrize("name", [*WITH_RADIUS, "l-infinity", "usam", "monge_sam", "mup_sam"])
def test_radius_schedule_runs_on_the_optimizers_step(name):
    case, (batch, params) = VARIANTS[name], fresh()

    @jax.jit
    def step(params, state, slope):
        tx = case.at_rest(rho=lambda step: 0.01 * (1.0 + slope * step))
        return problem.make_step(tx)(params, state, batch)

    def norms(slope):
        carry, readings = (params, case.at_rest(rho=0.01).init(params)), []
        for _ in range(6):
            carry = step(*carry, slope)
            readings.append(float(optax.tree.get(carry[1], "perturbation_norm")))
        return np.array(readings)

    constant, scheduled = norms(0.0), norms(1.0)
    np.testing.assert_allclose(scheduled, constant * np.arange(1, 7), rtol=5e-2)
    assert constant.max() > 0


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

        rho, h = case.hyper.get("rho", 0.05), 1e-5
        slope = jax.jit(jax.grad(loss_after))(rho)
        difference = (loss_after(rho + h) - loss_after(rho - h)) / (2 * h)
        np.testing.assert_allclose(slope, difference, rtol=1e-5)


@every_variant
def test_wide_hyperparameters_do_not_widen_the_step(name, float64):
    """float32 parameters and strong float64 numbers, as `optax.inject_hyperparams` passes them."""
    del float64
    case, (batch, params) = VARIANTS[name], fresh(np.float32)
    wide = {keyword: jnp.asarray(value, jnp.float64) for keyword, value in case.hyper.items()}
    tx = case.build(batch_like=batch, **wide)
    state = tx.init(params)
    after = jax.eval_shape(problem.make_step(tx), params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))


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
