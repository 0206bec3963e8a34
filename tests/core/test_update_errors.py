"""Wrong keywords of `update` get an error that names the keyword."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx.core import tree
from samx.perturbations import constants, metric_ball, on_leaves

SGD = optax.sgd(0.1)
DATA, PARAMS = problem.make("float32")
BATCH = problem.batch_at(DATA, 0)


def losses_fn(params, batch):
    return problem.losses_fn(params, batch)


def trace_update(tx, state=None, **keywords):
    """Trace one update; wrong input shows before anything is compiled."""
    state = jax.eval_shape(tx.init, PARAMS) if state is None else state
    return jax.eval_shape(lambda state: tx.update(PARAMS, state, PARAMS, **keywords), state)


UPDATES = {
    "a vector from value_fn": (
        {"value_fn": lambda p: problem.losses_fn(p, BATCH)},
        ValueError,
        r"`value_fn` must return a scalar.*got shape \(16,\).*losses_fn",
    ),
    "an integer from value_fn": (
        {"value_fn": lambda p: jnp.array(1)},
        TypeError,
        "`value_fn` must return real floating numbers, got int32",
    ),
    "no function": ({"value_fn": 1.0}, TypeError, "`value_fn` must be a function, got float"),
    "no function of losses": (
        {"losses_fn": 1.0, "batch": True},
        TypeError,
        "`losses_fn` must be a function, got float",
    ),
    "a scalar from losses_fn": (
        {"losses_fn": lambda p, b: problem.losses_fn(p, b).mean(), "batch": True},
        ValueError,
        r"`losses_fn` must return one loss per example, shape \(\d+,\), got \(\)",
    ),
    "batch leaves of different length": (
        {"losses_fn": losses_fn, "batch": {"x": np.ones((16, 10)), "y": np.ones(15)}},
        ValueError,
        r"every leaf of `batch`.*\(16, 10\).*\(15,\)",
    ),
    "a scalar in the batch": (
        {"losses_fn": losses_fn, "batch": {"x": np.ones((16, 10)), "y": 1.0}},
        ValueError,
        "every leaf of `batch`",
    ),
    "an empty batch": ({"losses_fn": losses_fn, "batch": {}}, ValueError, "every leaf of `batch`"),
    "weights of another length": (
        {"losses_fn": losses_fn, "batch": True, "weights": np.ones(3)},
        ValueError,
        r"`weights`.*\(16,\), got \(3,\)",
    ),
}


def ksam():
    return samx.ksam(num_selected=4)


def ausam():
    return samx.ausam(num_examples=16)


def sampa():
    return samx.sampa(SGD, batch_like=BATCH)


# SAMPa takes its gradients from `losses_fn`, so a wrong `value_fn` does not matter to it.
BAD_UPDATES = [(samx.sam, name) for name in UPDATES]
BAD_UPDATES += [
    (make, name)
    for make in (ksam, samx.esam, ausam, samx.msam)
    for name in UPDATES
    if "losses_fn" in UPDATES[name][0]
]
BAD_UPDATES += [(sampa, name) for name in UPDATES if "losses_fn" in UPDATES[name][0]]


@pytest.mark.parametrize(("make", "name"), BAD_UPDATES)
def test_updates(name, make):
    keywords, error, message = UPDATES[name]
    keywords = {k: BATCH if v is True else v for k, v in keywords.items()}
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(error, match=message):
        trace_update(tx, state, index=np.arange(16), **keywords)
    jax.tree.map(np.testing.assert_array_equal, *map(problem.as_numbers, (state, tx.init(PARAMS))))


FURTHER = {
    "no labels": (
        lambda: samx.focal_sam([90, 10, 5]),
        {},
        ValueError,
        r"focal_sam: `labels` is missing.*int\[B\]",
    ),
    "too few labels": (
        lambda: samx.focal_sam([90, 10, 5]),
        {"labels": np.zeros(3, int)},
        ValueError,
        r"`labels` must have one class per example, shape \(16,\), got \(3,\)",
    ),
    "labels of no class": (
        lambda: samx.imbalanced_sam([1]),
        {"labels": np.zeros(16)},
        TypeError,
        "imbalanced_sam: `labels` must be integers, got float",
    ),
    "nothing to climb": (samx.bisam, {}, ValueError, "bisam: `ascent_fn` is missing.*to climb"),
    "a vector to climb": (
        samx.bisam,
        {"ascent_fn": lambda p: jnp.ones(3)},
        ValueError,
        r"`ascent_fn` must return a scalar.*got shape \(3,\)",
    ),
    "no other training loss": (
        lambda: samx.lets(SGD),
        {"validation_fn": lambda p: jnp.ones(())},
        ValueError,
        "lets: `training_fn` is missing.*such as the next batch",
    ),
    "nothing held out": (
        lambda: samx.lets(SGD),
        {"training_fn": lambda p: jnp.ones(())},
        ValueError,
        "lets: `validation_fn` is missing.*not trained on",
    ),
    "groups that do not divide": (
        lambda: optax.chain(samx.fisher_sparse_sam(0.1, period=1, pattern=(3, 7)), SGD),
        {},
        ValueError,
        r"`pattern` \(3, 7\) needs leaves whose size is a multiple of 7.*\['W1'\].*\(10, 16\)",
    ),
    "microbatches of Fisher information": (
        lambda: samx.fisher_sparse_sam(period=1, num_microbatches=5),
        {},
        ValueError,
        "`num_microbatches` must divide the 16 examples.*got 5",
    ),
    "a batch of nothing": (
        lambda: samx.fisher_sparse_sam(period=1),
        {"fisher_batch": {}},
        ValueError,
        "fisher_mask: every leaf of `batch` must have",
    ),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further_keywords(name):
    make, keywords, error, message = FURTHER[name]
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(error, match=message):
        trace_update(tx, state, losses_fn=losses_fn, batch=BATCH, **keywords)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(PARAMS))


@pytest.mark.parametrize("make", [samx.fisher_sparse_sam, samx.dynamic_sparse_sam])
def test_a_mask_unlike_the_parameters(make):
    tx = make(period=1)
    start = jax.eval_shape(tx.init, PARAMS)
    mask = optax.tree.get(start, "mask")
    wrong = [mask | {"b1": np.ones(3, bool)}, mask | {"b1": np.ones(16)}, {"W1": mask["W1"]}]
    for other in wrong:
        state = optax.tree.set(start, mask=other)
        with pytest.raises(ValueError, match="the state's `mask` must hold booleans shaped like"):
            trace_update(tx, state, losses_fn=losses_fn, batch=BATCH)


def test_more_selected_than_there_is():
    for tx in (samx.ksam(0.1, 17), samx.ksam(0.1, 20, num_groups=4)):
        with pytest.raises(ValueError, match=r"`num_selected` must be at most the 16 examples"):
            trace_update(tx, losses_fn=losses_fn, batch=BATCH)
    for make in (samx.ksam, samx.esam, samx.ausam):
        tx, closures = make(num_groups=32), {"losses_fn": losses_fn, "index": np.arange(16)}
        with pytest.raises(ValueError, match=r"`num_groups` must divide the 16 examples.*got 32"):
            trace_update(tx, batch=BATCH, **closures)


def test_batch_unlike_batch_like():
    tx = samx.sampa(SGD, batch_like=BATCH)
    shorter = jax.tree.map(lambda x: x[:7], BATCH)
    with pytest.raises(ValueError, match=r"`batch`.*batch_like.*\(16, 10\).*\(7, 10\).*weights"):
        trace_update(tx, losses_fn=losses_fn, batch=shorter)


def test_aux_unlike_aux_like():
    tx = samx.sampa(SGD, batch_like=BATCH, aux_like=jnp.ones(3))
    for result in (lambda p, b: losses_fn(p, b), lambda p, b: (losses_fn(p, b), jnp.ones(4))):
        with pytest.raises(ValueError, match=r"`aux`.*aux_like"):
            trace_update(tx, losses_fn=result, batch=BATCH)


def test_aux_unlike_that_of_the_descent():
    tx = samx.async_sam(aux_like=jnp.ones(3))

    with pytest.raises(ValueError, match=r"async_sam: `aux`.*aux_like.*\(3,\).*got.*\(4,\)"):
        trace_update(tx, value_fn=lambda p: (p["b1"].sum(), jnp.ones(4)))


def test_scales_unlike_params():
    ball = metric_ball(0.1, constants({"W1": 1.0}))
    with pytest.raises(ValueError, match="`scales` must have the structure of `params`"):
        trace_update(ball)


def test_scales_of_other_leaves():
    tx = samx.mup_sam(0.1, {"W1": 1.0, "b1": 1.0, "W2": 1.0, "head": 1.0})
    with pytest.raises(ValueError, match=r"`scales`.*`params`.*lacks \[\"\['b2'\]\"\].*head"):
        trace_update(tx, value_fn=lambda p: losses_fn(p, BATCH).mean())


def test_microbatches_that_do_not_divide():
    tx = samx.msam(num_microbatches=3)
    with pytest.raises(ValueError, match=r"must divide the 16 examples of the batch, got 3.*pad"):
        trace_update(tx, losses_fn=losses_fn, batch=BATCH)


def test_no_leaf_selected():
    ball = on_leaves(metric_ball(0.1), lambda path, leaf: False)
    with pytest.raises(ValueError, match=r"selects none of the leaves.*W1"):
        trace_update(ball)


W = jnp.ones(2)
TREES = {
    "no gradient": ({"g": None}, ValueError, "sam: `grads` must have the structure of `params`"),
    "a leaf more": ({"g": {"w": W, "b": W}}, ValueError, "sam: `grads` must have the structure"),
    "a broadcast": ({"g": {"w": jnp.ones(())}}, ValueError, r"`grads`\['w'\].*\(2,\), got \(\)"),
    "complex": ({"g": {"w": 1j * W}}, TypeError, r"`grads`\['w'\] must be real"),
    "a text": ({"params": {"w": "x"}}, TypeError, r"`params`\['w'\] must be an array, got a str"),
    "a large integer": ({"params": {"w": 2**63}}, TypeError, r"`params`\['w'\].* got a int"),
    "no state": ({"state": None}, TypeError, "`state` must be a SharpnessAwareState.*NoneType"),
    "of looksam": ({"state": "looksam"}, TypeError, "`state` must be a Sharp.*got a ReuseState"),
    "no argument": ({"value_fn": lambda: 1.0}, TypeError, "`value_fn` must be a function of 1 arg"),
    "two": ({"value_fn": lambda a, b: 1.0}, TypeError, "`value_fn` must be a function of 1 arg"),
    "a text as value": ({"value": "0.5"}, TypeError, "`value` must be a number, got '0.5'"),
    "values": ({"value": W}, ValueError, r"`value` must be one number, got an array of shape"),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_and_numbers_of_the_wrong_kind(name):
    changes, error, message = TREES[name]
    params, tx = {"w": W}, samx.sam()
    given = {"g": params, "state": tx.init(params), "params": params, "value": 0.5}
    given |= {"value_fn": lambda p: jnp.sum(p["w"])} | changes
    if given["state"] == "looksam":
        given["state"] = samx.looksam().init(params)
    g, state, params = (given.pop(key) for key in ("g", "state", "params"))
    with pytest.raises(error, match=message):
        tx.update(g, state, params, **given)


def test_a_state_of_other_parameters():
    tx = samx.looksam()
    with pytest.raises(ValueError, match="looksam: `state` must be what `init` returns for these"):
        tx.update(W, tx.init(jnp.ones(3)), W, value_fn=jnp.sum)


def test_a_state_that_nobody_here_has_made_is_taken():
    """A restored state comes to a transformation whose `init` was never called."""
    state = samx.sam().init(W)
    updates, _ = samx.sam().update(W, state, W, value_fn=jnp.sum)
    assert updates.tolist() == [1, 1]


@pytest.mark.parametrize("inner", [samx.asam(), optax.chain(samx.sam(), SGD)])
def test_a_perturbation_that_takes_gradients_itself(inner):
    for make in (samx.sam, samx.looksam, samx.bisam):
        tx = make(perturbation=inner)
        with pytest.raises(ValueError, match="`perturbation` must map a gradient to a step"):
            tx.init(W)
    with pytest.raises(ValueError, match="`perturbation` must map a gradient to a step"):
        on_leaves(inner, lambda path, leaf: True).init(W)


def test_a_perturbation_needs_params_only_where_it_reads_them():
    ball = samx.perturbations.monge_ball(0.1)
    ball.update(W, ball.init(W))
    masked = optax.masked(samx.perturbations.metric_ball(0.1), {"w": True, "b": False})
    params = {"w": W, "b": W}
    eps, _ = masked.update(params, masked.init(params), params)
    assert eps["b"].tolist() == [1, 1]


def test_integers_of_64_bits_are_arrays():
    for number, is_one in (
        (2**63 - 1, True),
        (-(2**63), True),
        (2**63, False),
        (-(2**63) - 1, False),
    ):
        assert tree.is_array(number) == is_one


def test_the_gradient_of_an_integer_may_have_any_shape():
    """`jax.grad` gives float0 for it, others zeros of another shape, or nothing."""
    params, tx = {"w": W, "table": jnp.arange(3)}, samx.sam()
    for g in (np.zeros(3, jax.dtypes.float0), jnp.zeros(()), jnp.zeros(5)):
        tx.update({"w": W, "table": g}, tx.init(params), params, value_fn=lambda p: p["w"].sum())
