"""Messages survive the wire, and whatever else arrives raises ValueError or parses."""

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.transfer import messages


@given(st.sampled_from(list(messages.TYPES)), st.binary(max_size=60))
def test_junk_raises_value_error_or_parses(tag: bytes, body: bytes) -> None:
    with contextlib.suppress(ValueError):
        messages.parse([tag, body])


@given(st.lists(st.integers(-(2**70), 2**70), max_size=9))
def test_wrong_numbers_raise_value_error(numbers: list[int]) -> None:
    small = [n for n in numbers if -(2**63) <= n < 2**64]
    body = msgspec.msgpack.encode(small)
    for tag in messages.TYPES:
        with pytest.raises(ValueError):
            messages.parse([tag, body, struct.pack("i", 1)])
        with contextlib.suppress(ValueError):
            messages.parse([tag, body])


def test_messages_survive_the_wire() -> None:
    for message in (
        messages.Claim(1, "10.0.0.2", 65535),
        messages.Renewal([1, 2**63], "10.0.0.2", 65535),
        messages.Landed(1, 2, 3, 4, 5, 6, 7, [2**64 - 1]),
        messages.Resend(1, 2, "h:1", 3, 4, 5, 6),
        messages.Verified(1, 2, "h:1"),
    ):
        assert messages.parse(messages.frames(message)) == message
    assert messages.parse([b"None", b"x"]) is None and messages.parse([]) is None
