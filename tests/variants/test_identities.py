"""What every variant turns into at the limits of its hyperparameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import VARIANTS

import samx
from samx import perturbations as geometry
from samx import policies
from samx.combinations import decaying, mix, renormalized, surrogate_gap

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 8
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def assert_same(a, b, atol=1e-13):
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


def ball_step(ball, g, params):
    return ball.update(g, ball.init(params), params)[0]


def gradient():
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    return jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params), params


def batch_like():
    return problem.batch_at(problem.make()[0], 0)


# Also rows like others that have another perturbation or combination.
WITH_BASE_LIMIT = [
    name
    for name, case in VARIANTS.items()
    if case.has_base_limit
    and (case.like is None or name in ("asam", "wsam", "vsam", "friendly_sam", "coupled_wsam"))
]


@pytest.mark.parametrize("name", WITH_BASE_LIMIT)
def test_radius_zero_is_the_base_exactly(name):
    base = problem.train(MOMENTUM, STEPS)
    assert_same(problem.train(VARIANTS[name].build(MOMENTUM, rho=0.0), STEPS), base, atol=0)


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
}


def scales(s):
    return dict.fromkeys(("W1", "b1", "W2", "b2"), s)


EXACTLY_SAM = {
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
}
BALL = geometry.metric_ball(0.2)
EXACTLY_SAM |= {
    "imbalanced_sam, all classes tail": lambda: samx.imbalanced_sam([0, 1, 2], 0.2),
    "focal_sam, all of every class": lambda: samx.focal_sam([5, 1, 2], 0.2, 0.0, 1.0),
    "dynamic_sparse_sam, all entries": lambda: samx.dynamic_sparse_sam(
        sparsity=0.0, drop_rate=0.0, period=2, perturbation=BALL
    ),
    "sam_on, every leaf": lambda: samx.sam_on(0.2, is_perturbed=lambda path, leaf: True),
}
EQUAL_TO_SAM |= EXACTLY_SAM | {
    "look_layer_sam, one length for all": lambda: samx.look_layer_sam(
        0.2, period=1, scaling=lambda w, g, total: 1 / total
    ),
    "msam of one, mapped": lambda: samx.msam(0.2, 1, how="vmap"),
    "mup_sam, one common scale": lambda: samx.mup_sam(0.1, scales(4.0)),
    "mup_sam, layerwise, one common scale": lambda: samx.mup_sam(
        0.1, scales(3.0), normalization="layerwise", width=4.0
    ),
}


@functools.cache
def trained(make, steps=STEPS):
    return problem.train(optax.chain(make(), MOMENTUM), steps)


def sam():
    return samx.sam(0.2)


@pytest.mark.parametrize("name", EQUAL_TO_SAM)
def test_equal_to_sam(name):
    run = trained(EQUAL_TO_SAM[name])
    assert_same(run, trained(sam), atol=0 if name in EXACTLY_SAM else 1e-13)


def test_bisam_that_climbs_its_own_loss_is_sam_exactly():
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
    assert_same(carry[0], {key: x[-1] for key, x in trained(sam).items()}, atol=0)


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


def test_async_sam_that_climbs_without_delay_is_sam_exactly():
    """The state holds the gradient of the same step; with first="sam", step 0 does not need it."""
    fresh = trained_async_sam("none", first="sam", is_fresh=True)
    assert_same(fresh, trained(sam), atol=0)


def test_only_the_first_step_of_async_sam_may_be_sam():
    stale, sams = trained_async_sam("none", first="sam"), trained(sam)
    plain, base = trained_async_sam("none"), problem.train(MOMENTUM, 1)
    for key, steps in sams.items():
        np.testing.assert_array_equal(stale[key][0], steps[0])
        np.testing.assert_array_equal(plain[key][0], base[key][0])
        assert (stale[key][1] != steps[1]).any()


@pytest.mark.parametrize("first", ["plain", "sam"])
def test_async_sam_climbs_the_incoming_gradient_or_the_same_of_a_closure(first):
    given = trained_async_sam("its own", first=first)
    assert_same(given, trained_async_sam("none", first=first), atol=0)


def test_a_fisher_mask_of_all_entries_is_sam_exactly():
    """They are equal from the second step on; on the first step there is no mask."""
    tx = optax.chain(samx.fisher_sparse_sam(sparsity=0.0, period=2, perturbation=BALL), MOMENTUM)
    sam_of = optax.chain(samx.perturb_if(policies.between(1), samx.sam(0.2)), MOMENTUM)
    assert_same(problem.train(tx, STEPS), problem.train(sam_of, STEPS), atol=0)


@pytest.mark.parametrize("c", [0.0, 0.3, 1.2])
def test_focal_sam_with_one_factor_for_all_classes_is_a_mixture(c):
    focal = problem.train(optax.chain(samx.focal_sam([5, 1, 2], 0.2, 0.0, c), MOMENTUM), STEPS)
    mixed = problem.train(optax.chain(mix(samx.sam(0.2), c), MOMENTUM), STEPS)
    assert_same(focal, mixed)
    if c == 0:
        assert_same(focal, problem.train(MOMENTUM, STEPS), atol=0)


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
def test_lets_with_rate_zero_is_sam_exactly(hessian, base):
    """Equal to the last bit if SAM scales a ball of radius 1, as LETS does."""
    lets = problem.train(samx.lets(base, 0.2, 0.0, hessian=hessian), STEPS)
    scaled = optax.chain(geometry.metric_ball(1.0), optax.scale(0.2))
    sam_of = problem.train(optax.chain(samx.sam(perturbation=scaled), base), STEPS)
    assert_same(lets, sam_of, atol=0)
    assert_same(lets, problem.train(optax.chain(samx.sam(0.2), base), STEPS))


@pytest.mark.parametrize("groups", [1, lambda path, leaf: "all"])
@pytest.mark.parametrize("base", [MOMENTUM, optax.adamw(0.01)])
def test_sl_sam_of_every_layer_is_sam_exactly(groups, base):
    run = problem.train(samx.sl_sam(base, 0.2, groups), STEPS)
    assert_same(run, problem.train(optax.chain(sam(), base), STEPS), atol=0)


EQUAL_TO_BASE = {
    "gsam, clean, alpha 0": lambda: samx.gsam(0.2, 0.0, descend="clean"),
    "probability 0": lambda: samx.perturb_if(policies.random(0.0), sam()),
    "never": lambda: samx.perturb_if(policies.between(stop=0), sam()),
    "ae_sam, infinite threshold": lambda: samx.ae_sam(0.2, jnp.inf),
    "ae_looksam, infinite threshold": lambda: samx.ae_looksam(0.2, jnp.inf),
}


@pytest.mark.parametrize("name", EQUAL_TO_BASE)
def test_equal_to_the_base_exactly(name):
    assert_same(trained(EQUAL_TO_BASE[name]), trained(optax.identity), atol=0)


def test_mixed_with_weight_zero_is_the_base():
    assert_same(trained(lambda: mix(sam(), 0.0)), trained(optax.identity))
    assert_same(trained(lambda: samx.coupled_wsam(0.2, 0.0)), trained(optax.identity))
    assert_same(trained(lambda: samx.stable_sam(0.0)), trained(optax.identity), atol=1e-11)


def test_wsam_of_no_weight_is_its_base_exactly():
    for base in (MOMENTUM, optax.adam(0.01)):
        wsam = samx.wsam(base, 0.1, 0.2, gamma=0.0)
        assert_same(problem.train(wsam, STEPS), problem.train(base, STEPS), atol=0)


@pytest.mark.parametrize("gamma", [0.3, 0.5, 0.9])
def test_wsam_with_plain_descent_is_coupled_wsam(gamma):
    base = optax.sgd(0.1)
    wsam = problem.train(samx.wsam(base, 0.1, 0.2, gamma), STEPS)
    coupled = problem.train(optax.chain(samx.coupled_wsam(0.2, gamma), base), STEPS)
    assert_same(wsam, coupled)


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_msam_forms_are_the_same(num_microbatches):
    one, other = (
        trained(lambda how=how: samx.msam(0.2, num_microbatches, how=how))
        for how in ("scan", "vmap")
    )
    assert_same(one, other)


def test_msam_of_every_example_is_the_mean_of_their_steps():
    data, params = problem.make()
    batch, tx, sams = problem.batch_at(data, 0), samx.msam(0.3, 16), samx.sam(0.3)
    step, _ = tx.update(params, tx.init(params), params, losses_fn=problem.losses_fn, batch=batch)

    def alone(example):
        def value_fn(p):
            return problem.losses_fn(p, jax.tree.map(lambda x: x[None], example))[0]

        return sams.update(jax.grad(value_fn)(params), sams.init(params), params, value_fn=value_fn)

    each, _ = jax.vmap(alone)(batch)
    assert_same(step, jax.tree.map(lambda x: x.mean(0), each))


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_msam_weighs_microbatches_by_their_examples(how):
    """The microbatches have different amounts of padding, and one has only padding."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    weights = jnp.array([1, 1, 0, 0, 1, 0, 0, 0, 2, 1, 0, 1, 1, 0, 0, 0.5])
    closures = {"losses_fn": problem.losses_fn, "batch": batch, "weights": weights}
    tx, expected = samx.msam(0.3, 4, how=how), optax.tree.zeros_like(params)
    step, state = tx.update(params, tx.init(params), params, **closures)
    loss = 0.0
    for j in range(3):
        part, own = jax.tree.map(lambda x, j=j: x[j::4], (batch, weights))
        if j == 2:  # this one is all padding: take the fourth instead
            part, own = jax.tree.map(lambda x: x[3::4], (batch, weights))

        def value_fn(p, part=part, own=own):
            return jnp.average(problem.losses_fn(p, part), weights=own)

        value, g = jax.value_and_grad(value_fn)(params)
        g_s, _ = samx.sam(0.3).update(g, samx.sam(0.3).init(params), params, value_fn=value_fn)
        share = own.sum() / weights.sum()
        expected = jax.tree.map(lambda e, x, share=share: e + share * x, expected, g_s)
        loss += share * value
    assert_same(step, expected)
    np.testing.assert_allclose(state.readings.loss, loss, rtol=1e-12)


def test_msam_keeps_the_aux_of_its_clean_passes():
    def with_aux(params, batch):
        aux = {"mean": batch["x"].mean(0), "W1": params["W1"][0], "count": jnp.int32(len(batch))}
        return problem.losses_fn(params, batch), aux

    data, params = problem.make()
    batch = problem.batch_at(data, 0)
    expected = with_aux(params, batch)[1]
    for how in ("scan", "vmap"):
        tx = samx.msam(0.3, 4, how=how, aux_like=expected)
        _, state = tx.update(params, tx.init(params), params, losses_fn=with_aux, batch=batch)
        assert_same(state.aux, expected)


def test_readings_of_msam_are_means_over_the_microbatches():
    data, params = problem.make()
    batch, tx = problem.batch_at(data, 0), samx.msam(0.3, 4)
    closures = {"losses_fn": problem.losses_fn, "batch": batch}
    _, state = tx.update(params, tx.init(params), params, **closures)
    sams = []
    for j in range(4):
        part, sam = jax.tree.map(lambda x, j=j: x[j::4], batch), samx.sam(0.3)

        def value_fn(p, part=part):
            return problem.losses_fn(p, part).mean()

        value, g = jax.value_and_grad(value_fn)(params)
        _, own = sam.update(g, sam.init(params), params, value=value, value_fn=value_fn)
        sams.append(own.readings)
    expected = jax.tree.map(lambda *x: sum(x) / 4, *sams)._replace(gradients_spent=2.0)
    assert_same(jax.tree.map(float, state.readings), jax.tree.map(float, expected))


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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_monge_ball_between_a_ball_and_a_step_that_falls(scale):
    g, params = gradient()
    g = jax.tree.map(lambda x: scale * x, g)
    eps = ball_step(geometry.monge_ball(0.3), g, params)
    length, climbed = optax.tree.norm(eps), optax.tree.vdot(g, eps)
    # The length is measured on the graph of the loss.
    np.testing.assert_allclose(jnp.hypot(length, climbed), 0.3, rtol=1e-8)
    assert climbed > 0


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
    assert_same(one, other, atol=0)


def test_vsam_is_arsam_whose_reuse_ends():
    """They agree over two windows; ARSAM's default never drops h."""
    controller = {"window": 12, "num_blocks": 2, "warmup_steps": 4, "key": 1}

    def arsam(mixing=None):
        return samx.arsam(0.2, policy=policies.quota(**controller), mixing=mixing)

    runs = [
        problem.train(optax.chain(tx, MOMENTUM), 30)
        for tx in (
            samx.vsam(0.2, policy=policies.quota(**controller)),
            arsam(decaying(0.7, last=6)),
            arsam(),
        )
    ]
    assert_same(*runs[:2], atol=0)
    same = [np.array_equal(a, b) for a, b in zip(runs[0]["W1"], runs[2]["W1"], strict=True)]
    assert same == [True] * 10 + [False] * 20  # four steps of warm-up, six of reuse


def test_weight_of_a_reused_part():
    weight = decaying(optax.linear_schedule(1.0, 0.0, 10), last=2)
    steps, ages = jnp.arange(4), jnp.array([0, 1, 2, 3])
    np.testing.assert_allclose(weight(ages, steps), [1.0, 0.9, 0.64, 0.0])


def test_ratio_of_the_part_that_is_kept():
    curvature, w, tx = np.array([1.0, 5.0]), jnp.array([2.0, 1.0]), samx.looksam(0.5)

    @jax.jit
    def update(g, state):
        return tx.update(g, state, w, value_fn=lambda w: w @ (curvature * w) / 2)

    g = curvature * w
    g_s, state = update(g, tx.init(w))
    ratio = jnp.linalg.norm(g_s - (g @ g_s) / (g @ g) * g) / jnp.linalg.norm(g)
    np.testing.assert_allclose(state.part_ratio, ratio, rtol=1e-12)
    _, state = update(2 * g, state)
    np.testing.assert_allclose(state.part_ratio, ratio, rtol=1e-12)  # kept from the last sharp step


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_looksam_reuses_nothing_where_both_gradients_are_parallel(size, dtype):
    """The component orthogonal to `g` is only rounding; scaling would make it as long as `g`."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=size), dtype)
    tx = samx.looksam(0.05, period=5)

    def value_fn(w):
        return 1.7 * (w.astype(jnp.float32) ** 2).sum()

    @jax.jit
    def step(w, state):
        g = jax.grad(value_fn)(w)
        u, state = tx.update(g, state, w, value_fn=value_fn)
        return w - jnp.asarray(0.01, dtype) * u, state, g, u

    state = tx.init(w)
    for t in range(10):
        w, state, g, u = step(w, state)
        assert bool(state.readings.is_sharp) == (t % 5 == 0)
        assert np.array_equal(g, u) == (t % 5 != 0)


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


def test_sampa_forms_are_the_same():
    runs = [
        problem.train(samx.sampa(MOMENTUM, 0.3, batch_like=batch_like(), gradients=form), STEPS)
        for form in ("vmap", "separate")
    ]
    assert_same(*runs)


def test_sampa_starts_with_the_step_of_its_base():
    for lam in (0.0, 0.2, 1.0):
        first = problem.train(samx.sampa(MOMENTUM, 0.3, lam, batch_like=batch_like()), 1)
        assert_same(first, problem.train(MOMENTUM, 1))


def test_sampa_at_lam_one_does_not_see_the_radius():
    runs = [
        problem.train(samx.sampa(MOMENTUM, rho, 1.0, batch_like=batch_like()), STEPS)
        for rho in (0.0, 0.5)
    ]
    assert_same(*runs, atol=0)


def test_sampa_at_lam_zero_is_not_the_published_scripts_degenerate_case():
    """At lam=0 the script is the base optimizer on the previous batch, without a perturbation."""

    def run(rho):
        return problem.train(samx.sampa(MOMENTUM, rho, 0.0, batch_like=batch_like()), STEPS)

    assert_same(run(0.0)["W1"][:2], run(0.5)["W1"][:2], atol=1e-2)
    assert np.abs(run(0.0)["W1"][2:] - run(0.5)["W1"][2:]).max() > 1e-3


def test_sampa_keeps_the_aux_at_y_on_the_current_batch():
    def losses_fn(params, batch):
        return problem.losses_fn(params, batch), {"W1": params["W1"], "x": batch["x"].mean()}

    data, x = problem.make()
    base = optax.sgd(0.1)
    like = jax.eval_shape(lambda: losses_fn(x, batch_like())[1])
    for form in ("vmap", "separate"):
        tx = samx.sampa(base, 0.3, batch_like=batch_like(), aux_like=like, gradients=form)
        params, state = x, tx.init(x)
        for t in range(3):
            y = optax.apply_updates(params, base.update(state.g_y, state.base, params)[0])
            batch = problem.batch_at(data, t)
            updates, state = tx.update(params, state, params, losses_fn=losses_fn, batch=batch)
            aux = optax.tree.get(state, "aux")
            np.testing.assert_allclose(aux["W1"], y["W1"] if t else params["W1"], rtol=1e-12)
            np.testing.assert_allclose(aux["x"], batch["x"].mean(), rtol=1e-12)
            params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_radius_is_the_length_of_the_step(rho):
    g, params = gradient()
    np.testing.assert_allclose(
        optax.tree.norm(ball_step(geometry.metric_ball(rho), g, params)), rho, rtol=1e-10
    )
    metric = geometry.magnitude(0.1)
    eps = ball_step(geometry.metric_ball(rho, metric), g, params)
    relative = jax.tree.map(jnp.divide, eps, metric(params))
    np.testing.assert_allclose(optax.tree.norm(relative), rho, rtol=1e-10)
    corner = ball_step(geometry.linf_ball(rho), g, params)
    assert all(np.all(np.abs(leaf) == rho) for leaf in jax.tree.leaves(corner))


def test_corner_of_an_adaptive_ball():
    g, params = gradient()
    metric = geometry.magnitude(0.1)
    eps = ball_step(geometry.linf_ball(0.3, metric), g, params)
    scales = metric(params)
    assert_same(eps, jax.tree.map(lambda g, t: 0.3 * t * jnp.sign(g), g, scales), atol=1e-15)


def test_layerwise_eta_moves_a_tensor_of_zeros():
    w = {"kernel": jnp.zeros(3)}
    g = {"kernel": jnp.array([3.0, 0.0, 4.0])}
    for eta in (0.0, 0.5):
        eps = ball_step(geometry.metric_ball(1.0, geometry.layerwise(eta)), g, w)
        np.testing.assert_allclose(optax.tree.norm(eps), eta, rtol=1e-10)


def test_half_precision_gradients_have_a_float32_norm():
    g = jnp.full(1000, 1.0234375, jnp.bfloat16)  # the square is halfway between two bfloat16
    eps = ball_step(geometry.metric_ball(0.5), g, g)
    assert eps.dtype == jnp.float32
    np.testing.assert_allclose(optax.tree.norm(eps), 0.5, rtol=1e-5)
    tx = samx.sam(0.5)
    _, state = tx.update(g, tx.init(g), g, value_fn=lambda w: w.astype(jnp.float32).sum())
    np.testing.assert_allclose(state.readings.grad_norm, 1.0234375 * 1000**0.5, rtol=1e-5)


def test_step_goes_up():
    g, params = gradient()
    for ball in (
        geometry.metric_ball(0.1),
        geometry.metric_ball(0.1, geometry.magnitude()),
        geometry.metric_ball(0.1, geometry.layerwise(0.1)),
        geometry.linf_ball(0.1, geometry.magnitude()),
    ):
        assert float(optax.tree.vdot(g, ball_step(ball, g, params))) > 0


def test_step_does_not_depend_on_the_scale_of_the_loss():
    g, params = gradient()
    ball = geometry.metric_ball(0.1, geometry.magnitude())
    larger = jax.tree.map(lambda x: 1e3 * x, g)
    assert_same(ball_step(ball, larger, params), ball_step(ball, g, params), atol=1e-12)


def test_asam_does_not_depend_on_the_scale_of_the_weights():
    """With eta=0, scaling w -> c w and g -> g / c gives ε -> c ε, which is the same function."""
    g, params = gradient()
    ball = geometry.metric_ball(0.5, geometry.magnitude(0.0, is_scaled=lambda path, leaf: True))
    scaled = jax.tree.map(lambda x: 10 * x, params)
    eps = ball_step(ball, jax.tree.map(lambda x: x / 10, g), scaled)
    assert_same(jax.tree.map(lambda x: x / 10, eps), ball_step(ball, g, params), atol=1e-12)


def test_leaves_that_are_not_selected_stay_exactly_where_they_are():
    g, params = gradient()

    def is_weight(path, leaf):
        return leaf.ndim == 2

    whole = ball_step(geometry.metric_ball(0.1), g, params)
    selected = ball_step(geometry.on_leaves(geometry.metric_ball(0.1), is_weight), g, params)
    over_all = ball_step(
        geometry.on_leaves(geometry.metric_ball(0.1), is_weight, norm="all"), g, params
    )
    for eps in (selected, over_all):
        assert not np.any(eps["b1"])
        assert not np.any(eps["b2"])
    np.testing.assert_allclose(optax.tree.norm(selected), 0.1, rtol=1e-10)
    assert_same({k: over_all[k] for k in ("W1", "W2")}, {k: whole[k] for k in ("W1", "W2")})


def test_complex_parameters_climb():
    """JAX's gradient of a complex parameter points along the conjugate of the steepest ascent."""
    target = jnp.array([1.0 + 2.0j, -1.0j])

    def loss(w):
        return jnp.sum(jnp.abs(w - target) ** 2)

    w = jnp.array([0.5 - 0.5j, 2.0 + 1.0j])
    g = jax.grad(loss)(w)
    _, state = samx.sam(0.1).update(g, samx.sam(0.1).init(w), w, value=loss(w), value_fn=loss)
    readings = state.readings
    norm = np.linalg.norm(g)
    np.testing.assert_allclose(readings.sharp_loss - readings.loss, 0.1 * norm + 0.01, rtol=1e-8)
    np.testing.assert_allclose(readings.cosine, 1.0, rtol=1e-8)


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


def test_random_keys_in_the_batch_survive_the_hold():
    """Random keys of examples are `[B]` leaves of the batch; the held batch keeps them."""
    data, params = problem.make()
    batch = problem.batch_at(data, 0) | {"key": jax.random.split(jax.random.key(0), 16)}

    def losses_fn(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (10,)))(batch["key"])
        return problem.losses_fn(params, batch | {"x": batch["x"] + 0.1 * noise})

    for form in ("vmap", "separate"):
        tx = samx.sampa(MOMENTUM, batch_like=batch, gradients=form)
        state = tx.init(params)
        step = jax.jit(lambda p, s, b, tx=tx: tx.update(p, s, p, losses_fn=losses_fn, batch=b))
        for _ in range(2):
            updates, state = step(params, state, batch)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))
        held = optax.tree.get(state, "previous").batch["key"]
        assert jnp.array_equal(jax.random.key_data(held), jax.random.key_data(batch["key"]))
