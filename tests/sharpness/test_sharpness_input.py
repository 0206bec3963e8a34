"""What strangers pass: losses that are not finite, odd leaves, wrong trees, strict settings."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from samx import sharpness

PARAMS = {
    "kernel": np.array([[0.5, -1.0], [0.25, 1.0]], np.float32),
    "bias": np.ones(2, np.float32),
}
BATCH = {"x": np.eye(4, 2, dtype=np.float32) + 0.1, "y": np.arange(4.0, dtype=np.float32)}
BALL = samx.perturbations.metric_ball(0.1)


def apply(params, batch):
    return batch["x"] @ params["kernel"] + params["bias"][None]


def losses_on(logits, batch):
    return jnp.sum((logits - batch["y"][:, None]) ** 2, axis=1)


def of(**changes):
    given = {"apply_fn": apply, "loss_on_logits": losses_on, "batch": BATCH}
    return sharpness.objective(**given | changes)


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def is_kernel(path, leaf):
    return jnp.ndim(leaf) == 2


def measures(f, params):
    """Measure in every way; numbers only."""
    few = {"draws": 2}
    return {
        "hvp": sharpness.hvp(f, params)(ones(params)),
        "ggn": sharpness.ggn_vp(f, params)(ones(params)),
        "fisher": sharpness.trace(f, params, operator="empirical_fisher", **few),
        "values": sharpness.eigenvalues(f, params, k=2, iterations=3).values,
        "flatness": sharpness.relative_flatness(f, params, is_kernel, **few).mean,
        "first order": sharpness.first_order(f, params, BALL),
        "shards": sharpness.m_sharpness(f, params, BALL, shard_size=4),
        "exact": sharpness.exact_sam_gradient(f, params, BALL),
        "worst": sharpness.worst_case(f, params, BALL, steps=2, restarts=2).value,
        "average": sharpness.average_case(f, params, 0.1, **few),
        "smoothed": sharpness.smoothed(f, params, 0.1, **few),
        "barrier": sharpness.barrier(f, params, ones(params), points=3).height,
    }


@jax.jit
def measured(params, bad):
    """Measure a loss that has `bad` for the last example, whose gradient does not show it."""

    def losses(logits, batch):
        return jnp.where(batch["y"] == 3, bad, losses_on(logits, batch))

    return measures(of(loss_on_logits=losses), params)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_gives_no_number(bad):
    found = measured(PARAMS, np.float32(bad))
    numbers = jax.tree_util.tree_leaves_with_path(found)
    assert not [jax.tree_util.keystr(path) for path, x in numbers if np.isfinite(x).any()]


@pytest.mark.parametrize("setting", [jax.debug_nans, jax.debug_infs])
def test_finite_losses_give_numbers(setting):
    with setting(True):
        found = measured(PARAMS, np.float32(1.0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_derivatives_that_are_zero_whatever_the_loss_is():
    product = sharpness.hvp(lambda w: jnp.nan * jnp.sum(w["kernel"]), PARAMS)(PARAMS)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(product))


def test_restarts_that_never_find_a_number():
    nowhere = optax.stateless(lambda g, params: jax.tree.map(lambda x: x * jnp.nan, g))
    found = sharpness.worst_case(lambda w: jnp.sum(w**2), jnp.ones(2), nowhere, steps=2, restarts=2)
    assert np.isnan(found.value)


def test_logits_of_every_kind():
    """Complex ones count, integers do not; of a linear model, the products are the same."""

    def logits_of(params, batch):
        z = apply(params, batch)
        return {"z": z[:, 0] + 1j * z[:, 1], "count": jnp.arange(4), "none": None}

    def losses(logits, batch):
        return 3 * logits["z"].real ** 2 + logits["z"].imag ** 2 + logits["count"]

    f = of(apply_fn=logits_of, loss_on_logits=losses, weights=np.arange(4.0, dtype=np.float32))
    v = jax.tree.map(jnp.cos, PARAMS)
    found, wanted = (
        jax.jit(product(f, PARAMS))(v) for product in (sharpness.ggn_vp, sharpness.hvp)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, wanted)


def test_normalized_logits_of_every_kind():
    def logits_of(params, batch):
        return {"z": apply(params, batch) * jnp.array([[1, 1j]]), "count": jnp.arange(4)}

    f = sharpness.normalize_logits(of(apply_fn=logits_of, loss_on_logits=lambda z, b: z["count"]))
    logits, _ = f.apply_fn(PARAMS, BATCH)
    np.testing.assert_allclose(np.linalg.norm(logits["z"], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(logits["count"], np.arange(4))


def test_draws_are_a_tree_of_any_arrays():
    """Arrays of NumPy, with anything at the integers."""
    params = {"w": jnp.ones(3), "count": 2}

    def loss(params):
        return jnp.sum(params["w"] ** 3)

    draws = {"w": np.array([[1.0, -1.0, 1.0], [2.0, 0.0, 1.0]]), "count": 0}
    mean, stderr = sharpness.trace(loss, params, draws=draws)
    np.testing.assert_allclose([mean, stderr], [24, 6], rtol=1e-6)


def test_a_radius_of_numpy():
    """It is one of 64 bits; there must be no warning."""
    found = sharpness.average_case(lambda w: w @ w, jnp.ones(2), np.float64(0.1), draws=2)
    wanted = sharpness.average_case(lambda w: w @ w, jnp.ones(2), 0.1, draws=2)
    np.testing.assert_array_equal(found, wanted)


def test_leaves_without_numbers():
    params = PARAMS | {"kernel": np.ones((0, 3), np.float32), "none": None}
    found = sharpness.filter_normalize(params, params, vectors="keep")
    np.testing.assert_array_equal(found["bias"], [1, 1])
    assert found["kernel"].shape == (0, 3)
    g, vectors = {"a": 3.0, "b": 4.0, "n": 1}, {"a": np.ones(1), "b": np.zeros(1), "n": None}
    np.testing.assert_allclose(sharpness.alignment(vectors, g), [0.36], rtol=1e-6)


@pytest.mark.parametrize("is_wide", [False, True])
def test_strict_promotion(is_wide):
    """Two precisions, complex numbers and integers in one tree."""

    def loss(params):
        parts = [jnp.abs(params["c"]) ** 2, params["h"].astype(float) ** 2, params["w"] ** 4]
        return sum(jnp.sum(x).astype(float) for x in parts)

    def logits_of(params, batch):
        return loss(params) * batch[:, None]

    with jax.enable_x64(is_wide), jax.numpy_dtype_promotion("strict"):
        params = {
            **{"h": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64)},
            **{"w": jnp.ones(2), "kernel": jnp.ones((2, 2), jnp.float32), "n": jnp.arange(2)},
        }
        f = of(apply_fn=logits_of, loss_on_logits=lambda z, b: z[:, 0] ** 2, batch=jnp.ones(4))
        jax.eval_shape(functools.partial(measures, f), params)
        tx = sharpness.monitor({"loss": lambda f, w: f(w)}, 1)
        jax.eval_shape(lambda w: tx.update(w, tx.init(w), w, value_fn=loss), params)


def w_squared(w):
    return w @ w


W, COLUMNS = np.ones(3, np.float32), {"w": np.ones((2, 3)), "b": np.ones((3, 2))}
TREE = {"w": np.ones(3, np.float32), "b": np.ones(2, np.float32)}
KEYS = {"w": W, "key": jax.random.key(0)}


def of_tree(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def average(metric):
    return sharpness.average_case(of_tree, TREE, 0.1, metric=metric)


def step(measure, **like):
    tx = sharpness.monitor({"a": measure}, 1, **like)
    return tx.update(W, tx.init(W), W, value_fn=w_squared)


WRONG = {
    "the loss": (
        lambda: sharpness.hvp(lambda w: w, W)(W),
        ValueError,
        "hvp: `f` must return a sca",
    ),
    "losses on logits": (
        lambda: sharpness.ggn_vp(of(loss_on_logits=lambda z, b: z.mean()), PARAMS)(PARAMS),
        ValueError,
        "ggn_vp: `loss_on_logits` must return one loss per example, shape (4,), got ()",
    ),
    "losses on logits and aux": (
        lambda: of(loss_on_logits=lambda z, b: (z[:, 0], 1))(PARAMS),
        TypeError,
        "`loss_on_logits` must return losses [B], got a tuple",
    ),
    "no rows": (
        lambda: sharpness.ggn_vp(
            of(apply_fn=lambda w, b: apply(w, b).T, loss_on_logits=lambda z, b: z.sum(0) ** 2),
            PARAMS,
        )(PARAMS),
        ValueError,
        "ggn_vp: `apply_fn` must return floating logits [B, ...], one row per example, here "
        "[4, ...], got the shapes [(2, 4)]",
    ),
    "text for logits": (
        lambda: of(apply_fn=lambda w, b: "z")(PARAMS),
        TypeError,
        "`apply_fn(params, batch)` must be an array, got a str",
    ),
    "no classes": (
        lambda: sharpness.normalize_logits(
            of(apply_fn=lambda w, b: apply(w, b)[:, 0], loss_on_logits=lambda z, b: z)
        )(PARAMS),
        ValueError,
        "normalize_logits: `apply_fn` must return logits [B, ..., classes], got the shape (4,)",
    ),
    "one of two parts": (
        lambda: of(loss_on_logits=None),
        ValueError,
        "objective: `loss_on_logits` is missing; `apply_fn` needs it",
    ),
    "no axes": (lambda: of(axis_name=()), ValueError, "`axis_name` must name at least one axis"),
    "keys": (lambda: sharpness.trace(of_tree, KEYS), ValueError, "at params['key']"),
    "text to shards": (
        lambda: sharpness.m_sharpness(of(), {"w": "a"}, BALL, shard_size=2),
        TypeError,
        "m_sharpness: `params`['w'] must be an array, got a str",
    ),
    "ends": (
        lambda: sharpness.barrier(w_squared, "a", W),
        TypeError,
        "barrier: `a` must be an array",
    ),
    "another end": (
        lambda: sharpness.barrier(of_tree, TREE, W),
        ValueError,
        "barrier: `b` must have the structure of `a`",
    ),
    "a shape for a vector": (
        lambda: sharpness.hvp(w_squared, W)(jax.ShapeDtypeStruct((3,), jnp.float32)),
        TypeError,
        "hvp: `v` must be an array, got a ShapeDtypeStruct",
    ),
    "two numbers of draws": (
        lambda: sharpness.trace(of_tree, TREE, draws=COLUMNS),
        ValueError,
        "trace: `draws`['w'] must have the shape of `params`, (3, 3), got (2, 3); `draws` has one",
    ),
    "no draws": (
        lambda: sharpness.trace(w_squared, W, draws=np.ones((0, 3))),
        ValueError,
        "trace: `draws` must hold at least one vector",
    ),
    "a dtype for draws": (
        lambda: sharpness.trace(w_squared, W, draws=np.float32),
        TypeError,
        "`draws` must be a Python int",
    ),
    "a key that is not read": (
        lambda: sharpness.trace(w_squared, W, draws=np.ones((2, 3)), key="a"),
        TypeError,
        "`key` must be a seed",
    ),
    "a key without draws": (
        lambda: sharpness.relative_flatness(of_tree, PARAMS, is_kernel, key="a"),
        TypeError,
        "`key` must be a seed",
    ),
    "a choice of arrays": (
        lambda: sharpness.relative_flatness(of_tree, PARAMS, lambda path, leaf: np.ones(2)),
        TypeError,
        "`is_chosen(path, leaf)` must be True or False",
    ),
    "no grid": (
        lambda: sharpness.density(w_squared, W, [], sigma=0.1),
        ValueError,
        "density: `grid` must have the shape [n], got (0,)",
    ),
    "three scales": (
        lambda: average(lambda w: {"w": 1.0, "b": np.ones(3)}),
        ValueError,
        "average_case: `metric(params)`['b'] must be one number or have the shape of `params`, "
        "(2,), got (3,)",
    ),
    "complex scales": (lambda: average(lambda w: {"w": 1j, "b": 1.0}), TypeError, "must be real"),
    "no scale": (
        lambda: average(lambda w: {"w": 1.0, "b": None}),
        TypeError,
        "['b'] must be an ar",
    ),
    "a complex measure": (
        lambda: step(lambda f, w: 1j * f(w)),
        TypeError,
        "'a' must return values of the dtypes ['float32'], got ['complex64']",
    ),
    "a measure of a half": (
        lambda: step(lambda f, w: f(w) / 2, values_like={"a": 1}),
        TypeError,
        "'a' must return values of the dtypes ['int32'], got ['float32']",
    ),
    "a key for a measure": (
        lambda: step(lambda f, w: jax.random.key(0)),
        TypeError,
        "got ['key<fry>']",
    ),
    "values like a list": (
        lambda: step(lambda f, w: f(w), values_like=[1.0]),
        TypeError,
        "monitor: `values_like` must map names to arrays or shapes, got a list",
    ),
    "values like text": (
        lambda: step(lambda f, w: f(w), values_like={"a": "x"}),
        TypeError,
        "`values_like`['a'] must be an array",
    ),
    "a monitor of a part": (
        lambda: optax.masked(
            sharpness.monitor({"a": lambda f, w: f(w)}, 1), {"w": True, "b": False}
        ).init(TREE),
        ValueError,
        "monitor: `params` holds optax.MaskedNode leaves",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_named(what):
    call, error, message = WRONG[what]
    with pytest.raises(error, match=re.escape(message)):
        call()
