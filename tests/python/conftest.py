"""Settings for all tests: hypothesis without deadlines and with a fixed seed, threads put back."""

import hypothesis
import pytest
import rmsnorm

hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=100, database=None
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def thread_count():
    """rmsnorm.set_num_threads, undone at the end of the test."""
    before = rmsnorm.get_num_threads()
    yield rmsnorm.set_num_threads
    rmsnorm.set_num_threads(before)
