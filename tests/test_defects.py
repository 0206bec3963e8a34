"""Each deliberate defect makes a test fail.

A defect is one changed line in a copy of the package. The tests that must notice the defect run on
that copy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SUITES = {  # the names that the defects use
    "trajectories": "test_trajectories.py",
    "parallel": "test_parallel.py",
    "cost": "test_parallel_cost.py",
    "precision": "test_precision.py",
    "elastic": "test_elastic.py",
}

DEFECTS = {
    "sign of the perturbation flipped": (
        "trajectories",
        "test_recorded_run and sam__",
        "perturbations/balls.py",
        "s * t * _as_real(factor, s), scaled",
        "-s * t * _as_real(factor, s), scaled",
    ),
    "normalization dropped": (
        "trajectories",
        "test_recorded_run and sam__",
        "perturbations/balls.py",
        "factor = radius / (tree.norm(scaled) + norm_eps)",
        "factor = radius",
    ),
    "perturbation not undone": (
        "trajectories",
        "test_recorded_run and sam__",
        "variants/sam.py",
        "return g_s, SharpnessAwareState(ball, readings)",
        "return optax.tree.sub(g_s, eps), SharpnessAwareState(ball, readings)",
    ),
    "AsyncSAM waits for the gradient that it climbs": (
        "trajectories",
        "test_recorded_run and asyncsam",
        "variants/async_sam.py",
        "state.step == 0, state.ascent_grad\n",
        "state.step == 0, fresh()[1]\n",
    ),
    "the center is pulled at, but stays": (
        "elastic",
        "test_recorded_runs",
        "elastic/_rule.py",
        "lambda z, d: (z + d).astype(z.dtype), center, move)",
        "lambda z, d: z, center, move)",
    ),
    "mean over the devices left out": (
        "parallel",
        "test_global_is_the_step and shard_map and -sam]",
        "core/devices.py",
        "(_mean(axes, cotangent, share), None)",
        "(cotangent, None)",
    ),
    "state of the perturbation drifts": (
        "parallel",
        "test_local_ascent_keeps and shard_map",
        "core/sharp.py",
        "_, new_state = perturb(g, state, params)",
        "_, new_state = perturb(ascent_grad, state, params)",
    ),
    "each group computes both gradients": (
        "cost",
        "test_a_pair_costs",
        "parallel/pairs.py",
        "result = fn(*tree.where(side == 0, *pair))\n        results = [result, result]",
        "results = [fn(*args) for args in pair]",
    ),
    "the ascent rounded away": (
        "precision",
        "see_the_ascent and -sam]",
        "core/sharp.py",
        "return w.astype(jnp.promote_types(w.dtype, dtype))",
        "return w",
    ),
    "a skipped step leaves its state": (
        "precision",
        "as_if_its_batch and -sam]",
        "training/skip_nonfinite.py",
        "inner=tree.where(is_finite, inner_state, state.inner)",
        "inner=inner_state",
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Cache compiled programs that a defect does not change; each worker has its own cache."""
    return tmp_path_factory.mktemp("cache")


def run_tests(suite, selection, folder, cache):
    """Run some tests on the package in `folder`; return the exit code and the output."""
    file = SUITES[suite]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [
        "-m",
        "",
        "-k",
        selection,
        "-c",
        str(ROOT / "pyproject.toml"),
        str(ROOT / "tests" / file),
    ]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    if suite != "cost":  # the cost suite reads optimized programs
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    result = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout[-2000:]


def test_an_unchanged_copy_is_green(tmp_path, cache):
    """One suite is enough: without a defect, this run covers the others anyway."""
    shutil.copytree(ROOT / "samx", tmp_path / "samx")
    code, output = run_tests("trajectories", "test_recorded_run and sam__", tmp_path, cache)
    assert code == pytest.ExitCode.OK, output


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_turns_its_suite_red(name, tmp_path, cache):
    suite, tests, file, right, wrong = DEFECTS[name]
    shutil.copytree(ROOT / "samx", tmp_path / "samx")
    source = (tmp_path / "samx" / file).read_text()
    assert source.count(right) == 1, f"{file} no longer has the line {right!r}"
    (tmp_path / "samx" / file).write_text(source.replace(right, wrong))
    code, output = run_tests(suite, tests, tmp_path, cache)
    assert code == pytest.ExitCode.TESTS_FAILED, output
