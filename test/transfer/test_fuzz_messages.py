"""A tenth of `make fuzz-messages`, with another seed each time."""

from .fuzz_messages import MAX_GROWTH, fuzz
from .real_managers import Pair


def test_mutated_messages_change_nothing(managers: Pair, seed: int) -> None:
    assert fuzz(managers, 1000, seed) < MAX_GROWTH
