"""Wrong input gets an error that names the argument, what it got and what it wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx import combinations, losses, schedules
from samx.perturbations import (
    constants,
    layerwise,
    linf_ball,
    magnitude,
    metric_ball,
    monge_ball,
    mup_ball,
    on_leaves,
    subtract_ema,
    unnormalized_step,
)

BATCH = jax.eval_shape(lambda: problem.batch_at(problem.make("float32")[0], 0))
SGD = optax.sgd(0.1)

FACTORIES = {
    "negative rho": (lambda: samx.sam(-0.1), ValueError, "`rho` must be at least 0, got -0.1"),
    "not a number": (lambda: samx.sam(float("nan")), ValueError, "`rho`.*nan"),
    "negative rho of asam": (lambda: samx.asam(rho=-1), ValueError, "`rho`.*-1"),
    "negative rho of sampa": (
        lambda: samx.sampa(SGD, -1.0, batch_like=BATCH),
        ValueError,
        "`rho`.*-1",
    ),
    "negative rho of linf_ball": (lambda: linf_ball(-0.1), ValueError, "`rho`"),
    "rho of no number": (lambda: samx.sam("large"), TypeError, "`rho` must be a number.*'large'"),
    "no rho": (lambda: metric_ball(None), TypeError, "`rho` must be a number"),
    "negative eta": (lambda: samx.asam(eta=-0.01), ValueError, "`eta`.*-0.01"),
    "negative eta of a metric": (lambda: layerwise(-1), ValueError, "`eta`"),
    "rho and perturbation": (
        lambda: samx.sam(0.05, perturbation=metric_ball(0.1)),
        ValueError,
        "`rho` together with `perturbation`",
    ),
    "rho and perturbation of sampa": (
        lambda: samx.sampa(SGD, rho=0.1, perturbation=metric_ball(0.1), batch_like=BATCH),
        ValueError,
        "`rho` together with `perturbation`",
    ),
    "a number as perturbation": (
        lambda: samx.sharpness_aware(0.05),
        TypeError,
        "`perturbation` must be an optax transformation, got float",
    ),
    "a number as perturbation of sam": (
        lambda: samx.sam(perturbation=0.05),
        TypeError,
        "`perturbation` must be an optax transformation, got float",
    ),
    "lam": (
        lambda: samx.sampa(SGD, lam=1.5, batch_like=BATCH),
        ValueError,
        r"`lam` must be in \[0, 1\], got 1.5",
    ),
    "form of the pair": (
        lambda: samx.sampa(SGD, batch_like=BATCH, gradients="stacked"),
        ValueError,
        "'vmap' or 'separate', got 'stacked'",
    ),
    "batch_like of unequal lengths": (
        lambda: samx.sampa(SGD, batch_like={"x": jnp.ones((4, 2)), "y": jnp.ones(3)}),
        ValueError,
        r"batch_like.*\(4, 2\).*\(3,\)",
    ),
    "no ascent": (
        lambda: samx.sharpness_aware(metric_ball(0.1), ascent_steps=0),
        ValueError,
        "`ascent_steps` must be at least 1, got 0",
    ),
    "half an ascent": (
        lambda: samx.sharpness_aware(metric_ball(0.1), ascent_steps=1.5),
        TypeError,
        "`ascent_steps` must be a Python int",
    ),
    "rho and perturbation of ausam": (
        lambda: samx.ausam(0.1, perturbation=metric_ball(0.1)),
        ValueError,
        "`rho` together with `perturbation`",
    ),
    "nothing selected": (lambda: samx.ksam(0.1, 0), ValueError, "`num_selected` must be at least"),
    "half an example": (lambda: samx.ksam(0.1, 0.5), TypeError, "`num_selected` must be a Python"),
    "unequal groups": (
        lambda: samx.ksam(0.1, 6, num_groups=4),
        ValueError,
        "`num_selected` must be a multiple of `num_groups`, 4, got 6",
    ),
    "no fraction": (lambda: samx.esam(0.1, 0.5, 0.0), ValueError, r"in \(0, 1\], got 0.0"),
    "more than all": (lambda: samx.ausam(0.1, 1.5), ValueError, r"`fraction` must be in \(0, 1\]"),
    "a traced fraction": (
        lambda: samx.ausam(0.1, jnp.asarray(0.5)),
        TypeError,
        r"`fraction` must be a Python number.*static_args=\('fraction',\)",
    ),
    "no tensor perturbed": (
        lambda: samx.esam(0.1, 0.0),
        ValueError,
        r"`perturbed_fraction` must be in \(0, 1\], got 0.0",
    ),
    "rule of esam": (
        lambda: samx.esam(select="code"),
        ValueError,
        "`select` must be 'exact' or 'strict', got 'code'",
    ),
    "sharp pass of esam": (
        lambda: samx.esam(sharp_pass="half"),
        ValueError,
        "`sharp_pass` must be 'subset' or 'whole', got 'half'",
    ),
    "an empty table": (lambda: samx.ausam(num_examples=0), ValueError, "`num_examples` must be at"),
    "a negative warm-up": (lambda: samx.ausam(warmup_steps=-1), ValueError, "`warmup_steps`"),
    "weights upside down": (
        lambda: samx.ausam(low=0.5, high=0.1),
        ValueError,
        "`high` must be at least 0.5, got 0.1",
    ),
    "negative rho of unnormalized_step": (lambda: unnormalized_step(-1), ValueError, "`rho`.*-1"),
    "negative rho of monge_ball": (lambda: monge_ball(-1), ValueError, "`rho`.*-1"),
    "negative sigma": (lambda: subtract_ema(-1), ValueError, "`sigma` must be at least 0, got -1"),
    "decay of friendly_sam": (
        lambda: samx.friendly_sam(decay=1.5),
        ValueError,
        r"`decay` must be in \[0, 1\], got 1.5",
    ),
    "negative alpha": (lambda: samx.gsam(alpha=-0.1), ValueError, "`alpha`.*-0.1"),
    "which loss to descend": (
        lambda: samx.gsam(descend="both"),
        ValueError,
        "gsam: `descend` must be 'sharp' or 'clean', got 'both'",
    ),
    "a number renormalized": (
        lambda: combinations.renormalized(0.05),
        TypeError,
        "renormalized: `inner` must be an optax transformation, got float",
    ),
    "a wrapped base in a combination": (
        lambda: combinations.surrogate_gap(samx.wsam(SGD, 0.1), 0.4).init(jnp.ones(1)),
        ValueError,
        "`inner` must stand in front of a base, but it wraps one",
    ),
    "an optimizer under a policy": (
        lambda: samx.perturb_if(samx.policies.every(2), samx.lightsam_norm(0.1)).init(jnp.ones(1)),
        ValueError,
        "`inner` must stand in front of a base, but it wraps one",
    ),
    "an optimizer in a combination": (
        lambda: combinations.mix(samx.adasam(0.1), 0.5).init(jnp.ones(1)),
        ValueError,
        "`inner` must stand in front of a base, but it wraps one",
    ),
    "gamma beyond one": (
        lambda: samx.coupled_wsam(gamma=1.5),
        ValueError,
        r"`gamma` must be in \[0, 1\], got 1.5",
    ),
    "nothing of the loss": (
        lambda: samx.wsam(SGD, 0.1, gamma=1),
        ValueError,
        r"`gamma` must be in \[0, 1\): 1 leaves nothing of the loss",
    ),
    "negative learning rate": (
        lambda: samx.wsam(SGD, -0.1),
        ValueError,
        "`learning_rate` must be at least 0, got -0.1",
    ),
    "a number as base": (lambda: samx.wsam(0.1, 0.1), TypeError, "wsam: `base` must be an optax"),
    "normalize and perturbation": (
        lambda: samx.stable_sam(normalize=True, perturbation=metric_ball(0.1)),
        ValueError,
        "`normalize` together with `perturbation`",
    ),
    "no microbatches": (lambda: samx.msam(num_microbatches=0), ValueError, "`num_microbatches`"),
    "half a microbatch": (
        lambda: samx.msam(num_microbatches=0.5),
        TypeError,
        "`num_microbatches` must be a Python int, got float",
    ),
    "how microbatches are taken": (
        lambda: samx.msam(how="loop"),
        ValueError,
        "`how` must be 'scan' or 'vmap', got 'loop'",
    ),
    "no eps": (lambda: samx.lightsam_adagrad(0.1, eps=0), ValueError, "`eps` must be above 0"),
    "negative rho of lightsam": (lambda: samx.lightsam_norm(0.1, -1), ValueError, "`rho`.*-1"),
    "negative rate of lightsam": (lambda: samx.lightsam_norm(-1), ValueError, "`learning_rate`"),
    "b1": (lambda: samx.lightsam_adam(0.1, b1=1.1), ValueError, r"`b1` must be in \[0, 1\]"),
    "b2 of adasam": (lambda: samx.adasam(0.1, b2=-1), ValueError, r"`b2` must be in \[0, 1\]"),
    "a negative scale": (
        lambda: mup_ball(0.1, {"a": 1.0, "b": -1.0}),
        ValueError,
        r"`scales`\['b'\] must be at least 0 and finite, got -1.0",
    ),
    "a scale of no number": (
        lambda: samx.mup_sam(0.1, {"a": "wide"}),
        TypeError,
        r"`scales`\['a'\] must be a Python number, got 'wide'",
    ),
    "normalization": (
        lambda: samx.mup_sam(0.1, {}, normalization="global"),
        ValueError,
        "'decoupled' or 'layerwise', got 'global'",
    ),
    "layer-wise without a width": (
        lambda: samx.mup_sam(0.1, {}, normalization="layerwise"),
        ValueError,
        "`width`, how many times as wide.*must be given with normalization='layerwise'.*got None",
    ),
    "a width for nothing": (
        lambda: samx.mup_sam(0.1, {}, width=2.0),
        ValueError,
        "`width`.*only there, got 2.0",
    ),
    "no width": (
        lambda: samx.mup_sam(0.1, {}, normalization="layerwise", width=0),
        ValueError,
        "`width` must be above 0 and finite, got 0",
    ),
    "following no schedule": (
        lambda: schedules.following(0.1, 0.2, peak_value=0.1),
        TypeError,
        "`learning_rate` must be a schedule, step -> number, got 0.1",
    ),
    "radii upside down": (
        lambda: schedules.following(lambda t: 0.1, 0.1, 0.2, peak_value=0.1),
        ValueError,
        r"`rho_min` must be in \[0, 0.1\], got 0.2",
    ),
    "rates upside down": (
        lambda: schedules.following(lambda t: 0.1, 0.1, peak_value=0.1, end_value=1.0),
        ValueError,
        r"`end_value` must be in \[0, 0.1\], got 1.0",
    ),
    "first step of async_sam": (
        lambda: samx.async_sam(first="base"),
        ValueError,
        "async_sam: `first` must be 'plain' or 'sam', got 'base'",
    ),
    "no share of the ascent": (
        lambda: samx.async_sam(ascent_share=0.0),
        ValueError,
        r"`ascent_share` must be in \(0, 1\], got 0.0",
    ),
    "more than the whole batch": (
        lambda: samx.async_sam(ascent_share=2),
        ValueError,
        r"`ascent_share` must be in \[0, 1\], got 2",
    ),
    "two role axes": (
        lambda: samx.async_sam(role_axis=("role", "data")),
        TypeError,
        r"async_sam: `role_axis` must be the name of an axis, got \('role', 'data'\)",
    ),
    "rho and perturbation of async_sam": (
        lambda: samx.async_sam(0.05, perturbation=metric_ball(0.1)),
        ValueError,
        "async_sam: got `rho` together with `perturbation`",
    ),
    "a class without examples": (
        lambda: samx.focal_sam([90, 0, 10]),
        ValueError,
        r"`class_counts` must be one number above 0 for each class, got \[90, 0, 10\]",
    ),
    "one count": (lambda: samx.focal_sam(90), ValueError, "`class_counts`.*got 90"),
    "negative gamma of focal_sam": (
        lambda: samx.focal_sam([1, 2], gamma=-1),
        ValueError,
        "`gamma` must be at least 0, got -1",
    ),
    "negative sharpness": (lambda: samx.focal_sam([1], sharpness=-1), ValueError, "`sharpness`"),
    "half a class": (
        lambda: samx.imbalanced_sam([0.5]),
        ValueError,
        r"`tail_classes` must be a sequence of classes, integers, got \[0.5\]",
    ),
    "negative weight of the tail": (
        lambda: samx.imbalanced_sam([1], tail_weight=-1),
        ValueError,
        "`tail_weight`",
    ),
    "all and more": (
        lambda: samx.fisher_sparse_sam(sparsity=1.5, period=1),
        ValueError,
        r"`sparsity` must be in \[0, 1\], got 1.5",
    ),
    "no period": (
        lambda: samx.fisher_sparse_sam(period=0),
        ValueError,
        "`period` must be at least",
    ),
    "half a period": (
        lambda: samx.dynamic_sparse_sam(period=0.5),
        TypeError,
        "`period` must be a Python int, got float",
    ),
    "pattern": (
        lambda: samx.fisher_sparse_sam(period=1, pattern="2:4"),
        ValueError,
        r"'unstructured', 'structured' or two integers \(n, m\) with 0 < n <= m, got '2:4'",
    ),
    "more of less": (
        lambda: samx.fisher_sparse_sam(period=1, pattern=(4, 2)),
        ValueError,
        r"0 < n <= m, got \(4, 2\)",
    ),
    "two sparsities": (
        lambda: samx.fisher_sparse_sam(0.1, 0.5, period=1, pattern=(2, 4)),
        ValueError,
        r"`sparsity` together with `pattern` \(2, 4\)",
    ),
    "no microbatch of Fisher information": (
        lambda: samx.fisher_sparse_sam(period=1, num_microbatches=0),
        ValueError,
        "`num_microbatches` must be at least 1, got 0",
    ),
    "rho and perturbation of a mask": (
        lambda: samx.dynamic_sparse_sam(0.1, period=1, perturbation=metric_ball(0.1)),
        ValueError,
        "`rho` together with `perturbation`",
    ),
    "a schedule of the sparsity": (
        lambda: samx.dynamic_sparse_sam(sparsity=lambda t: 0.5, period=1),
        TypeError,
        "`sparsity` must be a number, got a schedule",
    ),
    "drop rate": (
        lambda: samx.dynamic_sparse_sam(drop_rate=1.5, period=1),
        ValueError,
        r"`drop_rate` must be in \[0, 1\], got 1.5",
    ),
    "by what to drop": (
        lambda: samx.dynamic_sparse_sam(period=1, drop="fisher"),
        ValueError,
        "`drop` must be one of .*'gradient', 'weight', 'random'.*got 'fisher'",
    ),
    "by what to grow": (
        lambda: samx.dynamic_sparse_sam(period=1, grow=None),
        ValueError,
        "`grow` must be one of .*got None",
    ),
    "a key of no number": (
        lambda: samx.dynamic_sparse_sam(period=1, key="seed").init(jnp.ones(2)),
        TypeError,
        "dynamic_mask: `key` must be a seed or a key from jax.random.key, got 'seed'",
    ),
    "a radius to learn from 0": (
        lambda: samx.lets(SGD, 0.0),
        ValueError,
        r"`rho` must be in \[0.0001, 100\], got 0.0",
    ),
    "a schedule to learn": (
        lambda: samx.lets(SGD, lambda t: 0.1),
        TypeError,
        "`rho` must be a number, the radius to begin with, got a schedule",
    ),
    "negative rate of lets": (
        lambda: samx.lets(SGD, rho_learning_rate=-1),
        ValueError,
        "`rho_learning_rate`.*-1",
    ),
    "hessian": (
        lambda: samx.lets(SGD, hessian="diagonal"),
        ValueError,
        "`hessian` must be 'exact' or 'diag_sq', got 'diagonal'",
    ),
    "bounds": (
        lambda: samx.lets(SGD, bounds=(1.0, 0.1)),
        ValueError,
        r"`bounds` must be 0 < least <= largest, got \(1.0, 0.1\)",
    ),
    "a number as base of lets": (
        lambda: samx.lets(0.1),
        TypeError,
        "lets: `base` must be an optax",
    ),
    "a number as perturbation of lets": (
        lambda: samx.lets(SGD, perturbation=0.1),
        TypeError,
        "lets: `perturbation` must be an optax",
    ),
    "labels of another shape": (
        lambda: losses.tanh_lower_bound(jnp.ones((4, 3)), jnp.ones((3,), int)),
        ValueError,
        r"tanh_lower_bound: `labels` must have the shape of `logits`.*\(4,\), got \(3,\)",
    ),
    "labels of no class": (
        lambda: losses.log_lower_bound(jnp.ones((4, 3)), jnp.ones(4)),
        TypeError,
        "log_lower_bound: `labels` must be integers, got float32",
    ),
    "negative mu": (
        lambda: losses.log_lower_bound(jnp.ones((4, 3)), jnp.ones(4, int), -1.0),
        ValueError,
        "`mu`",
    ),
    "norm of on_leaves": (
        lambda: on_leaves(metric_ball(0.1), lambda path, leaf: True, norm="none"),
        ValueError,
        "'selected' or 'all', got 'none'",
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name):
    make, error, message = FACTORIES[name]
    with pytest.raises(error, match=message):
        make()


def losses_fn(params, batch):
    return problem.losses_fn(params, batch)


UPDATES = {
    "a vector from value_fn": (
        {"value_fn": lambda p: problem.losses_fn(p, batch())},
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


def batch():
    return problem.batch_at(problem.make("float32")[0], 0)


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
    keywords = {k: batch() if v is True else v for k, v in keywords.items()}
    _, params = problem.make("float32")
    tx = make()
    state = tx.init(params)
    with pytest.raises(error, match=message):
        tx.update(params, state, params, index=np.arange(16), **keywords)
    jax.tree.map(np.testing.assert_array_equal, *map(problem.as_numbers, (state, tx.init(params))))


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
    "nothing held out": (
        lambda: samx.lets(SGD),
        {},
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
    tx, (_, params) = make(), problem.make("float32")
    state = tx.init(params)
    with pytest.raises(error, match=message):
        tx.update(params, state, params, losses_fn=losses_fn, batch=batch(), **keywords)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))


@pytest.mark.parametrize("make", [samx.fisher_sparse_sam, samx.dynamic_sparse_sam])
def test_a_mask_unlike_the_parameters(make):
    tx, (_, params) = make(period=1), problem.make("float32")
    mask = optax.tree.get(tx.init(params), "mask")
    wrong = [mask | {"b1": mask["b1"][:3]}, mask | {"b1": 1.0 * mask["b1"]}, {"W1": mask["W1"]}]
    for other in wrong:
        state = optax.tree.set(tx.init(params), mask=other)
        with pytest.raises(ValueError, match="the state's `mask` must hold booleans shaped like"):
            tx.update(params, state, params, losses_fn=losses_fn, batch=batch())


def test_more_selected_than_there_is():
    _, params = problem.make("float32")
    for tx in (samx.ksam(0.1, 17), samx.ksam(0.1, 20, num_groups=4)):
        with pytest.raises(ValueError, match=r"`num_selected` must be at most the 16 examples"):
            tx.update(params, tx.init(params), params, losses_fn=losses_fn, batch=batch())
    for make in (samx.ksam, samx.esam, samx.ausam):
        tx, closures = make(num_groups=32), {"losses_fn": losses_fn, "index": np.arange(16)}
        with pytest.raises(ValueError, match=r"`num_groups` must divide the 16 examples.*got 32"):
            tx.update(params, tx.init(params), params, batch=batch(), **closures)


def test_batch_unlike_batch_like():
    _, params = problem.make("float32")
    tx = samx.sampa(SGD, batch_like=BATCH)
    shorter = jax.tree.map(lambda x: x[:7], batch())
    with pytest.raises(ValueError, match=r"`batch`.*batch_like.*\(16, 10\).*\(7, 10\).*weights"):
        tx.update(params, tx.init(params), params, losses_fn=losses_fn, batch=shorter)


def test_aux_unlike_aux_like():
    _, params = problem.make("float32")
    tx = samx.sampa(SGD, batch_like=BATCH, aux_like=jnp.ones(3))
    for result in (lambda p, b: losses_fn(p, b), lambda p, b: (losses_fn(p, b), jnp.ones(4))):
        with pytest.raises(ValueError, match=r"`aux`.*aux_like"):
            tx.update(params, tx.init(params), params, losses_fn=result, batch=batch())


def test_aux_unlike_that_of_the_descent():
    _, params = problem.make("float32")
    tx = samx.async_sam(aux_like=jnp.ones(3))

    def update(p):
        return tx.update(p, tx.init(p), p, value_fn=lambda p: (p["b1"].sum(), jnp.ones(4)))

    with pytest.raises(ValueError, match=r"async_sam: `aux`.*aux_like.*\(3,\).*got.*\(4,\)"):
        jax.eval_shape(update, params)


def test_scales_unlike_params():
    _, params = problem.make("float32")
    ball = metric_ball(0.1, constants({"W1": 1.0}))
    with pytest.raises(ValueError, match="`scales` must have the structure of `params`"):
        ball.update(params, ball.init(params), params)


def test_scales_of_other_leaves():
    _, params = problem.make("float32")
    tx = samx.mup_sam(0.1, {"W1": 1.0, "b1": 1.0, "W2": 1.0, "head": 1.0})
    with pytest.raises(ValueError, match=r"`scales`.*`params`.*lacks \[\"\['b2'\]\"\].*head"):
        tx.update(params, tx.init(params), params, value_fn=lambda p: losses_fn(p, batch()).mean())


def test_microbatches_that_do_not_divide():
    _, params = problem.make("float32")
    tx = samx.msam(num_microbatches=3)
    with pytest.raises(ValueError, match=r"must divide the 16 examples of the batch, got 3.*pad"):
        tx.update(params, tx.init(params), params, losses_fn=losses_fn, batch=batch())


def test_no_leaf_selected():
    _, params = problem.make("float32")
    ball = on_leaves(metric_ball(0.1), lambda path, leaf: False)
    with pytest.raises(ValueError, match=r"selects none of the leaves.*W1"):
        ball.update(params, ball.init(params), params)


def test_dtype_failure_at_the_perturbed_point_names_the_way_out():
    w = jnp.ones(3, jnp.bfloat16)

    def strict(p):
        return jax.lax.dot(p, jnp.ones(3, jnp.bfloat16)).astype(jnp.float32) + jax.lax.add(
            p, jnp.ones(3, jnp.bfloat16)
        ).sum().astype(jnp.float32)

    with pytest.raises(TypeError, match="perturb_dtype=None"):
        samx.sam(0.5).update(w, samx.sam().init(w), w, value_fn=strict)
    tx = samx.sam(0.5, perturb_dtype=None)
    updates, _ = tx.update(w, tx.init(w), w, value_fn=strict)
    assert updates.dtype == jnp.bfloat16

    def broken(p):
        raise TypeError("not a matter of precision")

    with pytest.raises(TypeError, match="not a matter of precision"):
        samx.sam().update(jnp.ones(3), samx.sam().init(jnp.ones(3)), jnp.ones(3), value_fn=broken)


def test_opting_out_of_float32_is_visible_in_the_readings():
    w = jnp.full(1000, 100.0, jnp.bfloat16)
    norms = {}
    for dtype in (jnp.float32, None):
        tx = samx.sam(0.05, perturb_dtype=dtype)
        _, state = tx.update(w, tx.init(w), w, value_fn=lambda p: p.sum().astype(jnp.float32))
        norms[dtype] = float(optax.tree.get(state, "perturbation_norm"))
    assert norms[jnp.float32] == pytest.approx(0.05, rel=1e-2)
    assert norms[None] == 0.0


def test_missing_closures_of_different_objectives():
    _, params = problem.make("float32")
    given = {"losses_fn": losses_fn, "batch": batch()}
    samx.check_closures(params, value_fn=lambda p: losses_fn(p, batch()).mean(), **given)
    with pytest.raises(ValueError, match="must be the same objective"):
        samx.check_closures(params, value_fn=lambda p: losses_fn(p, batch()).sum(), **given)
    with pytest.raises(ValueError, match="must be the same objective"):
        samx.check_closures(
            params,
            value_fn=lambda p: losses_fn(p, batch()).mean(),
            weights=jnp.arange(16.0),
            **given,
        )


def test_with_base_hides_samx_keywords():
    seen = []

    def update_fn(updates, state, params=None, **keywords):
        seen.append(keywords)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    _, params = problem.make("float32")
    closure = {"value_fn": lambda p: (losses_fn(p, batch()).mean(), "aux")}
    given = {"losses_fn": losses_fn, "batch": batch(), "index": jnp.arange(16), "mine": 1}
    for tx in (samx.with_base(samx.sam(), base), samx.sampa(base, batch_like=BATCH)):
        seen.clear()
        tx.update(params, tx.init(params), params, value=1.0, **closure, **given)
        assert seen
        for keywords in seen:
            assert set(keywords) == {"value", "value_fn", "mine"}
            assert jnp.shape(keywords["value_fn"](params)) == ()


def test_magnitude_scales_by_name():
    metric = magnitude(0.5)
    params = {"kernel": jnp.zeros(1), "bias": jnp.zeros(1), "in_bias": jnp.zeros(1)}
    scales = metric(params | {"count": jnp.arange(2)})
    assert float(scales["kernel"][0]) == 0.5
    assert (scales["bias"], scales["in_bias"], scales["count"]) == (1.0, 1.0, 1.0)
