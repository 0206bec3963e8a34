"""BiSAM, Focal-SAM, ImbSAM, Sparse SAM and LETS in configurations without a recorded run.

They are compared with the independent loops of `reference.py`, as in `test_trajectories.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference

import samx
from samx import losses
from samx.perturbations import dynamic_mask, fisher_mask, magnitude, metric_ball

pytestmark = pytest.mark.usefixtures("float64")
STEPS = 24
NAMES = ("W1", "b1", "W2", "b2")
COUNTS = [28, 11, 25]  # class counts of the 64 examples
BASES = {
    "sgd": (optax.sgd(0.1), lambda: reference.SGD(0.1)),
    "momentum and decay": (
        optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9)),
        lambda: reference.SGD(0.1, 0.9, weight_decay=0.01),
    ),
    "adam": (optax.adam(0.01), lambda: reference.Adam(0.01)),
    "adamw": (
        optax.adamw(0.01, weight_decay=0.01),
        lambda: reference.Adam(0.01, weight_decay=0.01),
    ),
}
EVERY_LEAF = metric_ball(0.5, magnitude(0.0, is_scaled=lambda path, leaf: True))
EVERY_LEAF_BY_HAND = reference.adaptive_ball(0.5, 0.0, set(NAMES))


def train(tx, further=lambda data, batch, t: {}, *fields, losses_fn=problem.losses_fn, state=None):
    """Return the parameters after every step, and fields of the state."""
    data, params = problem.make()
    state, history = tx.init(params) if state is None else state, []

    @jax.jit
    def step(params, state, batch, t):
        keywords = further(data, batch, t)
        return problem.make_step(tx, losses_fn, **keywords)(params, state, batch)

    for t in range(STEPS):
        params, state = step(params, state, problem.batch_at(data, t), t)
        history.append((params, *(optax.tree.get(state, field) for field in fields)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *history)


def assert_same(found, expected, tolerance=1e-10):
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance)


def logits_of(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["W1"] + params["b1"][None])
    return hidden @ params["W2"] + params["b2"][None]


# ---- BiSAM


def of_logits(bound, **keywords):
    return lambda params, batch: bound(logits_of(params, batch), batch["y"], **keywords)


def smoothed(params, batch):
    """The authors' descent loss: 0.1 is spread over the wrong classes."""
    targets = jnp.where(jax.nn.one_hot(batch["y"], 3) == 1, 0.9, 0.05)
    return optax.safe_softmax_cross_entropy(logits_of(params, batch), targets)


BISAMS = {
    "log, smoothed, adamw": (
        lambda: samx.bisam(0.2),
        reference.ball(0.2),
        of_logits(losses.log_lower_bound, mu=3.0),
        smoothed,
        "adamw",
    ),
    "tanh, adaptive, decay": (
        lambda: samx.bisam(perturbation=EVERY_LEAF),
        EVERY_LEAF_BY_HAND,
        of_logits(losses.tanh_lower_bound, mu=1.0, alpha=0.3),
        problem.losses_fn,
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", BISAMS)
def test_bisam_against_reference(name):
    make, perturb, climbed, losses_fn, base = BISAMS[name]
    tx, make_reference = BASES[base]
    expected = reference.train_bisam(make_reference(), perturb, climbed, STEPS, losses_fn)

    def further(data, batch, t):
        return {"ascent_fn": lambda params: climbed(params, batch).mean()}

    (found,) = train(optax.chain(make(), tx), further, losses_fn=losses_fn)
    assert_same(found, expected)


@pytest.mark.parametrize("mu", [1.0, 10.0])
def test_lower_bounds_by_hand(mu):
    """Compared with the paper's formula; φ, a lower bound of the 0-1 loss, is 0 at 0."""
    logits, label = np.array([2.0, -1.0, 0.5]), 2
    gamma = np.log(np.e - 1)
    for bound, phi in (
        (losses.tanh_lower_bound, lambda x: np.tanh(0.1 * x)),
        (losses.log_lower_bound, lambda x: 1 - np.log(1 + np.exp(gamma - x))),
    ):
        total = sum(np.exp(mu * phi(f - logits[label])) for f in logits)
        found = bound(jnp.asarray(logits), jnp.asarray(label), mu)
        np.testing.assert_allclose(found, np.log(total) / mu, rtol=1e-12)
        assert phi(0.0) == pytest.approx(0, abs=1e-15)


def test_lower_bounds_far_out_are_finite():
    """The bounds are finite even where exp overflows and PyTorch's softplus becomes linear."""
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 30.0]])
    for bound in (losses.tanh_lower_bound, losses.log_lower_bound):
        value, slope = jax.value_and_grad(lambda x, b=bound: b(x, jnp.zeros(3, int)).sum())(logits)
        assert np.isfinite(value)
        assert np.all(np.isfinite(slope))


# ---- Focal-SAM and ImbSAM


def logit_adjusted(params, batch):
    shares = jnp.asarray(COUNTS) / sum(COUNTS)
    logits = logits_of(params, batch) + jnp.log(shares + 1e-9)[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def vector_scaled(params, batch):
    counts = jnp.asarray(COUNTS, float)
    temperature = (counts.max() / counts) ** 0.3
    shift = jnp.log(counts / counts.sum())
    logits = logits_of(params, batch) / temperature[None] + shift[None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def focal(gamma, sharpness):
    c = sharpness * (1 - np.array(COUNTS) / sum(COUNTS)) ** gamma
    return 1 - c, c


SPLITS = {
    "focal, adamw": (
        lambda: samx.focal_sam(COUNTS, 0.05, 1.5, 0.7),
        reference.ball(0.05),
        focal(1.5, 0.7),
        problem.losses_fn,
        "adamw",
    ),
    "focal, adaptive": (
        lambda: samx.focal_sam(COUNTS, perturbation=EVERY_LEAF),
        EVERY_LEAF_BY_HAND,
        focal(2.0, 0.8),
        problem.losses_fn,
        "momentum and decay",
    ),
    "focal, logit adjustment": (
        lambda: samx.focal_sam(COUNTS, 0.3, 3.2, 0.8),
        reference.ball(0.3),
        focal(3.2, 0.8),
        logit_adjusted,
        "momentum and decay",
    ),
    "focal, vector scaling, above 1": (
        lambda: samx.focal_sam(COUNTS, 0.2, 0.2, 1.3),
        reference.ball(0.2),
        focal(0.2, 1.3),
        vector_scaled,
        "sgd",
    ),
    "imbalanced, two classes": (
        lambda: samx.imbalanced_sam([1, 2], 0.2, 2.0),
        reference.ball(0.2),
        ([1, 0, 0], [0, 2, 2]),
        problem.losses_fn,
        "momentum and decay",
    ),
    "imbalanced, adam": (
        lambda: samx.imbalanced_sam(np.array([1]), 0.1),
        reference.ball(0.1),
        ([1, 0, 1], [0, 1, 0]),
        problem.losses_fn,
        "adam",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_the_loss_against_reference(name):
    make, perturb, factors, losses_fn, base = SPLITS[name]
    tx, make_reference = BASES[base]
    expected = reference.train_split(make_reference(), perturb, factors, STEPS, losses_fn)
    (found,) = train(optax.chain(make(), tx), losses_fn=losses_fn)
    assert_same(found, expected)


def test_a_batch_without_tail_takes_the_step_of_the_base():
    (found,) = train(optax.chain(samx.imbalanced_sam([], 0.5), optax.adam(0.01)))
    assert_same(found, problem.train(optax.adam(0.01), STEPS), 1e-13)


# ---- Sparse SAM


def fisher_run(make, base="momentum and decay", examples=None):
    def further(data, batch, t):
        chosen = None if examples is None else jax.tree.map(lambda x: x[examples], data)
        return {"fisher_batch": chosen}

    return train(optax.chain(make(), BASES[base][0]), further, "mask")


FISHERS = {
    "the current batch": (
        lambda: samx.fisher_sparse_sam(0.1, 0.5, period=4),
        (reference.ball(0.1), reference.unstructured(0.5), 4),
        None,
        "adamw",
    ),
    "sparse, rarely": (
        lambda: samx.fisher_sparse_sam(0.2, 0.9, period=8, num_microbatches=4),
        (reference.ball(0.2), reference.unstructured(0.9), 8),
        np.arange(0, 64, 2),
        "momentum and decay",
    ),
    "adaptive": (
        lambda: samx.fisher_sparse_sam(sparsity=0.3, period=5, perturbation=EVERY_LEAF),
        (EVERY_LEAF_BY_HAND, reference.unstructured(0.3), 5),
        None,
        "sgd",
    ),
    "structured": (
        lambda: samx.fisher_sparse_sam(0.1, 0.5, period=4, pattern="structured"),
        (reference.ball(0.1), reference.structured(0.5), 4),
        None,
        "momentum and decay",
    ),
    "structured, sparse": (
        lambda: samx.fisher_sparse_sam(0.1, 0.9, period=4, pattern="structured"),
        (reference.ball(0.1), reference.structured(0.9), 4),
        np.arange(64),
        "momentum and decay",
    ),
    "1 of 4": (
        lambda: samx.fisher_sparse_sam(0.2, period=3, pattern=(1, 4)),
        (reference.ball(0.2), reference.n_of_m(1, 4), 3),
        None,
        "adam",
    ),
    "3 of 8": (
        lambda: samx.fisher_sparse_sam(0.2, period=7, pattern=(3, 8), num_microbatches=1),
        (reference.ball(0.2), reference.n_of_m(3, 8), 7),
        None,
        "sgd",
    ),
}


@pytest.mark.parametrize("name", FISHERS)
def test_fisher_sparse_sam_against_reference(name):
    make, (perturb, choose, period), examples, base = FISHERS[name]
    expected, masks = reference.train_fisher_sparse(
        BASES[base][1](), perturb, choose, period, STEPS, examples
    )
    found, mask = fisher_run(make, base, examples)
    for key in NAMES:
        np.testing.assert_array_equal(mask[key], masks[key])
    assert_same(found, expected, 1e-8)  # 1e-7 is added to the norm


def drawn(key, step, purpose):
    """Recompute the scores of `dynamic_mask`, which promises nothing about how they are drawn."""
    _, params = problem.make()
    part = jax.random.split(jax.random.key(key), 3)[purpose]
    names = sorted(params)
    part = jax.random.fold_in(part, step)
    return {
        name: np.asarray(jax.random.uniform(jax.random.fold_in(part, i), params[name].shape))
        for i, name in enumerate(names)
    }


def gradient(t, g, point):
    return g


def weight(t, g, point):
    return point


RATES = [0.25 * (1 + np.cos(np.pi * t / STEPS)) for t in range(STEPS)]
DYNAMICS = {  # sparsity, period, drop, grow, the same by hand, base
    "weight, gradient": (0.8, 4, "weight", "gradient", (weight, gradient), "momentum and decay"),
    "gradient, random": (
        0.5,
        3,
        "gradient",
        "random",
        (gradient, lambda t, g, point: drawn(5, t, 2)),
        "adam",
    ),
    "random, weight": (
        0.2,
        1,
        "random",
        "weight",
        (lambda t, g, point: drawn(5, t, 1), weight),
        "sgd",
    ),
}


@pytest.mark.parametrize("name", DYNAMICS)
def test_dynamic_sparse_sam_against_reference(name):
    sparsity, period, drop, grow, scores, base = DYNAMICS[name]
    rate = optax.cosine_decay_schedule(0.5, STEPS)
    tx, make_reference = BASES[base]
    tx = optax.chain(
        samx.dynamic_sparse_sam(0.1, sparsity, rate, period=period, drop=drop, grow=grow, key=5), tx
    )
    state = tx.init(problem.make()[1])
    first = {k: np.asarray(v) for k, v in optax.tree.get(state, "mask").items()}
    size = reference.flat(first).size
    assert reference.flat(first).sum() == size - np.ceil(size * sparsity)
    expected, masks = reference.train_dynamic_sparse(
        make_reference(), reference.ball(0.1), first, sparsity, RATES, period, scores, STEPS
    )
    found, mask = train(tx, lambda data, batch, t: {}, "mask", state=state)
    for key in NAMES:  # the state holds the mask of the next step
        np.testing.assert_array_equal(mask[key][:-1], masks[key][1:])
    assert_same(found, expected, 1e-8)


def test_masks_of_other_seeds_differ_and_are_drawn_again():
    _, params = problem.make()

    def first(key):
        return dynamic_mask(metric_ball(0.1), period=1, key=key).init(params).mask["W1"]

    assert np.any(first(0) != first(1))
    np.testing.assert_array_equal(first(2), first(jax.random.key(2)))


def test_equal_scores_are_taken_in_order():
    """Dead units have Fisher information 0: ties go in order, and the mask is never too large."""
    params = (jnp.zeros((3, 4)), jnp.zeros(5))
    ball = fisher_mask(metric_ball(1.0), 0.5, period=1)
    batch = jnp.ones((2, 1))
    state = ball.init(params)
    for _ in range(2):
        _, state = ball.update(
            params, state, params, losses_fn=lambda p, x: p[1][4] * x[:, 0], batch=batch
        )
    np.testing.assert_array_equal(state.mask[0].ravel(), np.arange(12) < 7)
    np.testing.assert_array_equal(state.mask[1], np.arange(5) == 4)


def test_a_mask_that_is_smaller_than_what_is_to_be_kept_is_kept():
    params, g = jnp.ones(10), jnp.arange(1.0, 11.0)
    ball = dynamic_mask(metric_ball(1.0), 0.2, 0.0, period=1, grow="gradient")
    few = jnp.arange(10) < 3
    _, state = ball.update(g, ball.init(params)._replace(mask=few), params)
    np.testing.assert_array_equal(state.mask, few)  # 8 may stay, nothing grows


def test_a_look_waits_for_a_sharp_gradient():
    """A skipped step has no gradients of single examples, so the mask waits for a sharp step."""
    data, params = problem.make()
    fisher = samx.fisher_sparse_sam(0.1, 0.8, period=5)
    tx = optax.chain(samx.perturb_if(samx.policies.every(5), fisher), optax.sgd(0.1))
    step, carry, spent = jax.jit(problem.make_step(tx)), (params, tx.init(params)), []
    for t in range(11):
        before, batch = carry[0], problem.batch_at(data, t)
        carry = step(*carry, batch)
        spent.append(float(optax.tree.get(carry[1], "gradients_spent")))
        if t in (0, 4, 9):
            seen = optax.tree.get(carry[1], "mask")
            assert any(bool(x.any()) for x in jax.tree.leaves(seen)) == (t == 9)
        if t in (5, 10):
            alone = fisher.init(before)
            alone = optax.tree.set(alone, step=jnp.ones((), jnp.int32))
            g = jax.grad(lambda p, b=batch: problem.losses_fn(p, b).mean())(before)
            closures = {"losses_fn": problem.losses_fn, "batch": batch}
            _, alone = fisher.update(g, alone, before, **closures)
            for a, b in zip(
                *(jax.tree.leaves(optax.tree.get(s, "mask")) for s in (carry[1], alone)),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)
    assert spent == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 16]  # new masks on steps 5 and 10


def looked(ball, w, gradient, **fields):
    """Return the state after a mask update; the loss of the only example has this gradient."""

    def losses_fn(w, x):
        return x[:, 0] * optax.tree.vdot(w, gradient)

    state = ball.init(w)._replace(step=jnp.ones((), jnp.int32))._replace(**fields)
    return ball.update(w, state, w, losses_fn=losses_fn, batch=jnp.ones((1, 1)))[1]


@pytest.mark.parametrize(("step", "next_look"), [(1, 5), (2, 5), (3, 5), (4, 5), (5, 9)])
def test_a_late_look_does_not_put_off_the_next_one(step, next_look):
    ball, w = fisher_mask(metric_ball(0.1), period=4), jnp.ones(4)
    state = looked(ball, w, w, step=jnp.asarray(step, jnp.int32))
    assert int(state.next_look) == next_look


def test_whole_leaves_stop_where_the_share_is_reached():
    ball = fisher_mask(metric_ball(0.1), 0.5, period=1, pattern="structured")
    w = {name: jnp.ones(2) for name in "abcd"}
    gradient = {name: scale * jnp.ones(2) for name, scale in zip("abcd", (1, 4, 2, 3), strict=True)}
    mask = looked(ball, w, gradient).mask
    assert {name: bool(x.all()) for name, x in mask.items()} == {
        "a": False,
        "b": True,
        "c": False,
        "d": True,
    }


def test_fisher_information_of_examples_that_count():
    """Padding has no weight, and `fisher_batch` replaces the batch."""
    data, params = problem.make()
    batch, ball = problem.batch_at(data, 0), fisher_mask(metric_ball(0.1), 0.7, period=1)
    spoilt = batch | {"x": batch["x"].at[8:].set(50.0)}
    weights = (jnp.arange(16) < 8).astype(float)
    g = jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)

    def mask_of(**keywords):
        state = ball.init(params)._replace(step=jnp.ones((), jnp.int32))
        _, state = ball.update(g, state, params, losses_fn=problem.losses_fn, **keywords)
        return state.mask

    half = jax.tree.map(lambda x: x[:8], batch)
    expected = mask_of(batch=half)
    for key, found in mask_of(batch=spoilt, weights=weights).items():
        np.testing.assert_array_equal(found, expected[key])
    other = mask_of(batch=half, fisher_batch=spoilt)
    assert any(np.any(other[key] != expected[key]) for key in NAMES)


# ---- LETS

LETS = {  # arguments, the reference's perturbation, momentum, radius, rate
    "exact": ({}, reference.ball(1.0), 0.9, 0.1, 50.0),
    "approximate": ({"hessian": "diag_sq"}, reference.ball(1.0), 0.0, 0.3, 300.0),
    "adaptive": (
        {"perturbation": metric_ball(1.0, magnitude(0.01))},
        reference.adaptive_ball(1.0, 0.01, {"W1", "W2"}),
        0.0,
        0.4,
        40.0,
    ),
}


def held_out(data, batch, t):
    start = ((t + 1) % 4) * problem.BATCH_SIZE
    other = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, problem.BATCH_SIZE), data)
    return {"validation_fn": lambda params: problem.losses_fn(params, other).mean()}


@pytest.mark.parametrize("name", LETS)
def test_lets_against_reference(name):
    keywords, perturb, momentum, rho, rate = LETS[name]
    tx = samx.lets(optax.sgd(0.1, momentum=momentum), rho, rate, **keywords)
    expected, radii = reference.train_lets(
        reference.SGD(0.1, momentum), perturb, rho, rate, STEPS, name == "approximate"
    )
    found, after = train(tx, held_out, "rho")
    assert_same(found, expected)
    np.testing.assert_allclose(after[:-1], radii[1:], rtol=1e-9)
    assert np.ptp(np.log(radii)) > 0.05


def first_batches():
    data, params = problem.make()
    train, held_out = problem.batch_at(data, 0), problem.batch_at(data, 1)
    return params, *(
        lambda params, batch=batch: problem.losses_fn(params, batch).mean()
        for batch in (train, held_out)
    )


def test_the_hypergradient_of_the_notes():
    """SGD with learning rate 0.1 and ρ = 0.05; others computed these values, three times."""
    params, value_fn, validation_fn = first_batches()
    for hessian, expected in (
        ("exact", 0.010609708745719907),
        ("diag_sq", 4.440634729973349e-04),
    ):
        tx = samx.lets(optax.sgd(0.1), 0.05, hessian=hessian)
        _, state = tx.update(
            jax.grad(value_fn)(params),
            tx.init(params),
            params,
            value_fn=value_fn,
            validation_fn=validation_fn,
        )
        np.testing.assert_allclose(state.hypergradient, expected, rtol=1e-9)
        assert float(state.rho) < 0.05  # the gap grows with ρ


@pytest.mark.parametrize(
    "base",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
        optax.rmsprop(0.01),
    ],
    ids=["nesterov", "clipped adamw", "rmsprop"],
)
def test_the_hypergradient_is_the_slope_of_the_objective(base):
    """Compared with central differences, through any base, after its first steps."""
    params, value_fn, validation_fn = first_batches()
    closures = {"value_fn": value_fn, "validation_fn": validation_fn}
    tx, g = samx.lets(base, 0.2, rho_learning_rate=0.0), jax.grad(value_fn)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(g(params), state, params, **closures)
        params = optax.apply_updates(params, updates)
    _, after = tx.update(g(params), state, params, **closures)

    def objective(rho):
        sam = samx.sam(rho)
        g_s, _ = sam.update(g(params), sam.init(params), params, value_fn=value_fn)
        updates, _ = base.update(g_s, state.base, params)
        moved = optax.apply_updates(params, updates)
        return (validation_fn(moved) - value_fn(moved)) ** 2 / 2

    h = 1e-4
    around = [objective(0.2 + i * h) for i in (-2, -1, 1, 2)]
    slope = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * h)
    np.testing.assert_allclose(after.hypergradient, slope, rtol=1e-6)


@pytest.mark.parametrize("hessian", ["exact", "diag_sq"])
def test_units_that_are_dead_do_not_stop_the_learning(hessian):
    """Adam has no derivative where both moments are 0; this must not affect other entries."""
    params, value_fn, validation_fn = first_batches()
    params |= {"dead": jnp.ones(3)}
    tx = samx.lets(optax.adam(0.01), 0.1, hessian=hessian)
    g = jax.grad(value_fn)(params)
    closures = {"value_fn": value_fn, "validation_fn": validation_fn}
    _, state = jax.jit(lambda g, s, p: tx.update(g, s, p, **closures))(g, tx.init(params), params)
    del params["dead"], g["dead"]
    _, without = tx.update(g, tx.init(params), params, **closures)
    np.testing.assert_allclose(state.hypergradient, without.hypergradient, rtol=1e-7)
    assert abs(float(state.hypergradient)) > 1e-12


@pytest.mark.parametrize("hessian", ["exact", "diag_sq"])
def test_a_loss_without_any_gradient_leaves_the_radius_alone(hessian):
    """Adam has no derivative where both of its moments are 0."""
    params, value_fn, validation_fn = first_batches()
    tx = samx.lets(optax.adam(0.01), 0.1, hessian=hessian)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(
            optax.tree.zeros_like(params),
            state,
            params,
            value_fn=lambda p: 0.0 * value_fn(p),
            validation_fn=validation_fn,
        )
        assert (float(state.rho), float(state.hypergradient)) == (0.1, 0.0)
        assert all(bool((x == 0).all()) for x in jax.tree.leaves(updates))


def test_a_radius_stays_in_its_bounds():
    params, value_fn, validation_fn = first_batches()
    for rate, bound in ((1e6, 0.01), (1e-9, 0.05)):
        tx = samx.lets(optax.sgd(0.1), 0.05, rate, bounds=(0.01, 0.06))
        _, state = tx.update(
            jax.grad(value_fn)(params),
            tx.init(params),
            params,
            value_fn=value_fn,
            validation_fn=validation_fn,
        )
        assert float(state.rho) == pytest.approx(bound, rel=1e-6)


def test_a_validation_loss_that_is_no_number_leaves_the_radius_alone():
    params, value_fn, _ = first_batches()
    tx = samx.lets(optax.sgd(0.1), 0.05)
    _, state = tx.update(
        jax.grad(value_fn)(params),
        tx.init(params),
        params,
        value_fn=value_fn,
        validation_fn=lambda p: jnp.nan * value_fn(p),
    )
    assert float(state.rho) == 0.05
    assert np.isnan(state.hypergradient)
