"""Limits that the docstrings name, and variants that are the same.

What a row's oracle in `cases.py` already tells is not repeated here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import (
    MOMENTUM,
    STEPS,
    assert_same,
    assert_same_updates,
    batch_like,
    gradient,
    runner,
    sam,
    trained,
)

import samx
from samx import perturbations as geometry
from samx import policies
from samx.combinations import mix, renormalized

pytestmark = pytest.mark.usefixtures("float64")


def scales(s):
    return dict.fromkeys(("W", "b"), s)


BALL = geometry.metric_ball(0.2)
EQUAL_TO_SAM = {
    "one common constant": lambda: samx.sharpness_aware(
        geometry.metric_ball(0.1, geometry.constants(scales(2.0)))
    ),
    "injected with a perturbation": lambda: optax.inject_hyperparams(
        samx.sam, static_args=("rho", "perturbation")
    )(perturbation=geometry.metric_ball(0.2)),
    "gsam, alpha 0": lambda: samx.gsam(0.2, 0.0),
    "friendly_sam, sigma 0": lambda: samx.friendly_sam(0.2, 0.0),
    "mup_sam, layerwise, one common scale": lambda: samx.mup_sam(
        0.1, scales(3.0), normalization="layerwise", width=4.0
    ),
    "msam of one": lambda: samx.msam(0.2, 1),
    "looksam, period 1": lambda: samx.looksam(0.2, period=1),
    "ae_sam, no threshold": lambda: samx.ae_sam(0.2, -jnp.inf),
    "ksam in groups of one": lambda: samx.ksam(0.2, 16, num_groups=16),
    "esam of everything, strictly": lambda: samx.esam(0.2, 1.0, 0.99, select="strict"),
    "ausam of everything": lambda: samx.ausam(0.2, 1.0, 64, warmup_steps=3),
    "random leaves, all of them": lambda: samx.sharpness_aware(
        geometry.random_leaves(geometry.metric_ball(0.2), 1.0)
    ),
    "imbalanced_sam, all classes tail": lambda: samx.imbalanced_sam([0, 1, 2], 0.2),
}


def test_equal_to_sam():
    assert_same_updates({name: (make, sam) for name, make in EQUAL_TO_SAM.items()})


def test_bisam_that_climbs_its_own_loss_is_sam():
    tx = optax.chain(samx.bisam(0.2), MOMENTUM)
    data, params = problem.make()

    @jax.jit
    def step(params, state, batch):
        def own(params):
            return problem.losses_fn(params, batch).mean()

        return problem.make_step(tx, ascent_fn=own)(params, state, batch)

    carry = params, tx.init(params)
    for t in range(STEPS):
        carry = step(*carry, problem.batch_at(data, t))
    assert_same(carry[0], {key: x[-1] for key, x in trained(sam).items()})


@functools.cache
def trained_async_sam(first="plain", is_fresh=False, gives_ascent=False):
    """Return the parameters after every step; `is_fresh` climbs the gradient of the same step."""
    tx = optax.chain(samx.async_sam(0.2, first=first), MOMENTUM)
    data, params = problem.make()
    state, trajectory = tx.init(params), []

    @jax.jit
    def step(params, state, batch):
        def own(params):
            return problem.losses_fn(params, batch).mean()

        if is_fresh:
            state = optax.tree.set(state, ascent_grad=jax.grad(own)(params))
        ascent = own if gives_ascent else None
        return problem.make_step(tx, ascent_fn=ascent)(params, state, batch)

    for t in range(STEPS):
        params, state = step(params, state, problem.batch_at(data, t))
        trajectory.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trajectory)


def test_async_sam_that_climbs_without_delay_is_sam():
    """The state holds the gradient of the same step; with first="sam", step 0 does not need it."""
    assert_same(trained_async_sam("sam", is_fresh=True), trained(sam))


def test_only_the_first_step_of_async_sam_may_be_sam():
    stale, sams = trained_async_sam("sam"), trained(sam)
    plain, base = trained_async_sam(), trained(optax.identity)
    for key, steps in sams.items():
        np.testing.assert_allclose(stale[key][0], steps[0], rtol=1e-12)
        np.testing.assert_allclose(plain[key][0], base[key][0], rtol=1e-12)
        assert np.abs(stale[key][1] - steps[1]).max() > 1e-6


def test_async_sam_climbs_the_incoming_gradient_or_the_same_of_a_closure():
    assert_same(trained_async_sam("sam", gives_ascent=True), trained_async_sam("sam"))


def test_a_fisher_mask_of_all_entries_is_sam():
    """They are equal from the second step on; on the first step there is no mask."""
    fisher = samx.fisher_sparse_sam(sparsity=0.0, period=2, perturbation=BALL)
    late = samx.perturb_if(policies.between(1), samx.sam(0.2))
    assert_same_updates({"fisher": (lambda: fisher, lambda: late)})


def test_focal_sam_with_one_factor_for_all_classes_is_a_mixture():
    focal = runner(lambda c: optax.chain(samx.focal_sam([5, 1, 2], 0.2, 0.0, c), MOMENTUM))
    mixed = runner(lambda c: optax.chain(mix(samx.sam(0.2), c), MOMENTUM))
    for c in (0.0, 0.3, 1.2):
        assert_same(focal(c=c), mixed(c=c))
    assert_same(focal(c=0.0), trained(optax.identity))


def test_lets_with_rate_zero_is_sam():
    lets = problem.train(samx.lets(MOMENTUM, 0.2, 0.0), STEPS)
    assert_same(lets, trained(sam))


def test_sl_sam_of_every_layer_is_sam():
    assert_same(problem.train(samx.sl_sam(MOMENTUM, 0.2, 1), STEPS), trained(sam))


EQUAL_TO_BASE = {
    "gsam, clean, alpha 0": lambda: samx.gsam(0.2, 0.0, descend="clean"),
    "ae_sam, infinite threshold": lambda: samx.ae_sam(0.2, jnp.inf),
    "ae_looksam, infinite threshold": lambda: samx.ae_looksam(0.2, jnp.inf),
    "esam of all tensors, and of no radius": lambda: samx.esam(0.0, 0.5, 1.0),
}


def test_equal_to_the_base():
    assert_same_updates({name: (make, optax.identity) for name, make in EQUAL_TO_BASE.items()})


def test_wsam_with_plain_descent_is_coupled_wsam():
    base = optax.sgd(0.1)
    wsam = runner(lambda gamma: samx.wsam(base, 0.1, 0.2, gamma))
    coupled = runner(lambda gamma: optax.chain(samx.coupled_wsam(0.2, gamma), base))
    for gamma in (0.0, 0.3, 0.9):
        assert_same(wsam(gamma=gamma), coupled(gamma=gamma))


def test_adasam_is_sam_with_amsgrad_but_for_where_it_starts():
    amsgrad = optax.amsgrad(0.01, eps=0.0, bias_correction_mu=False, bias_correction_nu=False)
    expected = problem.train(optax.chain(sam(), amsgrad), STEPS)
    assert_same(problem.train(samx.adasam(0.01, 0.2), STEPS), expected, atol=1e-5)


FIRST = {
    "stable_sam": samx.all_readings(samx.stable_sam(5.0)),
    "asam": samx.all_readings(samx.asam(0.5)),
    "sam": samx.sam(0.5),
    "sharp": samx.gsam(0.5, 0.7, descend="sharp"),
    "clean": samx.gsam(0.5, 0.7, descend="clean"),
}


@functools.cache
def first_steps():
    """Take the first update of each on the first batch."""
    g, params = gradient()
    closures = {"losses_fn": problem.losses_fn, "batch": batch_like()}

    @jax.jit
    def all_of(params):
        return {k: tx.update(g, tx.init(params), params, **closures) for k, tx in FIRST.items()}

    return all_of(params)


def test_renormalized_gradients_are_as_long_as_the_gradient():
    updates, state = first_steps()["stable_sam"]
    length = optax.tree.norm(gradient()[0])
    np.testing.assert_allclose(optax.tree.norm(updates), length, rtol=1e-10)
    sharp_norm = float(optax.tree.get(state, "sharp_grad_norm"))
    # Before, the sharp gradient had another length.
    assert abs(sharp_norm - float(length)) > 1e-3


def test_the_gap_falls_across_the_descended_gradient():
    g, _ = gradient()
    g_s, _ = first_steps()["sam"]
    for descend, kept, sign in (("sharp", g_s, -1), ("clean", g, 1)):
        updates, _ = first_steps()[descend]
        taken = optax.tree.sub(updates, kept)
        other = g if descend == "sharp" else g_s
        assert abs(float(optax.tree.vdot(taken, kept))) < 1e-12
        assert sign * float(optax.tree.vdot(taken, other)) > 1e-6


def test_a_radius_that_follows_the_learning_rate():
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.4, 10, 30, end_value=0.1)
    steps = jnp.arange(31)
    rho = samx.schedules.following(rate, 0.8, 0.2, peak_value=0.4, end_value=0.1)
    np.testing.assert_allclose(jax.vmap(rho)(steps), 2 * jax.vmap(rate)(steps), rtol=1e-6)
    below = samx.schedules.following(rate, 0.8, peak_value=0.4, end_value=0.1)
    radii = np.array(jax.vmap(below)(steps))
    assert radii[0] == 0  # the line is below zero
    np.testing.assert_allclose(radii[[10, 30]], [0.8, 0.0], atol=1e-6)
    constant = samx.schedules.following(lambda step: 0.1, 0.8, 0.2, peak_value=0.1, end_value=0.1)
    assert float(constant(3)) == pytest.approx(0.8)


def test_a_decay_starts_after_the_last_step_at_the_peak():
    hold = optax.join_schedules(
        [optax.linear_schedule(0.0, 0.3, 5), lambda step: 0.3, optax.cosine_decay_schedule(0.3, 9)],
        [5, 20],
    )
    starts = {
        21: hold,  # the fall begins with the peak
        11: optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 30),
        1: optax.exponential_decay(0.1, 10, 0.5),
        30: lambda step: 0.1,
    }
    for start, schedule in starts.items():
        assert samx.schedules.start_of_decay(schedule, 30) == start
    found = []
    jax.eval_shape(lambda: found.append(samx.schedules.start_of_decay(hold, 30)))
    assert found == [21]
    rounded = [0.1, np.float32(0.3) * (1 + 2**-23), 0.3, 0.3, 0.2]
    assert samx.schedules.start_of_decay(lambda step: jnp.array(rounded)[step], 5) == 4
    assert samx.schedules.start_of_decay(lambda step: 0.1 if step < 3 else 0.05, 5) == 3
    assert samx.schedules.start_of_decay(lambda step: np.interp(step, [0, 2, 4], [1, 1, 0]), 5) == 3
    with pytest.raises(ValueError, match="must give finite numbers, got inf at step 0"):
        samx.schedules.start_of_decay(lambda step: jnp.where(step == 0, jnp.inf, 1.0), 5)


CONTROLLER = {"window": 4, "num_blocks": 2, "warmup_steps": 4, "variance_gain": 5.0, "key": 1}

EQUAL_PAIRS = {
    "stable_sam of another geometry": (
        lambda: samx.stable_sam(perturbation=geometry.metric_ball(0.5, geometry.magnitude())),
        lambda: renormalized(samx.asam(0.5)),
    ),
    "looksam, alpha 0": (
        lambda: samx.looksam(0.2, alpha=0.0),
        lambda: samx.perturb_if(policies.every(5), sam()),
    ),
    "arsam that always samples": (
        lambda: samx.arsam(0.2, policy=policies.every(1), mixing=lambda age, step: 0.3),
        lambda: mix(sam(), 0.3),
    ),
    "ausam at once": (
        lambda: samx.ausam(0.2, 0.5, 64, warmup_steps=0, ramp_steps=0, high=0.1),
        lambda: samx.ausam(0.2, 0.5, 64, warmup_steps=0, ramp_steps=9, low=0.1, high=0.1),
    ),
    "vsam without reuse": (
        lambda: samx.vsam(0.2, reuse_steps=0, policy=policies.quota(**CONTROLLER)),
        lambda: samx.perturb_if(policies.quota(**CONTROLLER), sam()),
    ),
}


def test_equal_pairs():
    assert_same_updates(EQUAL_PAIRS)


def test_equal_to_optax_contrib_sam():
    ascent_steps = 2
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(MOMENTUM, adversary, ascent_steps + 1, opaque_mode=True)

    @jax.jit
    def step(params, state, batch):
        grad_fn = jax.grad(lambda p: problem.losses_fn(p, batch).mean())
        updates, state = theirs.update(
            grad_fn(params), state, params, grad_fn=lambda p, _: grad_fn(p)
        )
        return optax.apply_updates(params, updates), state

    data, params = problem.make()
    carry = params, theirs.init(params)
    for t in range(STEPS):
        carry = step(*carry, problem.batch_at(data, t))
    ours = trained(lambda: samx.sharpness_aware(geometry.metric_ball(0.1), ascent_steps))
    assert_same({key: x[-1] for key, x in ours.items()}, carry[0])


def test_norm_of_the_sharp_gradient_is_that_of_the_updates():
    updates, state = first_steps()["asam"]
    np.testing.assert_allclose(state.readings.sharp_grad_norm, optax.tree.norm(updates), rtol=1e-12)


def test_weights_are_a_weighted_mean():
    batch, weights = batch_like(), jnp.linspace(0.0, 3.0, problem.BATCH_SIZE)
    tx, (g, params) = samx.sam(0.2), gradient()

    def value_fn(p):
        return jnp.average(problem.losses_fn(p, batch), weights=weights)

    @jax.jit
    def both(params):
        closures = {"losses_fn": problem.losses_fn, "batch": batch, "weights": weights}
        return [
            tx.update(g, tx.init(params), params, **keywords)[0]
            for keywords in ({"value_fn": value_fn}, closures)
        ]

    assert_same(*both(params), atol=1e-12)
