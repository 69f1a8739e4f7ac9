"""What every test may use."""

import random

import pytest


@pytest.fixture
def seed() -> int:
    """Fresh every run; shown when the test fails."""
    value = random.SystemRandom().randrange(2**32)
    print(f"seed {value}")
    return value
