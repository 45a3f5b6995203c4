"""Arrays that the caller's own code moves while their call is read: no freed memory is read or written."""

import isolation
import moving_cases
import pytest


@pytest.fixture(scope="module")
def outcomes():
    return isolation.outcomes("moving_cases.py", moving_cases.CASES, MALLOC_MMAP_THRESHOLD_="2048")


@pytest.mark.parametrize("name", moving_cases.CASES)
def test_case(name, outcomes):
    assert outcomes[name] == "", outcomes[name]
