"""Mistakes in samx, generated and deliberate, turn the tests red that are there for them."""

import contextlib
import dataclasses
import importlib

import jax
import mutations
import pytest
from mutations import PACKAGE, Mutation, mutations_of

MUTATIONS = [m for file in mutations.FILES for m in mutations_of(file)]
# Mutations that change nothing on which anybody may rely, and why.
EQUIVALENT = {
    **dict.fromkeys(
        (
            ("core/tree.py", "_measure", "jnp.where(is_done, scale, better)"),
            ("core/tree.py", "_measure", "better == 1"),
        ),
        "a loop without an end, inside a compiled program, where no time limit is seen",
    ),
    (
        "core/tree.py",
        "_stored_wide",
        "jax.device_count() == 1",
    ): "a layout, which changes what is copied and sent, and no number",
    (
        "perturbations/spectral_ball.py",
        "_newton_schulz",
        "matrix.shape[0] > matrix.shape[1]",
    ): "the transposed matrix gives the same, at more cost",
    (
        "variants/sassha.py",
        "_add_diagonal",
        "total + ((jnp.conj(z) * product).real / parts).astype(total.dtype)",
    ): "the absolute value of the sum is taken",
    (
        "core/closures.py",
        "unit_weights",
        "1 + jnp.zeros_like(leaf, dtype).sum(axis=tuple(range(1, leaf.ndim)))",
    ): "zeros, which only give the ones the sharding of the batch",
    (
        "perturbations/balls.py",
        "linf_ball.climb.corner",
        "jnp.sign(g) + 0 * g",
    ): "zero, or NaN where an entry is infinite, with either sign",
    (
        "perturbations/top_entries.py",
        "_count.in_leaf",
        "2**16",
    ): "a smaller bound, so that counts are wider where they need not be",
    (
        "perturbations/patterns.py",
        "_whole_leaves",
        "x.size * ok",
    ): "integers come last in the order, so their size is before no other leaf",
    (
        "core/draws.py",
        "drawn_like.draw.drawn",
        "sample(jax.random.fold_in(key, i), leaf) + zeros",
    ): "zeros, which only give the draw the sharding of the leaf",
    (
        "perturbations/spectral_ball.py",
        "_on_matrix",
        "jnp.moveaxis(found, -1, output_axis) + jnp.zeros_like(g)",
    ): "zeros, which only give the step the sharding of the gradient",
    (
        "core/tree.py",
        "_measured",
        "x.dtype == wide_dtype(x.dtype)",
    ): "the same norm; only what the compiler stores differs, which `test_traffic.py` counts",
    (
        "core/tree.py",
        "_measure",
        "limits.maxexp // 2 - 1",
    ): "room for a rewrite by XLA, of leaves that are constants of the program",
    (
        "core/slopes.py",
        "_forward",
        "not any(isinstance(x, Tracer) for x in jax.tree.leaves((params, moved)))",
    ): "the other way gives the same numbers, in two passes",
    (
        "variants/looksam.py",
        "_orthogonal",
        "rounding * jnp.abs(weight)",
    ): "the weight is near 1 where the rest is rounding error",
    (
        "core/inspection.py",
        "inside_update",
        "_DEPTH.get() + 1",
    ): "only 0 is outside",
    (
        "core/inspection.py",
        "_measured",
        "tree.subtract(updates, g)",
    ): "only the length of the difference is used",
    (
        "policies/quota.py",
        "quota.observe",
        "tree.subtract(g_s, g)",
    ): "only the length of the difference is used",
}


def ids(mutation):
    return f"{mutation.file}:{mutation.line}: {mutation.kind}: {mutation.before}"[:120]


def is_equivalent(mutation):
    """Epsilons may change their sign, but not be dropped."""
    key = (mutation.file, mutation.function, mutation.before)
    return key in EQUIVALENT and mutation.kind != "drop an epsilon"


# Each file of a paper, by turns with each kind.
PAPERS = [m for m in MUTATIONS if m.file.startswith("variants/") and "/_" not in m.file]
SAMPLE = [
    m
    for m in [m for m in PAPERS if not is_equivalent(m)][9::34]
    if m.file != "variants/esam.py"  # its suites take longer than all others of the sample
]


@pytest.mark.parametrize("mutation", SAMPLE, ids=ids)
def test_a_sample_is_caught(mutation):
    assert mutations.is_caught(mutation), str(mutation)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if not is_equivalent(m)], ids=ids)
def test_every_mutation_is_caught(mutation):
    assert mutations.is_caught(mutation), str(mutation)


def test_there_are_hundreds_of_every_folder():
    assert len(MUTATIONS) > 400
    assert {m.file.split("/")[0] for m in MUTATIONS} == {
        *mutations.FOLDERS,
        "combinations.py",
        "losses.py",
    }


def test_every_excuse_is_for_a_mutation_that_exists():
    assert set(EQUIVALENT) <= {(m.file, m.function, m.before) for m in MUTATIONS}


ALL_SUITES = sorted({suite for files in mutations.SUITES.values() for suite in files})


def test_every_suite_exists():
    suites = {*ALL_SUITES} | {f"{file}::{test}" for *_, (file, test) in DELIBERATE.values()}
    for suite in suites:
        file, _, only = suite.partition("::")
        assert f"def {only or 'test_'}" in (mutations.SUPPORT.parent / file).read_text(), suite


@pytest.mark.slow
@pytest.mark.parametrize("suite", ALL_SUITES)
def test_a_suite_is_green_without_a_mistake(suite):
    """Otherwise, it would catch everything."""
    mutations.run_suites([suite])


def test_the_unchanged_package_is_green():
    """Imported anew in the same way, it passes what the mutations fail."""
    source = (PACKAGE / "variants/fisher_sam.py").read_text()
    nothing = Mutation("variants/fisher_sam.py", "fisher_sam.climb", 64, "", "", "", source)
    with jax.enable_x64(True):
        assert mutations.rows_through(nothing) == ["fisher_sam"]
    assert not mutations.is_caught(nothing, by_suites=False)


# Mistakes that no generator makes: file, right, wrong, the tests that must notice.
DELIBERATE = {
    "the perturbation is not undone": (
        "variants/sam.py",
        "return g_s, SharpnessAwareState(ball, readings)",
        "return optax.tree.sub(g_s, eps), SharpnessAwareState(ball, readings)",
        ("variants/test_sam_loops.py", "test_sam_against_reference"),
    ),
    "AsyncSAM waits for the gradient that it climbs": (
        "variants/async_sam.py",
        "state.step == 0, state.ascent_grad\n",
        "state.step == 0, fresh()[1]\n",
        ("variants/test_stale_loops.py", "test_async_sam_against_reference"),
    ),
    "the center is pulled at, but stays": (
        "elastic/_rule.py",
        "lambda z, d: (z + d).astype(z.dtype), center, move)",
        "lambda z, d: z, center, move)",
        ("elastic/test_elastic.py", "test_recorded_runs"),
    ),
    "the mean over the devices is left out": (
        "core/devices.py",
        "(devices.mean_grad(cotangent, weights), None)",
        "(cotangent, None)",
        ("parallel/test_parallel.py", "test_global_is_the_step_of_one_device"),
    ),
    "the state of the perturbation drifts": (
        "core/sharp.py",
        "_, new_state = perturb(g, state, params)",
        "_, new_state = perturb(ascent_grad, state, params)",
        ("parallel/test_parallel.py", "test_local_ascent_keeps_one_state"),
    ),
    "each group computes both gradients": (
        "parallel/pairs.py",
        "values, grads = fn(*tree.where(side == 0, *pair))",
        "values, grads = tree.where(side == 0, *[fn(*args) for args in pair])",
        ("parallel/test_communication.py", "test_a_pair_costs_one_pass"),
    ),
    "the ascent is rounded away": (
        "core/sharp.py",
        "return w.astype(tree.common_dtype(w.dtype, dtype))",
        "return w",
        ("training/test_half_precision.py", "test_half_precision_parameters_see_the_ascent"),
    ),
    "the iterate before the step is averaged": (
        "averages/_iterates.py",
        "jax.tree.map(wide, optax.apply_updates(params, updates))",
        "jax.tree.map(wide, params)",
        ("averages/test_running.py", "test_against_a_loop"),
    ),
    "SWAD's minimum counts once": (
        "averages/_swad.py",
        "is_first = looked_at & (place > last_bad + 1)",
        "is_first = looked_at & (place > last_bad + 1) & (place < len(smooth) - len(recent))",
        ("averages/test_swad.py", "test_the_minimum_counts_twice_with_the_defaults"),
    ),
    "a skipped step leaves its state": (
        "training/skip_nonfinite.py",
        "inner=tree.where(is_finite, inner_state, state.inner)",
        "inner=inner_state",
        ("variants/test_contract.py", "test_skip_nonfinite_skips"),
    ),
}
# What the PyTorch copy of bSAM does that is used most.
COPY_OF_BSAM = {
    "noise of deviation 1 / (N s)": (
        "n / jnp.sqrt(state.num_examples * s)",
        "n / (state.num_examples * s)",
    ),
    "the ascent starts at the noisy point": (
        "lambda g, s: rho * g / s, jax.tree.map(tree.widen, g), state.precision)",
        "lambda g, s, n: n + rho * g / s, g, state.precision, noise)",
    ),
    "noise and ascent stay in the weights": (
        "        s = _map(lambda s, a:",
        """        noise = posterior_noise(state, keys.of(state.key), params, 0)
        _, g = value_and_grad_at(mean_loss(losses_fn, batch, weights), params, noise)
        updates = _map(lambda u, n, g, s: u + n + rho_t * g / s, updates, noise, g, s)
        s = _map(lambda s, a:""",
    ),
    "the momentum averages g times δ": ("(h + delta * w)", "(h * delta)"),
    "the precision averages a square of the sharp gradient": (
        "(jnp.sqrt(s) * a + damping + delta), s, a)",
        "(jnp.sqrt(s) * jnp.abs(a) + damping + delta) ** 2, s, h)",
    ),
}
DELIBERATE |= {
    f"bSAM: {name}": (
        "variants/bsam.py",
        *change,
        ("variants/test_bsam_rule.py", "test_recorded_runs"),
    )
    for name, change in COPY_OF_BSAM.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DELIBERATE)
def test_a_deliberate_mistake_is_caught(name):
    *_, (suite, test) = DELIBERATE[name]
    suites = [f"{suite}::{test}"]
    mutations.run_suites(suites)  # green without the mistake
    with mutations.applied(deliberate(name)), pytest.raises(Exception):  # noqa: PT011, B017
        mutations.run_suites(suites)


def deliberate(name):
    file, right, wrong, _ = DELIBERATE[name]
    source = (PACKAGE / file).read_text()
    assert source.count(right) == 1, f"{file} no longer has the line {right!r}"
    return Mutation(file, "", 1, "", "", "", source.replace(right, wrong))


@pytest.mark.parametrize("name", COPY_OF_BSAM)
def test_a_copy_of_bsam_is_caught(name):
    """It runs for two steps, and they are not those of the authors' code."""
    with mutations.applied(deliberate(f"bSAM: {name}")), jax.enable_x64(True):
        assert importlib.import_module("recorded").largest_error(BSAM_RUN, steps=2) > 1e-6


def test_bsam_is_not_the_copy():
    with jax.enable_x64(True):
        assert importlib.import_module("recorded").largest_error(BSAM_RUN, steps=2) < 1e-14


BSAM_RUN = "bsam__m1_lr0.1_rho0.05"


# Fisher SAM broken in three ways, and what its row may say to hide it.
WRONG = {
    "formula": ("jnp.sqrt(eta) * jnp.abs(g)", "jnp.sqrt(eta * jnp.abs(g))"),
    "NaN at a zero gradient": (
        "tree.with_length(whitened, radius, tree.length(whitened))",
        "jax.tree.map(lambda x: radius * x / tree.norm(whitened), whitened)",
    ),
    "frozen schedule": ("ball(rho, climb)", "ball(rho(0) if callable(rho) else rho, climb)"),
}
SAYS = {
    "what it should": {},
    "that SAM's recorded run is its own": {"oracle": ("sam__sgd_rho0.05",)},
    "that no limit is known and nothing climbs": {"limit": None, "climbs": False},
    "that its radius is no schedule": {"schedules": ()},
}


@pytest.mark.parametrize("says", SAYS)
def test_a_variant_that_is_wrong_in_three_ways_is_caught_whatever_its_row_says(says):
    assert fails(WRONG, SAYS[says])


@pytest.mark.parametrize("name", WRONG)
def test_each_of_the_three_is_caught(name):
    assert fails({name: WRONG[name]}, {})


def fails(changes, says):
    """Whether a check of Fisher SAM's row fails with these changes in its file."""
    source = (PACKAGE / "variants/fisher_sam.py").read_text()
    for right, wrong in changes.values():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    mutation = Mutation("variants/fisher_sam.py", "fisher_sam", 1, "", "", "", source)
    with mutations.applied(mutation), jax.enable_x64(True):
        checks = importlib.import_module("checks")
        row = checks.VARIANTS["fisher_sam"]
        checks.VARIANTS["fisher_sam"] = dataclasses.replace(row, **says)
        for check in checks.CHECKS:
            try:
                check("fisher_sam")
            except Exception:
                return True
    return False


def test_an_oracle_is_required():
    cases = importlib.import_module("cases")
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(ValueError, match="its row needs an `oracle`"))
        cases.row("rst", {"rho": 0.05})
    assert all(case.oracle for case in cases.VARIANTS.values())
