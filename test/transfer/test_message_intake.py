"""Whatever a peer sends, SGLang's receiving thread gets only what it can parse."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.disaggregation.common.utils import pack_int_lists
from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo, TransferInfo

from sglang_hma.transfer import messages, registrations
from sglang_hma.transfer.message_intake import DecodeIntake, PrefillIntake
from sglang_hma.transfer.rooms import Rooms

from .test_handshake import (
    WINDOW_PAGES,
    handshake,
    introduction,
    registration,
    windowed_handshake,
    windowed_registration,
)

PAGES = struct.pack("2i", 5, 6)
SESSION = "10.0.0.2:15001"


def intake() -> PrefillIntake:
    """Of a prefill server that one decode server has registered with."""
    made = PrefillIntake(handshake(), Rooms())
    assert made.screen(registration(introduction())) is not None
    return made


def request(pages: bytes = PAGES, *generation: bytes, room: bytes = b"77") -> list[bytes]:
    """A decode rank's pages for a room, as SGLang 0.5.23 publishes them."""
    head = [room, b"10.0.0.2", b"5000", SESSION.encode(), pages]
    return [*head, b"0", b"", b"1", b"0", b"", *generation]


@given(st.lists(st.binary(max_size=40), max_size=24))
def test_no_message_raises(message: list[bytes]) -> None:
    intake().screen(message)


NUMBERS = [0, 1, 2, 7, 2**16, 2**31, 2**32, 2**57, 2**63, 2**64 - 1, 2**64, -1]
JUNK = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([str(n).encode() for n in NUMBERS]),
    st.sampled_from([struct.pack("<Q", n) for n in NUMBERS if 0 <= n < 2**64]),
    st.just(b"9" * 5000),
)


@given(st.integers(0, 20), JUNK)
def test_broken_registrations_are_dropped_or_parsed(field: int, junk: bytes) -> None:
    message = registration(introduction())
    message[field] = junk
    if PrefillIntake(handshake(), Rooms()).screen(message) is not None and message[0] == b"None":
        info = KVArgsRegisterInfo.from_zmq(message)
        assert max(info.dst_kv_ptrs, default=0) < 2**57 and info.dst_dcp_rank >= 0
        assert 0 <= info.dst_dcp_rank < info.dst_dcp_size and 0 <= info.dst_tp_rank < 2**16


@given(st.integers(0, 10), JUNK)
def test_broken_page_lists_are_dropped_or_parsed(field: int, junk: bytes) -> None:
    message = request(PAGES, b"1")
    message[field] = junk
    if intake().screen(message) is not None and message[0].isdigit():
        info = TransferInfo.from_zmq(message)
        assert info.mooncake_session_id == SESSION and info.required_dst_info_num == 1
        assert all(0 <= page < 100 for page in info.dst_kv_indices.tolist())
        prefix = info.decode_prefix_len or 0
        assert 0 <= info.dst_aux_index < 8 and prefix % 32 == 0
        assert len(info.dst_kv_indices) or not prefix


@pytest.mark.parametrize(
    ("prefix", "pages", "taken"),
    [("32", 1, True), ("6400", 2, True), ("33", 1, False), ("32", 0, False), ("0", 0, True)],
)
def test_a_prefix_that_decode_has(prefix: str, pages: int, taken: bool) -> None:
    message = request(PAGES[: 4 * pages])
    message[8] = prefix.encode()
    assert intake().screen(message) == (message if taken else None)


@pytest.mark.parametrize(
    ("pages", "taken"), [((5, -1), False), ((5, 100), False), ((5, 99), True), ((), True)]
)
def test_pages_that_do_not_exist(pages: Sequence[int], taken: bool) -> None:
    message = request(struct.pack(f"{len(pages)}i", *pages))
    assert intake().screen(message) == (message if taken else None)


def windowed_request(*windows: list[int]) -> list[bytes]:
    message = request()
    message[6] = pack_int_lists(list(windows), "i")
    return message


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        (([1, 2, 3],), None),
        (([WINDOW_PAGES - 1],), None),
        (([WINDOW_PAGES],), "page 20 of 20"),
        (([1, -2],), "a state index is negative"),
        (([1, 1],), "one of them twice"),
        (([1, 2, 3, 4],), "a window of 4 pages: there may be 1 to 3"),
        (([],), "a window of 0 pages"),
        ((), "do not go with"),
        (([1], [2]), "do not go with"),
    ],
)
def test_pages_of_a_window(
    windows: tuple[list[int], ...], words: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A window of 63 tokens is in three pages at most."""
    made = PrefillIntake(windowed_handshake(), Rooms())
    assert made.screen(windowed_registration()) is not None
    message = windowed_request(*windows)
    assert made.screen(message) == (message if words is None else None)
    assert words is None or words in caplog.text


def test_no_window_for_a_server_with_one_pool(caplog: pytest.LogCaptureFixture) -> None:
    assert intake().screen(windowed_request([1])) is None and "do not go with" in caplog.text


@given(st.binary(max_size=60))
def test_broken_windows_are_dropped_or_parsed(junk: bytes) -> None:
    made = PrefillIntake(windowed_handshake(), Rooms())
    assert made.screen(windowed_registration()) is not None
    message = request()
    message[6] = junk
    if made.screen(message) is not None:
        (window,) = TransferInfo.from_zmq(message).dst_state_indices
        assert len(set(window)) == len(window) and all(0 <= page < WINDOW_PAGES for page in window)


def test_pages_are_for_a_server_that_has_registered_from_there() -> None:
    for field, other in ((1, b"10.0.0.3"), (2, b"5001"), (3, b"10.0.0.2:15002")):
        message = request()
        message[field] = other
        assert intake().screen(message) is None
    assert PrefillIntake(handshake(), Rooms()).screen(request()) is None


def test_pages_are_published_once(caplog: pytest.LogCaptureFixture) -> None:
    made = intake()
    assert made.open_rooms.open(77) is None
    assert made.screen(request()) == request()
    assert made.screen(request()) is None and "dropp" not in caplog.text.lower()
    assert made.screen(request(struct.pack("2i", 5, 7))) is None
    assert "before, and others" in caplog.text
    assert made.rooms() == [77]
    made.forget(77)
    assert not made.rooms()
    made.open_rooms.close(77)
    # Whatever was left of a request that has ended is replaced.
    for last in (7, 8):
        message = request(struct.pack("2i", 5, last))
        assert made.screen(message) == message


def test_memory_of_a_living_process_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ended = False
    asked: list[object] = []

    def refuses(address: object, timeout_s: float) -> bool:
        asked.append(address)
        return ended

    monkeypatch.setattr(registrations, "refuses", refuses)
    monkeypatch.setattr(registrations, "ASK_EVERY_S", 0.0)
    made = intake()
    again, other = registration(introduction()), registration(introduction(), start=1 << 41)
    assert made.screen(again) == again and not asked
    assert made.screen(other) is None and asked == [("10.0.0.2", 5000)]
    assert "was registered with other memory by 10.0.0.2:5000" in caplog.text
    ended = True
    assert made.screen(other) == other
    ended = False
    assert made.screen(again) is None


def test_too_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: set[tuple[str, int]] = set()
    dropped: list[str] = []
    monkeypatch.setattr(registrations, "refuses", lambda address, timeout_s: address in ended)
    monkeypatch.setattr(registrations, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(registrations, "MAX_SESSIONS", 3)
    made = PrefillIntake(handshake(), Rooms(), drop_session=dropped.append)

    def register(index: int) -> bool:
        message = registration(introduction())
        message[2] = str(5000 + index).encode()
        message[3] = f"10.0.0.2:{15000 + index}".encode()
        return made.screen(message) is not None

    assert all(map(register, range(3))) and not register(3) and not dropped
    ended.add(("10.0.0.2", 5001))
    for _ in range(3):  # whose turn it is to be looked at
        register(3)
    assert dropped == ["10.0.0.2:15001"] and register(3)


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
    assert made.screen(messages.frames(messages.Landed(1, 2, 3, 4, 5, 6, 7, [8], 0))) is None
    assert heard == [claim], "a message for the other role"


def test_an_error_of_the_handler_stays_with_it(caplog: pytest.LogCaptureFixture) -> None:
    made = intake()

    def fails(message: messages.Message) -> None:
        raise RuntimeError("a bug")

    made.handler = fails
    assert made.screen(messages.frames(messages.Claim(77, "10.0.0.2", 5000))) is None
    assert "a bug" in caplog.text


def test_what_decode_takes() -> None:
    made = DecodeIntake(Rooms(), waits=False)
    assert made.open_rooms.open(77) is None
    for message, taken in (
        ([b"77", b"0", b"0"], True),
        ([b"77", b"0", b"0", b"why"], True),
        ([b"77", b"4", b"0"], False),  # nothing is published yet
        ([b"77", b"2", b"0"], False),
        ([b"ABORT_ACK", b"77", b"0", b"1"], True),
        ([b"ABORT_ACK", b"77"], False),
        ([b"ABORT", b"77"], False),
    ):
        assert made.screen(list(message)) == (message if taken else None), message
    made.open_rooms.publish(77)
    assert made.screen([b"77", b"4", b"0"]) == [b"77", b"4", b"0"]
    assert DecodeIntake(Rooms(), waits=True).screen([b"77", b"2", b"0"]) is not None


def test_other_protocol_versions_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tag, _, body = messages.frames(messages.Claim(77, "10.0.0.2", 5000))
    newer = messages.PROTOCOL + 1
    for version, words in ((b"%d" % newer, f"version {newer}"), (b"\xff", "version unknown")):
        assert intake().screen([tag, version, body]) is None
        assert words in caplog.text and f"this server version {messages.PROTOCOL}" in caplog.text
