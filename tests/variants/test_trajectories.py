"""Every variant takes the same steps as the authors' own code, in float64.

First come the recorded runs. Then configurations without a recorded run are compared with the
independent loops of `reference.py`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import reference
import test_elastic

import samx
from samx import losses, policies, schedules
from samx.combinations import mix
from samx.perturbations import (
    layerwise,
    linf_ball,
    magnitude,
    metric_ball,
    subtract_ema,
    unnormalized_step,
)

pytestmark = pytest.mark.usefixtures("float64")

SGD, MOMENTUM = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
ADAMW = optax.adamw(0.01, weight_decay=0.01)
COSINE = (0.1, 0.075, 0.025)  # one learning rate for each epoch of four batches


def cosine(step):
    return jnp.asarray(COSINE)[step // 4]


def falling_rate(step):
    return 0.1 + (0.001 - 0.1) * jnp.asarray(step, float) / 12


def decayed(base, weight_decay=5e-4):
    return optax.chain(optax.add_decayed_weights(weight_decay), base)


def sampa(base, *args, **kwargs):
    batch_like = jax.eval_shape(lambda: problem.batch_at(problem.make()[0], 0))
    return samx.sampa(base, *args, batch_like=batch_like, **kwargs)


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


RECORDED = {
    "base__sgd": lambda: SGD,
    "base__sgdm": lambda: MOMENTUM,
    "base__adamw": lambda: ADAMW,
    "sam__sgd_rho0.05": lambda: optax.chain(samx.sam(), SGD),
    "sam__sgdm_rho0.5": lambda: optax.chain(samx.sam(0.5), MOMENTUM),
    "sam__adamw_rho0.05": lambda: optax.chain(samx.sam(0.05), ADAMW),
    "asam__sgdm_rho0.5_eta0.01": lambda: optax.chain(samx.asam(), MOMENTUM),
    "samon__ln_sgdm": lambda: optax.chain(samx.sam_on(is_perturbed=normalization_only), MOMENTUM),
    "bisam_log__sgdm": lambda: optax.chain(samx.bisam(), MOMENTUM),
    "bisam_tanh__sgdm_mu10": lambda: optax.chain(samx.bisam(), MOMENTUM),
    "focalsam__sgdm": lambda: optax.chain(samx.focal_sam([28, 11, 25]), MOMENTUM),
    "imbsam__sgdm": lambda: optax.chain(samx.imbalanced_sam([1], 0.1, 2.0), MOMENTUM),
    "ssamf__sgdm_cleanfisher_n64": lambda: optax.chain(
        samx.fisher_sparse_sam(0.1, period=4), MOMENTUM
    ),
    "ssamf2__nm_2of4": lambda: optax.chain(
        samx.fisher_sparse_sam(0.1, period=4, pattern=(2, 4)), MOMENTUM
    ),
    "ssamd__sgdm_s0.2_dr0.3_growgrad": lambda: optax.chain(
        samx.dynamic_sparse_sam(
            0.1, 0.2, optax.cosine_decay_schedule(0.3, 12), period=4, grow="gradient"
        ),
        MOMENTUM,
    ),
    "sampa__sgd_lam0.2_rho0.1": lambda: sampa(SGD),
    "sampa__sgdm_lam0.2_rho0.1": lambda: sampa(MOMENTUM, 0.1, 0.2),
    "sampa__sgdm_wd5e-4_cosine_lam0.2_rho0.1": lambda: sampa(
        decayed(optax.sgd(cosine, momentum=0.9))
    ),
    "looksam_becker__sgdm_k5_a0.7_rho0.05": lambda: optax.chain(samx.looksam(), MOMENTUM),
    "ref_ksam__sgdm_k8_rho0.05": lambda: optax.chain(samx.ksam(0.05, 8), MOMENTUM),
    "esam__sgdm_rho0.1_beta0.5_gamma0.5": lambda: optax.chain(
        samx.esam(
            perturbed_fraction=0.5,
            selected_fraction=0.5,
            select="strict",
            perturbation=metric_ball(0.1, norm_eps=1e-7),
        ),
        MOMENTUM,
    ),
    "ausam__sgdm_rho0.1_alpha0.5": lambda: optax.chain(
        samx.ausam(0.1, 0.5, 64, ramp_steps=0, high=half_by_epochs), MOMENTUM
    ),
    "momentumsam__sgdm_rho0.3": lambda: samx.momentum_sam(MOMENTUM, 0.3),
    "momentumsam__adamw_rho0.3": lambda: samx.momentum_sam(optax.adam(0.01), 0.3),
    "asyncsam_INFERRED__sgd_rho0.05_b16": lambda: optax.chain(samx.async_sam(0.05), SGD),
    "asyncsam_INFERRED__sgdm_rho0.1_b8": lambda: optax.chain(samx.async_sam(0.1), MOMENTUM),
    "gsam__sgdm_alpha0.4_rho0.1": lambda: optax.chain(samx.gsam(0.1, 0.4), MOMENTUM),
    "gsam__sgdm_alpha0.4_linearlr": lambda: optax.chain(
        samx.gsam(
            schedules.following(falling_rate, 0.2, 0.02, peak_value=0.1, end_value=0.001), alpha=0.4
        ),
        optax.sgd(falling_rate, momentum=0.9),
    ),
    "wsam__sgdm_rho0.05_gamma0.9": lambda: samx.wsam(MOMENTUM, 0.1),
    "wsam__sgdm_rho0.05_gamma0.9_coupled": lambda: optax.chain(samx.coupled_wsam(), MOMENTUM),
    "stableusam__sgdm": lambda: optax.chain(samx.stable_sam(), MOMENTUM),
    "stablesam__sgdm": lambda: optax.chain(samx.stable_sam(normalize=True), MOMENTUM),
    "usam__sgdm": lambda: optax.chain(samx.usam(), MOMENTUM),
    "fsam__sgdm": lambda: optax.chain(samx.friendly_sam(), MOMENTUM),
    "fsam__sgdm_rho0.1_sigma0.5_lmbda0.95": lambda: optax.chain(
        samx.friendly_sam(0.1, 0.5, 0.95), MOMENTUM
    ),
    "fishersam_thirdparty__sgd_gamma0.1_eta1.0": lambda: optax.chain(
        samx.fisher_sam(0.1, 1.0), SGD
    ),
    "mongesam__sgdm": lambda: optax.chain(samx.monge_sam(), MOMENTUM),
    "mup2__dp_n2_sgdm_lr0.1_nolrscale": lambda: optax.chain(
        samx.mup_sam(0.05, TWICE_AS_WIDE), MOMENTUM
    ),
    "msam__sgdm_k4": lambda: optax.chain(samx.msam(0.1, 4), MOMENTUM),
    "lightsam1__eta0.5_rho0.05": lambda: samx.lightsam_norm(0.5, 0.05),
    "lightsam2__eta0.1_rho0.01": lambda: samx.lightsam_adagrad(0.1, 0.01),
    "lightsam3__eta0.01_rho0.01": lambda: samx.lightsam_adam(0.01, 0.01),
    "adasam__gamma0.01_rho0.05": lambda: samx.adasam(0.01, 0.05),
    "ref_aesam__sgdm_l-1_l1_rho0.05_48steps": lambda: optax.chain(
        samx.ae_sam(0.05, falling(48)), MOMENTUM
    ),
    "ref_aelooksam__sgdm_l-1_l1_rho0.05": lambda: optax.chain(
        samx.ae_looksam(0.05, falling(12)), MOMENTUM
    ),
    "vsam__sgdm_rho0.05_win4x2_hp0.13": lambda: optax.chain(
        samx.vsam(
            0.05, policy=policies.quota(4, num_blocks=2, warmup_steps=5, is_measured=second_layer)
        ),
        MOMENTUM,
    ),
}


def index_at(t):
    """Return the positions in the data of the examples of a step."""
    return (t % 4) * problem.BATCH_SIZE + jnp.arange(problem.BATCH_SIZE)


def climbs(bound):
    """Make keywords with the other loss that BiSAM climbs."""

    def further(batch):
        def ascent_fn(params):
            hidden = jnp.tanh(batch["x"] @ params["W1"] + params["b1"][None])
            logits = hidden @ params["W2"] + params["b2"][None]
            return bound(logits, batch["y"]).mean()

        return {"ascent_fn": ascent_fn}

    return further


def climbs_first(size):
    """Make keywords with AsyncSAM's ascent loss, on the first examples of the batch."""

    def further(batch):
        part = jax.tree.map(lambda x: x[:size], batch)
        return {"ascent_fn": lambda params: problem.losses_fn(params, part).mean()}

    return further


FURTHER = {
    "bisam_log__sgdm": climbs(losses.log_lower_bound),
    "bisam_tanh__sgdm_mu10": climbs(losses.tanh_lower_bound),
    "asyncsam_INFERRED__sgd_rho0.05_b16": lambda batch: {"ascent_fn": None},
    "asyncsam_INFERRED__sgdm_rho0.1_b8": climbs_first(8),
}


def watch(tx, steps, *names, make=problem.make, further=lambda batch: {}, **start):
    """Return parameters and state fields after every step; `start` sets fields at the beginning."""
    data, params = make()
    state, history = optax.tree.set(tx.init(params), **start), []

    @jax.jit
    def step(params, state, batch, index):
        keywords = {"index": index, "fisher_batch": data} | further(batch)
        return problem.make_step(tx, **keywords)(params, state, batch)

    for t in range(steps):
        params, state = step(params, state, problem.batch_at(data, t), index_at(t))
        history.append((params, *(optax.tree.get(state, name) for name in names)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *history)


def assert_same(trajectory, expected, tolerance=1e-10):
    assert trajectory.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(trajectory[name], expected[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_run_of_the_authors_code(name, monkeypatch):
    expected, _ = problem.load(name)
    if "draw" in expected:  # NaN on steps without a draw
        draws = jnp.nan_to_num(jnp.asarray(expected["draw"]))
        monkeypatch.setattr(samx.policies.draws, "uniform_at", lambda key, step: draws[step])
    if "draws_for_next_step" in expected:  # one for each tensor, in the order W1, b1, W2, b2
        after = jnp.asarray(expected["draws_for_next_step"])[:, jnp.array([0, 2, 1, 3])]
        monkeypatch.setattr(
            samx.perturbations.leaves, "_draws", lambda key, step, count: after[step - 1]
        )
    if "idx_sampled" in expected:
        asked = replay_samples(jnp.asarray(expected["idx_sampled"]), monkeypatch)
        expected["score_sum"] = expected["score_mean"] * expected["score_count"]
    names = {"mask_is_sam": "is_sharp", "base_sr": "quota", "mu": "mean", "sigma2": "variance"}
    names |= {"score_count": "count", "score_sum": "total"}
    names = {theirs: ours for theirs, ours in names.items() if theirs in expected}
    start, further = {}, FURTHER.get(name, lambda batch: {})
    masks = {key: expected.get(f"mask_{key}") for key in ("W1", "b1", "W2", "b2")}
    if "ssamd" in name:
        start = {"mask": {key: jnp.asarray(mask[0], bool) for key, mask in masks.items()}}
    made = {"samon": problem.make_layer_norm, "msam": contiguous_as_strided}
    make = made.get(name.split("__")[0], problem.make)
    tx, steps = RECORDED[name](), len(expected["W1"])
    trajectory, mask, *read = watch(
        tx, steps, "mask", *names.values(), make=make, further=further, **start
    )
    # In the authors' code, LookSAM's projection divides by ‖g‖² + 1e-12.
    assert_same(
        trajectory | dict(zip(names, read, strict=True)),
        {key: expected[key] for key in (*trajectory, *names)},
        tolerance=1e-9 if "looksam" in name else 1e-10,
    )
    for key in mask or ():  # SSAM-D's state holds the next step's mask
        later = int("ssamd" in name)
        np.testing.assert_array_equal(mask[key][: steps - later], masks[key][later:])
    if "idx_sampled" in expected:
        jax.effects_barrier()
        assert sorted(asked) == list(range(4, 12))
        for t, probabilities in asked.items():
            np.testing.assert_allclose(probabilities, expected["prob_sampling"][t], atol=1e-12)


def replay_samples(drawn, monkeypatch):
    """Replay recorded draws; return the probabilities that samx asks for, by step."""
    asked = {}

    def sampled(probabilities, noise, num_selected, **keywords):
        t = noise[0]  # the patches below pass the step as noise
        jax.debug.callback(lambda t, p: asked.update({int(t): p}), t, probabilities)
        return drawn[t][None, :num_selected]

    monkeypatch.setattr(jax.random, "fold_in", lambda key, step: step)
    monkeypatch.setattr(jax.random, "gumbel", lambda step, shape: jnp.broadcast_to(step, shape))
    monkeypatch.setattr(sys.modules["samx.variants.ausam"], "sampled", sampled)
    return asked


def test_every_recorded_run_is_used():
    used = {*RECORDED, *test_elastic.RECORDED}
    assert {file.stem for file in problem.TRAJECTORIES.glob("*.npz")} == used


# Configurations without a recorded run: the optax base, its reference.
STEPS = 30
BASES = {
    "nesterov": (
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        lambda: reference.SGD(0.1, 0.9, nesterov=True),
    ),
    "adam": (optax.adam(0.01), lambda: reference.Adam(0.01)),
    "adamw": (ADAMW, lambda: reference.Adam(0.01, weight_decay=0.01)),
    "momentum and decay": (
        decayed(MOMENTUM),
        lambda: reference.SGD(0.1, 0.9, weight_decay=5e-4),
    ),
    "sgd, decay and cosine": (
        decayed(optax.sgd(optax.cosine_decay_schedule(0.1, STEPS))),
        lambda: reference.SGD(lambda t: 0.05 * (1 + np.cos(np.pi * t / STEPS)), weight_decay=5e-4),
    ),
}
WEIGHTS = {"W1", "W2"}
SAMS = {
    "sam 0.2": (lambda: samx.sam(0.2), reference.ball(0.2), 1),
    "asam 1.0, eta 0": (
        lambda: samx.asam(1.0, eta=0.0),
        reference.adaptive_ball(1.0, 0.0, WEIGHTS),
        1,
    ),
    "asam on every leaf": (
        lambda: samx.asam(2.0, eta=0.1, is_scaled=lambda path, leaf: True),
        reference.adaptive_ball(2.0, 0.1, WEIGHTS | {"b1", "b2"}),
        1,
    ),
    "two ascent steps": (
        lambda: samx.sharpness_aware(metric_ball(0.1), ascent_steps=2),
        reference.ball(0.1),
        2,
    ),
    "three adaptive ascent steps": (
        lambda: samx.sharpness_aware(metric_ball(0.2, magnitude(0.05)), ascent_steps=3),
        reference.adaptive_ball(0.2, 0.05, WEIGHTS),
        3,
    ),
    "l-infinity": (lambda: samx.sharpness_aware(linf_ball(0.01)), reference.sign_ball(0.01), 1),
}


def in_turn(rows, all_of):
    """Pair one row with every base, and each other row with one base."""
    return [
        (row, base)
        for i, row in enumerate(rows)
        for j, base in enumerate(BASES)
        if row == all_of or j == i % len(BASES)
    ]


@pytest.mark.parametrize(("variant", "base"), in_turn(SAMS, "sam 0.2"))
def test_sam_against_reference(variant, base):
    make, perturb, ascent_steps = SAMS[variant]
    tx, make_reference = BASES[base]
    expected = reference.train_sam(make_reference(), perturb, STEPS, ascent_steps)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


@pytest.mark.parametrize(
    ("lam", "gradients", "base"),
    [
        (*row, base)
        for row, base in in_turn(
            [(0.0, "vmap"), (0.2, "separate"), (0.5, "vmap"), (1.0, "separate")], (0.5, "vmap")
        )
    ],
)
def test_sampa_against_reference(lam, gradients, base):
    tx, make_reference = BASES[base]
    expected = reference.train_sampa(make_reference(), 0.3, lam, STEPS)
    assert_same(problem.train(sampa(tx, 0.3, lam, gradients=gradients), STEPS), expected)


def test_l2_inside_the_loss_is_part_of_the_ascent():
    def losses_fn(params, batch):
        squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
        return problem.losses_fn(params, batch) + 0.5 * 1e-2 * squares

    base = reference.SGD(0.1, 0.9, nesterov=True)
    expected = reference.train_sam(base, reference.ball(0.1), STEPS, losses_fn=losses_fn)
    tx = optax.chain(samx.sam(0.1), BASES["nesterov"][0])
    assert_same(problem.train(tx, STEPS, losses_fn=losses_fn), expected)
    outside = problem.train(optax.chain(samx.sam(0.1), decayed(BASES["nesterov"][0], 1e-2)), STEPS)
    assert np.abs(outside["W1"] - expected["W1"]).max() > 1e-6


def test_schedules_follow_the_step():
    schedule = optax.linear_schedule(0.0, 0.3, STEPS)
    radii = [float(schedule(t)) for t in range(STEPS)]
    perturb = [reference.ball(rho) for rho in radii]
    expected = reference.train_sam(reference.SGD(0.1, 0.9), perturb, STEPS)
    assert_same(problem.train(optax.chain(samx.sam(schedule), MOMENTUM), STEPS), expected)
    expected = reference.train_sampa(reference.SGD(0.1, 0.9), radii, radii, STEPS)
    assert_same(problem.train(sampa(MOMENTUM, schedule, schedule), STEPS), expected)


def test_layerwise_metric_by_hand():
    """The SAM-ON code has T = ‖w‖ (1 + eta). Here: eta = 0, and the radius times (1 + eta)."""
    data, params = problem.make()
    g = jax.grad(lambda p: problem.losses_fn(p, problem.batch_at(data, 0)).mean())(params)
    g, w = jax.tree.map(np.asarray, (g, params))
    scales = {k: np.linalg.norm(w[k]) * 1.01 for k in w}
    length = np.sqrt(sum(scales[k] ** 2 * np.sum(g[k] ** 2) for k in g))
    ball = metric_ball(0.3 * 1.01, layerwise(is_scaled=lambda path, leaf: True))
    eps, _ = ball.update(g, ball.init(params), params)
    for name in g:
        expected = 0.3 * scales[name] ** 2 * g[name] / length
        np.testing.assert_allclose(eps[name], expected, rtol=1e-12)


def every(period, first=0):
    return reference.listed([t >= first and (t - first) % period == 0 for t in range(STEPS)])


def drawn(probability, key):
    """The draws of `policies.random`, from its definition."""
    steps = jnp.arange(STEPS)
    draws = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(jax.random.key(key), t)))(
        steps
    )
    return reference.listed(draws < probability)


def linear(start, stop, steps):
    """A schedule, and its values."""
    values = np.linspace(start, stop, steps, endpoint=False).tolist()
    return optax.linear_schedule(start, stop, steps), values


ALPHA, ALPHAS = linear(0.0, 1.0, STEPS)
THRESHOLD, THRESHOLDS = linear(1.5, -1.0, 48)
LOOK_LAYER = {  # rule, rho, base
    "relative": (lambda w, g, total: w / g, 0.02, "adamw"),
    "equal": (lambda w, g, total: 1 / g, 0.05, "nesterov"),
    "divided twice": (lambda w, g, total: w / g**2, 0.002, "adam"),
}
GATED = {  # samx, the reference's perturbation and combination, base, steps
    "looksam": (
        lambda: samx.looksam(0.2, 3, 0.3),
        reference.ball(0.2),
        lambda: reference.LookSAM(every(3), 0.3),
        "nesterov",
    ),
    "looksam with a schedule of alpha": (
        lambda: samx.looksam(0.1, 4, ALPHA, first=3),
        reference.ball(0.1),
        lambda: reference.LookSAM(every(4, 3), ALPHAS),
        "adam",
    ),
    "look_layer_sam": (
        lambda: samx.look_layer_sam(0.05, 4, 0.3, first=1),
        reference.layer_steps(0.05, lambda w, g, total: w / g / total),
        lambda: reference.LookSAM(every(4, 1), 0.3),
        "momentum and decay",
    ),
    **{
        f"look_layer_sam, {name}": (
            lambda rule=rule, rho=rho: samx.look_layer_sam(rho, 4, 0.3, scaling=rule),
            reference.layer_steps(rho, rule),
            lambda: reference.LookSAM(every(4), 0.3),
            base,
        )
        for name, (rule, rho, base) in LOOK_LAYER.items()
    },
    "periodic": (
        lambda: samx.perturb_if(policies.every(3, first=2), samx.sam(0.1)),
        reference.ball(0.1),
        lambda: reference.sometimes(every(3, 2)),
        "adamw",
    ),
    "rst": (
        lambda: samx.perturb_if(policies.random(0.4, key=3), samx.sam(0.2)),
        reference.ball(0.2),
        lambda: reference.sometimes(drawn(0.4, 3)),
        "nesterov",
    ),
    "g-rst, gamma 2": (
        lambda: samx.perturb_if(policies.random(0.5), mix(samx.sam(0.1), 2.0)),
        reference.ball(0.1),
        lambda: reference.sometimes(drawn(0.5, 0), gamma=2.0),
        "momentum and decay",
    ),
    "ae_sam": (
        lambda: samx.ae_sam(0.2, THRESHOLD, 0.8),
        reference.ball(0.2),
        lambda: reference.sometimes(reference.SquaredNorm(THRESHOLDS, 0.8)),
        "momentum and decay",
        48,
    ),
    "ae_looksam": (
        lambda: samx.ae_looksam(0.1, 0.3, 0.2, decay=0.5),
        reference.ball(0.1),
        lambda: reference.LookSAM(reference.SquaredNorm([0.3] * STEPS, 0.5), 0.2),
        "adam",
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_against_reference(name):
    make, perturb, combine, base, *rest = GATED[name]
    steps = rest[0] if rest else STEPS
    tx, make_reference = BASES[base]
    expected, is_sharp = reference.train_gated(make_reference(), perturb, combine(), steps)
    trajectory, sharp = watch(optax.chain(make(), tx), steps, "is_sharp")
    assert 3 <= sum(is_sharp) <= steps - 3
    np.testing.assert_array_equal(sharp, is_sharp)
    assert_same(trajectory, expected)


@pytest.mark.parametrize("base", ["momentum and decay", "adam"])
def test_vsam_against_reference_past_several_windows(base):
    steps, tx, make_reference = 66, *BASES[base]
    draws = np.random.default_rng(1).uniform(size=steps)
    variant = reference.VSAM(draws, (10, 2), 0.8, (0.5, 0.5), 0.7, 12, ["W1", "W2"])
    expected, is_sharp = reference.train_gated(
        make_reference(), reference.ball(0.1), variant, steps
    )
    controller = policies.quota(
        window=10,
        num_blocks=2,
        ratio_gain=0.5,
        variance_gain=0.5,
        warmup_steps=12,
        is_measured=lambda path, leaf: path[-1].key in WEIGHTS,
    )
    vsam = samx.vsam(0.1, policy=controller)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samx.policies.draws, "uniform_at", lambda key, step: jnp.asarray(draws)[step])
        trajectory, sharp, fractions, quotas, ages = watch(
            optax.chain(vsam, tx), steps, "is_sharp", "sharp_fraction", "quota", "age"
        )
    np.testing.assert_array_equal(sharp, is_sharp)
    np.testing.assert_allclose(fractions, np.cumsum(is_sharp) / np.arange(1, steps + 1), rtol=1e-5)
    np.testing.assert_allclose(quotas, variant.base_srs, rtol=1e-9)
    assert ages.max() > 7  # the reuse has expired
    assert len(set(quotas.astype(int))) > 1
    assert_same(trajectory, expected)


def adamw_decayed_behind(learning_rate, weight_decay):
    """The authors' AdamW: w ← (1 − lr·wd) (w + u)."""

    def update_fn(updates, state, params):
        return jax.tree.map(
            lambda u, w: u - learning_rate * weight_decay * (w + u), updates, params
        ), state

    decay = optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
    return optax.chain(optax.adam(learning_rate), decay)


MOMENTUM_BASES = BASES | {
    "sgd of momentum 0": (optax.sgd(0.1, momentum=0.0), lambda: reference.SGD(0.1)),
    "adam, decay behind": (
        adamw_decayed_behind(0.01, 0.5),
        lambda: reference.Adam(0.01, 0.5, decay_behind=True),
    ),
}
del MOMENTUM_BASES["sgd, decay and cosine"]  # has no momentum


RHO, RHOS = linear(0.2, 0.8, STEPS)


@pytest.mark.parametrize("base", MOMENTUM_BASES)
def test_momentum_sam_against_reference(base):
    tx, make_reference = MOMENTUM_BASES[base]
    balls = [reference.ball(rho) for rho in RHOS]
    expected = reference.train_momentum_sam(make_reference(), balls, STEPS)
    assert_same(problem.train(samx.momentum_sam(tx, RHO), STEPS), expected)


COSINE_RHO = optax.cosine_decay_schedule(0.3, STEPS)
ASYNC_SAM = {  # arguments, the reference's perturbation, b′, first, base
    "adam": ({"rho": 0.2}, reference.ball(0.2), 4, "plain", "adam"),
    "adamw": ({"rho": 0.3}, reference.ball(0.3), 4, "sam", "adamw"),
    "cosine rho": (
        {"rho": COSINE_RHO},
        [reference.ball(0.15 * (1 + np.cos(np.pi * t / STEPS))) for t in range(STEPS)],
        16,
        "plain",
        "nesterov",
    ),
    "the metric of ASAM": (
        {"perturbation": metric_ball(1.0, magnitude(0.05))},
        reference.adaptive_ball(1.0, 0.05, WEIGHTS),
        8,
        "sam",
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", ASYNC_SAM)
def test_async_sam_against_reference(name):
    arguments, perturb, ascent_size, first, base = ASYNC_SAM[name]
    tx, make_reference = BASES[base]
    expected = reference.train_async_sam(make_reference(), perturb, ascent_size, STEPS, first)
    async_sam = optax.chain(samx.async_sam(first=first, **arguments), tx)
    further = climbs_first(ascent_size)
    trajectory, _ = watch(async_sam, STEPS, "loss", further=further)
    assert_same(trajectory, expected)


def test_l2_inside_the_loss_is_the_decay_of_the_perturbed_weights():
    def losses_fn(params, batch):
        squares = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
        return problem.losses_fn(params, batch) + 0.5 * 1e-2 * squares

    tx, sgd = samx.momentum_sam(MOMENTUM, 0.5), reference.SGD(0.1, 0.9)
    expected = reference.train_momentum_sam(sgd, reference.ball(0.5), STEPS, decay=1e-2)
    assert_same(problem.train(tx, STEPS, losses_fn=losses_fn), expected)


RADIUS, RADII = linear(0.05, 0.5, 15)
WITH_MEMORY = {
    "looksam": (
        lambda ball: samx.looksam(period=5, perturbation=ball),
        lambda: reference.LookSAM(every(5), 0.7),
    ),
    "periodic": (
        lambda ball: samx.perturb_if(policies.every(3), samx.sam(perturbation=ball)),
        lambda: reference.sometimes(every(3)),
    ),
}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_schedules_and_memories_go_on_where_no_sharp_gradient_is_taken(name):
    make, combine = WITH_MEMORY[name]
    ball = optax.chain(subtract_ema(0.9, 0.8), metric_ball(RADIUS))
    climb = reference.Friendly(map(reference.ball, RADII), 0.9, 0.8)
    expected, is_sharp = reference.train_gated(reference.SGD(0.1, 0.9), climb, combine(), 15)
    trajectory, sharp = watch(optax.chain(make(ball), MOMENTUM), 15, "is_sharp")
    assert not all(is_sharp)
    np.testing.assert_array_equal(sharp, is_sharp)
    assert_same(trajectory, expected)

    states, sams = (
        watch(optax.chain(sharp, optax.sgd(0.0)), 7, "perturbation")[1]
        for sharp in (make(ball), samx.sam(perturbation=ball))
    )
    jax.tree.map(np.testing.assert_array_equal, states, sams)


# ---- Where the sharp gradient is taken, at which radius, and how it is combined.

EVERYWHERE = magnitude(0.0, is_scaled=lambda path, leaf: True)
ALL = {"W1", "b1", "W2", "b2"}
SCALES = {"W1": 3.0, "b1": 2.5, "W2": 0.5, "b2": 1.0}
DECOUPLED = {k: s**0.5 for k, s in SCALES.items()}
LAYERWISE = {k: s / 3**0.5 for k, s in SCALES.items()}


def always(t, g, look):
    return look()


def friendly_ball(sigma, decay, *balls):
    return reference.Friendly(balls, sigma, decay)


FORMULATIONS = {  # samx, the reference's perturbation and combination, base
    "gsam, a schedule of alpha": (
        lambda: samx.gsam(0.2, ALPHA),
        lambda: reference.ball(0.2),
        reference.gsam(ALPHAS),
        "adam",
    ),
    "gsam, clean": (
        lambda: samx.gsam(0.1, 0.7, descend="clean"),
        lambda: reference.ball(0.1),
        reference.gsam(0.7, clean=True),
        "momentum and decay",
    ),
    "gsam, adaptive": (
        lambda: samx.gsam(alpha=1.0, perturbation=metric_ball(1.0, EVERYWHERE)),
        lambda: reference.adaptive_ball(1.0, 0.0, ALL),
        reference.gsam(1.0),
        "adamw",
    ),
    "coupled_wsam": (
        lambda: samx.coupled_wsam(0.2, 0.8),
        lambda: reference.ball(0.2),
        reference.weighted(0.8),
        "adam",
    ),
    "coupled_wsam, adaptive": (
        lambda: samx.coupled_wsam(gamma=0.3, perturbation=metric_ball(0.5, magnitude(0.1))),
        lambda: reference.adaptive_ball(0.5, 0.1, WEIGHTS),
        reference.weighted(0.3),
        "momentum and decay",
    ),
    "stable_sam": (
        lambda: samx.stable_sam(0.5),
        lambda: reference.unnormalized_step(0.5),
        reference.renormalized,
        "adamw",
    ),
    "stable_sam, normalized": (
        lambda: samx.stable_sam(0.2, normalize=True),
        lambda: reference.ball(0.2),
        reference.renormalized,
        "nesterov",
    ),
    "un-normalized, adaptive": (
        lambda: samx.usam(perturbation=unnormalized_step(2.0, EVERYWHERE)),
        lambda: reference.adaptive_step(2.0),
        always,
        "momentum and decay",
    ),
    "fisher_sam": (
        lambda: samx.fisher_sam(0.3, 5.0),
        lambda: reference.fisher_ball(0.3, 5.0),
        always,
        "adam",
    ),
    "friendly_sam": (
        lambda: samx.friendly_sam(0.2, 0.7, 0.6),
        lambda: friendly_ball(0.7, 0.6, reference.ball(0.2)),
        always,
        "adam",
    ),
    "friendly_sam, adaptive": (
        lambda: samx.friendly_sam(perturbation=metric_ball(0.5, EVERYWHERE)),
        lambda: friendly_ball(1.0, 0.9, reference.adaptive_ball(0.5, 0.0, ALL)),
        always,
        "momentum and decay",
    ),
    "monge_sam": (
        lambda: samx.monge_sam(0.5),
        lambda: reference.monge_ball(0.5),
        always,
        "adamw",
    ),
    "mup_sam": (
        lambda: samx.mup_sam(0.2, SCALES),
        lambda: reference.mup_ball(0.2, SCALES, DECOUPLED),
        always,
        "adam",
    ),
    "mup_sam, layerwise": (
        lambda: samx.mup_sam(0.2, SCALES, normalization="layerwise", width=3.0),
        lambda: reference.mup_ball(0.2, SCALES, LAYERWISE),
        always,
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", FORMULATIONS)
def test_formulations_against_reference(name):
    make, perturb, combine, base = FORMULATIONS[name]
    tx, make_reference = BASES[base]
    expected, _ = reference.train_gated(make_reference(), perturb(), combine, STEPS)
    assert_same(problem.train(optax.chain(make(), tx), STEPS), expected)


def test_the_papers_order_of_friendly_sam_is_another_sigma():
    """As the docstring says: d = g − σ (λ m + (1 − λ) g), except for its length."""
    sigma, decay = 0.5, 0.8
    m, g = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    papers = g - sigma * (decay * m + (1 - decay) * g)
    ours = g - sigma * decay / (1 - sigma * (1 - decay)) * m
    np.testing.assert_allclose(papers / ours, 1 - sigma * (1 - decay), rtol=1e-12)


WSAMS = {  # base, learning rate, both ours and the reference's
    "nesterov": (BASES["nesterov"], 0.1, 0.1),
    "adam": (BASES["adam"], 0.01, 0.01),
    "cosine": (
        BASES["sgd, decay and cosine"],
        lambda step: 0.05 * (1 + jnp.cos(jnp.pi * step / STEPS)),
        lambda t: 0.05 * (1 + np.cos(np.pi * t / STEPS)),
    ),
}


@pytest.mark.parametrize("name", WSAMS)
def test_wsam_against_reference(name):
    (tx, make_reference), ours, theirs = WSAMS[name]
    perturb = reference.adaptive_ball(0.5, 0.0, ALL)
    expected = reference.train_wsam(make_reference(), theirs, perturb, 0.8, STEPS)
    wsam = samx.wsam(tx, ours, gamma=0.8, perturbation=metric_ball(0.5, EVERYWHERE))
    assert_same(problem.train(wsam, STEPS), expected)


RATES = [0.05 * (1 - t / STEPS) for t in range(STEPS)]
OPTIMIZERS = {  # samx, the reference's base and perturbation
    "lightsam_norm": (
        lambda: samx.lightsam_norm(1.0, 0.2, eps=0.1),
        lambda: (reference.AdaGradNorm(1.0, 0.1), reference.AdaGradNorm(0.2, 0.1)),
    ),
    "lightsam_adagrad": (
        lambda: samx.lightsam_adagrad(0.2, 0.05, eps=0.1),
        lambda: (reference.AdaGrad(0.2, 0.1), reference.AdaGrad(0.05, 0.1)),
    ),
    "lightsam_adam": (
        lambda: samx.lightsam_adam(0.02, 0.05, 0.8, 0.99, eps=0.01),
        lambda: (
            reference.RawAdam(0.02, 0.8, 0.99, 0.01),
            reference.RawAdam(0.05, 0.8, 0.99, 0.01),
        ),
    ),
    "lightsam_adam, schedules": (
        lambda: samx.lightsam_adam(falling_to_zero, falling_to_zero),
        lambda: (
            reference.RawAdam(RATES, 0.9, 0.999, 1e-8),
            reference.RawAdam(RATES, 0.9, 0.999, 1e-8),
        ),
    ),
    "adasam": (
        lambda: samx.adasam(0.02, 0.2, 0.8, 0.9, eps=0.05),
        lambda: (reference.RawAdam(0.02, 0.8, 0.9, 0.05, largest=True), reference.ball(0.2)),
    ),
    "adasam, adaptive": (
        lambda: samx.adasam(0.02, b2=0.8, perturbation=metric_ball(0.5, EVERYWHERE)),
        lambda: (
            reference.RawAdam(0.02, 0.9, 0.8, 1e-8, largest=True),
            reference.adaptive_ball(0.5, 0.0, ALL),
        ),
    ),
}


def falling_to_zero(step):
    return 0.05 * (1 - jnp.asarray(step, float) / STEPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_against_reference(name):
    make, make_reference = OPTIMIZERS[name]
    expected = reference.train_sam(*make_reference(), STEPS)
    assert_same(problem.train(make(), STEPS), expected)


# ---- Variants on some of the examples or some of the layers.


def esam_draws(key, steps):
    """The draws of `random_leaves`, from its definition, by name."""
    draws = [
        jax.random.uniform(jax.random.fold_in(jax.random.key(key), t), (4,))
        for t in range(1, steps + 1)
    ]
    return [dict(zip(("W1", "W2", "b1", "b2"), d.tolist(), strict=True)) for d in draws]


def gumbel_draw(t, p, m):
    """Gumbel top-k, from its definition."""
    noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(0), t), (problem.BATCH_SIZE,))
    return np.argsort(-(np.log(p) + np.asarray(noise)))[:m]


def ramp(t, low=0.2, high=0.9, steps=10):
    return low + (high - low) * min(t / steps, 1)


ON_EXAMPLES = {  # samx, the reference, base
    "ksam": (lambda: samx.ksam(0.2, 5), lambda: reference.ksam(reference.ball(0.2), 5), "adam"),
    "ksam, adaptive": (
        lambda: samx.ksam(num_selected=4, perturbation=metric_ball(0.5, magnitude(0.01))),
        lambda: reference.ksam(reference.adaptive_ball(0.5, 0.01, WEIGHTS), 4),
        "momentum and decay",
    ),
    "msam": (
        lambda: samx.msam(0.2, 2, how="vmap"),
        lambda: reference.msam(reference.ball(0.2), 2),
        "adam",
    ),
    "msam, every example, adaptive": (
        lambda: samx.msam(num_microbatches=16, perturbation=metric_ball(0.5, magnitude(0.01))),
        lambda: reference.msam(reference.adaptive_ball(0.5, 0.01, WEIGHTS), 16),
        "momentum and decay",
    ),
    "msam, with a memory": (
        lambda: samx.msam(
            num_microbatches=4, perturbation=optax.chain(subtract_ema(0.9, 0.8), metric_ball(0.2))
        ),
        lambda: reference.msam(reference.Friendly([reference.ball(0.2)], 0.9, 0.8, calls=4), 4),
        "nesterov",
    ),
    "esam": (
        lambda: samx.esam(0.1, 0.6, 0.75),
        lambda: reference.esam(reference.ball(0.1), 0.6, 0.75, esam_draws(0, STEPS), strict=False),
        "adam",
    ),
    "esam, adaptive and strict": (
        lambda: samx.esam(
            perturbed_fraction=0.7,
            selected_fraction=0.5,
            select="strict",
            key=3,
            perturbation=metric_ball(0.5, magnitude(0.0, is_scaled=lambda path, leaf: True)),
        ),
        lambda: reference.esam(
            reference.adaptive_ball(0.5, 0.0, {"W1", "b1", "W2", "b2"}),
            *(0.7, 0.5, esam_draws(3, STEPS)),
            strict=True,
        ),
        "momentum and decay",
    ),
    "esam, the whole sharp pass": (
        lambda: samx.esam(0.1, 0.8, 0.75, sharp_pass="whole"),
        lambda: reference.esam(reference.ball(0.1), 0.8, 0.75, esam_draws(0, STEPS), strict=False),
        "nesterov",
    ),
    "ausam past its ramp": (
        lambda: samx.ausam(0.1, 0.75, 64, ramp_steps=10, low=0.2, high=0.9),
        lambda: reference.AUSAM(
            reference.ball(0.1), 0.75, gumbel_draw, 4, [ramp(t) for t in range(STEPS)], 0.2
        ),
        "adam",
    ),
    "ausam, a long warm-up": (
        lambda: samx.ausam(0.2, 0.5, 64, warmup_steps=9, ramp_steps=0),
        lambda: reference.AUSAM(reference.ball(0.2), 0.5, gumbel_draw, 9, [0.5] * STEPS, 0.1),
        "momentum and decay",
    ),
}


@pytest.mark.parametrize("name", ON_EXAMPLES)
def test_on_examples_against_reference(name):
    make, sharp_gradient, base = ON_EXAMPLES[name]
    tx, make_reference = BASES[base]
    expected = reference.train_on_examples(make_reference(), sharp_gradient(), STEPS)
    trajectory, _ = watch(optax.chain(make(), tx), STEPS, "loss")
    assert_same(trajectory, expected)


def by_layer(path, leaf):
    return path[-1].key[1]


SL_SAM = {  # groups, what they hold
    "two layers": (by_layer, [["W1", "b1"], ["W2", "b2"]]),
    "every tensor": (4, [["W1"], ["W2"], ["b1"], ["b2"]]),
    "three": (3, [["W1"], ["W2"], ["b1", "b2"]]),
}


@pytest.mark.parametrize(
    ("name", "base"), [*zip(SL_SAM, ("nesterov", "adam", "nesterov"), strict=True)]
)
def test_sl_sam_against_reference(name, base):
    groups, names = SL_SAM[name]
    tx, make_reference = BASES[base]

    def draw(t, p):
        key = jax.random.fold_in(jax.random.key(2), t)
        return int(jax.random.categorical(key, jnp.log(jnp.asarray(p, jnp.float32))))

    expected, drawn = reference.train_sl_sam(
        make_reference(), reference.ball(0.1), names, draw, 0.3, 0.4, STEPS
    )
    sl_sam = samx.sl_sam(tx, 0.1, groups, bandit_learning_rate=0.3, exploration=0.4, key=2)
    trajectory, found = watch(sl_sam, STEPS, "group")
    assert set(drawn) == set(range(len(names)))
    np.testing.assert_array_equal(found, drawn)
    assert_same(trajectory, expected)
