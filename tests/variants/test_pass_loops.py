"""Variants with passes and states of their own: independent loops.

No recorded run has these settings.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import reference_passes as loops
from loops import ALL, BASES, EVERYWHERE, WEIGHTS
from recorded import assert_same, patch_normals, watch

import samx
from samx.perturbations import magnitude, metric_ball

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 6
RNG = np.random.default_rng(3)
SHAPES = {"W1": (10, 16), "W2": (16, 3), "b1": (16,), "b2": (3,)}
NORMALS = {k: RNG.normal(size=(STEPS, 4, *shape)) for k, shape in SHAPES.items()}
SIGNS = {k: np.sign(x) for k, x in NORMALS.items()}
START = {k: x[0, 0] for k, x in NORMALS.items()}
BALL, ADAPTIVE = reference.ball(0.3), reference.adaptive_ball(0.5, 0.1, WEIGHTS)
ASAM = metric_ball(0.5, magnitude(0.1))
RATE, RATES = optax.linear_schedule(0.02, 0.0, 12), [0.02 * (1 - t / 12) for t in range(STEPS)]
RISING, RISE = optax.linear_schedule(0.0, 1.0, 4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
TRIED = [0.5 * i for i in range(17)]


def adaptive(rho):
    return metric_ball(rho, EVERYWHERE)


def changing(loop, numbers):
    """Make a loop whose number is another one at each step."""
    made = [loop(number) for number in numbers]
    return lambda t, w, batch: made[t](t, w, batch)


def tsam(**numbers):
    return loops.tsam(BALL, NORMALS, **{"samples": 4, "radius": 0.4, "sigma": 1.0} | numbers)


CHAINS = {  # samx, the loop, base
    "cr_sam": (
        lambda: samx.cr_sam(0.3, 0.5, 0.2),
        lambda: loops.cr_sam(BALL, 0.5, 0.2),
        "nesterov",
    ),
    "cr_sam, adaptive, schedules": (
        lambda: samx.cr_sam(gamma=RISING, beta=RISING, perturbation=ASAM),
        lambda: changing(lambda x: loops.cr_sam(ADAPTIVE, x, x), RISE),
        "adam",
    ),
    "xsam, searching": (
        lambda: samx.xsam(0.6, every=2, rho_max=2.0, alpha_max=8.0, alpha_step=0.5),
        lambda: loops.xsam(reference.ball(0.6), 1, 2, TRIED, 2.0),
        "nesterov",
    ),
    "xsam, three climbs": (
        lambda: samx.xsam(0.6, every=3, rho_max=1.0, alpha_max=8.0, alpha_step=0.5, ascent_steps=3),
        lambda: loops.xsam(reference.ball(0.2), 3, 3, TRIED, 1.0),
        "momentum and decay",
    ),
    "xsam, a schedule in place of the search": (
        lambda: samx.xsam(alpha=RISING, ascent_steps=2, perturbation=ASAM),
        lambda: changing(lambda x: loops.xsam(ADAPTIVE, 2, 1, TRIED, 1.0, alpha=x), RISE),
        "adam",
    ),
    "x_sam": (
        lambda: samx.x_sam(0.3, 0.7, every=2, iterations=3),
        lambda: loops.x_sam(BALL, 0.7, 2, 3, START),
        "nesterov",
    ),
    "x_sam, epochs": (
        lambda: samx.x_sam(alpha=1.5, every=2, iterations=1, steps_per_epoch=4, perturbation=ASAM),
        lambda: loops.x_sam(ADAPTIVE, 1.5, 2, 1, START, steps_per_epoch=4),
        "adam",
    ),
    "tsam": (
        lambda: samx.tsam(0.3, 3.0, samples=4, radius=0.4),
        lambda: tsam(tilt=3.0),
        "nesterov",
    ),
    "tsam, rising, not on the sphere": (
        lambda: samx.tsam(0.3, RISING, samples=2, radius=1.0, sigma=0.05),
        lambda: changing(lambda x: tsam(tilt=x, samples=2, radius=1.0, sigma=0.05), RISE),
        "adam",
    ),
    "tsam, worst": (
        lambda: samx.tsam(0.3, 1e4, samples=4, radius=0.4),
        lambda: tsam(tilt=1e4),
        "momentum and decay",
    ),
    "gam, cifar 10": (
        lambda: samx.gam(0.2, 0.03, beta0=0.1, beta1=0.1, gamma=0.05),
        lambda: loops.gam(reference.ball(0.03), reference.ball(0.2), 0.1, 0.1, 0.05),
        "nesterov",
    ),
    "gam, schedules": (
        lambda: samx.gam(rho_prime=0.3, beta0=1.5, beta1=RISING, gamma=RISING, outer=adaptive(0.4)),
        lambda: changing(
            lambda x: loops.gam(BALL, reference.adaptive_ball(0.4, 0.0, ALL), 1.5, x, x), RISE
        ),
        "adam",
    ),
    "gam_exact": (
        lambda: samx.gam_exact(0.3, RISING),
        lambda: changing(lambda x: loops.gam_exact(BALL, 0.3, x), RISE),
        "nesterov",
    ),
    "gam_exact, adaptive": (
        lambda: samx.gam_exact(0.2, 0.7, perturbation=ASAM),
        lambda: loops.gam_exact(ADAPTIVE, 0.2, 0.7),
        "adam",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_against_its_loop(name):
    make, loop, base = CHAINS[name]
    tx, make_reference = BASES[base]
    expected = loops.train(loops.on(make_reference(), loop()), STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch_normals(NORMALS if "tsam" in name else START, patch)
        assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


LOOKBEHIND = {
    "k 4": ({"rho": 0.3, "steps": 4, "alpha": 0.7}, BALL, 4, 0.7, "nesterov"),
    "asam, adam": ({"steps": 3, "perturbation": ASAM}, ADAPTIVE, 3, 0.5, "adam"),
    "adaptive": (
        {"rho": 0.3, "steps": 3, "alpha": None}, BALL, 3, "adaptive", "momentum and decay"
    ),
    "k 1": ({"rho": 0.3, "steps": 1, "alpha": 1.5}, BALL, 1, 1.5, "sgd, decay and cosine"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKBEHIND)
def test_lookbehind_against_its_loop(name):
    arguments, ball, k, alpha, base = LOOKBEHIND[name]
    tx, make_reference = BASES[base]
    expected = loops.train(loops.lookbehind(make_reference(), ball, k, alpha), STEPS)
    assert_same(problem.train(samx.lookbehind_sam(tx, **arguments), STEPS), expected)


def rate_of(count):
    """The same numbers; optax's schedules divide in float32."""
    return jnp.asarray(RATES)[count]


SCHEDULED = {
    "sgd": lambda: optax.sgd(rate_of, momentum=0.9),
    "with a weight decay": lambda: optax.chain(
        optax.add_decayed_weights(lambda count: 0.0 * count), optax.sgd(rate_of, momentum=0.9)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(rate_of, momentum=0.9),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_in_the_base_of_lookbehind_counts_steps(name):
    """All inner steps of a step have one learning rate, as in the authors' loop."""
    base = reference.SGD(None, 0.9)
    rule = loops.lookbehind(base, BALL, 3, 0.5)

    def at(t, w, batch):
        base.lr = RATES[t]
        return rule(t, w, batch)

    expected = loops.train(at, STEPS)
    tx = samx.lookbehind_sam(SCHEDULED[name](), 0.3, steps=3)
    trajectory, state = watch(tx, STEPS, "base")
    assert_same(trajectory, expected)
    counts = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.integer)]
    assert counts
    for count in counts:
        np.testing.assert_array_equal(count, np.arange(1, STEPS + 1))


POLYAK = {
    "bounded": (
        {"rho": 0.3, "max_learning_rate": 0.6, "min_loss": 0.2, "weight_decay": 0.1},
        (BALL, 0.6, 0.2, 0.1),
    ),
    "partly normalized": (
        {"rho": 0.3, "lam": 0.4, "max_learning_rate": 5.0, "weight_decay": 0.0},
        (reference.partly_normalized_step(0.3, 0.4), 5.0, 0.0, 0.0),
    ),
    "a loss below the bound": (
        {"min_loss": 1.0, "perturbation": ASAM, "weight_decay": 0.01},
        (ADAPTIVE, 1.0, 1.0, 0.01),
    ),
}


@pytest.mark.parametrize("name", POLYAK)
def test_sam_polyak_against_its_loop(name):
    arguments, theirs = POLYAK[name]
    expected = loops.train(loops.sam_polyak(*theirs), STEPS)
    assert_same(problem.train(samx.sam_polyak(**arguments), STEPS), expected)


SASSHA = {
    "every step, three samples": (
        {"rho": 0.3, "every": 1, "samples": 3, "power": 0.5, "b1": 0.8, "b2": 0.9}
        | {"weight_decay": 0.0},
        {"perturb": BALL, "every": 1, "samples": 3, "power": 0.5, "b1": 0.8, "b2": 0.9},
    ),
    "a rising power": (
        {"rho": 0.3, "every": 4, "power": RISING, "weight_decay": 0.0, "eps": 1e-3},
        {"perturb": BALL, "every": 4, "samples": 1, "power": RISE, "eps": 1e-3},
    ),
    "power 1, decay, adaptive": (
        {"every": 3, "power": 1.0, "weight_decay": 0.1, "eps": 1e-2, "perturbation": ASAM},
        {"perturb": ADAPTIVE, "every": 3, "samples": 1, "power": 1.0, "decay": 0.1, "eps": 1e-2},
    ),
}


@pytest.mark.parametrize("by_momentum", [False, True])
@pytest.mark.parametrize("name", SASSHA)
def test_sassha_against_its_loop(name, by_momentum):
    ours, theirs = SASSHA[name]
    rule = loops.Sassha(signs=SIGNS, rate=RATES, by_momentum=by_momentum, **theirs)
    expected = loops.train(rule, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch_normals(SIGNS, patch)
        make = partial(samx.msassha if by_momentum else samx.sassha, RATE)
        assert_same(problem.train(make(**ours), STEPS), expected)


def test_states():
    """What the states hold: the position of XSAM's search, the curvature, the step size."""
    every_4 = optax.chain(samx.xsam(0.6, every=4), optax.sgd(0.1))
    _, alpha, spent = watch(every_4, STEPS, "alpha", "extra_gradients")
    assert set(alpha[:4]) == {alpha[0]}
    assert alpha[0] != 1
    np.testing.assert_allclose(spent, [7, 0, 0, 0, 7, 0], rtol=1e-6)
    _, curvature, spent = watch(
        samx.sassha(0.01, every=2, samples=2), STEPS, "hessian", "extra_gradients"
    )
    np.testing.assert_array_equal(spent, [4, 0, 4, 0, 4, 0])
    for key in curvature:
        assert (curvature[key] >= 0).all()
        moves = np.abs(np.diff(curvature[key], axis=0)).reshape(STEPS - 1, -1).max(1) > 0
        np.testing.assert_array_equal(moves, [False, True, False, True, False])
    _, rate = watch(samx.sam_polyak(0.1, 0.9), STEPS, "learning_rate")
    assert 0 < rate.min() < rate.max() <= 0.9


def test_a_search_that_meets_losses_that_are_not_finite():
    """It takes the best of the others; if there is none, the last position stays."""

    def loss(limit, w):
        return jnp.where(w[1] < limit, 0.5 * (w[0] ** 2 + 4 * w[1] ** 2), jnp.nan)

    w, g = jnp.array([1.0, 1.0]), jnp.array([1.0, 4.0])
    tx = samx.xsam(0.1, rho_max=1.0, alpha_max=8.0, alpha_step=1.0)

    @jax.jit
    def search(limit):
        updates, state = tx.update(g, tx.init(w), w, value_fn=partial(loss, limit))
        point = w + updates / jnp.linalg.norm(updates)  # the one that was found, at rho_max
        return optax.tree.get(state, "alpha"), loss(limit, point)

    (best, _), (other, highest), (last, _) = map(search, (9.0, 1.985, 0.0))
    assert best > last == 1.0
    assert 1.0 < other < best
    assert jnp.isfinite(highest)


SEARCHING = {
    "xsam": (lambda: samx.xsam(0.3, every=2), "alpha"),
    "x_sam": (lambda: samx.x_sam(0.3, every=2), "eigenvector"),
    "eigen_sam": (lambda: samx.eigen_sam(0.3, every=2), "eigenvector"),
}


@pytest.mark.parametrize("name", SEARCHING)
def test_what_is_due_on_a_skipped_step_is_left_out(name):
    """The steps 0, 2 and 3 are skipped."""
    make, field = SEARCHING[name]

    policy = samx.policies.between(1, 2)
    tx = optax.chain(samx.perturb_if(policy, make()), optax.sgd(0.1))
    _, found, spent = watch(tx, 4, field, "extra_gradients")
    np.testing.assert_array_equal(spent, 0)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf[1:], leaf[:-1])


def test_a_search_without_an_ascent_changes_nothing():
    """A radius that begins at 0 would otherwise leave α at 0 until the next search."""
    for further in ({"rho": 0.0}, {"rho_max": 0.0}):
        tx = optax.chain(samx.xsam(**further, every=3), optax.sgd(0.1))
        _, alpha = watch(tx, 2, "alpha")
        np.testing.assert_array_equal(alpha, 1.0)


@pytest.mark.parametrize("name", ["x_sam", "eigen_sam", "sassha", "lookbehind_sam", "xsam", "gam"])
def test_integer_leaves(name):
    w = {"w": jnp.arange(1.0, 4.0), "i": jnp.arange(3)}

    def loss(w):
        return jnp.sum((w["w"] - w["i"]) ** 4)

    makers = {
        "sassha": lambda: samx.sassha(0.01),
        "lookbehind_sam": lambda: samx.lookbehind_sam(optax.adam(0.01), steps=2),
    }
    make = makers.get(name, lambda: getattr(samx, name)(**{} if name == "gam" else {"every": 1}))
    tx, state = make(), make().init(w)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss, allow_int=True)(w), state, w, value_fn=loss)
        return updates, state

    for _ in range(2):
        updates, state = step(w, state)
    assert updates["i"].dtype == w["i"].dtype
    np.testing.assert_array_equal(updates["i"], 0)
    assert np.isfinite(updates["w"]).all()
    assert updates["w"].any()


def test_strict_promotion_of_a_search():
    w = jnp.ones(2, jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        tx = samx.xsam(0.1, every=1)
        updates, _ = jax.jit(lambda: tx.update(w, tx.init(w), w, value_fn=lambda w: w @ w))()
    assert np.isfinite(updates).all()


def test_sam_polyak_refuses_what_a_perturbation_replaces():
    for further in ({"rho": 0.1}, {"lam": 0.5}):
        (name,) = further
        with pytest.raises(ValueError, match=f"got `{name}` together with `perturbation`"):
            samx.sam_polyak(**further, perturbation=ASAM)


def test_the_diagonal_of_a_complex_parameter():
    """Its curvature is the mean of those along both parts: 2 (a + b) / 2 for a x² + b y²."""

    def loss(w):
        return 3 * w.real @ w.real + 1 * w.imag @ w.imag

    w = jnp.array([1.0 + 2.0j, -1.0j])
    tx = samx.sassha(1.0, 0.0, b2=0.0)
    g = jnp.conj(jax.grad(loss)(w))
    _, state = jax.jit(lambda: tx.update(g, tx.init(w), w, value_fn=loss))()
    np.testing.assert_allclose(optax.tree.get(state, "hessian"), [4.0, 4.0], rtol=1e-12)


def test_polyak_steps_do_not_depend_on_the_scale_of_the_loss():
    """With SAM's ball and a lowest loss of 0, far outside the range of squares too."""
    data, params = problem.make()
    batch, tx = problem.batch_at(data, 0), samx.sam_polyak(0.1, 1e300, weight_decay=0.0)

    @jax.jit
    def step(factor):
        def loss(w):
            return factor * problem.losses_fn(w, batch).mean()

        return tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)[0]

    usual = step(1.0)
    for factor in (2.0**-560, 2.0**560):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9), step(factor), usual)
