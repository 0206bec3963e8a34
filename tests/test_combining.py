"""Any perturbation works in any variant that takes one, with any base or several bases."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from identities import one_layer

import samx
from samx import perturbations as geometry
from samx import policies

ONES = dict.fromkeys(("W1", "b1", "W2", "b2"), 1.0)
BALL = geometry.metric_ball(0.3)
PERTURBATIONS = {
    "metric_ball": geometry.metric_ball(0.3, geometry.magnitude()),
    "layerwise": geometry.metric_ball(0.3, geometry.layerwise()),
    "linf_ball": geometry.linf_ball(0.01),
    "unnormalized_step": geometry.unnormalized_step(0.3),
    "monge_ball": geometry.monge_ball(0.3),
    "mup_ball": geometry.mup_ball(0.3, ONES | {"W1": 2.0}),
    "layer_steps": geometry.layer_steps(0.3),
    "on_leaves": geometry.on_leaves(BALL, lambda path, leaf: leaf.ndim == 2),
    "random_leaves": geometry.random_leaves(BALL, 0.5),
    "centralized_ball": geometry.centralized_ball(0.3),
    "filterwise": geometry.metric_ball(0.3, geometry.filterwise()),
    "z_score_ball": geometry.z_score_ball(0.3, 0.5),
    "loss_rise_ball": geometry.loss_rise_ball(0.1),
    "partly_normalized_step": geometry.partly_normalized_step(0.3, 0.5),
    "gradient_matching_step": geometry.gradient_matching_step(0.3, 0.01),
    "spectral_ball": geometry.spectral_ball(0.3),
    "gaussian_noise": geometry.gaussian_noise(0.1),
    "sphere_noise": geometry.sphere_noise(0.3),
    "dynamic_mask": geometry.dynamic_mask(BALL, period=2),
    "subtract_ema": optax.chain(geometry.subtract_ema(), BALL),
    "a chain of optax's": optax.chain(
        optax.clip_by_global_norm(0.1), geometry.unnormalized_step(0.3)
    ),
}
BASE = optax.sgd(0.1, momentum=0.9)
LIKE = jax.eval_shape(lambda: problem.batch_at(problem.make("float32")[0], 0))


def in_front(variant, **keywords):
    return lambda ball: optax.chain(variant(perturbation=ball, **keywords), BASE)


TAKERS = {
    "sam": in_front(samx.sam),
    "gsam": in_front(samx.gsam),
    "coupled_wsam": in_front(samx.coupled_wsam),
    "wsam": lambda ball: samx.wsam(BASE, 0.1, perturbation=ball),
    "stable_sam": in_front(samx.stable_sam),
    "usam": in_front(samx.usam),
    "friendly_sam": in_front(samx.friendly_sam),
    "msam": in_front(samx.msam),
    "adasam": lambda ball: samx.adasam(0.01, perturbation=ball),
    "bisam": in_front(samx.bisam),
    "async_sam": in_front(samx.async_sam),
    "lsam": lambda ball: samx.lsam(BASE, perturbation=ball),
    "focal_sam": in_front(samx.focal_sam, class_counts=[28, 11, 25]),
    "imbalanced_sam": in_front(samx.imbalanced_sam, tail_classes=[1]),
    "fisher_sparse_sam": in_front(samx.fisher_sparse_sam, period=2),
    "dynamic_sparse_sam": in_front(samx.dynamic_sparse_sam, period=2),
    "sam_on": in_front(samx.sam_on, is_perturbed=lambda path, leaf: leaf.ndim == 2),
    "lets": lambda ball: samx.lets(BASE, perturbation=ball),
    "looksam": in_front(samx.looksam, period=2),
    "ae_sam": in_front(samx.ae_sam),
    "ae_looksam": in_front(samx.ae_looksam),
    "vsam": in_front(samx.vsam),
    "arsam": in_front(samx.arsam, policy=policies.every(2)),
    "ksam": in_front(samx.ksam, num_selected=8),
    "esam": in_front(samx.esam),
    "ausam": in_front(samx.ausam, num_examples=64),
    "sampa": lambda ball: samx.sampa(BASE, perturbation=ball, batch_like=LIKE),
    "momentum_sam": lambda ball: samx.momentum_sam(BASE, perturbation=ball),
    "gnp": in_front(samx.gnp),
    "sagm": in_front(samx.sagm),
    "le_sam": in_front(samx.le_sam),
    "cr_sam": in_front(samx.cr_sam),
    "xsam": in_front(samx.xsam),
    "x_sam": in_front(samx.x_sam),
    "tsam": in_front(samx.tsam),
    "gam": in_front(samx.gam),
    "gam_exact": in_front(samx.gam_exact),
    "lookbehind_sam": lambda ball: samx.lookbehind_sam(BASE, perturbation=ball),
    "sam_polyak": lambda ball: samx.sam_polyak(perturbation=ball),
    "sassha": lambda ball: samx.sassha(0.1, perturbation=ball),
    "msassha": lambda ball: samx.msassha(0.1, perturbation=ball),
    "functional_sam": in_front(samx.functional_sam),
    "logits_sam": in_front(samx.logits_sam),
    "sl_sam": lambda ball: samx.sl_sam(BASE, groups=2, perturbation=ball),
}


def takes_one(value):
    return callable(value) and "perturbation" in inspect.signature(value).parameters


def test_every_variant_that_takes_one_is_here():
    taking = {name for name in samx.__all__ if takes_one(getattr(samx, name))}
    assert taking - {"sharpness_aware"} == set(TAKERS)


@pytest.mark.parametrize("taker", TAKERS)
def test_any_perturbation_in_any_variant(taker):
    data, params = problem.make(np.float32)
    batch = problem.batch_at(data, 0)
    for i, (name, perturbation) in enumerate(PERTURBATIONS.items()):
        if taker != "sam" and (i - list(TAKERS).index(taker)) % len(PERTURBATIONS):
            continue  # SAM is tested with all perturbations, the others with one each
        tx = TAKERS[taker](perturbation)
        state = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(problem.make_step(tx), params, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state), custom_message=name)


# Variants that climb the gradient of the whole batch on their first step.
WHOLE = [
    *("sam", "gsam", "coupled_wsam", "wsam", "stable_sam", "usam", "friendly_sam", "adasam"),
    "looksam",
    *("ae_looksam", "vsam", "arsam", "ausam"),
    *("cr_sam", "x_sam", "sam_polyak", "sassha", "gam", "functional_sam"),
]


def test_it_is_the_one_that_was_given():
    """On a network of one layer, which compiles faster."""
    data, params = problem.make(np.float32)
    batch, params = problem.batch_at(data, 0), {"W": params["W1"][:, :3], "b": params["b2"]}
    mark = optax.chain(optax.clip_by_global_norm(0.1), geometry.unnormalized_step(0.7))

    @jax.jit
    def norms(params):
        norms = {}
        for taker in WHOLE:
            tx = samx.all_readings(TAKERS[taker](mark))
            _, state = problem.make_step(tx, one_layer)(params, tx.init(params), batch)
            norms[taker] = optax.tree.get(state, "perturbation_norm")
        return norms

    assert norms(params) == pytest.approx(dict.fromkeys(WHOLE, 0.07), rel=1e-4)


# Variants that use the losses themselves, or climb without a closure.
WITHOUT_LOSSES = ("msam", "ksam", "esam", "ausam", "focal_sam", "imbalanced_sam")
WITHOUT_LOSSES += ("sampa", "momentum_sam")


@pytest.mark.parametrize("taker", ["sam", "looksam", "bisam", "wsam", "lets", *WITHOUT_LOSSES])
def test_a_fisher_mask_where_losses_are_handed_on(taker):
    data, params = problem.make(np.float32)
    batch = problem.batch_at(data, 0)
    tx = TAKERS[taker](geometry.fisher_mask(BALL, period=2))
    step, state = problem.make_step(tx), jax.eval_shape(tx.init, params)
    if taker in WITHOUT_LOSSES:
        with pytest.raises(ValueError, match=r"fisher_mask: `(losses_fn|batch)` is missing"):
            jax.eval_shape(step, params, state, batch)
        return
    after = jax.eval_shape(step, params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, (params, state))


def test_every_perturbation_climbs_as_it_does_alone():
    data, params = problem.make(np.float32)
    batch = problem.batch_at(data, 0)

    @jax.jit
    def norms(params):
        g = jax.grad(lambda p: problem.losses_fn(p, batch).mean())(params)
        closures = {"losses_fn": problem.losses_fn, "batch": batch}
        pairs = []
        for ball in PERTURBATIONS.values():
            eps, _ = ball.update(g, ball.init(params), params)
            tx = samx.all_readings(samx.sharpness_aware(ball))
            _, state = tx.update(g, tx.init(params), params, **closures)
            pairs.append((optax.tree.norm(eps), state.readings.perturbation_norm))
        return pairs

    for name, (alone, inside) in zip(PERTURBATIONS, norms(params), strict=True):
        assert float(alone) > 0, name
        assert float(inside) == pytest.approx(float(alone), rel=1e-4), name


def test_groups_with_bases_of_their_own(float64):
    """There is one sharp gradient of all parameters; each group's base gets its part of it."""
    labels = {"W1": "body", "b1": "body", "W2": "head", "b2": "head"}
    bases = {"body": optax.sgd(0.1, momentum=0.9), "head": optax.adam(0.01)}
    tx = optax.chain(samx.gsam(0.2), optax.partition(bases, labels))
    found = problem.train(tx, 6)

    data, params = problem.make()
    gsam, states = samx.gsam(0.2), {}
    groups = {name: [k for k in params if labels[k] == name] for name in bases}
    gsam_state = gsam.init(params)
    for name, keys in groups.items():
        states[name] = bases[name].init({k: params[k] for k in keys})

    @jax.jit
    def step(params, gsam_state, states, batch):
        def value_fn(p):
            return problem.losses_fn(p, batch).mean()

        g_s, gsam_state = gsam.update(
            jax.grad(value_fn)(params), gsam_state, params, value_fn=value_fn
        )
        after = {}
        for name, keys in groups.items():
            part = {k: g_s[k] for k in keys}
            updates, after[name] = bases[name].update(part, states[name])
            params = params | {k: params[k] + updates[k] for k in keys}
        return params, gsam_state, after

    for t in range(6):
        batch = problem.batch_at(data, t)
        params, gsam_state, states = step(params, gsam_state, states, batch)
        for k in params:
            np.testing.assert_allclose(found[k][t], params[k], rtol=0, atol=1e-10)


def test_combinations_of_combinations():
    """A renormalized surrogate gap around a microbatched ASAM, on every second step."""
    inner = samx.msam(num_microbatches=2, perturbation=PERTURBATIONS["metric_ball"])
    gap = samx.combinations.surrogate_gap(inner, 0.2)
    tx = samx.perturb_if(policies.every(2), samx.combinations.renormalized(gap))
    data, params = problem.make(np.float32)
    step = jax.jit(problem.make_step(optax.chain(tx, BASE)))
    carry, are_sharp = (params, optax.chain(tx, BASE).init(params)), []
    for t in range(4):
        carry = step(*carry, problem.batch_at(data, t))
        are_sharp.append(bool(optax.tree.get(carry[1], "is_sharp")))
    assert are_sharp == [True, False, True, False]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(carry[0]))
