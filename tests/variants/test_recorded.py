"""Recorded runs of the authors' own code that no row takes as its oracle."""

import averaged
import elastic_runs
import optax
import problem
import pytest
import recorded
from cases import VARIANTS
from recorded import ON_DEVICES, RECORDED

pytestmark = pytest.mark.usefixtures("float64")

NOT_ORACLES = [  # those of rows are among the checks of `test_rows.py`
    name for name in RECORDED if not any(name in case.oracle for case in VARIANTS.values())
]


@pytest.mark.parametrize("name", NOT_ORACLES)
def test_recorded_run_of_the_authors_code(name):
    run = RECORDED[name]
    assert run.entry is None  # a base alone
    recorded.check(name, optax.with_extra_args_support(run.base))


def test_every_recorded_run_is_used():
    used = {*RECORDED, *ON_DEVICES, *elastic_runs.RECORDED, *averaged.RECORDED}
    assert {file.stem for file in problem.TRAJECTORIES.glob("*.npz")} == used
