"""What tests of training need from the processor."""

import pytest
from processor import has_float16


@pytest.fixture(scope="session")
def float16():
    if not has_float16():
        pytest.skip("XLA has no float16 for this processor")
