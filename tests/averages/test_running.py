"""Running averages of the iterates: rules, dtypes, steps that are skipped, transformations."""

import averaged
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx import averages

NUM_STEPS = 11
ITERATES = np.random.RandomState(0).randn(NUM_STEPS, 3)


def warm_up(step):
    return jnp.minimum(0.9, (1 + step) / (4 + step))


FACTORIES = {
    "ema": lambda tx: averages.ema(tx, 0.5),
    "swa": lambda tx: averages.swa(tx, 0),
    "latest": lambda tx: averages.latest(tx, 2),
    "swad": lambda tx: averages.swad(tx, 2, 2),
}
every_factory = pytest.mark.parametrize("name", FACTORIES)
LOOPS = {  # the transformation, and the average after each step by an independent loop
    "ema": (
        lambda tx: averages.ema(tx, 0.75),
        lambda xs: averaged.ema(xs, lambda t: 0.75),
    ),
    "ema of some": (
        lambda tx: averages.ema(tx, 0.5, every=3),
        lambda xs: averaged.ema(xs, lambda t: 0.5, 3),
    ),
    "ema, warmed up": (
        lambda tx: averages.ema(tx, warm_up, every=2),
        lambda xs: averaged.ema(xs, lambda t: float(warm_up(t)), 2),
    ),
    "the last iterate": (
        lambda tx: averages.ema(tx, 0),
        lambda xs: iter(xs),
    ),
    "swa": (lambda tx: averages.swa(tx, 0), lambda xs: averaged.swa(xs, 0)),
    "swa of some": (lambda tx: averages.swa(tx, 3, 4), lambda xs: averaged.swa(xs, 3, 4)),
    "latest": (lambda tx: averages.latest(tx, 3), lambda xs: averaged.latest(xs, 3)),
    "latest of some": (
        lambda tx: averages.latest(tx, 2, every=3),
        lambda xs: averaged.latest(xs, 2, 3),
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_against_a_loop(name, float64):
    build, loop = LOOPS[name]
    found, _ = averaged.run(build(optax.identity()), jnp.asarray(ITERATES), averages.params)
    np.testing.assert_allclose(found, [*loop(ITERATES)], rtol=0, atol=1e-12)


def test_a_recorded_run_of_swa(float64):
    """PyTorch's AveragedModel, as khanrc/swad has it."""
    arrays, meta = problem.load("swa__sgdm_start4_freq1")
    iterates = {k: jnp.asarray(arrays[k]) for k in problem.make()[1]}
    tx = averages.swa(optax.identity(), meta["hyper"]["start"], meta["hyper"]["freq"])
    found, state = averaged.run(tx, iterates, averages.params)
    assert int(state.num_averaged) == 8
    for k, x in found.items():
        wanted = np.where(np.isnan(arrays[f"avg_{k}"]), arrays[k], arrays[f"avg_{k}"])
        np.testing.assert_allclose(x, wanted, rtol=0, atol=1e-14)


@every_factory
def test_the_training_does_not_change(name, float64):
    """With SAM inside, which needs the keywords, and a base with a state."""
    base = optax.chain(samx.sam(0.1), optax.sgd(0.1, momentum=0.9))
    data, params = problem.make()
    first = params
    step = jax.jit(problem.make_step(FACTORIES[name](base)))
    state, iterates = FACTORIES[name](base).init(params), []
    for t in range(2):
        params, state = step(params, state, problem.batch_at(data, t))
        iterates.append(params)
    expected = problem.train(base, steps=2)
    for k, x in expected.items():
        np.testing.assert_allclose(params[k], x[-1], rtol=0, atol=1e-14)
        assert np.abs(x[-1] - first[k]).max() > 1e-3
    if name != "swad":
        weights = np.array([1, 2]) / 3 if name == "ema" else np.array([0.5, 0.5])
        found = averages.params(state, params)
        wanted = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *iterates)
        chex.assert_trees_all_close(found, wanted, atol=1e-14)


@every_factory
def test_before_the_first_iterate(name):
    params = {"w": jnp.array([0.5, -2.0]), "table": jnp.arange(3)}
    state = FACTORIES[name](optax.sgd(0.1)).init(jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(averages.params(state, params), params)


@every_factory
def test_one_iterate_is_its_own_average_to_the_last_bit(name):
    params = {"w": jnp.array([0.1, 1e8, -1e-8]), "b": jnp.array(0.7, jnp.bfloat16)}
    tx = FACTORIES[name](optax.sgd(0.3))
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.cos, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    state = averages.end_segment(state, 1.0) if name == "swad" else state
    chex.assert_trees_all_equal(averages.params(state, params), new)


@every_factory
def test_half_precision_is_averaged_in_float32(name):
    """256, 258, 256 in bfloat16, which has nothing between the two."""
    params = jnp.full(2, 256.0, jnp.bfloat16)
    iterates = jnp.array([[256.0] * 2, [258.0] * 2, [258.0] * 2], jnp.bfloat16)
    _, state = averaged.run(FACTORIES[name](optax.identity()), iterates, lambda s, p: ())
    if name == "swad":
        assert state.segment.dtype == jnp.float32
        np.testing.assert_allclose(state.segment, 256 + 4 / 3, rtol=1e-6)
        state = averages.end_segment(state, 1.0)
    stored = {"ema": "mean", "swa": "mean", "latest": "iterates", "swad": "queue"}[name]
    assert getattr(state, stored).dtype == jnp.float32
    assert averages.params(state, params).dtype == jnp.bfloat16
    exact = averages.params(state, params.astype(jnp.float32))
    wanted = {"ema": 256 + 12 / 7, "swa": 256 + 4 / 3, "latest": 258.0, "swad": 256 + 4 / 3}[name]
    np.testing.assert_allclose(exact, wanted, rtol=1e-6)


@every_factory
def test_complex_integer_and_missing_leaves(name):
    tx, real = (FACTORIES[name](optax.identity()) for _ in range(2))
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 4))
    tables = jnp.arange(6).reshape(3, 2)
    iterates = {"z": x + 1j * y, "table": tables, "none": None}
    _, state = averaged.run(tx, iterates, lambda s, p: ())
    _, twin = averaged.run(real, {"x": x, "y": y}, lambda s, p: ())
    if name == "swad":
        state, twin = (averages.end_segment(s, 1.0) for s in (state, twin))
    params = {"z": x[-1] + 1j * y[-1], "table": tables[-1], "none": None}
    found = averages.params(state, params)
    wanted = averages.params(twin, {"x": x[-1], "y": y[-1]})
    np.testing.assert_allclose(found["z"], wanted["x"] + 1j * wanted["y"], rtol=1e-6)
    chex.assert_trees_all_equal(found["table"], tables[-1])
    assert found["none"] is None


@every_factory
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_entry_is_left_out(name, bad, float64):
    """The other entries take part; after good iterates the average is one of good ones."""
    tx = FACTORIES[name](optax.identity())
    iterates = ITERATES[:3].copy()
    iterates[1, 0] = bad
    found, state = averaged.run(tx, jnp.asarray(iterates), averages.params)
    if name == "swad":
        found = averages.params(averages.end_segment(state, 1.0), jnp.zeros(3))[None]
    share = {"ema": 0.5 / 0.875, "swa": 1 / 3, "latest": 1.0, "swad": 1 / 3}[name]
    good = (1 - share) * ITERATES[0, 0] + share * ITERATES[2, 0]
    np.testing.assert_allclose(found[-1][0], good, atol=1e-12)
    clean, state = averaged.run(tx, jnp.asarray(ITERATES[:3]), averages.params)
    if name == "swad":
        clean = averages.params(averages.end_segment(state, 1.0), jnp.zeros(3))[None]
    np.testing.assert_allclose(found[-1][1:], clean[-1][1:], atol=1e-12)


@every_factory
def test_a_first_iterate_that_is_bad(name, float64):
    """The first good one is the average; a constant infinity stays what it is."""
    start = jnp.array([np.nan, 1.0, -jnp.inf])
    iterates = jnp.array([[np.nan, np.nan, -np.inf], [2.0, 3.0, -np.inf]])
    tx = FACTORIES[name](optax.identity())
    _, state = averaged.run(tx, iterates, lambda s, p: (), first=start)
    state = averages.end_segment(state, 1.0) if name == "swad" else state
    found = averages.params(state, iterates[-1])
    second = {"ema": 1 + 2 * 2 / 3, "swa": 2.0, "latest": 3.0, "swad": 2.0}[name]
    np.testing.assert_allclose(found, [2.0, second, -np.inf], rtol=1e-6)


def test_skipped_steps():
    """Inside, a skipped step repeats the iterate, which counts; outside, it leaves the average."""
    gradients = jnp.array([1.0, jnp.nan, 1.0])
    inside = averages.swa(samx.skip_nonfinite(optax.sgd(1.0)), 0)
    outside = samx.skip_nonfinite(averages.swa(optax.sgd(1.0), 0))
    for tx, wanted, count in ((inside, (-1 - 1 - 2) / 3, 3), (outside, (-1 - 2) / 2, 2)):
        w, state = jnp.zeros(()), tx.init(jnp.zeros(()))
        for g in gradients:
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(averages.params(state, w), wanted, rtol=1e-6)
        assert int(optax.tree.get(state, "num_averaged")) == count


def test_multi_steps():
    """Around it every call counts; inside of it, every step of the optimizer."""
    around = averages.swa(optax.MultiSteps(optax.sgd(1.0), 2), 0)
    inside = optax.MultiSteps(averages.swa(optax.sgd(1.0), 0), 2)
    for tx, wanted in ((around, (0 - 1 - 1 - 2) / 4), (inside, (-1 - 2) / 2)):
        w, state, update = jnp.zeros(()), tx.init(jnp.zeros(())), jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(jnp.ones(()), state, w)
            w = optax.apply_updates(w, updates)
        assert float(averages.params(state, w)) == wanted


@every_factory
def test_states_keep_their_form(name):
    """Dtypes and weak types are equal before and after a step; no buffer is there twice."""
    params = {"w": jnp.ones(2), "h": jnp.ones(1, jnp.float16), "i": jnp.arange(2)}
    tx = FACTORIES[name](optax.sgd(0.1))
    state = tx.init(params)

    def forms(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    after = jax.eval_shape(lambda s: tx.update(params, s, params)[1], state)
    assert forms(after) == forms(state)
    if name == "swad":
        closed = jax.eval_shape(lambda s: averages.end_segment(s, 1.0), state)
        assert forms(closed) == forms(state)
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len({*buffers}) == len(buffers)


@pytest.mark.parametrize("is_wide", [False, True])
@every_factory
def test_strict_promotion(name, is_wide):
    """Leaves of many dtypes, one of 8 bits."""
    dtypes = (jnp.float32, jnp.bfloat16, jnp.complex64, jnp.float8_e4m3fn, jnp.int32, bool)
    params = {str(dtype): jnp.ones(2, dtype) for dtype in dtypes}
    tx = FACTORIES[name](optax.identity())

    def step(params, state):
        _, state = tx.update(optax.tree.zeros_like(params), state, params)
        state = averages.end_segment(state, 1.0) if name == "swad" else state
        return averages.params(state, params)

    with jax.numpy_dtype_promotion("strict"), jax.enable_x64(is_wide):
        found = jax.eval_shape(step, params, jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)


def test_no_value_is_ever_without_a_number():
    """Where nothing is stored or averaged yet; JAX checks every result."""
    with jax.debug_nans(True), jax.debug_infs(True):
        for build in FACTORIES.values():
            tx, w = build(optax.sgd(0.1)), jnp.ones(2)
            state = tx.init(w)
            assert averages.params(state, w).tolist() == [1.0, 1.0]
            _, state = tx.update(w, state, w)


def test_a_decay_is_injected_and_vectorized(float64):
    iterates = jnp.asarray(ITERATES[:4])
    decays = jnp.array([0.2, 0.8])

    def of(decay):
        tx = optax.inject_hyperparams(averages.ema, static_args=("tx", "every"))(
            optax.identity(), decay=decay
        )
        return averaged.run(tx, iterates, averages.params)[0]

    for decay, found in zip(decays, jax.vmap(of)(decays), strict=True):
        loop = averaged.ema(ITERATES[:4], lambda t, decay=decay: float(decay))
        np.testing.assert_allclose(found, [*loop], atol=1e-12)


@pytest.mark.parametrize("name", ["ema", "swa", "latest"])
def test_over_seeds(name, float64):
    """Each run of a `vmap` has its own average, also where only its iterates are mapped."""
    build, loop = LOOPS[name]
    both = np.stack([ITERATES, ITERATES[::-1]])
    found = jax.vmap(lambda xs: averaged.run(build(optax.identity()), xs, averages.params)[0])(
        jnp.asarray(both)
    )
    for one, iterates in zip(found, both, strict=True):
        np.testing.assert_allclose(one, [*loop(iterates)], atol=1e-12)


WRONG = {
    "no transformation": (lambda: averages.ema(0.5), TypeError, "ema: `tx` must be an optax"),
    "not called": (lambda: averages.swa(optax.sgd, 0), TypeError, "swa: `tx` must be an optax"),
    "a decay of 1": (lambda: averages.ema(optax.sgd(1), 1.0), ValueError, "`decay` must be in"),
    "below 0": (lambda: averages.ema(optax.sgd(1), -0.1), ValueError, "`decay` must be in"),
    "a text": (lambda: averages.ema(optax.sgd(1), "0.9"), TypeError, "`decay` must be a number"),
    "every 0": (lambda: averages.ema(optax.sgd(1), every=0), ValueError, "`every` must be at"),
    "a start below 0": (lambda: averages.swa(optax.sgd(1), -1), ValueError, "`start` must be at"),
    "half a step": (lambda: averages.swa(optax.sgd(1), 0.75), TypeError, "`start` must be a Py"),
    "every -1": (lambda: averages.swa(optax.sgd(1), 0, -1), ValueError, "`every` must be at"),
    "none stored": (lambda: averages.latest(optax.sgd(1), 0), ValueError, "`num_iterates` must"),
    "True": (lambda: averages.latest(optax.sgd(1), True), TypeError, "`num_iterates` must be"),
    "stored never": (lambda: averages.latest(optax.sgd(1), 1, 0), ValueError, "`every` must be"),
    "no segment": (lambda: averages.swad(optax.sgd(1), 0), ValueError, "`num_converge` must be"),
    "none back": (lambda: averages.swad(optax.sgd(1), 1, 0), ValueError, "`num_tolerance` must"),
    "a negative ratio": (lambda: averages.swad(optax.sgd(1), ratio=-1), ValueError, "`ratio` mu"),
    "a schedule": (lambda: averages.swad(optax.sgd(1), ratio=abs), TypeError, "`ratio` must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    call, kind, match = WRONG[what]
    with pytest.raises(kind, match=match):
        call()


@every_factory
def test_parameters_are_needed(name):
    tx = FACTORIES[name](optax.sgd(0.1))
    with pytest.raises(ValueError, match=f"{name}: `params` is missing"):
        tx.init(None)
    with pytest.raises(ValueError, match=f"{name}: `params` is missing"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=f"{name}: `params` must not hold random keys"):
        tx.init({"w": jnp.ones(2), "key": jax.random.key(0)})
