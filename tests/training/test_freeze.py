"""Frozen parameters: by `samx.freeze`, or by a gradient that is `None`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import CLOSURES, KINDS, VARIANTS

import samx

pytestmark = pytest.mark.usefixtures("float64")

MASK = {"W1": True, "b1": True, "W2": False, "b2": False}


def on_head(losses_fn, params):
    """The losses as functions of the trained parameters alone, and these parameters."""
    held = {name: params[name] for name in MASK if MASK[name]}
    head = {name: params[name] for name in MASK if not MASK[name]}

    def head_losses(head, batch):
        return losses_fn(held | head, batch)

    for name in ("logits_of", "features_of", "head_on"):
        part = getattr(losses_fn, name)
        setattr(head_losses, name, lambda head, x, part=part: part(held | head, x))
    return head_losses, head


# A row of each set of closures, of each shape, and a gated one; the other kinds are slow.
FAST = {*CLOSURES, "lightsam_norm", "periodic"}
every_kind = pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)


@every_kind
def test_the_step_is_that_of_the_trained_parameters_alone(name):
    case, (data, params) = VARIANTS[name], problem.make()
    batch = problem.batch_at(data, 0)
    head_losses, head = on_head(problem.losses_fn, params)

    @jax.jit
    def both(params, head):
        frozen, alone = (
            samx.freeze(case.build(batch_like=batch), MASK),
            case.build(batch_like=batch),
        )
        found, expected = (params, frozen.init(params)), (head, alone.init(head))
        for t in range(2):
            batch_t = problem.batch_at(data, t)
            found = problem.make_step(frozen)(*found, batch_t)
            expected = problem.make_step(alone, head_losses)(*expected, batch_t)
        return found[0], expected[0]

    found, expected = both(params, head)
    chex.assert_trees_all_equal(
        {k: found[k] for k in ("W1", "b1")}, {k: params[k] for k in ("W1", "b1")}
    )
    if name not in DRAWN_BY_LEAF:
        chex.assert_trees_all_close({k: found[k] for k in head}, expected, rtol=1e-10, atol=1e-12)


# Their draws and groups depend on how many leaves there are.
DRAWN_BY_LEAF = {"sl_sam", "fisher_sparse_sam", "dynamic_sparse_sam", "random_leaves"}
DRAWN_BY_LEAF |= {"bsam", "lpf_sgd", "rwp", "arwp", "marwp", "tsam", "sassha", "msassha", "x_sam"}


def test_weight_decay_of_the_base_does_not_move_a_frozen_leaf():
    data, params = problem.make()
    tx = samx.freeze(optax.chain(samx.sam(0.1), optax.adamw(0.1, weight_decay=0.5)), MASK)
    step = jax.jit(problem.make_step(tx))
    after, _ = step(params, tx.init(params), problem.batch_at(data, 0))
    for name, is_frozen in MASK.items():
        assert np.array_equal(after[name], params[name]) == is_frozen


def test_a_mask_may_be_a_function_or_a_part():
    w = {"body": {"a": jnp.ones(2), "b": jnp.ones(1)}, "head": jnp.ones(2)}

    def loss(w):
        return sum((x**2).sum() for x in jax.tree.leaves(w))

    sam = optax.chain(samx.sam(0.1), optax.sgd(0.1))
    steps = [
        tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)[0]
        for tx in (
            samx.freeze(sam, {"body": True, "head": False}),
            samx.freeze(sam, lambda w: jax.tree.map_with_path(lambda p, _: p[0].key == "body", w)),
        )
    ]
    chex.assert_trees_all_equal(*steps)
    assert not np.any(steps[0]["body"]["a"])
    assert np.all(steps[0]["head"] < 0)
    nothing, _ = samx.freeze(sam, True).update(w, sam.init(w), w, value_fn=loss)
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"w": 1}, TypeError, r"`mask` must hold booleans, got 1 at mask\['w'\]"),
        ({"w": "train"}, TypeError, r"`mask` must hold booleans, got 'train'"),
        ({"v": True}, ValueError, r"`mask` must have the structure of `params`"),
        (lambda params: {"w": jnp.ones(2)}, TypeError, "`mask` must hold booleans, got Array"),
    ],
)
def test_a_mask_that_is_none(mask, error, message):
    w = {"w": jnp.ones(2)}

    def step():
        tx = samx.freeze(samx.sam(0.1), mask)
        return tx.update(w, tx.init(w), w, value_fn=lambda w: w["w"].sum())

    with pytest.raises(error, match=message):
        step()


def test_nothing_to_freeze():
    with pytest.raises(TypeError, match="freeze: `tx` must be an optax transformation, got"):
        samx.freeze(samx.sam, True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", [n if n in CLOSURES else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_a_gradient_that_is_none_freezes(name):
    """As `jax.grad` with a filter, and Equinox, leave it out. `optax.sgd` accepts it."""
    case, (data, params) = VARIANTS[name], problem.make()
    batch = problem.batch_at(data, 0)
    sgd = case.shape == "chain"
    tx = case.build(optax.sgd(0.1) if sgd else None, batch_like=batch)
    frozen = samx.freeze(tx, MASK)

    def update(tx, holes):
        def value_fn(params):
            return problem.losses_fn(params, batch).mean()

        value, g = jax.value_and_grad(value_fn)(params)
        g = {k: None if holes and MASK[k] else x for k, x in g.items()}
        keywords = {"losses_fn": problem.losses_fn, "batch": batch, **problem.further(batch)}
        return tx.update(g, tx.init(params), params, value=value, value_fn=value_fn, **keywords)[0]

    found, expected = jax.jit(lambda: (update(tx, True), update(frozen, False)))()
    assert {k for k, x in found.items() if x is None} == {"W1", "b1"}
    for key in ("W2", "b2"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-10, atol=1e-12)


def test_a_gradient_of_another_structure():
    w, tx = {"a": jnp.ones(2), "b": None}, samx.sam(0.1)
    tx.update({"a": jnp.ones(2), "b": None}, tx.init(w), w, value_fn=lambda w: w["a"].sum())
    for g in ({"a": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(1)}, None, [jnp.ones(2), None]):
        with pytest.raises(ValueError, match="sam: `grads` must have the structure of `params`"):
            tx.update(g, tx.init(w), w, value_fn=lambda w: w["a"].sum())


def test_a_random_key_is_no_parameter():
    w, tx = {"w": jnp.ones(2), "key": jax.random.key(0)}, samx.sam(0.1)
    with pytest.raises(ValueError, match=r"sam: `params` must not hold random keys.*\['key'\]"):
        tx.init(w)


def test_wrappers_of_optax_that_change_the_parameters():
    def loss(w):
        return jnp.abs(w["z"]).sum()

    w = {"z": jnp.ones(2, complex)}
    split = optax.contrib.split_real_and_imaginary(optax.chain(samx.sam(0.1), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"split_real_and_imaginary wraps .* Wrap the base alone"):
        split.init(w)
    w = {"z": jnp.ones(2)}
    flat = optax.flatten(optax.chain(samx.sam(0.1), optax.sgd(0.1)))
    with pytest.raises(TypeError) as caught:
        flat.update(w, flat.init(w), w, value_fn=loss)
    assert any(
        "optax.chain(samx.sam(...), optax.flatten(base))" in n for n in caught.value.__notes__
    )
    bare = samx.sam(0.1)
    for params in (w, jnp.ones(()), jnp.ones((1, 2)), [jnp.ones(2)]):  # not one flat vector
        with pytest.raises(TypeError) as caught:
            bare.update(params, bare.init(params), params, value_fn=lambda w: w + "no number")
        assert not any("flatten" in n for n in getattr(caught.value, "__notes__", ()))
    for base in (
        optax.flatten(optax.adam(0.1)),
        optax.contrib.split_real_and_imaginary(optax.sgd(1.0)),
    ):
        tx = optax.chain(samx.sam(0.1), base)
        tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
