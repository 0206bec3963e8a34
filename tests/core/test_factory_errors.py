"""Wrong arguments of a factory get an error that names the argument."""

import jax
import jax.numpy as jnp
import optax
import problem
import pytest

import samx
from samx import combinations, losses, schedules
from samx.perturbations import (
    layerwise,
    linf_ball,
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
    "no functions": (
        lambda: samx.closure_transformation(3, lambda g, s, p: (g, s)),
        TypeError,
        "`init_fn` must be a function, got 3",
    ),
    "no update": (
        lambda: samx.closure_transformation(lambda p: (), None),
        TypeError,
        "`update_fn` must be a function, got None",
    ),
    "no axis": (lambda: samx.data_parallel(SGD, ()), ValueError, "`axis_name` must name at least"),
    "a class below 0": (lambda: samx.imbalanced_sam([-1]), ValueError, "`tail_classes` must be at"),
    "no scales": (lambda: mup_ball(0.1, None), ValueError, "`scales` must have a number for each"),
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
        "`descend` must be 'sharp' or 'clean', got 'both'",
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
        r"`gamma` must be in \[0, 1\), got 1.5",
    ),
    "nothing of the loss": (
        lambda: samx.wsam(SGD, 0.1, gamma=1),
        ValueError,
        r"`gamma` must be in \[0, 1\), got 1",
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
        "`num_microbatches` must be a Python int, got 0.5",
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
        r"`scales\['b'\]` must be at least 0, got -1.0",
    ),
    "a scale of no number": (
        lambda: samx.mup_sam(0.1, {"a": "wide"}),
        TypeError,
        r"`scales\['a'\]` must be a number, got 'wide'",
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
        "`width` must be above 0, got 0",
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
    "a decay of a traced peak": (
        lambda: jax.jit(lambda peak: schedules.start_of_decay(lambda step: peak * step, 3))(0.1),
        ValueError,
        "start_of_decay: the values of `schedule` must be known, got traced ones; its peak does",
    ),
    "a decay of no number": (
        lambda: schedules.start_of_decay(lambda step: jnp.where(step == 2, jnp.nan, step), 3),
        ValueError,
        "`schedule` must give finite numbers, got nan at step 2",
    ),
    "first step of async_sam": (
        lambda: samx.async_sam(first="base"),
        ValueError,
        "`first` must be 'plain' or 'sam', got 'base'",
    ),
    "no share of the ascent": (
        lambda: samx.async_sam(ascent_share=0.0),
        ValueError,
        r"`ascent_share` must be in \(0, 1\], got 0.0",
    ),
    "more than the whole batch": (
        lambda: samx.async_sam(ascent_share=2),
        ValueError,
        r"`ascent_share` must be in \(0, 1\], got 2",
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
        "`class_counts` must be above 0, got 0",
    ),
    "one count": (lambda: samx.focal_sam(90), TypeError, "`class_counts`.*got 90"),
    "negative gamma of focal_sam": (
        lambda: samx.focal_sam([1, 2], gamma=-1),
        ValueError,
        "`gamma` must be at least 0, got -1",
    ),
    "negative sharpness": (lambda: samx.focal_sam([1], sharpness=-1), ValueError, "`sharpness`"),
    "half a class": (
        lambda: samx.imbalanced_sam([0.5]),
        TypeError,
        "`tail_classes` must be a Python int, got 0.5",
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
        "`period` must be a Python int, got 0.5",
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
        "`sparsity` must be a number, got the function",
    ),
    "drop rate": (
        lambda: samx.dynamic_sparse_sam(drop_rate=1.5, period=1),
        ValueError,
        r"`drop_rate` must be in \[0, 1\], got 1.5",
    ),
    "by what to drop": (
        lambda: samx.dynamic_sparse_sam(period=1, drop="fisher"),
        ValueError,
        "`drop` must be 'gradient', 'weight' or 'random', got 'fisher'",
    ),
    "by what to grow": (
        lambda: samx.dynamic_sparse_sam(period=1, grow=None),
        ValueError,
        "`grow` must be .*got None",
    ),
    "a key of no number": (
        lambda: samx.dynamic_sparse_sam(period=1, key="seed").init(jnp.ones(2)),
        TypeError,
        "`key` must be a seed or a key from jax.random.key, got 'seed'",
    ),
    "a radius to learn from 0": (
        lambda: samx.lets(SGD, 0.0),
        ValueError,
        r"`rho` must be in \[0.0001, 100\], got 0.0",
    ),
    "a schedule to learn": (
        lambda: samx.lets(SGD, lambda t: 0.1),
        TypeError,
        "`rho` must be a number, got the function",
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
