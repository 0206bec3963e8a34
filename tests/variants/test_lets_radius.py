"""LETS against an independent loop, and what moves its radius."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
from formulations import STEPS, train
from recorded import assert_same

import samx
from samx.perturbations import magnitude, metric_ball

pytestmark = pytest.mark.usefixtures("float64")

# The row in `cases.py` has the exact form, with momentum.
LETS = {  # arguments, the reference's perturbation, momentum, radius, rate
    "approximate": ({"hessian": "diag_sq"}, reference.ball(1.0), 0.0, 0.3, 300.0),
    "adaptive": (
        {"perturbation": metric_ball(1.0, magnitude(0.01))},
        reference.adaptive_ball(1.0, 0.01, {"W1", "W2"}),
        0.0,
        0.4,
        40.0,
    ),
}


def other_losses(data, batch, t):
    """The losses on the next batch, which is held out, and on the one after it."""

    def loss_on(number):
        start, size = (number % 4) * problem.BATCH_SIZE, problem.BATCH_SIZE
        other = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), data)
        return lambda params: problem.losses_fn(params, other).mean()

    return {"validation_fn": loss_on(t + 1), "training_fn": loss_on(t + 2)}


def after_the_next(data, t):
    return problem.batch_at(data, t + 2)


@pytest.mark.parametrize("name", LETS)
def test_lets_against_reference(name):
    keywords, perturb, momentum, rho, rate = LETS[name]
    tx = samx.lets(optax.sgd(0.1, momentum=momentum), rho, rate, **keywords)
    expected, radii = reference.train_lets(
        reference.SGD(0.1, momentum),
        perturb,
        rho,
        rate,
        STEPS,
        name == "approximate",
        training=after_the_next,
    )
    found, after = train(tx, other_losses, "rho")
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


def update_of(tx, value_fn, validation_fn, training_fn=None):
    """Compile `(params, state) -> (updates, state)`; the training loss is that of the step."""

    @jax.jit
    def update(params, state):
        closures = {"value_fn": value_fn, "validation_fn": validation_fn}
        closures["training_fn"] = value_fn if training_fn is None else training_fn
        return tx.update(jax.grad(value_fn)(params), state, params, **closures)

    return update


def test_the_hypergradient_of_the_notes():
    """SGD with learning rate 0.1 and ρ = 0.05; others computed these values, three times."""
    params, value_fn, validation_fn = first_batches()
    for hessian, expected in (
        ("exact", 0.010609708745719907),
        ("diag_sq", 4.440634729973349e-04),
    ):
        tx = samx.lets(optax.sgd(0.1), 0.05, hessian=hessian)
        _, state = update_of(tx, value_fn, validation_fn)(params, tx.init(params))
        np.testing.assert_allclose(state.hypergradient, expected, rtol=1e-9)
        assert float(state.rho) < 0.05  # the gap grows with ρ


@pytest.mark.parametrize(
    "base",
    [
        optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
        optax.rmsprop(0.01),
    ],
    ids=["clipped adamw", "rmsprop"],
)
def test_the_hypergradient_is_the_slope_of_the_objective(base):
    """Compared with central differences, through any base, after its first steps."""
    params, value_fn, validation_fn = first_batches()
    tx = samx.lets(base, 0.2, rho_learning_rate=0.0)

    def training_fn(params):
        return value_fn(params) + validation_fn(params) ** 2

    update, state = update_of(tx, value_fn, validation_fn, training_fn), tx.init(params)
    for _ in range(2):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
    _, after = update(params, state)

    @jax.jit
    def objective(rho):
        sam, g = samx.sam(rho), jax.grad(value_fn)(params)
        g_s, _ = sam.update(g, sam.init(params), params, value_fn=value_fn)
        updates, _ = base.update(g_s, state.base, params)
        moved = optax.apply_updates(params, updates)
        return (validation_fn(moved) - training_fn(moved)) ** 2 / 2

    h = 1e-4
    around = [objective(0.2 + i * h) for i in (-2, -1, 1, 2)]
    slope = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * h)
    np.testing.assert_allclose(after.hypergradient, slope, rtol=1e-6)


@pytest.mark.parametrize("hessian", ["exact", "diag_sq"])
def test_adam_has_no_derivative_where_both_moments_are_zero(hessian):
    """Dead units must not affect other entries; no gradient at all leaves the radius alone."""
    params, value_fn, validation_fn = first_batches()
    tx = samx.lets(optax.adam(0.01), 0.1, hessian=hessian)

    @jax.jit
    def update(params, state, factor, whole):
        """Of `whole`, the entry "dead" has no gradient."""
        closures = {"value_fn": lambda p: factor * value_fn(p), "validation_fn": validation_fn}
        closures["training_fn"] = closures["value_fn"]
        g = jax.grad(closures["value_fn"])
        _, without = tx.update(g(params), tx.init(params), params, **closures)
        updates, state = tx.update(g(whole), state, whole, **closures)
        return updates, state, without

    whole = params | {"dead": jnp.ones(3)}
    state = tx.init(whole)
    _, found, without = update(params, state, 1.0, whole)
    np.testing.assert_allclose(found.hypergradient, without.hypergradient, rtol=1e-7)
    assert abs(float(found.hypergradient)) > 1e-12
    for _ in range(2):
        updates, state, _ = update(params, state, 0.0, whole)
        assert (float(state.rho), float(state.hypergradient)) == (0.1, 0.0)
        assert all(bool((x == 0).all()) for x in jax.tree.leaves(updates))


def test_a_radius_stays_in_its_bounds():
    params, value_fn, validation_fn = first_batches()

    @jax.jit
    def radius_after(rate):
        tx = samx.lets(optax.sgd(0.1), 0.05, rate, bounds=(0.01, 0.06))
        return update_of(tx, value_fn, validation_fn)(params, tx.init(params))[1].rho

    for rate, bound in ((1e6, 0.01), (1e-9, 0.05)):
        assert float(radius_after(rate)) == pytest.approx(bound, rel=1e-6)


def test_a_validation_loss_that_is_no_number_leaves_the_radius_alone():
    params, value_fn, _ = first_batches()
    tx = samx.lets(optax.sgd(0.1), 0.05)
    _, state = update_of(tx, value_fn, lambda p: jnp.nan * value_fn(p))(params, tx.init(params))
    assert float(state.rho) == 0.05
    assert np.isnan(state.hypergradient)


@jax.custom_vjp
def unchanged(loss):
    return loss


unchanged.defvjp(lambda loss: (loss, None), lambda _, cotangent: (cotangent,))


def in_a_loop(loss):
    return jax.lax.scan(lambda total, x: (total + unchanged(x), None), 0.0, loss[None])[0]


@pytest.mark.parametrize("hessian", ["exact", "diag_sq"])
def test_a_loss_with_a_custom_vjp_has_the_same_hypergradient(hessian):
    """It has no forward derivative; so the slopes come from gradients. Integers have none."""
    params, *losses = first_batches()
    params |= {"count": jnp.int32(3)}
    base = optax.masked(optax.sgd(0.1, momentum=0.9), lambda tree: {k: k != "count" for k in tree})
    tx, found = samx.lets(base, 0.2, 50.0, hessian=hessian), []
    for wraps in ((None, None), (unchanged, None), (None, unchanged), (in_a_loop, unchanged)):
        value_fn, validation_fn = (
            (lambda p, fn=fn, wrap=wrap: wrap(fn(p))) if wrap else fn
            for fn, wrap in zip(losses, wraps, strict=True)
        )

        @jax.jit
        def update(params, state, value_fn=value_fn, validation_fn=validation_fn):
            g = jax.grad(value_fn, allow_int=True)(params)
            closures = {"value_fn": value_fn, "validation_fn": validation_fn}
            closures["training_fn"] = value_fn
            return tx.update(g, state, params, **closures)[1]

        state = update(params, tx.init(params))
        found.append([float(x) for x in (state.gap, state.hypergradient, state.rho)])
    assert abs(found[0][1]) > 1e-4
    np.testing.assert_allclose(found[1:], found[:1] * 3, rtol=1e-12)
