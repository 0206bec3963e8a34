"""Which examples are chosen, and what the variants that choose do with them."""

import functools
import itertools
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS
from jax.sharding import AxisType

import samx
from samx.perturbations import metric_ball, random_leaves
from samx.selection import largest, put, sampled, take

MOMENTUM = optax.sgd(0.1, momentum=0.9)
INDEX = jnp.arange(16)


# ---- The positions.


def rows_of(position, size):
    """Turn positions in the groups into positions in the batch."""
    offsets = np.arange(len(position)) * size // len(position)
    return np.asarray(position) + offsets[:, None]


@pytest.mark.parametrize(("num_selected", "num_groups"), [(8, 1), (8, 4), (16, 2), (16, 8)])
def test_largest_of_each_group(num_groups, num_selected):
    scores = np.random.default_rng(0).normal(size=16)
    choose = jax.jit(functools.partial(largest, num_selected=num_selected, num_groups=num_groups))
    found = rows_of(choose(jnp.asarray(scores)), 16)
    count = num_selected // num_groups
    for rows, group in zip(found, np.split(np.arange(16), num_groups), strict=True):
        np.testing.assert_array_equal(rows, sorted(group, key=lambda i: -scores[i])[:count])


def test_ties_and_what_is_no_number():
    scores = jnp.array([1.0, jnp.inf, 1.0, jnp.nan, 1.0, -jnp.inf])
    assert largest(scores, 5).tolist() == [[3, 1, 0, 2, 4]]


def test_padding_is_chosen_last():
    scores = jnp.array([5.0, -jnp.inf, 3.0, 4.0])
    weights = jnp.array([0.0, 1.0, 0.5, 0.0])
    assert largest(scores, 3, weights=weights).tolist() == [[2, 1, 0]]
    assert largest(scores, 2, num_groups=2, weights=weights).tolist() == [[1], [0]]


def test_take_and_put():
    batch = {
        "x": jnp.arange(12.0).reshape(6, 2),
        "deep": [jnp.arange(6, dtype=jnp.int8), None],
        "key": jax.random.split(jax.random.key(0), 6),
    }
    position = jnp.array([[2, 0], [1, 1]])
    rows = [2, 0, 4, 4]
    chosen = jax.jit(take)(batch, position)
    expected = jax.tree.map(lambda leaf: leaf[jnp.array(rows)], batch)
    chex.assert_trees_all_equal(*map(problem.as_numbers, (chosen, expected)))
    back = put(jnp.array([1.0, 2.0, 3.0]), jnp.array([[2, 0, 1]]), 4)
    np.testing.assert_array_equal(back, [2.0, 3.0, 1.0, 0.0])


def successive_draws(p, count):
    """The probability of each sequence of draws without replacement."""
    law = {}
    for draws in itertools.permutations(range(len(p)), count):
        left, probability = 1.0, 1.0
        for i in draws:
            probability *= p[i] / left
            left -= p[i]
        law[draws] = probability
    return law


def test_law_of_the_draws():
    p, draws = np.array([0.5, 0.1, 0.3, 0.1]), 20_000
    noise = jax.random.gumbel(jax.random.key(0), (draws, 4))
    found = jax.vmap(lambda noise: sampled(jnp.asarray(3 * p), noise, 2)[0])(noise)
    pairs, counts = np.unique(np.asarray(found), axis=0, return_counts=True)
    law = successive_draws(p, 2)
    assert len(pairs) == len(law)
    for pair, count in zip(pairs, counts, strict=True):
        expected = law[tuple(pair.tolist())]
        assert abs(count / draws - expected) < 4 * (expected / draws) ** 0.5


REFUSED = {
    "no count": (lambda: largest(jnp.ones(4), 0), ValueError, "`num_selected` must be at least 1"),
    "half a count": (lambda: largest(jnp.ones(4), 1.5), TypeError, "`num_selected` must be a"),
    "too many": (lambda: largest(jnp.ones(4), 5), ValueError, "at most the 4 examples.*got 5"),
    "no group": (lambda: largest(jnp.ones(4), 1, num_groups=0), ValueError, "`num_groups`"),
    "unequal groups": (
        lambda: largest(jnp.ones(4), 3, num_groups=3),
        ValueError,
        "`num_groups` must divide the 4 examples of the batch, got 3",
    ),
    "unequal shares": (
        lambda: largest(jnp.ones(4), 3, num_groups=2),
        ValueError,
        "`num_selected` must be a multiple of `num_groups`, 2, got 3",
    ),
    "weights of another length": (
        lambda: largest(jnp.ones(4), 3, weights=jnp.ones(3)),
        ValueError,
        r"`weights` must have one number per score, shape \(4,\), got \(3,\)",
    ),
    "leaves of unequal length": (
        lambda: take({"x": jnp.ones(4), "y": jnp.ones(3)}, jnp.array([[0]])),
        ValueError,
        r"same leading axis \[B\]",
    ),
    "values of another length": (
        lambda: put(jnp.ones(3), jnp.array([[0, 1]]), 4),
        ValueError,
        r"need `values` of shape \(2,\).*got \(3,\) and 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


# ---- The variants.


def make(name, **changes):
    if name == "ksam":
        return samx.ksam(0.1, **{"num_selected": 8} | changes)
    if name.startswith("esam"):
        if "," in name:
            changes |= {"select": "strict", "sharp_pass": "whole"}
        return samx.esam(0.1, 0.6, **{"selected_fraction": 0.5} | changes)
    return samx.ausam(0.1, num_examples=64, **{"fraction": 0.5, "warmup_steps": 1} | changes)


CHOOSING = ("ksam", "esam", "ausam")
FORMS = (*CHOOSING, "esam, strict and whole")
PADDED = [1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0.5, 2, 0, 0]


def first_batch():
    data, params = problem.make(float)
    return problem.batch_at(data, 0), params


def assert_same_steps(found, expected):
    """Compare parameters and states after each step."""
    for after, wanted in zip(found, expected, strict=True):
        chex.assert_trees_all_close(
            *(jax.tree.map(np.asarray, problem.as_numbers(x[:2])) for x in (after, wanted)),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis_type", "weights"),
    [
        (name, *((AxisType.Auto, PADDED), (AxisType.Explicit, None))[i % 2])
        for i, name in enumerate(FORMS)
    ],
)
def test_one_group_over_all_devices(name, axis_type, weights, float64):
    """The choice is from the whole batch, on whichever device its examples are."""
    data, params = problem.make()
    extra = () if weights is None else (jnp.asarray(weights, float),)
    batches = [(problem.batch_at(data, t), *extra) for t in range(4)]

    def build(batch_like):
        return optax.chain(make(name), MOMENTUM)

    found = regimes.sharded_jit(build, params, batches, axis_type)
    expected = regimes.single(build, params, batches)
    assert_same_steps(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_weights_on_devices(name, float64):
    """Some devices have no valid example; each device has one group."""
    data, params = problem.make()
    batches = [(problem.batch_at(data, t), jnp.asarray(PADDED, float)) for t in range(4)]

    def build(batch_like):
        return optax.chain(make(name, num_groups=8), MOMENTUM)

    found = regimes.shard_map(build, params, batches, check_vma=True)
    expected = regimes.single(build, params, batches)
    assert_same_steps(found, expected)


@pytest.mark.parametrize("name", CHOOSING)
def test_devices_choose_among_their_own(name):
    batch, params = first_batch()
    message = "`num_groups` must be a multiple of the 8 devices.*got 1"
    with pytest.raises(ValueError, match=message):
        regimes.shard_map(lambda like: make(name), params, [(batch,)], check_vma=True)


@pytest.mark.parametrize("name", CHOOSING)
def test_padding_is_no_share_of_the_batch(name, float64):
    """Half of a padded batch is half of its valid examples, whatever the padding holds."""
    batch, params = first_batch()
    valid = jax.tree.map(lambda x: x[:6], batch)
    padded = {"x": batch["x"].at[6:].set(100.0), "y": batch["y"]}
    weights = (jnp.arange(16) < 6).astype(float)
    steps = []
    for data, keywords in ((valid, {}), (padded, {"weights": weights})):
        changes = {"ksam": {"num_selected": 3}, "ausam": {"fraction": 1.0}}.get(name, {})
        tx = make(name, **changes)
        closures = {"losses_fn": problem.losses_fn, "batch": data, "index": INDEX[: len(data["y"])]}
        update = jax.jit(functools.partial(tx.update, **closures, **keywords))
        steps.append(update(params, tx.init(params), params))
    (g_s, state), (of_padded, padded_state) = steps
    chex.assert_trees_all_close(g_s, of_padded, rtol=1e-10)
    np.testing.assert_allclose(state.readings.loss, padded_state.readings.loss, rtol=1e-10)
    np.testing.assert_allclose(
        state.readings.sharp_loss, padded_state.readings.sharp_loss, rtol=1e-10
    )


def test_ausam_draws_a_fraction_of_what_is_there():
    batch, params = first_batch()
    weights = (jnp.arange(16) < 6).astype(jnp.float32)
    tx = make("ausam", warmup_steps=0)
    closures = {"losses_fn": problem.losses_fn, "batch": batch, "index": INDEX, "weights": weights}
    _, state = jax.jit(functools.partial(tx.update, **closures))(params, tx.init(params), params)
    drawn = np.flatnonzero(np.asarray(state.count) > 1)
    assert len(drawn) == 3
    assert drawn.max() < 6


def test_ksam_says_what_its_losses_are():
    batch, params = first_batch()
    tx = samx.ksam(0.1, 4)
    update = jax.jit(functools.partial(tx.update, losses_fn=problem.losses_fn, batch=batch))
    _, state = update(params, tx.init(params), params)
    losses = np.asarray(jax.jit(problem.losses_fn)(params, batch))
    np.testing.assert_allclose(state.readings.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(state.selected_loss, np.sort(losses)[-4:].mean(), rtol=1e-5)
    assert state.readings.sharp_loss > state.selected_loss > state.readings.loss


# ---- ESAM.


def test_random_leaves_are_drawn_as_often_as_said():
    g = {str(i): jnp.ones(2) for i in range(6)}
    ball = random_leaves(metric_ball(0.1), 0.3, key=5)

    def step(state, _):
        eps, state = ball.update(g, state, g)
        return state, (jnp.stack([e[0] != 0 for e in eps.values()]), optax.tree.norm(eps))

    _, (drawn, norms) = jax.jit(lambda: jax.lax.scan(step, ball.init(g), length=2000))()
    assert drawn[0].all()
    some = drawn[1:][~drawn[1:].all(axis=1)]  # all are perturbed if none was drawn
    np.testing.assert_allclose(norms, 0.1 / 0.3, rtol=1e-4)
    none, every = 0.7**6, 0.3**6
    expected = (0.3 - every) / (1 - every - none)
    np.testing.assert_allclose(some.mean(axis=0), expected, atol=0.05)
    np.testing.assert_allclose(drawn[1:].all(axis=1).mean(), none + every, atol=0.03)


def test_random_leaves_refused():
    for fraction in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match="`fraction` must be"):
            random_leaves(metric_ball(0.1), fraction)
    with pytest.raises(TypeError, match="`perturbation` must be"):
        random_leaves(0.1, 0.5)


def test_strict_selection_leaves_the_smallest_out(float64):
    """Compared with a selection by hand; if nothing would be left, everything stays."""
    batch, params = first_batch()
    losses_fn = problem.losses_fn

    @jax.jit
    def climbed(params):
        g = jax.grad(lambda p: losses_fn(p, batch).mean())(params)
        point = optax.tree.add_scale(params, 0.1 / (optax.tree.norm(g) + 1e-12), g)
        return point, losses_fn(point, batch) - losses_fn(params, batch)

    @jax.jit
    def gradient(point, chosen):
        return jax.grad(lambda p: losses_fn(p, batch) @ chosen / chosen.sum())(point)

    point, increase = climbed(params)
    for fraction, num_groups, kept in ((0.5, 1, 7), (0.5, 4, 1), (1 / 16, 1, 1)):
        tx = samx.esam(0.1, 1.0, fraction, select="strict", num_groups=num_groups)
        update = jax.jit(functools.partial(tx.update, losses_fn=losses_fn, batch=batch))
        g_s, _ = update(params, tx.init(params), params)
        rows = np.argsort(-np.asarray(increase).reshape(num_groups, -1), axis=1)[:, :kept]
        chosen = np.isin(np.arange(16), rows_of(rows, 16)).astype(float)
        chex.assert_trees_all_close(g_s, gradient(point, chosen), rtol=1e-9, atol=1e-12)


def test_the_whole_sharp_pass_differs_where_examples_depend_on_each_other(float64):
    """Elsewhere both forms are the same: `test_example_loops.py` has both."""
    batch, params = first_batch()

    def normalized(params, batch):
        mean = batch["x"].mean(axis=0, keepdims=True)
        return problem.losses_fn(params, batch | {"x": batch["x"] - mean})

    def step(losses_fn, sharp_pass):
        tx = samx.esam(0.1, 1.0, sharp_pass=sharp_pass)
        update = jax.jit(functools.partial(tx.update, losses_fn=losses_fn, batch=batch))
        return update(params, tx.init(params), params)[0]

    subset, whole = (step(normalized, form)["W1"] for form in ("subset", "whole"))
    assert np.abs(subset - whole).max() > 1e-3


# ---- AUSAM.


def ausam_step(tx, state, params, index, **keywords):
    batch, _ = first_batch()
    closures = {"losses_fn": problem.losses_fn, "batch": batch, "index": index, **keywords}
    return tx.update(params, state, params, **closures)


def test_an_index_outside_the_table():
    _, params = first_batch()
    tx, weights = make("ausam"), jnp.ones(16)
    state, padded = tx.init(params), weights.at[5].set(0)
    update = jax.jit(functools.partial(ausam_step, tx))
    for outside in (64, 10_000, -1):
        index = INDEX.at[5].set(outside)
        updates, after = update(state, params, index, weights=weights)
        assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(updates))
        np.testing.assert_array_equal(after.total[16:], state.total[16:])
        # the index of padding is not checked
        chex.assert_tree_all_finite(update(state, params, index, weights=padded)[0])
    for outside in (64, -1):
        with pytest.raises(ValueError, match=rf"`index` must be in \[0, 64\).*got {outside}"):
            ausam_step(tx, state, params, INDEX.at[5].set(outside))


def test_indices_of_another_kind():
    _, params = first_batch()
    tx = make("ausam")
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"one position per example, shape \(16,\), got \(15,\)"):
        ausam_step(tx, state, params, INDEX[:15])
    with pytest.raises(TypeError, match="`index` must be of integers, got float32"):
        ausam_step(tx, state, params, jnp.ones(16))


def test_the_table_keeps_the_mean_of_what_each_loss_rose():
    """By hand over six steps; an example that occurs twice counts twice, in the warm-up, too."""
    with jax.enable_x64(True):
        batch, params = first_batch()
        tx = make("ausam", fraction=1.0, warmup_steps=2)
        twice = INDEX.at[7].set(6)
        step, state = jax.jit(functools.partial(ausam_step, tx)), tx.init(params)
        total, count = np.ones(64), np.ones(64)

        @jax.jit
        def rise_at(params):
            g = jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)
            moved = optax.tree.add_scale(params, 0.1 / (optax.tree.norm(g) + 1e-12), g)
            return jnp.abs(problem.losses_fn(moved, batch) - problem.losses_fn(params, batch))

        for t in range(6):
            index = twice if t in (1, 4) else INDEX
            rise = rise_at(params)
            updates, state = step(state, params, index)
            params = optax.tree.add_scale(params, -0.3, updates)
            if t < 2:
                total[index], count[index] = 0, 0
            np.add.at(total, index, rise)
            np.add.at(count, index, 1)
            np.testing.assert_allclose(state.total, total, rtol=1e-10)
            np.testing.assert_array_equal(state.count, count)


def test_examples_of_high_scores_are_drawn_more_often():
    _, params = first_batch()
    tx = samx.ausam(0.1, 0.25, 16, warmup_steps=0, ramp_steps=0, low=0.1, high=0.9)
    scores = jnp.linspace(1.0, 2.0, 16)

    def drawn(step):
        state = tx.init(params)._replace(total=scores, step=step)
        return ausam_step(tx, state, params, INDEX)[1].count - 1

    often = jax.jit(lambda: jax.lax.map(drawn, jnp.arange(1000)).mean(0))()
    p = 0.1 + 0.8 * np.arange(16) / 15
    noise = np.random.default_rng(0).gumbel(size=(20_000, 16))
    expected = np.zeros(16)
    np.add.at(expected, np.argsort(-(np.log(p) + noise), axis=1)[:, :4], 1 / 20_000)
    np.testing.assert_allclose(often, expected, atol=0.05)


def test_equal_scores_are_drawn_alike():
    _, params = first_batch()
    tx = samx.ausam(0.1, 0.25, 16, warmup_steps=0)
    drawn = jax.jit(
        lambda: jax.lax.map(
            lambda step: (
                ausam_step(tx, tx.init(params)._replace(step=step), params, INDEX)[1].count
            ),
            jnp.arange(400),
        ).mean(0)
    )()
    np.testing.assert_allclose(drawn - 1, 0.25, atol=0.1)


@pytest.mark.parametrize("name", ["ksam", "esam", "ausam"])
def test_readings_of_several_examples_in_a_group(name):
    """One group of 16: the same share of the batch as in the groups of two of the row."""
    case, (batch, params) = VARIANTS[name], first_batch()
    tx = case.build(num_groups=1, **{"warmup_steps": 0} if name == "ausam" else {})
    _, state = jax.jit(problem.make_step(tx))(params, tx.init(params), batch)
    assert float(optax.tree.get(state, "gradients_spent")) == pytest.approx(case.gradients)


def test_the_default_ramp_is_thirty_epochs(monkeypatch):
    seen, module = [], sys.modules["samx.variants.ausam"]
    monkeypatch.setattr(
        module, "weight_range", lambda low, high, step, ramp: seen.append(ramp) or (low, high)
    )
    _, params = first_batch()
    tx = samx.ausam(0.1, 0.5, num_examples=40)  # three batches of 16 per epoch
    jax.eval_shape(functools.partial(ausam_step, tx), tx.init(params), params, INDEX)
    assert seen == [90]


def test_defaults_are_epochs():
    """One epoch of warm-up, then thirty epochs in which the weights of the draws spread."""
    _, params = first_batch()
    tx = samx.ausam(0.1, 0.5, num_examples=40)  # three batches of 16 per epoch
    step, state = jax.jit(functools.partial(ausam_step, tx)), tx.init(params)
    for t in range(5):
        spent = state.readings.gradients_spent
        _, state = step(state, params, INDEX)
        assert state.readings.gradients_spent - spent == (2 if t < 3 else 1)
    low, high = samx.selection.score_table.weight_range(0.1, 0.5, jnp.asarray(45), 90)
    np.testing.assert_allclose((low, high), (0.1, 0.3))


def test_ausam_keeps_the_aux_of_the_drawn_examples():
    batch, params = first_batch()

    def losses_fn(params, batch):
        return problem.losses_fn(params, batch), {"mean": batch["x"].mean(0), "W1": params["W1"]}

    like = jax.eval_shape(lambda: losses_fn(params, batch)[1])
    tx = make("ausam", aux_like=like)
    closures = {"losses_fn": losses_fn, "batch": batch, "index": INDEX}
    state, update = tx.init(params), jax.jit(functools.partial(tx.update, **closures))
    for _ in range(2):
        before = state.count
        _, state = update(params, state, params)
    drawn = np.asarray((state.count - before)[:16]) > 0
    assert drawn.sum() == 8
    aux = optax.tree.get(state, "aux")
    np.testing.assert_allclose(aux["mean"], batch["x"][drawn].mean(0), rtol=1e-5)
    np.testing.assert_array_equal(aux["W1"], params["W1"])
    without_aux = functools.partial(tx.update, **closures | {"losses_fn": problem.losses_fn})
    with pytest.raises(ValueError, match="aux"):
        jax.eval_shape(without_aux, params, state, params)


def test_strict_selection_of_99_percent_takes_everything():
    """As the authors' code does: two gradients and no forward pass more, on 256 examples."""
    data, params = problem.make("float32")
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4), data)
    tx = samx.esam(0.1, 1.0, 0.99, select="strict")
    _, state = jax.jit(problem.make_step(tx))(params, tx.init(params), batch)
    assert float(state.readings.gradients_spent) == pytest.approx(2)


def test_an_epoch_counts_the_examples_of_all_devices():
    devices = types.SimpleNamespace(count=8)
    losses_fn = types.SimpleNamespace(evaluation=types.SimpleNamespace(devices=devices))
    assert samx.selection.score_table.steps_per_epoch(losses_fn, 640, 16) == 5
    assert samx.selection.score_table.steps_per_epoch(losses_fn, 641, 16) == 6
