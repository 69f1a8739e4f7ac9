"""What every test may use, what hypothesis does, and the order of the tests."""

import random

import hypothesis
import pytest

# Drawn afresh in every run, and never judged by how fast this machine is.
hypothesis.settings.register_profile(
    "sglang-hma",
    database=None,
    deadline=None,
    derandomize=False,
    max_examples=60,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sglang-hma")


def pytest_collectstart() -> None:
    """hypothesis gives a test its settings where it is decorated, when its module is imported. What
    an earlier module imported may have loaded others, as torch.testing does."""
    hypothesis.settings.load_profile("sglang-hma")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that start servers come last."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


@pytest.fixture
def seed() -> int:
    """Fresh every run; shown when the test fails."""
    value = random.SystemRandom().randrange(2**32)
    print(f"seed {value}")
    return value
