"""Half precision: the ascent is seen, gradients do not vanish, an overflow costs one step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS

import samx

# Rows that differ in how they take their passes.
every_program = pytest.mark.parametrize(
    "name",
    ["sam", "two ascent steps", "sampa", "looksam", "momentum_sam", "esam", "sl_sam", "msam"],
)
# Rows that differ in what they compute from the passes.
every_arithmetic = pytest.mark.parametrize(
    "name",
    ["sam", "asam", "two ascent steps", "sampa", "looksam", "momentum_sam", "esam", "msam", "gsam"],
)
half_precision = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
SAM = optax.chain(samx.sam(0.05), optax.sgd(0.1))


def assert_close(a, b, rtol=1e-5, atol=1e-7):
    chex.assert_trees_all_close(*map(problem.as_numbers, (a, b)), rtol=rtol, atol=atol)


assert_same = functools.partial(assert_close, rtol=0, atol=0)  # to the last bit


# ---- Parameters in half precision: the closure sees the ascent.


@functools.cache
def wide(dtype):
    """Two million parameters and a gradient: a step of length 0.05 moves each by 3.5e-5."""
    rng = np.random.default_rng(0)
    shapes = {"W1": (1000, 1000), "b1": (1000,), "W2": (1000, 999)}
    scales = (0.02, 1.0)
    return [
        {k: jnp.asarray(scale * rng.standard_normal(shape), dtype) for k, shape in shapes.items()}
        for scale in scales
    ]


def share_of_the_ascent(name, dtype, **changes):
    """Return <g, Δ> / <g, ε>: Δ is the step seen by the closure, ε the step by hand in float64."""
    case, (w, g) = VARIANTS[name], wide(dtype)
    changes |= ONE_EXAMPLE.get(name, {})
    tx = case.build(optax.sgd(0.0, momentum=0.0), batch_like=jnp.ones(1), **changes)
    point, slope = ({k: np.asarray(x, float) for k, x in tree.items()} for tree in (w, g))
    seen = []

    def losses_fn(params, batch):
        jax.debug.callback(seen.append, params)
        return batch * sum((g[k] * params[k].astype(jnp.float32)).sum() for k in g)

    state = tx.init(w)
    # Not every step is sharp, and the first one may not be.
    while float(optax.tree.get(state, "perturbation_norm")) == 0:
        seen.clear()
        _, state = tx.update(g, state, w, losses_fn=losses_fn, batch=jnp.ones(1))
        jax.effects_barrier()

    def climbed(step):
        return sum(np.vdot(slope[k], step[k]) for k in slope)

    moves = [{k: np.asarray(p[k], float) - point[k] for k in point} for p in seen]
    return max(map(climbed, moves)) / climbed(BY_HAND[name](case.hyper["rho"], slope, point))


def in_metric(scale):
    """`ε = ρ T² g / ‖T g‖` with `T = scale(name, leaf)`."""

    def by_hand(rho, g, w):
        scales = {k: scale(k, w[k]) for k in w}
        norm = norm_of({k: scales[k] * g[k] for k in g})
        return {k: rho * scales[k] ** 2 * g[k] / norm for k in g}

    return by_hand


def norm_of(g):
    return np.sqrt(sum(np.sum(x**2) for x in g.values()))


euclidean = in_metric(lambda k, x: 1.0)
BY_HAND = {
    "sam": euclidean,
    "asam": in_metric(lambda k, x: 1.0 if k == "b1" else np.abs(x) + 0.01),
    "sampa": euclidean,
    "two ascent steps": lambda rho, g, w: euclidean(2 * rho, g, w),  # both have the same slope
    "l-infinity": lambda rho, g, w: {k: rho * np.sign(g[k]) for k in g},
    "looksam": euclidean,
    "usam": lambda rho, g, w: {k: rho * g[k] for k in g},
    "friendly_sam": euclidean,  # on the first step
    "monge_sam": lambda rho, g, w: euclidean(rho / np.hypot(1, norm_of(g)), g, w),
    "msam": euclidean,
    "lightsam_adam": lambda rho, g, w: {
        k: rho * 0.1 * g[k] / np.sqrt(0.99 * 0.1**2 + 0.01 * g[k] ** 2) for k in g
    },
    "momentum_sam": lambda rho, g, w: euclidean(-rho, g, w),
    "esam": lambda rho, g, w: euclidean(rho / 0.6, g, w),  # the first step perturbs all tensors
    "sl_sam": lambda rho, g, w: euclidean(rho, {k: g[k] * (k == "W1") for k in g}, w),
}
ONE_EXAMPLE = {"esam": {"num_groups": 1}, "msam": {"num_microbatches": 1}}


@pytest.mark.parametrize("name", BY_HAND)
@half_precision
def test_half_precision_parameters_see_the_ascent(name, dtype):
    np.testing.assert_allclose(share_of_the_ascent(name, dtype), 1, atol=0.02)


@pytest.mark.parametrize("name", ["sam", "asam", "sampa"])
def test_bfloat16_would_round_the_ascent_away(name):
    """The same test fails if the perturbed point has the dtype of the parameters."""
    assert abs(share_of_the_ascent(name, jnp.bfloat16, perturb_dtype=None) - 1) > 0.02


# ---- Compute in half precision, on one layer of the tiny problem.

WRAPPERS = {
    "none": lambda tx: tx,
    "skip": samx.skip_nonfinite,
    "scale": samx.scale_loss,
    "scale, accumulate": lambda tx: samx.scale_loss(samx.accumulate(tx, 4)),
}


def start(dtype=np.float32):
    params = problem.make(dtype)[1]
    return {k: params[k] for k in ("W1", "b1")}


def batch_at(step, dtype=np.float32, example=slice(None), **factors):
    """Return a batch with factors of its activations and its losses in each kind of pass.

    `clean=(activations, losses)`, `sharp=(activations, losses)`; for one `example`, or all.
    """
    batch = problem.batch_at(problem.make(dtype)[0], step)
    for kind in ("clean", "sharp"):
        batch[kind] = jnp.ones((problem.BATCH_SIZE, 2), dtype)
        batch[kind] = batch[kind].at[example].set(jnp.asarray(factors.get(kind, 1), dtype))
    return batch


def losses_in(dtype):
    """Return the losses, computed in `dtype` whatever the dtype of the parameters is."""

    def losses_fn(params, batch):
        params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, batch["x"]))
        activations, losses = batch["sharp" if samx.is_sharp_pass() else "clean"].T
        logits = jnp.tanh(x @ params["W1"] + params["b1"][None])
        logits = logits * activations.astype(dtype)[:, None]
        logits = logits.astype(jnp.promote_types(dtype, jnp.float32))
        return losses * optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    return losses_fn


@functools.cache
def program(name, wrapper, dtype):
    """Make an optimizer and its step, the same for all tests: the batch causes the overflow.

    Dynamic loss scaling is compiled. Rows with a loop or a branch are compiled, too; otherwise JAX
    would compile the loop or branch at every call. The rest is cheaper without compilation.
    """
    tx = WRAPPERS[wrapper](VARIANTS[name].build(batch_like=batch_at(0)))
    step = problem.make_step(tx, losses_in(dtype))
    is_compiled = "scale" in wrapper and dtype == jnp.float16
    is_compiled |= name in ("two ascent steps", "msam") or VARIANTS[name].is_gated
    return tx, jax.jit(step) if is_compiled else step


def train(name, wrapper, dtype, batches, **state):
    """Return `(params, state)` before the first step and after each step."""
    tx, step = program(name, wrapper, dtype)
    params = start()
    history = [(params, optax.tree.set(tx.init(params), **state))]
    for batch in batches:
        history.append(step(*history[-1], batch))
    assert signature(history[-1]) == signature(history[0])
    if hasattr(step, "_cache_size"):
        assert step._cache_size() == 1
    return history


@functools.cache
def four_steps(name, wrapper, dtype):
    return train(name, wrapper, dtype, [batch_at(t) for t in range(4)])


def signature(tree):
    """Return shapes and dtypes. If they change between steps, the program is compiled again."""
    return jax.tree.map(lambda x: (jnp.shape(x), x.dtype, jax.typeof(x).weak_type), tree)


def distance(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


def roundings(name, state):
    """Count the roundings: LookSAM scales g_v, with its rounding error, by α ‖g‖ / ‖g_v‖."""
    if name != "looksam":
        return 2
    return 2 + VARIANTS[name].hyper["alpha"] / float(optax.tree.get(state, "part_ratio"))


@pytest.mark.slow
@every_program
@pytest.mark.parametrize("dtype", [jnp.bfloat16])
def test_half_precision_compute_stays_close(name, dtype):
    """Roundings of half an eps add up to a few eps of the distance that the parameters moved."""
    *_, (expected, _) = four_steps(name, "none", jnp.float32)
    *_, (found, state) = four_steps(name, "skip", dtype)
    way = distance(expected, start())
    assert (
        0 < distance(found, expected) < roundings(name, state) * float(jnp.finfo(dtype).eps) * way
    )
    assert int(state.skipped_steps) == 0


# ---- A scaled loss.

# The factor of a loss; cotangents of single examples are below half of 6e-8.
VANISHING = 2.0**-22
FLOAT16_EPS = float(jnp.finfo(jnp.float16).eps)


@pytest.mark.slow
@every_arithmetic
def test_a_scale_changes_nothing_in_float32(name):
    history, expected = (four_steps(name, wrapper, jnp.float32) for wrapper in ("scale", "none"))
    for (params, state), wanted in zip(history, expected, strict=True):
        assert_close((params, state.inner.inner), wanted)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("sam", "value_fn"),
        ("sam", "losses_fn"),
        ("sam", "weights"),
        ("sampa", "losses_fn"),
        ("sampa", "weights"),
    ],
)
def test_every_form_of_the_loss(name, form):
    """The incoming gradient is not read in any of them."""
    batch, losses_fn = batch_at(0), losses_in(jnp.float32)
    weights = jnp.arange(16.0) if form == "weights" else jnp.ones(16)

    def value_fn(params):
        return jnp.average(losses_fn(params, batch), weights=weights)

    keywords = {"losses_fn": losses_fn, "batch": batch, "weights": weights}
    if form == "value_fn":
        keywords = {"value_fn": value_fn}
    params = start()
    value, g = jax.value_and_grad(value_fn)(params)
    plain, scaled = (program(name, wrapper, jnp.float32)[0] for wrapper in ("none", "scale"))
    expected = plain.update(g, plain.init(params), params, value=value, **keywords)
    updates, state = scaled.update(params, scaled.init(params), params, **keywords)
    assert_close((updates, state.inner.inner), expected)


@functools.cache
def vanishing_gradient(name, wrapper, dtype):
    """Return the gradients that the base got, as its momentum holds them, and the state."""
    factors = (1, VANISHING)
    *_, (_, state) = train(name, wrapper, dtype, [batch_at(0, clean=factors, sharp=factors)] * 2)
    return optax.tree.get(state, "trace"), state


@every_arithmetic
def test_gradients_that_vanish_in_float16_are_kept_by_a_scale(name):
    vanished, _ = vanishing_gradient(name, "skip", jnp.float16)
    assert not any(map(np.any, vanished.values()))
    kept, _ = vanishing_gradient(name, "scale", jnp.float16)
    expected, state = vanishing_gradient(name, "none", jnp.float32)
    bound = roundings(name, state) * FLOAT16_EPS * float(optax.tree.norm(expected))
    assert distance(kept, expected) < bound


@pytest.mark.parametrize("name", ["sam", "sampa"])
def test_around_accumulate(name):
    """Every microbatch is scaled, and one that overflows skips the step."""
    kept, _ = vanishing_gradient(name, "scale, accumulate", jnp.float16)
    expected, _ = vanishing_gradient(name, "none", jnp.float32)
    assert distance(kept, expected) < 2 * FLOAT16_EPS * float(optax.tree.norm(expected))
    bad = batch_at(0, example=6, sharp=OVERFLOW["backward"])
    (_, before), (_, after) = train(name, "scale, accumulate", jnp.float16, [bad])
    assert_skipped(after, before)


def test_inside_accumulate_it_raises():
    tx, params = samx.accumulate(samx.scale_loss(SAM), 4), start()
    arguments = {"losses_fn": losses_in(jnp.float32), "batch": batch_at(0)}
    with pytest.raises(ValueError, match="scale_loss: stands inside accumulate; put it around"):
        tx.update(params, tx.init(params), params, **arguments)


@every_program
def test_map_params(name):
    tx, params = program(name, "scale", jnp.float32)[0], start()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert signature(mapped) == signature(state)
    assert_same(optax.tree.get(mapped, "trace"), optax.tree.ones_like(params))
    assert float(mapped.loss_scale) == float(state.loss_scale)


def test_scan_and_donation():
    """SAMPa has the largest state."""
    tx, step = program("sampa", "scale", jnp.float16)
    batches = [batch_at(0), batch_at(1, sharp=OVERFLOW["backward"]), batch_at(2)]
    *_, expected = train("sampa", "scale", jnp.float16, batches)
    params = start()
    carry = params, tx.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, batches):
        return jax.lax.scan(lambda carry, batch: (step(*carry, batch), None), carry, batches)[0]

    found = run(carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry[0]))


# ---- An overflow skips the step.

OVERFLOW = {"forward": (1e5, 1), "backward": (1, 2.0**24)}  # float16 ends at 65504
A_GROUP = slice(4, 6)  # examples; every selection takes one of them
one_pass = pytest.mark.parametrize("kind", ["clean", "sharp"])
somewhere = pytest.mark.parametrize("where", OVERFLOW)


def assert_skipped(state, before):
    """Check that one step was skipped, and that moments, schedules, examples and readings stay."""
    assert_same(state.inner.inner, before.inner.inner)
    assert float(state.loss_scale) == float(before.loss_scale) / 2
    assert int(state.inner.skipped_steps) == int(before.inner.skipped_steps) + 1
    assert int(state.inner.skipped_in_a_row) == int(before.inner.skipped_in_a_row) + 1
    assert int(state.finite_steps) == 0


def has_the_pass(name, kind, batches):
    """Return whether a row has this pass. SAMPa has no clean one; policies can skip sharp ones."""
    if kind == "clean":
        return name not in ("sampa", "sampa, separate", "momentum_sam")
    *_, (_, state) = train(name, "none", jnp.float32, batches)
    return bool(optax.tree.get(state, "is_sharp"))


@every_program
@one_pass
@somewhere
def test_an_overflow_is_as_if_its_batch_had_never_come(name, kind, where):
    good = [batch_at(t) for t in range(3)]
    bad = batch_at(3, example=A_GROUP, **{kind: OVERFLOW[where]})
    *_, before, after, last = train(name, "scale", jnp.float16, [*good[:2], bad, good[2]])
    if not has_the_pass(name, kind, [*good[:2], batch_at(3)]):
        assert int(last[1].inner.skipped_steps) == 0
        return
    assert_same(after[0], before[0])
    assert_skipped(after[1], before[1])
    *_, expected = train(name, "scale", jnp.float16, good)
    assert_close((last[0], last[1].inner.inner), (expected[0], expected[1].inner.inner))
    assert int(last[1].inner.skipped_steps) == 1
    assert int(last[1].inner.skipped_in_a_row) == 0
    assert int(last[1].finite_steps) == 1


@every_program
@one_pass
@somewhere
def test_skip_nonfinite_needs_no_scale_for_it(name, kind, where):
    bad = batch_at(1, example=A_GROUP, **{kind: OVERFLOW[where]})
    _, before, after = train(name, "skip", jnp.float16, [batch_at(0), bad])
    has_it = has_the_pass(name, kind, [batch_at(0), batch_at(1)])
    assert int(after[1].skipped_steps) == has_it
    if has_it:
        assert_same((after[0], after[1].inner), (before[0], before[1].inner))


@every_program
def test_a_scale_that_is_far_too_large_comes_down(name):
    """Every backward pass overflows for about twenty steps; then training goes on."""
    batches = [batch_at(t) for t in range(32)]
    history = train(name, "scale", jnp.float16, batches, loss_scale=jnp.float32(2**40))
    is_taken = [int(state.inner.skipped_in_a_row) == 0 for _, state in history[1:]]
    skipped = 32 - sum(is_taken)
    assert not any(is_taken[:15])
    assert sum(is_taken) > 4
    assert int(history[-1][1].inner.skipped_steps) == skipped
    assert float(history[-1][1].loss_scale) == 2.0 ** (40 - skipped)
    taken = [batch for batch, is_taken in zip(batches, is_taken, strict=True) if is_taken]
    *_, expected = train(name, "scale", jnp.float16, taken)
    assert_close(history[-1][0], expected[0], rtol=1e-3, atol=1e-3)


HIDING = {
    "sign": optax.sign_sgd(0.1),
    "lion": optax.lion(0.1),
    "clip": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("base", HIDING)
@pytest.mark.parametrize("first", ["plain", "sam", "l-infinity"])
def test_no_sign_and_no_clipping_hides_an_overflow(base, first):
    ball = samx.sharpness_aware(samx.perturbations.linf_ball(0.01))
    first = {"plain": optax.identity(), "sam": samx.sam(0.05), "l-infinity": ball}[first]
    tx, w = samx.scale_loss(optax.chain(first, HIDING[base])), jnp.ones(2)
    updates, state = tx.update(w, tx.init(w), w, value_fn=lambda w: infinite_gradient(w))
    assert int(state.inner.skipped_steps) == 1
    assert not np.any(updates)


def infinite_gradient(w):
    """A loss of 2e5 with a gradient of 1e5, in float16: infinite, not NaN."""
    return 1e5 * w.astype(jnp.float16).sum().astype(jnp.float32)


def test_skip_nonfinite_looks_at_moments():
    """Lion takes the sign of its momentum, so an infinite momentum gives finite updates."""
    tx, w = samx.skip_nonfinite(optax.lion(0.1)), jnp.ones(2)
    updates, state = tx.update(jax.grad(infinite_gradient)(w), tx.init(w), w)
    assert int(state.skipped_steps) == 1
    assert not np.any(updates)
    assert not np.any(optax.tree.get(state, "mu"))


def test_infinities_that_break_nothing():
    """An infinite mask in a held batch, or an unknown (infinite) loss, skips no step."""
    batch = {"x": jnp.ones((2, 2)), "mask": jnp.array([0.0, -jnp.inf])}
    keywords = {"losses_fn": lambda w, b: jax.nn.relu(b["x"] @ w + b["mask"]), "batch": batch}
    w, sampa = jnp.ones(2), samx.sampa(optax.sgd(0.1), batch_like=batch)
    for tx in (samx.skip_nonfinite(sampa), samx.skip_nonfinite(SAM)):
        state = tx.init(w)
        for value in ({"value": 1.0}, {}):
            updates, state = tx.update(w, state, w, **keywords, **value)
            assert int(state.skipped_steps) == 0
            assert np.any(updates)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_infinite_gradient_is_no_direction(compiled):
    """The compiler must not replace 0 · x by 0: a step of the L∞ ball along infinity is NaN."""
    ball, g = samx.perturbations.linf_ball(0.5), jnp.array([jnp.inf, -2.0, 0.0])
    climb = jax.jit(ball.update) if compiled else ball.update
    np.testing.assert_array_equal(climb(g, ball.init(g), g)[0], [np.nan, -0.5, 0.0])


@pytest.mark.parametrize("ball", ["metric_ball", "linf_ball"])
def test_skip_nonfinite_sees_an_infinity_that_was_climbed(ball):
    """The infinity is in the clean pass alone; the sharp gradient is finite."""
    ball = getattr(samx.perturbations, ball)(0.05)
    tx, w = samx.skip_nonfinite(samx.sharpness_aware(ball)), jnp.ones(2)
    g = 2 * w + jax.grad(infinite_gradient)(w)
    assert np.all(np.isposinf(g))
    updates, state = tx.update(g, tx.init(w), w, value_fn=lambda w: w @ w)
    assert int(state.skipped_steps) == 1
    assert not np.any(updates)


def test_a_leaf_that_is_not_perturbed_may_overflow_in_the_clean_pass():
    """Only a reading uses the infinite number. In the sharp pass, the overflow skips the step."""
    ball = samx.perturbations.metric_ball(0.05)
    ball = samx.perturbations.on_leaves(ball, lambda path, leaf: path[-1].key == "W")
    tx = samx.scale_loss(optax.chain(samx.sharpness_aware(ball), optax.sgd(0.1)))
    params = {"W": jnp.ones(2), "b": jnp.ones(2)}

    def one_step(clean, sharp):
        def value_fn(params):
            factor = sharp if samx.is_sharp_pass() else clean
            return params["W"] @ params["W"] + factor * infinite_gradient(params["b"])

        updates, state = tx.update(params, tx.init(params), params, value_fn=value_fn)
        return updates, int(state.inner.skipped_steps), optax.tree.get(state, "grad_norm")

    *expected, grad_norm = one_step(0.0, 0.0)
    assert np.isfinite(grad_norm)
    *found, grad_norm = one_step(1.0, 0.0)
    assert_same(found, expected)
    assert not np.isfinite(grad_norm)
    assert one_step(0.0, 1.0)[1] == 1


# ---- The scale from step to step.


def quadratic(tx):
    """Compile a step on a quadratic loss; an infinite `factor` breaks the loss."""

    @jax.jit
    def step(w, state, factor):
        updates, state = tx.update(w, state, w, value_fn=lambda w: factor * (w @ w))
        return optax.apply_updates(w, updates), state

    return step


def follow(tx, factors, **state):
    step, w = quadratic(tx), jnp.array([0.25, -0.5])
    history = [(w, optax.tree.set(tx.init(w), **state))]
    for factor in factors:
        history.append(step(*history[-1], factor))
    return history


def test_the_scale_grows_and_backs_off():
    tx = samx.scale_loss(SAM, 8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    history = follow(tx, [jnp.inf if sign == "-" else 1.0 for sign in "++-+++++--+++"])
    scales = [8.0, 8, 24, 6, 6, 18, 18, 54, 54, 13.5, 3.375, 3.375, 10.125, 10.125]
    assert [float(state.loss_scale) for _, state in history] == scales
    counts = [int(state.finite_steps) for _, state in history]
    assert counts == [0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    assert int(history[-1][1].inner.skipped_steps) == 3


def test_the_scale_stays_a_number_whose_inverse_is_one():
    """The scale stops at 2^126 and 2^-126; a step with the largest scale is still right."""
    tx = samx.scale_loss(SAM, growth_interval=1)
    *_, (w, state) = follow(tx, [1.0] * 4, loss_scale=jnp.float32(2.0**124))
    assert float(state.loss_scale) == 2.0**126
    *_, (expected, _) = follow(samx.scale_loss(SAM, 1.0, growth_factor=1.0), [1.0] * 4)
    assert_close(w, expected)
    *_, (w, state) = follow(tx, [jnp.inf] * 4, loss_scale=jnp.float32(2.0**-124))
    assert float(state.loss_scale) == 2.0**-126
    assert np.isfinite(1 / state.loss_scale)


def test_a_fixed_scale():
    tx = samx.scale_loss(SAM, 5.0, growth_factor=1.0, backoff_factor=1.0, growth_interval=1)
    history = follow(tx, [1.0, jnp.inf, 1.0])
    assert [float(state.loss_scale) for _, state in history] == [5.0] * 4
    assert [int(state.inner.skipped_steps) for _, state in history] == [0, 0, 1, 1]


def test_vmap():
    """Each seed has its own scale; only the seed that overflows skips its step."""
    tx = samx.scale_loss(SAM)
    w = jnp.ones((3, 2))
    state = jax.vmap(tx.init)(w)
    new, state = jax.vmap(quadratic(tx))(w, state, jnp.array([1.0, jnp.inf, 2.0]))
    assert state.inner.skipped_steps.tolist() == [0, 1, 0]
    assert state.loss_scale.tolist() == [2.0**16, 2.0**15, 2.0**16]
    assert np.any(new != w, axis=1).tolist() == [True, False, True]


def test_injected_hyperparameters():
    make = optax.inject_hyperparams(samx.scale_loss, static_args=("growth_interval",))
    tx = make(SAM, 8.0, growth_factor=4.0, growth_interval=1)
    history = follow(tx, [1.0])
    hyperparams = history[-1][1].hyperparams
    assert set(hyperparams) == {"scale", "growth_factor", "backoff_factor"}
    assert float(optax.tree.get(history[-1][1], "loss_scale")) == 32.0
    changed = hyperparams | {"backoff_factor": jnp.float32(0.125)}
    _, (_, state) = follow(tx, [jnp.inf], hyperparams=changed)
    assert float(optax.tree.get(state, "loss_scale")) == 1.0


@pytest.mark.parametrize(
    ("keyword", "value", "error"),
    [
        ("scale", 0.0, ValueError),
        ("scale", -1.0, ValueError),
        ("scale", float("inf"), ValueError),
        ("scale", float("nan"), ValueError),
        ("scale", "large", TypeError),
        ("growth_factor", 0.5, ValueError),
        ("growth_factor", float("inf"), ValueError),
        ("growth_factor", None, TypeError),
        ("backoff_factor", 0.0, ValueError),
        ("backoff_factor", 1.5, ValueError),
        ("backoff_factor", None, TypeError),
        ("growth_interval", 0, ValueError),
        ("growth_interval", 2.0, TypeError),
        ("growth_interval", True, TypeError),
    ],
)
def test_bad_arguments(keyword, value, error):
    with pytest.raises(error, match=f"`{keyword}` must be"):
        samx.scale_loss(SAM, **{keyword: value})


# ---- What a variant may ask of a closure.


def test_second_derivatives_inside_a_variant():
    def update_fn(g, state, params, *, value_fn):
        return jax.jvp(jax.grad(value_fn), (params,), (g,))[1], state

    tx = samx.scale_loss(samx.closure_transformation(lambda params: (), update_fn))
    w = jnp.array([1.0, 2.0])
    updates, _ = tx.update(w, tx.init(w), w, value_fn=lambda w: (w**4).sum())
    assert_close(updates, 12 * w**2 * 4 * w**3)


def test_a_step_is_differentiable_in_the_radius():
    def length(rho, wrap):
        tx, w = wrap(optax.chain(samx.sam(rho), optax.sgd(0.1))), jnp.array([1.0, 2.0])
        g = 4 * w**3
        return optax.tree.norm(tx.update(g, tx.init(w), w, value_fn=lambda w: (w**4).sum())[0])

    slopes = [jax.grad(length)(0.05, wrap) for wrap in (WRAPPERS["none"], samx.scale_loss)]
    assert slopes[0] > 0
    assert_close(*slopes)


def test_integers_complex_numbers_and_leaves_that_the_loss_does_not_read():
    params = {
        "w": jnp.ones(2),
        "z": jnp.ones(2) + 1j,
        "table": jnp.arange(3),
        "unread": jnp.ones(2),
    }

    def value_fn(params):
        return (jnp.abs(params["z"]) ** 4).sum() * (params["w"] ** 2).sum() * params["table"].sum()

    g = jax.grad(value_fn, allow_int=True)(params)
    plain, scaled = (
        tx.update(g, tx.init(params), params, value_fn=value_fn)[0]
        for tx in (SAM, samx.scale_loss(SAM))
    )
    assert_close(scaled, plain)
    assert signature(scaled) == signature(plain)


def test_there_is_no_nan_without_an_overflow():
    with jax.debug_nans(True):
        for name in ("sam", "l-infinity", "sampa"):
            train(name, "scale", jnp.float32, [batch_at(0)])


# ---- On several devices.


@functools.cache
def mapped(regime, name, is_scaled, examples, **keywords):
    """Return `(params, state, value)` after each step; `examples` can add a bad batch."""
    batches = [batch_at(t, np.float64) for t in range(2)]
    if examples == "one overflows":
        batches.insert(1, batch_at(2, np.float64, example=5, sharp=(1, 1e308)))
    history = getattr(regimes, regime)(
        lambda like: WRAPPERS["scale" if is_scaled else "none"](
            VARIANTS[name].build(batch_like=like)
        ),
        start(np.float64),
        [(batch,) for batch in batches],
        losses_fn=losses_in(np.float64),
        **keywords,
    )
    return jax.tree.map(np.asarray, history)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "regime", "keywords"),
    [
        ("sam", "shard_map", {"check_vma": True}),
        ("sam", "shard_map", {"check_vma": False}),
        ("sam", "shard_map", {"check_vma": True, "ascent": "local"}),
        ("two ascent steps", "shard_map", {"check_vma": True}),
        ("sampa", "shard_map", {"check_vma": True}),
        ("sam", "pmap", {}),
    ],
)
def test_an_overflow_on_one_device_skips_the_step_on_all(name, regime, keywords):
    """The other steps equal those without a scale; `regimes` compares the replicas."""
    history = mapped(regime, name, True, "one overflows", **keywords)
    reference = (regime, keywords) if "ascent" in keywords else ("single", {})
    *_, (*expected, _) = mapped(reference[0], name, False, "good", **reference[1])
    (_, before, _), (_, after, _), (params, state, _) = history
    assert_skipped(after, before)
    chex.assert_trees_all_close(
        (params, state.inner.inner), tuple(expected), rtol=1e-12, atol=1e-12
    )
    assert int(state.inner.skipped_steps) == 1
