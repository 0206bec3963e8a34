"""Every row of the table passes every check of `checks.py`."""

import pytest
from cases import VARIANTS
from checks import CHECKS


@pytest.mark.parametrize(
    ("name", "check"),
    [pytest.param(n, c, id=f"{n}-{c.__name__}") for n in VARIANTS for c in CHECKS],
)
def test_row(name, check, float64):
    del float64
    check(name)
