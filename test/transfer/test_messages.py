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
        messages.parse([tag, messages.VERSION, body])


@given(st.lists(st.integers(-(2**70), 2**70), max_size=9))
def test_wrong_numbers_raise_value_error(numbers: list[int]) -> None:
    small = [n for n in numbers if -(2**63) <= n < 2**64]
    body = msgspec.msgpack.encode(small)
    for tag in messages.TYPES:
        with pytest.raises(ValueError):
            messages.parse([tag, messages.VERSION, body, struct.pack("i", 1)])
        with pytest.raises(ValueError, match=f"this server version {messages.PROTOCOL}"):
            messages.parse([tag, b"%d" % (messages.PROTOCOL + 1), body])
        with contextlib.suppress(ValueError):
            messages.parse([tag, messages.VERSION, body])


def test_messages_survive_the_wire() -> None:
    for message in (
        messages.Claim(1, "10.0.0.2", 65535),
        messages.Renewal([1, 2**63], "10.0.0.2", 65535),
        messages.Landed(1, 2, 3, 4, 5, 6, 7, [2**64 - 1], 1),
        messages.Resend(1, 2, "h:1", 3, 4, 5, 6, 1),
        messages.Landed(1, 2, 3, 4, 5, 6, 7, [], 0, kind=1),
        messages.Resend(1, 2, "h:1", 3, 4, 5, 6, 1, kind=1),
        messages.Verified(1, 2, "h:1"),
    ):
        assert messages.parse(messages.frames(message)) == message
    assert messages.parse([b"None", b"x"]) is None and messages.parse([]) is None


@pytest.mark.parametrize("kind", [-1, 2, 1.0, None, 2**63])
def test_there_are_two_kinds_of_pages(kind: object) -> None:
    for tag, numbers in (
        (messages.LANDED_TAG, [1, 2, 3, 4, 5, 6, 7, [], 0, kind]),
        (messages.RESEND_TAG, [1, 2, "h:1", 3, 4, 5, 6, 1, kind]),
    ):
        with pytest.raises(ValueError):
            messages.parse([tag, messages.VERSION, msgspec.msgpack.encode(numbers)])


@pytest.mark.parametrize("pages", [[], [0], [1, 2, 3], [1, 1 << 31], 7])
def test_introductions_count_the_pages_of_one_kind_or_two(pages: object) -> None:
    body = msgspec.msgpack.encode(["hma-kv/2 name=x", pages, 8])
    frame = messages.INTRODUCTION_TAG + b"/" + messages.VERSION + b" " + body
    with pytest.raises(ValueError):
        messages.Introduction.parse(frame)


@pytest.mark.parametrize("host", ["a.name", "", "10.0.0.2 ", "10.0.0.300", "::1\n", "x" * 65])
def test_addresses_are_numbers(host: str) -> None:
    for frames in ([1, host, 5000], [[1], host, 5000]):
        tag = messages.CLAIM_TAG if frames[0] == 1 else messages.RENEWAL_TAG
        with pytest.raises(ValueError):
            messages.parse([tag, messages.VERSION, msgspec.msgpack.encode(frames)])


def test_introductions_survive_the_wire() -> None:
    made = messages.Introduction("hma-kv/1 name=x", [1000, 100], 8)
    assert messages.Introduction.parse(made.frame()) == made
