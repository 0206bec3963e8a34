"""Norms and steps where squares are out of float32's range: 1e-20 and 1e19 times the usual."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from samx.core import tree
from samx.perturbations import constants, layerwise, linf_ball, magnitude, metric_ball, monge_ball

SCALES = (1e-30, 1e-20, 1e-12, 1.0, 1e12, 1e19, 1e30)
TREE = {"a": np.array([3.0, -4.0, 0.0]), "b": np.array([[1e-3], [12.0]])}


def scaled(scale, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(scale * x, dtype), TREE)


@pytest.mark.parametrize("jit", [jax.jit, lambda fn: fn])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_a_norm_is_in_range(dtype, jit):
    norm = jit(tree.norm)
    for scale in SCALES:
        wide = jax.tree.map(lambda x: np.asarray(x, complex), scaled(scale, dtype))
        expected = np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in wide.values()))
        np.testing.assert_allclose(norm(scaled(scale, dtype)), expected, rtol=1e-6)


def test_many_small_squares_count():
    """Each square is above the smallest number, but most of what they are above it is lost."""
    x = jnp.full(10_000, 1.2e-19)
    np.testing.assert_allclose(jax.jit(tree.norm)(x), 1.2e-17, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_what_is_not_finite_shows(bad):
    assert not np.isfinite(jax.jit(tree.norm)(jnp.array([1.0, bad])))


def test_a_batch_of_norms():
    """Under `vmap`, each norm has its own scale."""
    rows = jnp.outer(jnp.array(SCALES), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(jax.vmap(tree.norm)(rows), 5 * np.array(SCALES), rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_the_derivative_of_a_norm(scale):
    """It is the unit vector; at zero it is zero."""
    g = jax.jit(jax.grad(tree.norm))(scaled(scale))
    chex.assert_trees_all_close(g, scaled(1 / 13.0), rtol=1e-5)
    zeros = jax.tree.map(jnp.zeros_like, g)
    chex.assert_trees_all_equal(jax.jit(jax.grad(tree.norm))(zeros), zeros)


BALLS = {
    "metric_ball": metric_ball(0.1),
    "magnitude": metric_ball(0.1, magnitude()),
    "layerwise": metric_ball(0.1, layerwise(0.1)),
    "constants": metric_ball(0.1, constants({"a": 1e-3, "b": 1.0})),
    "linf_ball": linf_ball(0.1),
    "mup_ball": samx.perturbations.mup_ball(0.1, {"a": 2.0, "b": 1.0}),
    "layers of length rho": samx.perturbations.layer_steps(0.1, lambda w, g, total: 1 / g),
    "layers by the whole": samx.perturbations.layer_steps(0.1, lambda w, g, total: 1 / total),
}


@pytest.mark.parametrize("name", BALLS)
def test_a_radius_does_not_depend_on_the_scale(name):
    params = scaled(0.1)

    @jax.jit
    def step(g):
        return BALLS[name].update(g, BALLS[name].init(params), params)[0]

    usual = step(scaled(1.0))
    for scale in SCALES:
        chex.assert_trees_all_close(step(scaled(scale)), usual, rtol=1e-5)


@pytest.mark.parametrize("name", BALLS)
@pytest.mark.usefixtures("float64")
def test_a_tree_of_two_precisions(name):
    """A factor in the range of the wide leaf may be out of that of the narrow one."""
    for scale in (0.0, 1e-200, 1e-30, 1.0, 1e30):
        wide, params = scaled(scale, jnp.float64), scaled(0.1, jnp.float64)
        mixed, narrow = (tree | {"a": tree["a"].astype(jnp.float32)} for tree in (wide, params))
        wide["a"] = mixed["a"].astype(jnp.float64)
        ball = BALLS[name]
        with jax.numpy_dtype_promotion("strict"):
            eps, _ = ball.update(mixed, ball.init(narrow), narrow)
        expected, _ = ball.update(wide, ball.init(params), params)
        assert eps["a"].dtype == jnp.float32
        chex.assert_trees_all_close(jax.tree.map(np.float64, eps), expected, rtol=1e-5)


def test_norm_eps_shrinks_the_radius_if_one_asks_for_it():
    ball = metric_ball(0.1, norm_eps=13e-20)
    eps, _ = ball.update(scaled(1e-20), ball.init(TREE), TREE)
    np.testing.assert_allclose(tree.norm(eps), 0.05, rtol=1e-5)


def test_norm_eps_of_each_tensor():
    w, g = (
        {"a": jnp.array([6.0]), "b": jnp.array([0.5])},
        {"a": jnp.array([3.0]), "b": jnp.array([4.0])},
    )
    steps = samx.perturbations.layer_steps(0.1, norm_eps=1.0)
    eps, _ = steps.update(g, steps.init(w), w)
    np.testing.assert_allclose(eps["a"], 0.1 * 6.0 / ((3 + 1) * (5 + 1)) * 3.0, rtol=1e-6)
    np.testing.assert_allclose(eps["b"], 0.1 * 0.5 / ((4 + 1) * (5 + 1)) * 4.0, rtol=1e-6)


def test_monge_and_fisher_steps_of_long_gradients():
    """Both get shorter where the loss is steep: by 1 / ‖g‖, and to the length of 1 / g."""
    g = jnp.array([3e25, 4e25])
    step, _ = monge_ball(1e20).update(g, monge_ball(1e20).init(g), g)
    np.testing.assert_allclose(step, 1e20 / 5e25 * np.array([0.6, 0.8]), rtol=1e-5)
    tx = samx.all_readings(samx.fisher_sam(1e20))
    w = jnp.zeros(2)
    _, state = tx.update(g, tx.init(w), w, value_fn=lambda w: g @ w)
    moved = np.sqrt(0.5) * 1e20 * np.array([1 / 3e25, 1 / 4e25])
    np.testing.assert_allclose(state.readings.perturbation_norm, np.linalg.norm(moved), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e19, 1e25])
def test_the_first_step_of_lightsam_is_as_long_as_its_learning_rate(scale):
    tx = samx.lightsam_norm(0.5, 0.1, eps=1e-38)
    w = jnp.array([3.0, 4.0])

    def loss(w):
        return scale * 0.5 * (w @ w)

    updates, _ = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
    np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-5)


@pytest.mark.parametrize("name", ["sam", "looksam", "gsam", "stable_sam", "friendly_sam", "vsam"])
def test_float32_steps_at_any_scale_of_the_loss(name):
    """The faults were seen in float32; the table's rows are in float64."""
    factory = getattr(samx, name)
    tx = factory(0.1, normalize=True) if name == "stable_sam" else factory(0.1)
    steps = []
    for scale in (1.0, 2.0**-66, 2.0**64, 2.0**100):

        def value_fn(w, scale=scale):
            return scale * (0.5 * w @ jnp.array([1.0, 4.0, 9.0]) ** 2 + (w**4).sum())

        @jax.jit
        def step(w, state, value_fn=value_fn, scale=scale):
            g = jax.grad(value_fn)(w)
            updates, state = tx.update(g, state, w, value_fn=value_fn)
            return w - 0.001 / scale * updates, state

        w = jnp.array([1.0, -1.0, 0.5])
        state = tx.init(w)
        for _ in range(3):
            w, state = step(w, state)
        steps.append(w)
        assert optax.tree.get(state, "grad_norm") < jnp.inf
    np.testing.assert_allclose(steps, np.tile(steps[0], (4, 1)), rtol=1e-6)


def test_dtypes_that_jax_does_not_promote():
    for dtype, wanted in (
        (jnp.int4, "int32"),
        (jnp.uint4, "int32"),
        (jnp.int8, "int8"),
        (jnp.float8_e4m3fn, "float32"),
        (jnp.bfloat16, "bfloat16"),
    ):
        assert tree.common_dtype(dtype, dtype) == wanted


def test_a_known_length_is_that_of_its_tree_only():
    known, other = jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])
    found = tree.Length(jnp.ones(()), jnp.full((), 7.0))
    with tree.known_length(known, found):
        assert (float(tree.norm(known)), float(tree.norm(other))) == (7.0, 10.0)
    assert float(tree.norm(known)) == 5.0
