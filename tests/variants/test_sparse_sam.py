"""Sparse SAM against independent loops, and its masks."""

import functools

import checks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from formulations import BASES, EVERY_LEAF, EVERY_LEAF_BY_HAND, NAMES, STEPS, train
from recorded import assert_same

import samx
from samx.perturbations import dynamic_mask, fisher_mask, metric_ball
from samx.perturbations.top_entries import top_entries

pytestmark = pytest.mark.usefixtures("float64")


def fisher_run(make, base="momentum and decay", examples=None):
    def further(data, batch, t):
        chosen = None if examples is None else jax.tree.map(lambda x: x[examples], data)
        return {"fisher_batch": chosen}

    return train(optax.chain(make(), BASES[base][0]), further, "mask")


FISHERS = {
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
    "structured, sparse": (
        lambda: samx.fisher_sparse_sam(0.1, 0.9, period=4, pattern="structured"),
        (reference.ball(0.1), reference.structured(0.9), 4),
        np.arange(64),
        "momentum and decay",
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


# The rows have an oracle each, with other settings.
SLOW = {"gradient, random", "sparse, rarely"}


def some(cases):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in cases]


@pytest.mark.parametrize("name", some(DYNAMICS))
def test_dynamic_sparse_sam_against_reference(name):
    sparsity, period, drop, grow, scores, base = DYNAMICS[name]
    rate = optax.cosine_decay_schedule(0.5, STEPS)
    tx, make_reference = BASES[base]
    tx = optax.chain(
        samx.dynamic_sparse_sam(0.2, sparsity, rate, period=period, drop=drop, grow=grow, key=5), tx
    )
    state = tx.init(problem.make()[1])
    first = {k: np.asarray(v) for k, v in optax.tree.get(state, "mask").items()}
    size = reference.flat(first).size
    assert reference.flat(first).sum() == size - np.ceil(size * sparsity)
    expected, masks = reference.train_dynamic_sparse(
        make_reference(), reference.ball(0.2), first, sparsity, RATES, period, scores, STEPS
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
    update = jax.jit(
        functools.partial(ball.update, losses_fn=lambda p, x: p[1][4] * x[:, 0], batch=batch)
    )
    for _ in range(2):
        _, state = update(params, state, params)
    np.testing.assert_array_equal(state.mask[0].ravel(), np.arange(12) < 7)
    np.testing.assert_array_equal(state.mask[1], np.arange(5) == 4)


def test_ties_over_several_leaves_of_any_rank():
    scores = (jnp.ones(()), jnp.ones((2, 3)), jnp.ones(2))
    for count, kept in ((1, (1, 0, 0)), (4, (1, 3, 0)), (8, (1, 6, 1))):
        mask = jax.jit(top_entries, static_argnums=1)(scores, count)
        assert tuple(int(leaf.sum()) for leaf in mask) == kept


def test_weights_are_those_at_the_perturbed_point():
    """The smaller weight stays, because the step makes it the larger one."""
    ball = dynamic_mask(metric_ball(0.3), 0.5, 0.0, period=1, drop="weight", grow="gradient")
    w, g = jnp.array([1.0, 1.1]), jnp.array([1.0, 0.0])
    state = ball.init(w)._replace(mask=jnp.ones(2, bool))
    np.testing.assert_array_equal(ball.update(g, state, w)[1].mask, [True, False])


def test_a_mask_that_is_smaller_than_what_is_to_be_kept_is_kept():
    ball = dynamic_mask(metric_ball(1.0), 0.2, 0.0, period=1, grow="gradient")
    few = jnp.arange(10) < 3

    @jax.jit
    def mask_after(g):
        w = jnp.ones(10)
        return ball.update(g, ball.init(w)._replace(mask=few), w)[1].mask

    found = mask_after(jnp.arange(1.0, 11.0))
    np.testing.assert_array_equal(found, few)  # 8 may stay, nothing grows


def test_a_look_waits_for_a_sharp_gradient():
    """A skipped step has no gradients of single examples, so the mask waits for a sharp step."""
    data, params = problem.make()
    fisher = samx.fisher_sparse_sam(0.1, 0.8, period=5)
    tx = optax.chain(samx.perturb_if(samx.policies.every(5), fisher), optax.sgd(0.1))
    step, carry, spent = jax.jit(problem.make_step(tx)), (params, tx.init(params)), []
    alone_at = jax.jit(problem.make_step(fisher))
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
            _, alone = alone_at(before, alone, batch)
            for a, b in zip(
                *(jax.tree.leaves(optax.tree.get(s, "mask")) for s in (carry[1], alone)),
                strict=True,
            ):
                np.testing.assert_array_equal(a, b)
    assert spent == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 16]  # new masks on steps 5 and 10


def looked(ball, w, gradient):
    """Return a function of the step that returns the state after a mask update on this step.

    The loss of the only example has this gradient.
    """

    def losses_fn(w, x):
        return x[:, 0] * optax.tree.vdot(w, gradient)

    @jax.jit
    def update(step):
        state = ball.init(w)._replace(step=step)
        return ball.update(w, state, w, losses_fn=losses_fn, batch=jnp.ones((1, 1)))[1]

    return lambda step=1: update(jnp.asarray(step, jnp.int32))


def test_a_late_look_does_not_put_off_the_next_one():
    ball, w = fisher_mask(metric_ball(0.1), period=4), jnp.ones(4)
    state_at = looked(ball, w, w)
    assert [int(state_at(step).next_look) for step in range(1, 6)] == [5, 5, 5, 5, 9]


def test_whole_leaves_stop_where_the_share_is_reached():
    ball = fisher_mask(metric_ball(0.1), 0.5, period=1, pattern="structured")
    w = {name: jnp.ones(2) for name in "abcd"}
    gradient = {name: scale * jnp.ones(2) for name, scale in zip("abcd", (1, 4, 2, 3), strict=True)}
    mask = looked(ball, w, gradient)().mask
    assert {name: bool(x.all()) for name, x in mask.items()} == {
        "a": False,
        "b": True,
        "c": False,
        "d": True,
    }


def test_integers_are_no_share_of_whole_leaves():
    """Half of 4 entries is one leaf of 2, however large the table of integers is."""
    ball = fisher_mask(metric_ball(0.1), 0.5, period=1, pattern="structured")
    w = {"a": jnp.ones(2), "b": jnp.ones(2), "table": jnp.arange(100)}
    gradient = {"a": jnp.ones(2), "b": 2 * jnp.ones(2), "table": jnp.zeros(100, int)}
    mask = looked(ball, w, gradient)().mask
    assert {name: bool(x.any()) for name, x in mask.items()} == {
        "a": False,
        "b": True,
        "table": False,
    }


def test_fisher_information_of_examples_that_count():
    """Padding has no weight, and `fisher_batch` replaces the batch."""
    data, params = problem.make()
    batch, ball = problem.batch_at(data, 0), fisher_mask(metric_ball(0.1), 0.7, period=1)
    spoilt = batch | {"x": batch["x"].at[8:].set(50.0)}
    weights = (jnp.arange(16) < 8).astype(float)
    g = optax.tree.ones_like(params)  # which a mask of Fisher information does not see

    def mask_of(**keywords):
        state = ball.init(params)._replace(step=jnp.ones((), jnp.int32))
        _, state = ball.update(g, state, params, losses_fn=problem.losses_fn, **keywords)
        return state.mask

    @jax.jit
    def masks():
        half = jax.tree.map(lambda x: x[:8], batch)
        return (
            mask_of(batch=half),
            mask_of(batch=spoilt, weights=weights),
            mask_of(batch=half, fisher_batch=spoilt),
        )

    expected, found, other = masks()
    for key in NAMES:
        np.testing.assert_array_equal(found[key], expected[key])
    assert any(np.any(other[key] != expected[key]) for key in NAMES)


@pytest.mark.parametrize("name", ["fisher_sparse_sam", "dynamic_sparse_sam"])
def test_the_mask_does_not_depend_on_the_scale_of_the_loss(name, float64):
    """Squares of gradients over- and underflow here; a mask that is chosen from them must not."""
    del float64
    masks = []
    for factor in (1.0, 2.0**-560, 2.0**560):
        _, state = checks.program(name).run(3, rate=0.0, factor=factor)[-1]
        masks.append(optax.tree.get(state, "mask"))
    assert 0 < sum(int(x.sum()) for x in jax.tree.leaves(masks[0])) < 227
    for mask in masks[1:]:
        jax.tree.map(np.testing.assert_array_equal, mask, masks[0])


def test_rows_that_are_too_long_for_16_bits():
    """The counts of a row of more than 65,535 entries."""
    scores = jnp.arange(2 * 70_000, dtype=jnp.float32).reshape(2, -1)
    mask = jax.jit(top_entries, static_argnums=1)(scores, 137_000)
    np.testing.assert_array_equal(mask, scores >= 3_000)
