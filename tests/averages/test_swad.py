"""SWAD: the segments that its official code averages, and when its average begins and ends."""

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

SEGMENTS = 10


def run(tx, targets):
    """Two steps and a checkpoint at a time; return what can be read after each one."""
    zeros = jnp.zeros(targets.shape[-1])

    def segment(state, inputs):
        targets, loss = inputs
        for target in targets:
            _, state = tx.update(target, state, zeros)
        state = averages.end_segment(state, loss)
        flags = state.has_converged, state.is_over, state.threshold, state.minimum
        return state, (averages.params(state, targets[-1]), *flags)

    scan = jax.jit(lambda state, *inputs: jax.lax.scan(segment, state, inputs))
    return scan, tx.init(zeros)


def valleys(rng):
    """Losses with a minimum, with ties, without a minimum, without an end, and any."""
    t = np.arange(SEGMENTS)
    yield np.abs(t - 3.0) / 4 + 1 + 0.05 * rng.rand(SEGMENTS)
    yield np.round(np.abs(t - 2.0) / 5 + 1 + 0.2 * rng.rand(SEGMENTS), 1)
    yield 2.0 - 0.1 * t
    yield np.ones(SEGMENTS)
    for _ in range(20):
        yield np.round(0.5 + np.abs(rng.randn(SEGMENTS)), 1)


SETTINGS = [(3, 2, 0.2), (3, 6, 0.3), (2, 2, 0.2), (1, 3, 0.5), (4, 1, 0.1)]
MORE = [(c, t, 0.25) for c in (1, 2, 3, 4) for t in (1, 2, 3, 4, 5, 7)]


@pytest.mark.parametrize(
    ("converge", "tolerance", "ratio"),
    [*SETTINGS, *(pytest.param(*setting, marks=pytest.mark.slow) for setting in MORE)],
)
def test_against_a_loop(converge, tolerance, ratio, float64):
    rng = np.random.RandomState(converge + 10 * tolerance)
    tx = averages.swad(optax.identity(), converge, tolerance, ratio)
    targets = rng.randn(SEGMENTS, 2, 3)
    scan, state = run(tx, targets)
    seen = set()
    for losses in valleys(rng):
        means, begun, over, thresholds, minima = scan(state, targets, losses)[1]
        for n in range(1, SEGMENTS + 1):
            mean, _, (minimum, threshold, is_over) = averaged.swad(
                targets.mean(1)[:n], losses[:n], converge, tolerance, ratio
            )
            np.testing.assert_allclose(means[n - 1], mean, rtol=0, atol=1e-12)
            assert (minimum is not None, is_over) == (bool(begun[n - 1]), bool(over[n - 1]))
            if minimum is not None:
                assert int(minima[n - 1]) == minimum
                assert abs(float(thresholds[n - 1]) - threshold) < 1e-14
        seen.add((bool(begun[-1]), bool(over[-1])))
    assert (True, True) in seen or tolerance == 7  # too few segments for an end
    assert (False, False) in seen or converge == 1  # every loss is the minimum of one


def test_a_recorded_run(float64):
    arrays, meta = problem.load("swad__sgdm_freq1_conv3_tol2_ratio0.2_v1")
    hyper = meta["hyper"]
    tx = averages.swad(
        optax.identity(), hyper["n_converge"], hyper["n_tolerance"], hyper["tolerance_ratio"]
    )
    iterates = {k: jnp.asarray(arrays[k]) for k in problem.make()[1]}
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), iterates)

    @jax.jit
    def step(state, target, loss):
        return averages.end_segment(tx.update(target, state, params)[1], loss)

    state, begun, over = tx.init(params), [], []
    for t, loss in enumerate(arrays["val_loss"]):
        state = step(state, jax.tree.map(lambda x, t=t: x[t], iterates), loss)
        begun.append(bool(state.has_converged))
        over.append(bool(state.is_over))
    for k, x in averages.params(state, params).items():
        np.testing.assert_allclose(x, arrays[f"final_{k}"], rtol=0, atol=1e-14)
    assert int(state.minimum) == arrays["converge_step"]
    assert over.index(True) == arrays["dead_step"]
    assert int(state.num_averaged) == arrays["n_averaged"] == len(arrays["segments"])
    np.testing.assert_allclose(state.threshold, arrays["threshold"], rtol=1e-14)


def test_the_minimum_counts_twice_with_the_defaults(float64):
    """The minimum is segment 4; 2 and 3 are good enough before it, and 1 is one too many."""
    losses = np.array([1.4, 1.3, 1.2, 1.1, 1.0, 1.05, 1.1, 1.05, 1.05, 1.05])
    targets = np.eye(10)[:, None].repeat(2, 1)
    scan, state = run(averages.swad(optax.identity()), targets)
    means = scan(state, targets, losses)[1][0]
    np.testing.assert_allclose(means[-1] * 9, [0, 0, 1, 1, 2, 1, 1, 1, 1, 1], atol=1e-12)


def test_a_segment_is_a_mean_and_begins_anew(float64):
    tx = averages.swad(optax.identity(), 3, 1)
    state, w = tx.init(jnp.zeros(())), jnp.zeros(())
    for points, wanted in (((1.0, 2.0, 6.0), 3.0), ((5.0, 6.0), 5.5)):
        for point in points:
            _, state = tx.update(jnp.array(point), state, w)
        state = averages.end_segment(state, 1.0)
        assert float(averages.params(state, w)) == wanted  # it has not begun: the last one
    assert int(state.segments) == 2


def test_without_a_step_nothing_is_closed():
    tx = averages.swad(optax.sgd(0.1), 1, 1)
    state = tx.init(jnp.ones(2))
    chex.assert_trees_all_equal(averages.end_segment(state, 1.0), state)


def test_after_its_end_nothing_changes():
    tx = averages.swad(optax.identity(), 1, 1, 0.1)
    targets = jnp.arange(4.0)[:, None, None]
    scan, state = run(tx, targets)
    losses = jnp.array([1.0, 2.0, 0.5, 0.1])
    state, (means, _, over, *_) = scan(state, targets, losses)
    assert over.tolist() == [False, True, True, True]
    assert np.ptp(means[1:]) == 0
    w = jnp.zeros(1)
    later = averages.end_segment(tx.update(w + 9, state, w)[1], 0.1)
    chex.assert_trees_all_equal(averages.params(later, w), averages.params(state, w))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite(bad, float64):
    """It is never a minimum, no average begins with it, and it does not end one by itself."""
    tx = averages.swad(optax.identity(), 2, 3, 0.2)
    targets = np.arange(7.0)[:, None, None]
    scan, state = run(tx, targets)
    losses = np.array([1.0, bad, 1.0, 1.1, bad, 1.0, 1.1])
    means, begun, over, thresholds, _ = scan(state, targets, losses)[1]
    assert begun.tolist() == [False] * 3 + [True] * 4
    assert not over.any()
    np.testing.assert_allclose(thresholds[3:], 1.05 * 1.2)
    assert np.isfinite(means).all()
    losses[4:] = bad
    assert scan(state, targets, losses)[1][2].tolist() == [False] * 6 + [True]


def test_inside_wrappers_and_in_one_program():
    base = optax.chain(samx.sam(0.05), optax.sgd(0.1))
    w = jnp.ones(2)

    def loss(w):
        return jnp.sum(w**2)

    for tx in (
        averages.swad(base, 1, 1),
        samx.skip_nonfinite(averages.swad(base, 1, 1)),
        optax.chain(averages.swad(base, 1, 1)),
        averages.swad(samx.skip_nonfinite(base), 1, 1),
    ):

        @jax.jit
        def step(w, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
            w = optax.apply_updates(w, updates)
            return w, averages.end_segment(state, loss(w))

        new, state = step(w, tx.init(w))
        np.testing.assert_array_equal(averages.params(state, w), new)
        assert bool(optax.tree.get(state, "has_converged"))
        assert not optax.tree.get(state, "is_over")


def test_over_seeds(float64):
    """Each run begins and ends for itself."""
    tx = averages.swad(optax.identity(), 2, 3, 0.2)
    rng = np.random.RandomState(5)
    targets, losses = rng.randn(3, SEGMENTS, 2, 1), np.stack([*valleys(rng)][4:7])
    scan, state = run(tx, targets[0])
    means = jax.vmap(lambda t, x: scan(state, t, x)[1][0])(targets, losses)
    for i in range(3):
        wanted = averaged.swad(targets[i].mean(1), losses[i], 2, 3, 0.2)[0]
        np.testing.assert_allclose(means[i, -1], wanted, atol=1e-12)


STATE = averages.swad(optax.sgd(0.1)).init(jnp.ones(2))
WRONG = {
    "no SWAD": (averages.ema(optax.sgd(0.1)).init(jnp.ones(2)), 1.0, ValueError, "found 0 in a EM"),
    "two": ((STATE, STATE), 1.0, ValueError, "found 2 in a tuple; pass the part"),
    "one in another": (STATE._replace(base=STATE), 1.0, ValueError, "found 2 in a SWADState"),
    "a vector": (STATE, jnp.ones(2), ValueError, "`validation_loss` must be one number"),
    "a text": (STATE, "1", TypeError, "`validation_loss` must be a number"),
    "nothing": (STATE, None, TypeError, "`validation_loss` must be a number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    state, loss, kind, match = WRONG[what]
    with pytest.raises(kind, match=match):
        averages.end_segment(state, loss)
