"""Whatever a stranger sends to the control ports of real managers, over real sockets: no thread
ends, nothing is written, and a request still goes its way."""

import struct
from collections.abc import Sequence

import numpy as np
import psutil
import pytest
import torch
from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_hma.transfer.limited_log import LINES
from sglang_hma.transfer.messages import PROTOCOL

from .real_managers import HOST, Pair, free_port, push, push_and_settle, until

BIG = str(2**40).encode()


def registration(managers: Pair, **changed: bytes) -> list[bytes]:
    """The decode server's own, with some frames changed: `_16=b"2"`."""
    message = managers.decode.build_receiver_registration_message()
    for name, frame in changed.items():
        message[int(name[1:])] = frame
    return message


def page_list(managers: Pair, room: bytes, pages: Sequence[int] = (1, 2)) -> list[bytes]:
    packed = struct.pack(f"{len(pages)}i", *pages)
    session = managers.decode.get_session_id().encode()
    port = str(managers.decode.rank_port).encode()
    return [room, HOST.encode(), port, session, packed, b"0", b"", b"1", b"0", b"", b"7"]


TO_PREFILL = [
    [b"WATERMARK"],
    [b"WATERMARK", b"1", b"1"],
    [b"WATERMARK", b"1", b"1", b"10.0.0.2:15001"],
    [b"STAGING_RSP"],
    [b"STAGING_RSP", b"1", b"999999999", b"0", b"0", b"0", b"h:1"],
    [b""],
    [b"\xff\xfe"],
    [b"None"],
    [b"None"] * 20,
    [b"ABORT"],
    [b"ABORT", b"7", b"10.0.0.9", b"9", b"1"],
    [b"ABORT", b"7", b"a.name.to.look.up", b"9", b"1"],
    [b"BOOTSTRAP", b"7", b"10.0.0.9", b"9"],
    [b"77"],
    [b"77", b"10.0.0.2", b"5000", b"10.0.0.2:15001", b"\0" * 8, b"0", b"", b"1", b"0", b""],
    [b"AUX_DATA", b"0", b"0", BIG, struct.pack(">I", 8), b"x" * 8],
    [b"HMA-CLAIM", b"2", b"\x93\x01\xa91.2.3.4\x01"],
    [b"HMA-LANDED", b"1", b"\x90"],
]

TO_DECODE = [
    [b"STAGING_REQ"],
    [b"STAGING_REQ", b"1", b"0", b"0", b"h:1"],
    [b"AUX_DATA"],
    [b"AUX_DATA", b"0", b"0", BIG, struct.pack(">I", 8), b"x" * 8],
    [b"AUX_DATA", b"0", b"0", b"1", struct.pack(">I", 8), b"x" * 8],
    [b"AUX_DATA", b"0", b"99", b"0", struct.pack(">I", 8), b"x" * 8],
    [b"CHUNK_READY"],
    [b"CHUNK_READY", b"1", b"0", b"0", b"0", b"h:1", b"0"],
    [b"ABORT_ACK"],
    [b"ABORT_ACK", b"1", b"x", b"1"],
    [b"77"],
    [b"77", b"3", b"0"],
    [b"77", b"-1", b"0"],
    [b"\xff"],
    [b"None"],
    [b"HMA-CLAIM", b"1", b"\x90"],
]


@pytest.mark.parametrize("message", TO_PREFILL, ids=lambda m: f"{len(m)} {m[0]!r:.20}")
def test_prefill_survives(managers: Pair, message: list[bytes]) -> None:
    push_and_settle(managers, "prefill", message)
    managers.check()


@pytest.mark.parametrize("message", TO_DECODE, ids=lambda m: f"{len(m)} {m[0]!r:.20}")
def test_decode_survives(managers: Pair, message: list[bytes]) -> None:
    before = managers.decode_memory.rows.clone()
    push_and_settle(managers, "decode", message)
    assert torch.equal(managers.decode_memory.rows, before), "a stranger wrote metadata"
    managers.check()


@pytest.mark.parametrize(
    "changed",
    [
        {"_16": b"2"},
        {"_16": b"2", "_17": b"1"},
        {"_17": b"1"},
        {"_16": b"0"},
        {"_7": b"-1"},
        {"_8": b"0"},
        {"_8": b"9" * 5000},
        {"_9": b"x"},
        {"_2": b"65536"},
        {"_1": b"a.name.to.look.up"},
        {"_3": b"no port"},
        {"_4": b"\0" * 7},
        {"_4": b""},
        {"_6": b"\xff\xff\xff\xff"},
        {"_10": struct.pack("<2I", 1, 4)},
        {"_14": b"\1" * 8, "_15": b"8"},
        {"_19": b""},
        {"_20": b"HMA-KV/1 junk"},
        {"_20": b"HMA-KV/%d \x93\xa1x\x01\x01" % PROTOCOL},
    ],
    ids=str,
)
def test_prefill_survives_registrations(managers: Pair, changed: dict[str, bytes]) -> None:
    """Of a new session and of the one that is known."""
    message = registration(managers, **({"_3": b"127.0.0.1:9"} | changed))
    push_and_settle(managers, "prefill", message, registration(managers, **changed))
    managers.check()


def test_frames_that_are_too_long_are_not_received(managers: Pair) -> None:
    rss = psutil.Process().memory_info().rss
    frame = bytes(64 << 20)
    for port in (managers.prefill.rank_port, managers.decode.rank_port):
        for _ in range(8):
            push(port, [b"77", frame], timeout_ms=300)
    del frame
    assert psutil.Process().memory_info().rss - rss < 32 << 20
    managers.check()


def test_a_page_list_names_pages_that_exist_and_stays_as_it_is(managers: Pair) -> None:
    room = next(managers.rooms)
    sender = managers.sender(room)
    name = str(room).encode()
    for pages in ((1, 16), (1, -1), (2**31 - 1,)):
        push_and_settle(managers, "prefill", page_list(managers, name, pages))
        assert sender.poll() == KVPoll.Bootstrapping
    push_and_settle(managers, "prefill", page_list(managers, name, (1, 2)))
    assert sender.poll() == KVPoll.WaitingForInput
    push_and_settle(managers, "prefill", page_list(managers, name, (3, 4)))
    (info,) = managers.prefill.transfer_infos[room].values()
    assert info.dst_kv_indices.tolist() == [1, 2]
    sender.abort()
    sender.clear()
    managers.check()


def test_success_of_a_request_without_pages_is_not_believed(managers: Pair) -> None:
    """SGLang's scheduler would end."""
    room = next(managers.rooms)
    receiver = managers.receiver(room)
    push_and_settle(managers, "decode", [str(room).encode(), b"4", b"0"])
    assert receiver.poll() == KVPoll.WaitingForInput
    receiver.abort()
    receiver.clear()
    managers.check()


def test_reasons_of_a_peer_are_one_short_line(managers: Pair) -> None:
    room = next(managers.rooms)
    receiver = managers.receiver(room)
    reason = b"no\nroom \x1b[31m" + b"x" * 100_000
    push_and_settle(managers, "decode", [str(room).encode(), b"0", b"0", reason])
    found = managers.decode.failure_records[room]
    assert receiver.poll() == KVPoll.Failed
    assert found.startswith("no room  [31m") and len(found) < 5000
    receiver.clear()


def test_a_flood_fills_no_log(managers: Pair, caplog: pytest.LogCaptureFixture) -> None:
    push_and_settle(managers, "decode", *[[b"\n" + bytes(1000)]] * 3000)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) <= LINES + 1 and all(len(line) < 400 and "\n" not in line for line in lines)
    managers.check()


def test_requests_that_never_arrive_are_bounded(
    managers: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_hma.transfer.page_lists.MAX_WAITING_BYTES", 64 << 10)
    managers.check()  # it has registered
    names = [str(10**9 + i).encode() for i in range(500)]
    push_and_settle(managers, "prefill", *(page_list(managers, name) for name in names))
    assert 0 < sum(room >= 10**9 for room in managers.prefill.transfer_infos) < 100
    assert sum(room >= 10**9 for room in managers.prefill.request_status) < 100
    until(lambda: not managers.prefill.sender.requests)
    managers.check()


@pytest.mark.parametrize(
    "pointers",
    [
        [2**64 - 8192 * (i + 1) for i in range(4)],
        [2**56 + (i << 30) for i in range(4)],
        [8192] * 4,
        "shifted",
    ],
    ids=["past the end", "elsewhere", "one place", "other pages of the same memory"],
)
def test_memory_of_a_known_session_cannot_be_moved(
    managers: Pair, pointers: list[int] | str
) -> None:
    """Every later write would fail, or land in somebody else's pages."""
    managers.check()  # it has registered
    known = managers.decode.kv_args.kv_data_ptrs
    moved = [known[0], *known[2:], known[1]] if isinstance(pointers, str) else pointers
    session = managers.decode.get_session_id()
    before = managers.prefill.decode_kv_args_table[session]
    push_and_settle(managers, "prefill", registration(managers, _4=struct.pack("4Q", *moved)))
    assert managers.prefill.decode_kv_args_table[session] is before
    managers.check()


def test_a_strangers_session_ends_only_its_own_request(managers: Pair) -> None:
    """It registers properly, with memory that nobody has, and asks for a request's pages."""
    room, session = next(managers.rooms), f"{HOST}:{free_port()}".encode()
    sender = managers.sender(room)
    strange = page_list(managers, str(room).encode())
    strange[3] = session
    push_and_settle(managers, "prefill", registration(managers, _3=session), strange)
    until(lambda: sender.poll() == KVPoll.WaitingForInput)
    sender.init(2, 0)
    sender.send(np.array([1, 2], dtype=np.int32))
    until(lambda: sender.poll() == KVPoll.Failed)
    sender.clear()
    managers.check()
    until(lambda: not managers.prefill.sender.requests)
