"""Objects that are not the arrays that they say they are, and DLPack tensors that say what is not so.

Each is refused by name with nothing written, or taken for what it really is.
"""

import hostile_cases
import isolation
import pytest


@pytest.fixture(scope="module")
def outcomes():
    return isolation.outcomes("hostile_cases.py", hostile_cases.CASES)


@pytest.mark.parametrize("name", hostile_cases.CASES)
def test_case(name, outcomes):
    assert outcomes[name] == "", outcomes[name]
