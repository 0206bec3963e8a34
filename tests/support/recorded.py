"""Recorded runs of the authors' own code: how they were made, and that we take their steps.

`Run` names an entry of the catalog and the arguments of its factory, so that a row of the table can
take the run as its oracle.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest

import samx
from samx import losses, policies, schedules
from samx.perturbations import magnitude, metric_ball, sphere_noise

SGD, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
ADAMW = optax.adamw(0.01, weight_decay=0.01)
COSINE = (0.1, 0.075, 0.025)  # one learning rate for each epoch of four batches


@dataclass(frozen=True)
class Run:
    """What a recorded run was made with.

    Attributes:
        entry: Name of the entry in the catalog; `None` for the base alone.
        base: The base; `None` for variants that are the optimizer.
        arguments: Arguments of the entry's factory, without the base.
        make: Returns the data and the parameters.
        further: `batch -> keywords` of `update`, beyond those that every row gets.
        tolerance: The largest difference; `None` for what the catalog admits to.
    """

    entry: str | None
    base: optax.GradientTransformation | None
    arguments: dict[str, Any]
    make: Callable[[], Any] = problem.make
    further: Callable[[Any], dict[str, Any]] = lambda batch: {}
    tolerance: float | None = None


def nothing_further(batch):
    return {}


def run(entry, base, *, make=problem.make, further=nothing_further, tolerance=None, **arguments):
    return Run(entry, base, arguments, make, further, tolerance)


def cosine(step):
    return jnp.asarray(COSINE)[step // 4]


def falling_rate(step):
    return 0.1 + (0.001 - 0.1) * jnp.asarray(step, float) / 12


def decayed(base, weight_decay=5e-4):
    return optax.chain(optax.add_decayed_weights(weight_decay), base)


def normalization_only(path, leaf):
    return path[-1].key in ("g", "c")


def second_layer(path, leaf):
    return path[-1].key.endswith("2")


def falling(total_steps):
    return optax.linear_schedule(1.0, -1.0, total_steps)


def half_by_epochs(step):
    """The largest weight of a draw in the authors' loop: it rises once per epoch of 4 batches."""
    return 0.1 + 0.4 * (step // 4) / 30 + 1e-9


TWICE_AS_WIDE = {"W1": 2.0, "b1": 2.0, "W2": 0.5, "b2": 1.0}


def contiguous_as_strided(num_microbatches=4):
    """Reorder every batch so that samx's microbatches are those of the recorded run."""
    data, params = problem.make()
    shape = (-1, num_microbatches, problem.BATCH_SIZE // num_microbatches)
    order = np.arange(len(data["y"])).reshape(shape).swapaxes(1, 2).ravel()
    return jax.tree.map(lambda x: x[order], data), params


def climbs(bound):
    """Make keywords with the other loss that BiSAM climbs."""

    def further(batch):
        def ascent_fn(params):
            return bound(problem.logits_of(params, batch), batch["y"]).mean()

        return {"ascent_fn": ascent_fn}

    return further


def climbs_first(size):
    """Make keywords with AsyncSAM's ascent loss, on the first examples of the batch."""

    def further(batch):
        part = jax.tree.map(lambda x: x[:size], batch)
        return {"ascent_fn": lambda params: problem.losses_fn(params, part).mean()}

    return further


def climbs_incoming(batch):
    """Make AsyncSAM climb the incoming gradient."""
    return {"ascent_fn": None}


BATCH_LIKE = {
    "x": jax.ShapeDtypeStruct((problem.BATCH_SIZE, 10), np.float64),
    "y": jax.ShapeDtypeStruct((problem.BATCH_SIZE,), np.int64),
}


def with_decay(batch):
    """Make GNP's losses, in which the weight decay of its authors is a part of both passes."""

    def losses_fn(params, batch):
        return problem.losses_fn(params, batch) + 0.5 * 1e-3 * optax.tree.norm(params, squared=True)

    return {"losses_fn": losses_fn}


def warm_factor(step):
    """The factor of bSAM's recorded learning rate: a warm-up of 3 steps, then a cosine."""
    factors = jnp.asarray(problem.load("bsam__m2_lr0.2_rho0.05_b2_0.99_schedule")[0]["lrfactor"])
    return 0.2 * factors[step]


CLIPPED = optax.chain(optax.clip_by_global_norm(5.0), MOMENTUM)
NESTEROV = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.1, momentum=0.9, nesterov=True))
FULL_MAGNITUDE = magnitude(0.0, is_scaled=lambda path, leaf: True)
BSAM = {"num_examples": 64, "prior_precision": 0.64, "rho": 0.05}
ARWP = {"sigma": 0.01, "eta": 1.0, "decay": 0.9}
FOLLOWING = {"peak_value": 0.1, "end_value": 0.001}
QUOTA = {"num_blocks": 2, "warmup_steps": 5, "is_measured": second_layer}
RECORDED = {
    "base__sgd": run(None, SGD),
    "base__sgdm": run(None, MOMENTUM),
    "base__adamw": run(None, ADAMW),
    "sam__sgd_rho0.05": run("sam", SGD),
    "sam__sgdm_rho0.5": run("sam", MOMENTUM, rho=0.5),
    "sam__adamw_rho0.05": run("sam", ADAMW, rho=0.05),
    "asam__sgdm_rho0.5_eta0.01": run("asam", MOMENTUM),
    "samon__ln_sgdm": run(
        "sam_on", MOMENTUM, make=problem.make_layer_norm, is_perturbed=normalization_only
    ),
    "bisam_log__sgdm": run("bisam", MOMENTUM, further=climbs(losses.log_lower_bound)),
    "bisam_tanh__sgdm_mu10": run("bisam", MOMENTUM, further=climbs(losses.tanh_lower_bound)),
    "focalsam__sgdm": run("focal_sam", MOMENTUM, class_counts=[28, 11, 25]),
    "imbsam__sgdm": run("imbalanced_sam", MOMENTUM, tail_classes=[1], rho=0.1, tail_weight=2.0),
    "ssamf__sgdm_cleanfisher_n64": run("fisher_sparse_sam", MOMENTUM, rho=0.1, period=4),
    "ssamf2__nm_2of4": run("fisher_sparse_sam", MOMENTUM, rho=0.1, period=4, pattern=(2, 4)),
    "ssamd__sgdm_s0.2_dr0.3_growgrad": run(
        "dynamic_sparse_sam",
        MOMENTUM,
        rho=0.1,
        sparsity=0.2,
        drop_rate=optax.cosine_decay_schedule(0.3, 12),
        period=4,
        grow="gradient",
    ),
    "sampa__sgd_lam0.2_rho0.1": run("sampa", SGD, batch_like=BATCH_LIKE),
    "sampa__sgdm_lam0.2_rho0.1": run("sampa", MOMENTUM, batch_like=BATCH_LIKE, rho=0.1, lam=0.2),
    "sampa__sgdm_wd5e-4_cosine_lam0.2_rho0.1": run(
        "sampa", decayed(optax.sgd(cosine, momentum=0.9)), batch_like=BATCH_LIKE
    ),
    "looksam_becker__sgdm_k5_a0.7_rho0.05": run(
        "looksam",
        MOMENTUM,
        period=5,
        alpha=0.7,  # their projection divides by ‖g‖² + 1e-12
    ),
    "ref_ksam__sgdm_k8_rho0.05": run("ksam", MOMENTUM, rho=0.05, num_selected=8, num_groups=1),
    "esam__sgdm_rho0.1_beta0.5_gamma0.5": run(
        "esam",
        MOMENTUM,
        perturbed_fraction=0.5,
        selected_fraction=0.5,
        select="strict",
        num_groups=1,
        perturbation=metric_ball(0.1, norm_eps=1e-7),
    ),
    "ausam__sgdm_rho0.1_alpha0.5": run(
        "ausam",
        MOMENTUM,
        rho=0.1,
        fraction=0.5,
        num_examples=64,
        warmup_steps=None,
        ramp_steps=0,
        high=half_by_epochs,
        num_groups=1,
    ),
    "momentumsam__sgdm_rho0.3": run("momentum_sam", MOMENTUM, rho=0.3),
    "momentumsam__adamw_rho0.3": run("momentum_sam", optax.adam(0.01), rho=0.3),
    "asyncsam_INFERRED__sgd_rho0.05_b16": run("async_sam", SGD, rho=0.05, further=climbs_incoming),
    "asyncsam_INFERRED__sgdm_rho0.1_b8": run(
        "async_sam", MOMENTUM, rho=0.1, further=climbs_first(8)
    ),
    "gsam__sgdm_alpha0.4_rho0.1": run("gsam", MOMENTUM, rho=0.1, alpha=0.4),
    "gsam__sgdm_alpha0.4_linearlr": run(
        "gsam",
        optax.sgd(falling_rate, momentum=0.9),
        rho=schedules.following(falling_rate, 0.2, 0.02, **FOLLOWING),
        alpha=0.4,
    ),
    "wsam__sgdm_rho0.05_gamma0.9": run("wsam", MOMENTUM, learning_rate=0.1),
    "wsam__sgdm_rho0.05_gamma0.9_coupled": run("coupled_wsam", MOMENTUM),
    "stableusam__sgdm": run("stable_sam", MOMENTUM),
    "stablesam__sgdm": run("stable_sam", MOMENTUM, normalize=True),
    "usam__sgdm": run("usam", MOMENTUM),
    "fsam__sgdm": run("friendly_sam", MOMENTUM),
    "fsam__sgdm_rho0.1_sigma0.5_lmbda0.95": run(
        "friendly_sam", MOMENTUM, rho=0.1, sigma=0.5, decay=0.95
    ),
    "fishersam_thirdparty__sgd_gamma0.1_eta1.0": run("fisher_sam", SGD, rho=0.1, eta=1.0),
    "mongesam__sgdm": run("monge_sam", MOMENTUM),
    "mup2__dp_n2_sgdm_lr0.1_nolrscale": run("mup_sam", MOMENTUM, rho=0.05, scales=TWICE_AS_WIDE),
    "msam__sgdm_k4": run("msam", MOMENTUM, make=contiguous_as_strided, rho=0.1, num_microbatches=4),
    "lightsam1__eta0.5_rho0.05": run("lightsam_norm", None, learning_rate=0.5, rho=0.05, eps=1e-8),
    "lightsam2__eta0.1_rho0.01": run(
        "lightsam_adagrad", None, learning_rate=0.1, rho=0.01, eps=1e-8
    ),
    "lightsam3__eta0.01_rho0.01": run(
        "lightsam_adam", None, learning_rate=0.01, rho=0.01, eps=1e-8
    ),
    "adasam__gamma0.01_rho0.05": run("adasam", None, learning_rate=0.01, rho=0.05, eps=1e-8),
    "ref_aesam__sgdm_l-1_l1_rho0.05_48steps": run(
        "ae_sam", MOMENTUM, rho=0.05, threshold=falling(48)
    ),
    "ref_aelooksam__sgdm_l-1_l1_rho0.05": run(
        "ae_looksam", MOMENTUM, rho=0.05, threshold=falling(12), alpha=0.7
    ),
    "vsam__sgdm_rho0.05_win4x2_hp0.13": run(
        "vsam", MOMENTUM, rho=0.05, policy=policies.quota(4, **QUOTA)
    ),
    "mollenhoffsam__m1_lr0.1_wd1e-2": run(
        "msam", decayed(MOMENTUM, 0.01), rho=0.05, num_microbatches=1
    ),
    "gcsam__sgd_rho0.05": run("gcsam", SGD),
    "gcsam__sgdm_rho0.2": run("gcsam", MOMENTUM, rho=0.2),
    "zsharp__sgd_rho0.05_alpha0.95": run("zsharp", SGD),
    "zsharp__sgdm_rho0.05_alpha0.95": run("zsharp", MOMENTUM),
    "lesam__sgd_sigma0.02_nocap": run("le_sam", SGD, sigma=0.02, rho_max=None),
    "lesam__sgdm_sigma0.05_rhomax0.1": run("le_sam", MOMENTUM, sigma=0.05, rho_max=0.1),
    "unifiedsam__sgd_rho0.1_lambda0.5": run("unified_sam", SGD, rho=0.1, lam=0.5),
    "unifiedsam__sgdm_rho0.3_lambda0.0": run("unified_sam", MOMENTUM, rho=0.3, lam=0.0),
    "sagm__sgd_alpha0.001_rho0.05": run("sagm", SGD),
    "sagm__sgdm_alpha0.1_rho0.05": run("sagm", MOMENTUM, alpha=0.1),
    "gnp__sgdm_r0.1_a0.8_raw": run("gnp", CLIPPED),
    "gnp__sgdm_r0.1_a0.8_raw_warmlambda2": run(  # its authors' code counts in float32
        "gnp", CLIPPED, alpha=optax.linear_schedule(0.0, 0.8, 8), tolerance=1e-8
    ),
    "gnp__nesterov_r0.1_a0.8_default": run("gnp", NESTEROV, further=with_decay, clean="unit"),
    "eigensam__sgd_rho0.05_alpha0.2_freq3_ep1": run(
        "eigen_sam", SGD, every=3, before_refresh="usam"
    ),
    "eigensam__sgdm_rho0.05_alpha0.2_freq3_ep1": run(
        "eigen_sam", MOMENTUM, every=3, before_refresh="usam"
    ),
    "ref_spectralsam__sgdm_rho0.05_vecl2_perleaf": run("spectral_sam", MOMENTUM),
    "lpfsgd__sgd_std0.01_M1": run("lpf_sgd", SGD, sigma=0.01),
    "ref_randomsam__sgdm_sphere0.5": run("lpf_sgd", MOMENTUM, noise=sphere_noise(0.5)),
    "rwp__sgd_alpha0.5_gamma0.01": run("rwp", SGD, make=partial(contiguous_as_strided, 2)),
    "arwp__sgd_std0.01_eta1.0_beta0.9": run("arwp", SGD, **ARWP),
    "marwp__sgd_sigma0.01_eta1.0_beta0.9_lambda0.5": run(
        "marwp", SGD, make=partial(contiguous_as_strided, 2), **ARWP
    ),
    "saf__sgd_lam0.3_T5.0_start0_minus1": run(
        "saf",
        SGD,
        **{"num_examples": 64, "logits_like": np.zeros(3), "steps_per_epoch": None},
        **{"lag": 1, "start": 0, "end": 300, "temperature": 5.0},
    ),
    "mesa__sgd_lam0.3_T5.0_start0_end360_decay0.9": run(
        "mesa", SGD, lam=0.3, decay=0.9, steps_per_epoch=4, start=0, end=360
    ),
    "bsam__m1_lr0.1_rho0.05": run("bsam", None, learning_rate=0.1, num_microbatches=1, **BSAM),
    "bsam__m2_lr0.2_rho0.05_b2_0.99_schedule": run(
        "bsam",
        None,
        make=partial(contiguous_as_strided, 2),
        learning_rate=warm_factor,
        b1=0.8,
        b2=0.99,
        num_microbatches=2,
        **BSAM,
    ),
    "bsam_thirdparty_patched__m1_lr0.05_rho0.05_s1.0": run(
        "bsam", None, learning_rate=0.05, num_microbatches=1, **BSAM | {"prior_precision": 0.064}
    ),
}
RECORDED |= {
    "ref_functionalsam__sgdm_rho0.1": run("functional_sam", MOMENTUM, rho=0.1),
    "logitssam__sgd_rho0.05": run("logits_sam", SGD, rho=0.05),
    "logitssam__sgdm_rho0.5": run("logits_sam", MOMENTUM, rho=0.5),
}
SEARCH = {"alpha_max": 2.0, "alpha_step": 0.1}
RECORDED |= {
    "crsam__sgd_rho0.1_gamma0.1_beta0.01": run("cr_sam", SGD),
    "crsam__sgdm_rho0.1_gamma0.1_beta0.01": run("cr_sam", MOMENTUM),
    "xsam_slerp__sgd_k1_rho0.15_dynamic_rhomax0.3_amax2.0_d0.1": run(
        "xsam", SGD, every=4, **SEARCH
    ),
    "xsam_slerp__sgdm_k1_rho0.1_alpha0.4": run("xsam", MOMENTUM, rho=0.1, alpha=0.4, **SEARCH),
    "lookbehind_sam__sgd_k2_alpha0.5_rho0.05": run("lookbehind_sam", SGD, steps=2),
    "lookbehind_asam__sgdm_k3_alpha0.2_rho0.5_eta0.01": run(
        "lookbehind_sam",
        MOMENTUM,
        steps=3,
        alpha=0.2,
        perturbation=metric_ball(0.5, magnitude(0.01)),
    ),
    "tsam__sgd_rho0.05_n3_tilt1.0_radius1.0_scaling1.0_sched0": run("tsam", SGD, samples=3),
    "samsps__rho0.1_lambda1.0_gammab1.0_wd0.0_fstar0.0": run("sam_polyak", None, weight_decay=0.0),
    "sassha_cleanhessian__lr0.01_rho0.1_lazy10_n1_power0.5": run(
        "sassha", None, learning_rate=0.01, rho=0.1, every=10
    ),
    "gam__sgdm_cifar100resnet": run("gam", MOMENTUM),
    "gam__sgdm_adaptive_rho1": run(
        "gam",
        MOMENTUM,
        gamma=0.1,
        outer=metric_ball(1.0, FULL_MAGNITUDE),
        perturbation=metric_ball(0.5, FULL_MAGNITUDE),
    ),
    "ref_gam_exact__sgd_rho0.2_alpha0.5": run("gam_exact", SGD),
}
ON_DEVICES = {"gnp__sgdm_r0.1_a0.8_raw_dev4_nosync": run("gnp", CLIPPED)}
# Fields of the recorded files, and their names in samx's states.
FIELDS = {
    "mask_is_sam": "is_sharp",
    "base_sr": "quota",
    "mu": "mean",
    "sigma2": "variance",
    "score_count": "count",
    "score_sum": "total",
    "angle_alpha": "alpha",
    "gamma": "learning_rate",
}
# Trees of the recorded files, such as `s_W1`, and their names in samx's states.
TREES = {"s": "precision", "gm": "momentum", "v": "eigenvector"}
LEAVES = ("W1", "b1", "W2", "b2")


def index_at(t):
    """Return the positions in the data of the examples of a step."""
    return (t % 4) * problem.BATCH_SIZE + jnp.arange(problem.BATCH_SIZE)


def watch(tx, steps, *names, make=problem.make, further=nothing_further, compiled=None, **start):
    """Return parameters and state fields after every step.

    `start` sets fields at the beginning. `compiled` is the state and a step for this problem that
    was compiled before, if there is one.
    """
    data, params = make()

    @jax.jit
    def anew(params, state, batch, index):
        keywords = {"index": index, "fisher_batch": data} | further(batch)
        return problem.make_step(tx, **keywords)(params, state, batch)

    state, step = compiled or (optax.tree.set(tx.init(params), **start), anew)
    history = []
    for t in range(steps):
        params, state = step(params, state, problem.batch_at(data, t), index_at(t))
        history.append((params, *(optax.tree.get(state, name) for name in names)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *history)


def assert_same(trajectory, expected, tolerance=1e-10):
    assert trajectory.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(trajectory[name], expected[name], rtol=0, atol=tolerance)


def stated(entry):
    """Return the largest difference that the catalog admits to: "matches ... to 1e-12"."""
    if entry is None:
        return 1e-12
    [row] = samx.catalog(entry)
    return max(float(number) for number in re.findall(r"to (\de-\d+)", row.fidelity))


def check(name, tx, compiled=lambda: None):
    """Check that `tx` takes the steps of a recorded run, in float64; its draws are replayed.

    `compiled` returns what `watch` may take. Where draws are replayed, nothing that was compiled
    before is right.
    """
    (expected, _), run, start, asked = problem.load(name), RECORDED[name], {}, {}
    is_replayed = run.entry in NOISY or not REPLAYED.isdisjoint(expected)
    masks = {key: expected.get(f"mask_{key}") for key in LEAVES}
    if "ssamd" in name:
        start = {"mask": {key: jnp.asarray(mask[0], bool) for key, mask in masks.items()}}
    if "idx_sampled" in expected:
        expected["score_sum"] = expected["score_mean"] * expected["score_count"]
    names = {theirs: ours for theirs, ours in FIELDS.items() if theirs in expected}
    trees = {theirs: ours for theirs, ours in TREES.items() if f"{theirs}_W1" in expected}
    with pytest.MonkeyPatch.context() as patch:
        replay_draws(expected, patch, asked)
        if run.entry in NOISY:
            replay_normals(name, expected, run, patch)
        trajectory, mask, *others = watch(
            *(tx, len(expected["W1"]), "mask", *trees.values(), *names.values()),
            make=run.make,
            further=run.further,
            compiled=None if is_replayed else compiled(),
            **start,
        )
        jax.effects_barrier()
    found, read = others[: len(trees)], others[len(trees) :]
    of_trees = {f"{t}_{k}": x for t, f in zip(trees, found, strict=True) for k, x in f.items()}
    known = {key: ~np.isnan(expected[key]) for key in of_trees}  # no vector at first: NaN
    assert_same(
        trajectory
        | {key: x[known[key]] for key, x in of_trees.items()}
        | dict(zip(names, read, strict=True)),
        {key: expected[key] for key in (*trajectory, *names)}
        | {key: expected[key][known[key]] for key in of_trees},
        run.tolerance or stated(run.entry),
    )
    for key in mask or ():  # SSAM-D's state holds the next step's mask
        later = int("ssamd" in name)
        np.testing.assert_array_equal(mask[key][: len(mask[key]) - later], masks[key][later:])
    if "idx_sampled" in expected:
        assert sorted(asked) == list(range(4, 12))
        for t, probabilities in asked.items():
            np.testing.assert_allclose(probabilities, expected["prob_sampling"][t], atol=1e-12)


def largest_error(name, steps):
    """Return the largest difference to the parameters of a recorded run of bSAM, in float64."""
    (expected, _), run = problem.load(name), RECORDED[name]
    with pytest.MonkeyPatch.context() as patch:
        replay_normals(name, expected, run, patch)
        (found,) = watch(samx.bsam(**run.arguments), steps, make=run.make)
    return max(np.abs(found[key] - expected[key][:steps]).max() for key in LEAVES)


def replay_draws(expected, patch, asked):
    """Replay what the recorded run drew; `asked` collects the probabilities that samx asks for."""
    if "draw" in expected:  # NaN on steps without a draw
        draws = jnp.nan_to_num(jnp.asarray(expected["draw"]))
        patch.setattr(samx.policies.draws, "uniform_at", lambda key, step: draws[step])
    if "draws_for_next_step" in expected:  # one for each tensor, in the order W1, b1, W2, b2
        after = jnp.asarray(expected["draws_for_next_step"])[:, jnp.array([0, 2, 1, 3])]
        patch.setattr(samx.perturbations.leaves, "_draws", lambda key, step, count: after[step - 1])
    if "idx_sampled" in expected:
        drawn = jnp.asarray(expected["idx_sampled"])

        def sampled(probabilities, noise, num_selected, **keywords):
            t = noise[0]  # the patches below pass the step as noise
            jax.debug.callback(lambda t, p: asked.update({int(t): p}), t, probabilities)
            return drawn[t][None, :num_selected]

        patch.setattr(jax.random, "fold_in", lambda key, step: step)
        patch.setattr(jax.random, "gumbel", lambda step, shape: jnp.broadcast_to(step, shape))
        patch.setattr(sys.modules["samx.variants.ausam"], "sampled", sampled)


NOISY = ("bsam", "arwp", "marwp", "rwp", "lpf_sgd", "eigen_sam", "tsam", "sassha")
REPLAYED = {"draw", "draws_for_next_step", "idx_sampled"}  # arrays of a recorded run
SCALED = ("rwp__", "lpfsgd__")  # recorded with their scale, `sigma` times the norm of the filter


def replay_normals(name, expected, run, patch):
    """Replay standard normal numbers: of each step, or of each microbatch of each step."""
    prefix = next(p for p in ("noise_", "draw_v0_", "draw_") if f"{p}W1" in expected)
    normals = {key: expected[f"{prefix}{key}"] for key in LEAVES}
    if name.startswith(SCALED):
        before = {key: [w, *expected[key][:-1]] for key, w in run.make()[1].items()}
        normals = {key: over_scale(x, before[key], 0.01) for key, x in normals.items()}

    patch_normals(normals, patch)


def patch_normals(normals, patch):
    """Let samx draw these numbers: of all steps, one step or one microbatch, by their axes."""

    def normal_like(key, step, like, draw=0):
        return {k: pick(jnp.asarray(normals[k]), step, draw, w.ndim) for k, w in like.items()}

    def pick(x, step, draw, ndim):
        x = x if x.ndim == ndim else x[step]
        return x if x.ndim == ndim else x[draw]

    for draws in ("normal_like", "signs_like"):  # a recorded run has one kind of them
        patch.setattr(samx.core.draws, draws, normal_like)


def over_scale(noise, weights, sigma):
    """Return noise of each step, `[steps, ...]` or `[steps, microbatches, ...]`, in deviation 1."""
    scales = np.stack([sigma * np.linalg.norm(w, axis=0 if w.ndim > 1 else None) for w in weights])
    shape = (len(scales), *(1,) * (noise.ndim - scales.ndim), *scales.shape[1:])
    return noise / scales.reshape(shape)
