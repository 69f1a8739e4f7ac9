from collections.abc import Iterator

import pytest

from .real_managers import Pair, real_pair


@pytest.fixture(scope="module")
def managers() -> Iterator[Pair]:
    with real_pair() as pair:
        yield pair
