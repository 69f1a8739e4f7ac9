"""Whatever a peer sends, SGLang's receiving thread gets only what it can parse."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo

from sglang_hma.transfer import messages
from sglang_hma.transfer.handshake import FORMAT_FRAME, Handshake
from sglang_hma.transfer.message_intake import MessageIntake

from .test_handshake import OURS, handshake, registration

PAGES = struct.pack("2i", 5, 6)


def intake(role: str = "prefill") -> MessageIntake:
    if role == "prefill":
        return MessageIntake(handshake())
    return MessageIntake(
        Handshake(str(OURS), [8704] * 4, role=role, attn_tp=1, stock_allowed=False, plain=True)
    )


def request(pages: bytes = PAGES, *generation: bytes) -> list[bytes]:
    """A decode rank's pages for room 77, as SGLang 0.5.23 publishes them."""
    head = [b"77", b"10.0.0.2", b"5000", b"10.0.0.2:15001", pages]
    return [*head, b"0", b"", b"1", b"0", b"", *generation]


@given(st.lists(st.binary(max_size=40), max_size=24))
def test_no_message_raises(message: list[bytes]) -> None:
    intake().screen(message)


@given(st.integers(0, 9), st.binary(max_size=12))
def test_broken_registrations_are_dropped_or_parsed(field: int, junk: bytes) -> None:
    message = registration(FORMAT_FRAME + str(OURS).encode())
    message[field] = junk
    if intake().screen(message) is not None and message[0] == b"None":
        KVArgsRegisterInfo.from_zmq(message)


def test_negative_pages_are_dropped() -> None:
    assert intake().screen(request(struct.pack("2i", 5, -1))) is None
    assert intake().screen(request()) == request()


def test_a_request_brings_its_generation() -> None:
    made = intake()
    for message, generation in (
        (request(), None),
        (request(PAGES, b""), None),
        (request(PAGES, b"8123"), 8123),
    ):
        assert made.screen(message) == message
        assert made.generation(77, "10.0.0.2:15001") == generation
    made.forget(77)
    assert made.generation(77, "10.0.0.2:15001") is None
    assert made.screen(request(PAGES, b"x")) is None


def test_our_messages_go_to_the_handler_and_no_further() -> None:
    made, heard = intake(), []
    claim = messages.Claim(77, "10.0.0.2", 5000)
    assert made.screen(messages.frames(claim)) is None  # nobody listens yet
    made.handler = heard.append
    assert made.screen(messages.frames(claim)) is None and heard == [claim]
    assert made.screen([messages.CLAIM_TAG, b"junk"]) is None and heard == [claim]


def test_an_error_of_the_handler_stays_with_it(caplog: pytest.LogCaptureFixture) -> None:
    made = intake()

    def fails(message: messages.Message) -> None:
        raise RuntimeError("a bug")

    made.handler = fails
    assert made.screen(messages.frames(messages.Claim(77, "10.0.0.2", 5000))) is None
    assert "a bug" in caplog.text


def test_decode_leaves_the_rest_to_sglang() -> None:
    assert intake("decode").screen([b"77", b"4", b"0"]) == [b"77", b"4", b"0"]
