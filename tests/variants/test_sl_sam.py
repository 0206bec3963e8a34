"""SL-SAM: what its groups are, what stays unchanged, and how its bandit draws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx import policies
from samx.variants._layer_groups import groups_of

MOMENTUM = optax.sgd(0.1, momentum=0.9)


# ---- Groups of layers.


def sizes(*numbers):
    return {f"layer{i}": {"w": jnp.ones(n), "b": jnp.ones(1)} for i, n in enumerate(numbers)}


def names(groups, params):
    """Return the layers of each group; all leaves of a layer must be in its group."""
    found = []
    for active in groups_of(groups, params):
        found.append([int(name[-1]) for name, leaves in active.items() if all(leaves.values())])
        assert sum(jax.tree.leaves(active)) == 2 * len(found[-1])
    return found


@pytest.mark.parametrize(
    ("numbers", "groups", "expected"),
    [
        ([9] * 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ([9] * 8, 1, [[*range(8)]]),
        ([9] * 3, 5, [[0], [1], [2]]),
        ([99, 9, 9, 9], 2, [[0], [1, 2, 3]]),
        ([9, 9, 9, 99], 2, [[0, 1, 2], [3]]),
        ([99, 9, 9], 3, [[0], [1], [2]]),
        ([9, 99, 9, 9, 9], 3, [[0, 1], [2], [3, 4]]),
    ],
)
def test_groups_are_consecutive_layers_of_equal_sizes(numbers, groups, expected):
    assert names(groups, sizes(*numbers)) == expected


def test_groups_by_name():
    def kind(path, leaf):
        return path[-1].key

    b, w = groups_of(kind, sizes(3, 3) | {"count": {"b": jnp.arange(3)}})
    assert w == {f"layer{i}": {"w": True, "b": False} for i in range(2)} | {"count": {"b": False}}
    assert b == {f"layer{i}": {"w": False, "b": True} for i in range(2)} | {"count": {"b": False}}


REFUSED = {
    "no group": (lambda: samx.sl_sam(MOMENTUM, groups=0), ValueError, "`groups` must be at least"),
    "groups": (lambda: samx.sl_sam(MOMENTUM, groups="four"), TypeError, "`groups` must be a Py"),
    "bandit_learning_rate": (
        lambda: samx.sl_sam(MOMENTUM, bandit_learning_rate=-1.0),
        ValueError,
        "`bandit_learning_rate` must be at least 0",
    ),
    "exploration": (lambda: samx.sl_sam(MOMENTUM, exploration=2.0), ValueError, "`exploration`"),
    "base": (lambda: samx.sl_sam(0.1), TypeError, "`base` must be an optax transformation"),
    "key": (lambda: samx.sl_sam(MOMENTUM, key=0.5).init(jnp.ones(1)), TypeError, "`key`"),
    "inside perturb_if": (
        lambda: samx.perturb_if(policies.every(2), samx.sl_sam(MOMENTUM)).init(jnp.ones(1)),
        ValueError,
        "must stand in front of a base",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


# ---- What is not active stays as it is.


def first_layer(path, leaf):
    return path[-1].key.endswith("1")


def decay_of_weights(params):
    return {k: k.startswith("W") for k in params}


BASES = {
    "adamw": optax.adamw(0.01, weight_decay=0.1, mask=decay_of_weights),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2),
    "a base for each kind": optax.partition(
        {"W": optax.adam(0.01), "b": MOMENTUM}, {"W1": "W", "W2": "W", "b1": "b", "b2": "b"}
    ),
    "line search": optax.chain(
        optax.sgd(1.0, momentum=0.9),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
    ),
}


def of_layer(state, digit):
    """Return the leaves of a state that belong to the parameters of a layer."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [x for path, x in leaves if jax.tree_util.keystr(path).endswith(f"{digit}']")]


@pytest.mark.parametrize("name", BASES)
def test_nothing_moves_outside_of_the_active_group(name):
    data, params = problem.make("float32")
    tx = samx.sl_sam(BASES[name], 0.1, first_layer, bandit_learning_rate=0.0)
    step, state, drawn = jax.jit(problem.make_step(tx)), tx.init(params), set()
    digits = {0: "1", 1: "2"}  # group 0 has the label True, of layer 1
    for t in range(6):
        before = params, state.base
        params, state = step(params, state, problem.batch_at(data, t))
        group = int(state.group)
        drawn.add(group)
        for digit, is_active in ((digits[group], True), (digits[1 - group], False)):
            old, new = (of_layer(tree, digit) for tree in (before, (params, state.base)))
            assert len(old) >= 2
            same = [np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
            assert all(same) != is_active
    assert drawn == {0, 1}


def test_the_schedule_of_the_base_runs_on_all_steps():
    _, params = problem.make("float32")
    rates = []
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = samx.sl_sam(optax.sgd(schedule), 0.0, first_layer)
    state = tx.init(params)

    def value_fn(params):
        return sum(leaf.sum() for leaf in params.values())

    update = jax.jit(lambda state: tx.update(params, state, params, value_fn=value_fn))
    for _ in range(5):
        updates, state = update(state)
        rates.append(-min(float(leaf.min()) for leaf in updates.values()))
    np.testing.assert_allclose(rates, [1.0, 0.9, 0.8, 0.7, 0.6], rtol=1e-6)


def test_the_aux_is_that_of_the_clean_pass():
    _, params = problem.make("float32")

    def value_fn(p):
        return sum((leaf**2).sum() for leaf in p.values()), dict(p)

    tx = samx.sl_sam(MOMENTUM, 0.5, first_layer, aux_like=params)
    state = tx.init(params)
    _, state = jax.jit(lambda s: tx.update(params, s, params, value_fn=value_fn))(state)
    chex.assert_trees_all_equal(optax.tree.get(state, "aux"), params)
    with pytest.raises(ValueError, match="aux"):
        jax.eval_shape(
            lambda s: tx.update(params, s, params, value_fn=lambda p: value_fn(p)[0]), state
        )


# ---- The bandit.


@functools.partial(jax.jit, static_argnames="steps")
def drawn(slopes, steps, **hyper):
    """Draw with three parameters of constant gradients; return the groups and the weights."""
    w = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
    tx = samx.sl_sam(optax.sgd(0.0), 0.1, groups=3, **hyper)

    def value_fn(w):
        return slopes[0] * w["a"].sum() + slopes[1] * w["b"].sum() + slopes[2] * w["c"].sum()

    def step(state, _):
        _, state = tx.update(w, state, w, value_fn=value_fn)
        return state, (state.group, state.log_weights)

    return jax.lax.scan(step, tx.init(w), length=steps)[1]


def shares(bandit_learning_rate, exploration=0.2, slopes=(1.0, 4.0, 1.0), steps=2000):
    """Return how often each parameter is drawn."""
    groups, weights = drawn(
        jnp.asarray(slopes),
        steps,
        bandit_learning_rate=bandit_learning_rate,
        exploration=exploration,
    )
    assert np.isfinite(weights).all()
    assert (weights.max(axis=1) == 0).all()
    return np.bincount(groups[steps // 2 :], minlength=3) / (steps - steps // 2)


def test_a_bandit_that_learns_nothing_draws_alike():
    np.testing.assert_allclose(shares(bandit_learning_rate=0.0), 1 / 3, atol=0.06)
    np.testing.assert_allclose(shares(bandit_learning_rate=10.0, exploration=1.0), 1 / 3, atol=0.06)


def test_the_bandit_prefers_the_longest_gradient_down_to_its_floor():
    np.testing.assert_allclose(
        shares(bandit_learning_rate=0.1, exploration=0.3), [0.1, 0.8, 0.1], atol=0.05
    )


def test_zero_gradients_teach_nothing():
    np.testing.assert_allclose(
        shares(slopes=(0.0, 0.0, 0.0), bandit_learning_rate=1.0), 1 / 3, atol=0.06
    )


@pytest.mark.parametrize("spike", [1e6, 50.0])
def test_one_spike_does_not_end_the_learning(spike):
    """After it the bandit learns as fast as before; a rise of an ordinary size is the new scale."""
    tx, w = (
        samx.sl_sam(optax.sgd(0.0), 0.1, groups=2, exploration=0.5),
        {"a": jnp.ones(1), "b": jnp.ones(1)},
    )

    @jax.jit
    def step(state, factor):
        def value_fn(w):
            return 1e3 * factor * (w["a"] + 3 * w["b"]).sum()

        return tx.update(w, state, w, value_fn=value_fn)[1]

    state = tx.init(w)
    for t in range(102):
        state = step(state, spike if t == 100 else 1.0)
    largest = float(state.largest_norm)
    assert largest == 3e3 if spike > 100 else largest in (1e3 * spike, 3e3 * spike)
    assert np.isfinite(np.asarray(state.log_weights)).all()
