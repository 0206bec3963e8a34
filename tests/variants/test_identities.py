"""What every variant turns into at the limits of its hyperparameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import MOMENTUM, STEPS, assert_same, batch_like, gradient, sam, trained

import samx
from samx import perturbations as geometry
from samx import policies
from samx.combinations import mix, renormalized, surrogate_gap

pytestmark = pytest.mark.usefixtures("float64")


def scales(s):
    return dict.fromkeys(("W1", "b1", "W2", "b2"), s)


BALL = geometry.metric_ball(0.2)
EQUAL_TO_SAM = {
    "sharpness_aware": lambda: samx.sharpness_aware(geometry.metric_ball(0.2)),
    "perturbation given": lambda: samx.sam(perturbation=geometry.metric_ball(0.2)),
    "constant schedule": lambda: samx.sam(optax.constant_schedule(0.2)),
    "constants of one": lambda: samx.sharpness_aware(
        geometry.metric_ball(0.2, geometry.constants(dict.fromkeys(("W1", "b1", "W2", "b2"), 1.0)))
    ),
    "one common constant": lambda: samx.sharpness_aware(
        geometry.metric_ball(0.1, geometry.constants(dict.fromkeys(("W1", "b1", "W2", "b2"), 2.0)))
    ),
    "asam that scales nothing": lambda: samx.asam(0.2, is_scaled=lambda path, leaf: False),
    "every leaf selected": lambda: samx.sharpness_aware(
        geometry.on_leaves(geometry.metric_ball(0.2), lambda path, leaf: True)
    ),
    "every leaf selected, norm over all": lambda: samx.sharpness_aware(
        geometry.on_leaves(geometry.metric_ball(0.2), lambda path, leaf: True, norm="all")
    ),
    "injected": lambda: optax.inject_hyperparams(samx.sam)(rho=0.2),
    "injected with a perturbation": lambda: optax.inject_hyperparams(
        samx.sam, static_args=("rho", "perturbation")
    )(perturbation=geometry.metric_ball(0.2)),
    "gsam, alpha 0": lambda: samx.gsam(0.2, 0.0),
    "coupled_wsam, gamma 0.5": lambda: samx.coupled_wsam(0.2, 0.5),
    "coupled_wsam, a schedule of gamma 0.5": lambda: samx.coupled_wsam(
        0.2, optax.constant_schedule(0.5)
    ),
    "fisher_sam, eta 0": lambda: samx.fisher_sam(0.2, 0.0),
    "friendly_sam, sigma 0": lambda: samx.friendly_sam(0.2, 0.0),
    "mup_sam, scales of 1": lambda: samx.mup_sam(0.2, scales(1.0)),
    "mup_sam, layerwise, of base width": lambda: samx.mup_sam(
        0.2, scales(1), normalization="layerwise", width=1
    ),
    "msam of one": lambda: samx.msam(0.2, 1),
    "looksam, period 1": lambda: samx.looksam(0.2, period=1),
    "ae_sam, no threshold": lambda: samx.ae_sam(0.2, -jnp.inf),
    "ae_looksam, no threshold": lambda: samx.ae_looksam(0.2, -jnp.inf),
    "every step": lambda: samx.perturb_if(policies.every(1), samx.sam(0.2)),
    "always": lambda: samx.perturb_if(policies.between(), samx.sam(0.2)),
    "probability 1": lambda: samx.perturb_if(policies.random(1.0), samx.sam(0.2)),
    "a schedule of probability 1": lambda: samx.perturb_if(
        policies.random(optax.constant_schedule(1.0)), samx.sam(0.2)
    ),
    "mixed with weight 1": lambda: mix(samx.sam(0.2), 1.0),
    "vsam in its warm-up": lambda: samx.vsam(0.2, policy=policies.quota(warmup_steps=STEPS)),
    "arsam, every step": lambda: samx.arsam(0.2, policy=policies.every(1)),
    "ksam of everything": lambda: samx.ksam(0.2, 16, num_groups=4),
    "esam of everything": lambda: samx.esam(0.2, 1.0, 1.0),
    "esam of everything, strictly": lambda: samx.esam(0.2, 1.0, 0.99, select="strict"),
    "ausam of everything": lambda: samx.ausam(0.2, 1.0, 64, warmup_steps=3),
    "ausam in its warm-up": lambda: samx.ausam(0.2, 0.5, 64, warmup_steps=STEPS),
    "random leaves, all of them": lambda: samx.sharpness_aware(
        geometry.random_leaves(geometry.metric_ball(0.2), 1.0)
    ),
    "imbalanced_sam, all classes tail": lambda: samx.imbalanced_sam([0, 1, 2], 0.2),
    "focal_sam, all of every class": lambda: samx.focal_sam([5, 1, 2], 0.2, 0.0, 1.0),
    "dynamic_sparse_sam, all entries": lambda: samx.dynamic_sparse_sam(
        sparsity=0.0, drop_rate=0.0, period=2, perturbation=BALL
    ),
    "sam_on, every leaf": lambda: samx.sam_on(0.2, is_perturbed=lambda path, leaf: True),
    "look_layer_sam, one length for all": lambda: samx.look_layer_sam(
        0.2, period=1, scaling=lambda w, g, total: 1 / total
    ),
    "msam of one, mapped": lambda: samx.msam(0.2, 1, how="vmap"),
    "mup_sam, one common scale": lambda: samx.mup_sam(0.1, scales(4.0)),
    "mup_sam, layerwise, one common scale": lambda: samx.mup_sam(
        0.1, scales(3.0), normalization="layerwise", width=4.0
    ),
}


@pytest.mark.parametrize("name", EQUAL_TO_SAM)
def test_equal_to_sam(name):
    run = trained(EQUAL_TO_SAM[name])
    assert_same(run, trained(sam))


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
def trained_async_sam(ascent_fn, first="plain", is_fresh=False):
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
        ascent = {"none": None, "its own": own}[ascent_fn]
        return problem.make_step(tx, ascent_fn=ascent)(params, state, batch)

    for t in range(STEPS):
        params, state = step(params, state, problem.batch_at(data, t))
        trajectory.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trajectory)


def test_async_sam_that_climbs_without_delay_is_sam():
    """The state holds the gradient of the same step; with first="sam", step 0 does not need it."""
    fresh = trained_async_sam("none", first="sam", is_fresh=True)
    assert_same(fresh, trained(sam))


def test_only_the_first_step_of_async_sam_may_be_sam():
    stale, sams = trained_async_sam("none", first="sam"), trained(sam)
    plain, base = trained_async_sam("none"), problem.train(MOMENTUM, 1)
    for key, steps in sams.items():
        np.testing.assert_allclose(stale[key][0], steps[0], rtol=1e-12)
        np.testing.assert_allclose(plain[key][0], base[key][0], rtol=1e-12)
        assert np.abs(stale[key][1] - steps[1]).max() > 1e-6


@pytest.mark.parametrize("first", ["plain", "sam"])
def test_async_sam_climbs_the_incoming_gradient_or_the_same_of_a_closure(first):
    given = trained_async_sam("its own", first=first)
    assert_same(given, trained_async_sam("none", first=first))


def test_a_fisher_mask_of_all_entries_is_sam():
    """They are equal from the second step on; on the first step there is no mask."""
    tx = optax.chain(samx.fisher_sparse_sam(sparsity=0.0, period=2, perturbation=BALL), MOMENTUM)
    sam_of = optax.chain(samx.perturb_if(policies.between(1), samx.sam(0.2)), MOMENTUM)
    assert_same(problem.train(tx, STEPS), problem.train(sam_of, STEPS))


@pytest.mark.parametrize("c", [0.0, 0.3, 1.2])
def test_focal_sam_with_one_factor_for_all_classes_is_a_mixture(c):
    focal = problem.train(optax.chain(samx.focal_sam([5, 1, 2], 0.2, 0.0, c), MOMENTUM), STEPS)
    mixed = problem.train(optax.chain(mix(samx.sam(0.2), c), MOMENTUM), STEPS)
    assert_same(focal, mixed)
    if c == 0:
        assert_same(focal, problem.train(MOMENTUM, STEPS))


def test_focal_sam_with_factors_of_0_and_1_is_imbalanced_sam():
    # shares 1/2, 0 and 1/2; with γ = 60 the factors are about 0, 1 and 0
    counts = [10**6, 1, 10**6]
    focal = samx.focal_sam(counts, 0.2, 60.0, 1.0)
    imbalanced = samx.imbalanced_sam([1], 0.2)
    assert_same(
        problem.train(optax.chain(focal, MOMENTUM), STEPS),
        problem.train(optax.chain(imbalanced, MOMENTUM), STEPS),
        atol=1e-3,
    )


@pytest.mark.parametrize("hessian", ["exact", "diag_sq"])
@pytest.mark.parametrize("base", [MOMENTUM, optax.adamw(0.01)], ids=["momentum", "adamw"])
def test_lets_with_rate_zero_is_sam(hessian, base):
    lets = problem.train(samx.lets(base, 0.2, 0.0, hessian=hessian), STEPS)
    scaled = optax.chain(geometry.metric_ball(1.0), optax.scale(0.2))
    sam_of = problem.train(optax.chain(samx.sam(perturbation=scaled), base), STEPS)
    assert_same(lets, sam_of)
    assert_same(lets, problem.train(optax.chain(samx.sam(0.2), base), STEPS))


@pytest.mark.parametrize("groups", [1, lambda path, leaf: "all"])
@pytest.mark.parametrize("base", [MOMENTUM, optax.adamw(0.01)])
def test_sl_sam_of_every_layer_is_sam(groups, base):
    run = problem.train(samx.sl_sam(base, 0.2, groups), STEPS)
    assert_same(run, problem.train(optax.chain(sam(), base), STEPS))


EQUAL_TO_BASE = {
    "gsam, clean, alpha 0": lambda: samx.gsam(0.2, 0.0, descend="clean"),
    "probability 0": lambda: samx.perturb_if(policies.random(0.0), sam()),
    "never": lambda: samx.perturb_if(policies.between(stop=0), sam()),
    "ae_sam, infinite threshold": lambda: samx.ae_sam(0.2, jnp.inf),
    "ae_looksam, infinite threshold": lambda: samx.ae_looksam(0.2, jnp.inf),
}


@pytest.mark.parametrize("name", EQUAL_TO_BASE)
def test_equal_to_the_base(name):
    assert_same(trained(EQUAL_TO_BASE[name]), trained(optax.identity))


def test_mixed_with_weight_zero_is_the_base():
    assert_same(trained(lambda: mix(sam(), 0.0)), trained(optax.identity))
    assert_same(trained(lambda: samx.coupled_wsam(0.2, 0.0)), trained(optax.identity))
    assert_same(trained(lambda: samx.stable_sam(0.0)), trained(optax.identity), atol=1e-11)


def test_wsam_of_no_weight_is_its_base():
    for base in (MOMENTUM, optax.adam(0.01)):
        wsam = samx.wsam(base, 0.1, 0.2, gamma=0.0)
        assert_same(problem.train(wsam, STEPS), problem.train(base, STEPS))


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.9])
def test_wsam_with_plain_descent_is_coupled_wsam(gamma):
    base = optax.sgd(0.1)
    wsam = problem.train(samx.wsam(base, 0.1, 0.2, gamma), STEPS)
    coupled = problem.train(optax.chain(samx.coupled_wsam(0.2, gamma), base), STEPS)
    assert_same(wsam, coupled)


def test_lightsam_of_no_radius_is_adagrad():
    adagrad = optax.chain(
        optax.scale_by_rss(initial_accumulator_value=0.01, eps=0.0), optax.scale(-0.1)
    )
    lightsam = samx.lightsam_adagrad(0.1, 0.0, eps=0.1)
    assert_same(problem.train(lightsam, STEPS), problem.train(adagrad, STEPS))


def test_adasam_is_sam_with_amsgrad_but_for_where_it_starts():
    amsgrad = optax.amsgrad(0.01, eps=0.0, bias_correction_mu=False, bias_correction_nu=False)
    expected = problem.train(optax.chain(sam(), amsgrad), STEPS)
    assert_same(problem.train(samx.adasam(0.01, 0.2), STEPS), expected, atol=1e-5)


def test_renormalized_gradients_are_as_long_as_the_gradient():
    g, params = gradient()
    batch, tx = batch_like(), samx.stable_sam(5.0)
    updates, state = tx.update(g, tx.init(params), params, losses_fn=problem.losses_fn, batch=batch)
    np.testing.assert_allclose(optax.tree.norm(updates), optax.tree.norm(g), rtol=1e-10)
    sharp_norm = float(optax.tree.get(state, "sharp_grad_norm"))
    # Before, the sharp gradient had another length.
    assert abs(sharp_norm - float(optax.tree.norm(g))) > 1e-3


def test_the_gap_falls_across_the_descended_gradient():
    g, params = gradient()
    closures = {"losses_fn": problem.losses_fn, "batch": batch_like()}

    def updates_of(tx):
        return tx.update(g, tx.init(params), params, **closures)[0]

    g_s = updates_of(samx.sam(0.5))
    for descend, kept, sign in (("sharp", g_s, -1), ("clean", g, 1)):
        taken = optax.tree.sub(updates_of(samx.gsam(0.5, 0.7, descend=descend)), kept)
        other = g if descend == "sharp" else g_s
        assert abs(float(optax.tree.vdot(taken, kept))) < 1e-15
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


CONTROLLER = {"window": 4, "num_blocks": 2, "warmup_steps": 4, "variance_gain": 5.0, "key": 1}

EQUAL_PAIRS = {
    "gsam is the gap of sam": (
        lambda: samx.gsam(0.2, 0.3),
        lambda: surrogate_gap(sam(), 0.3),
    ),
    "coupled_wsam mixes": (lambda: samx.coupled_wsam(0.2, 0.75), lambda: mix(sam(), 3.0)),
    "stable_sam of another geometry": (
        lambda: samx.stable_sam(perturbation=geometry.metric_ball(0.5, geometry.magnitude())),
        lambda: renormalized(samx.asam(0.5)),
    ),
    "looksam, alpha 0": (
        lambda: samx.looksam(0.2, alpha=0.0),
        lambda: samx.perturb_if(policies.every(5), sam()),
    ),
    "ae_looksam, alpha 0": (
        lambda: samx.ae_looksam(0.2, 0.5, alpha=0.0),
        lambda: samx.ae_sam(0.2, 0.5),
    ),
    "ae_sam": (
        lambda: samx.ae_sam(0.2, 0.5, 0.8),
        lambda: samx.perturb_if(policies.squared_norm(0.5, 0.8), sam()),
    ),
    "arsam that always samples": (
        lambda: samx.arsam(0.2, policy=policies.every(1), mixing=lambda age, step: 0.3),
        lambda: mix(sam(), 0.3),
    ),
    "esam of all tensors, and of no radius": (
        lambda: samx.esam(0.0, 0.5, 1.0),
        optax.identity,
    ),
    "ksam in groups of one": (lambda: samx.ksam(0.2, 16, num_groups=16), sam),
    "ausam at once": (
        lambda: samx.ausam(0.2, 0.5, 64, warmup_steps=0, ramp_steps=0, high=0.1),
        lambda: samx.ausam(0.2, 0.5, 64, warmup_steps=0, ramp_steps=9, low=0.1, high=0.1),
    ),
    "vsam without reuse": (
        lambda: samx.vsam(0.2, reuse_steps=0, policy=policies.quota(**CONTROLLER)),
        lambda: samx.perturb_if(policies.quota(**CONTROLLER), sam()),
    ),
}


@pytest.mark.parametrize("name", EQUAL_PAIRS)
def test_equal_pairs(name):
    one, other = (problem.train(optax.chain(make(), MOMENTUM), 14) for make in EQUAL_PAIRS[name])
    assert_same(one, other)


@pytest.mark.parametrize("ascent_steps", [1, 2, 4])
def test_equal_to_optax_contrib_sam(ascent_steps):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(MOMENTUM, adversary, ascent_steps + 1, opaque_mode=True)
    ours = optax.chain(samx.sharpness_aware(geometry.metric_ball(0.1), ascent_steps), MOMENTUM)
    data, params = problem.make()
    state = theirs.init(params)
    for t in range(STEPS):
        batch = problem.batch_at(data, t)
        grad_fn = jax.grad(lambda p, batch=batch: problem.losses_fn(p, batch).mean())
        updates, state = theirs.update(
            grad_fn(params), state, params, grad_fn=lambda p, _, grad_fn=grad_fn: grad_fn(p)
        )
        params = optax.apply_updates(params, updates)
    last = jax.tree.map(lambda x: x[-1], problem.train(ours, STEPS))
    assert_same(last, params, atol=1e-11)


def test_norm_of_the_sharp_gradient_is_that_of_the_updates():
    g, params = gradient()
    batch, tx = batch_like(), samx.asam(0.5)
    updates, state = tx.update(g, tx.init(params), params, losses_fn=problem.losses_fn, batch=batch)
    np.testing.assert_allclose(state.readings.sharp_grad_norm, optax.tree.norm(updates), rtol=1e-12)


def test_weights_are_a_weighted_mean():
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    weights = jnp.linspace(0.0, 3.0, problem.BATCH_SIZE)
    grads = jax.grad(lambda p: jnp.average(problem.losses_fn(p, batch), weights=weights))(params)
    tx = samx.sam(0.2)
    explicit, _ = tx.update(
        grads,
        tx.init(params),
        params,
        value_fn=lambda p: jnp.average(problem.losses_fn(p, batch), weights=weights),
    )
    derived, _ = tx.update(
        grads,
        tx.init(params),
        params,
        losses_fn=problem.losses_fn,
        batch=batch,
        weights=weights,
    )
    assert_same(derived, explicit)
