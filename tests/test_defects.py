"""The suite sees what it is there to see: each deliberate defect turns it red.

A defect is one line changed in a copy of the package; the trajectory tests then run on that copy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUITE = "test_recorded_run or test_schedules"  # of test_trajectories.py: the fast part

DEFECTS = {
    "nothing changed": None,
    "sign of the perturbation flipped": (
        "perturbations.py",
        "s * t * jnp.asarray(factor, s.real.dtype)",
        "-s * t * jnp.asarray(factor, s.real.dtype)",
    ),
    "normalization dropped": (
        "perturbations.py",
        "factor = radius / (_tree.norm(scaled) + norm_eps)",
        "factor = radius",
    ),
    "perturbation not undone": (
        "variants/sam.py",
        "return g_s, SharpnessAwareState(ball, readings)",
        "return optax.tree.sub(g_s, eps), SharpnessAwareState(ball, readings)",
    ),
    "SAMPa on the wrong batch": (
        "variants/sampa.py",
        "previous = _tree.where(is_first, current, previous)",
        "previous = current",
    ),
    "SAMPa's trial step forgotten": (
        "variants/sampa.py",
        "trial = _tree.where(is_first, optax.tree.zeros_like(trial), trial)",
        "trial = optax.tree.zeros_like(trial)",
    ),
    "schedule of rho frozen": (
        "perturbations.py",
        "at_step(rho, state.step)",
        "at_step(rho, jnp.zeros_like(state.step))",
    ),
    "biases scaled like weights": (
        "_metrics.py",
        "if _tree.is_inexact(w) and is_scaled(path, w) else 1.0",
        "if _tree.is_inexact(w) else 1.0",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_turns_the_suite_red(name, tmp_path):
    shutil.copytree(ROOT / "samx", tmp_path / "samx")
    if DEFECTS[name]:
        file, right, wrong = DEFECTS[name]
        source = (tmp_path / "samx" / file).read_text()
        assert source.count(right) == 1, f"{file} no longer has the line {right!r}"
        (tmp_path / "samx" / file).write_text(source.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SUITE]
    command += ["-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests" / "test_trajectories.py")]
    result = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    expected = pytest.ExitCode.TESTS_FAILED if DEFECTS[name] else pytest.ExitCode.OK
    assert result.returncode == expected, result.stdout[-2000:]
