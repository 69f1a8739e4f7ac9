"""Decode servers that a prefill server refuses, by what they say of themselves."""

import dataclasses
import struct
from typing import Any

import pytest
from sglang.srt.disaggregation.common.utils import pack_int_lists

from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer import sglang_messages
from sglang_hma.transfer.handshake import Handshake, OwnMemory
from sglang_hma.transfer.messages import PROTOCOL, Introduction

OURS = KVFormat.bfp8(kv_heads=4, head_dim=64, v_head_dim=64, layers=2)
PAGE_BYTES, PAGES, ROWS = 8704, 100, 8
START = 1 << 40
NEWER = PROTOCOL + 1


def handshake() -> Handshake:
    """Of a prefill server with attention TP 1."""
    memory = OwnMemory(((PAGE_BYTES,) * 4,), (PAGES,), (64,), ROWS)
    return Handshake(str(OURS), memory, role="prefill", attn_tp=1, stock_allowed=False, plain=True)


WINDOWED = dataclasses.replace(OURS, layers=3, window=63, windowed="5")
WINDOW_PAGES = 20  # in each of the buffers of one layer


def windowed_handshake() -> Handshake:
    """Of a prefill server with a second pool, for one layer with a window."""
    sizes = (PAGE_BYTES,) * 4, (PAGE_BYTES,) * 2
    memory = OwnMemory(sizes, (PAGES, WINDOW_PAGES), (64,), ROWS)
    options = {"role": "prefill", "attn_tp": 1, "stock_allowed": False, "plain": True}
    return Handshake(str(WINDOWED), memory, **options)


def windowed_registration(
    *,
    start: int = START + 4 * PAGES * PAGE_BYTES,
    step: int = WINDOW_PAGES * PAGE_BYTES,
    buffers: int = 2,
    page: int = PAGE_BYTES,
    kinds: int = 1,
    layout: object = WINDOWED,
    pages: tuple[int, ...] = (PAGES, WINDOW_PAGES),
) -> list[bytes]:
    """As `registration`, with the second pool's buffers as SGLang's state."""
    message = registration(Introduction(str(layout), list(pages), ROWS).frame())
    starts = [start + step * i for i in range(buffers)]
    message[6] = pack_int_lists([starts] * kinds, "Q")
    message[10] = pack_int_lists([[page] * buffers] * kinds, "I")
    return message


def introduction(layout: object = OURS, pages: int = PAGES) -> bytes:
    return Introduction(str(layout), [pages], ROWS).frame()


def registration(
    *extra: bytes,
    buffers: int = 4,
    rank: int = 0,
    tp: int = 1,
    page: int = PAGE_BYTES,
    step: int = PAGES * PAGE_BYTES,
    start: int = START,
    metadata: tuple[int, ...] = (1 << 39,),
) -> list[bytes]:
    """A decode server's registration message, as SGLang 0.5.23 builds it; `step` lies between its
    buffers."""
    pointers = struct.pack(f"{buffers}Q", *(start + step * i for i in range(buffers)))
    rows = struct.pack(f"{len(metadata)}Q", *metadata)
    parallel = [str(n).encode() for n in (rank, tp, page)]
    head = [b"None", b"10.0.0.2", b"5000", b"10.0.0.2:15001", pointers, rows, b"", *parallel]
    sizes = struct.pack(f"{buffers}Q", *[page] * buffers)
    return [*head, b"", b"", b"", b"", b"", b"", b"1", b"0", b"", sizes, *extra]


def refusal(message: list[bytes], ours: Handshake | None = None) -> str | None:
    try:
        return (ours or handshake()).refuse_decode(sglang_messages.registration(message))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("frames", "buffers", "words"),
    [
        ([], 4, ["stock SGLang", str(OURS)]),
        ([introduction("hma-kv/9 x=1")], 4, ["hma-kv/9 x=1", str(OURS)]),
        ([introduction(str(OURS).replace("head_dim=64", "head_dim=96"))], 4, ["64/96"]),
        ([introduction()], 3, ["registered 3 KV buffers", "4"]),
        ([b"HMA-KV" + str(OURS).encode()], 4, ["does not say which protocol it speaks"]),
        (
            [introduction().replace(b"/%d " % PROTOCOL, b"/%d " % NEWER, 1)],
            4,
            [
                "10.0.0.2",
                f"version {NEWER}",
                f"this server version {PROTOCOL}",
                "the same sglang-hma",
            ],
        ),
        ([introduction()[:-1]], 4, ["10.0.0.2"]),
    ],
)
def test_foreign_decode_servers_are_refused(
    frames: list[bytes], buffers: int, words: list[str]
) -> None:
    reason = refusal(registration(*frames, buffers=buffers))
    assert reason is not None and all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ({"tp": 2, "rank": 1, "page": 4352}, None),
        ({"tp": 1, "page": 4352}, "have 4352 bytes"),
        ({"tp": 2, "rank": 1, "page": 8704}, "have 8704 bytes"),
        ({"tp": 3, "page": 4352}, "cannot be cut into 3"),
        ({"tp": 0}, "TP size is 0"),
        ({"rank": -1}, "rank is b'-1'"),
        ({"step": PAGES * PAGE_BYTES - 1}, "buffers of 100 pages overlap"),
        ({"step": 0}, "buffers of 100 pages overlap"),
        ({"start": 0}, "do not lie in 1..2^57-1"),
        ({"start": (1 << 57) - 4 * PAGES * PAGE_BYTES}, "do not lie in 1..2^57-1"),
        ({"start": (1 << 64) - 5 * PAGES * PAGE_BYTES}, "pointer is not below 2^57"),
        ({"metadata": ()}, "registered 0 metadata buffers, this one has 1"),
        ({"metadata": (START - 1,)}, "overlap"),
    ],
)
def test_peers_memory_and_ranks(peer: dict[str, Any], words: str | None) -> None:
    reason = refusal(registration(introduction(), **peer))
    assert reason is None if words is None else reason is not None and words in reason, reason


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ({}, None),
        ({"buffers": 4}, "registered (4,) buffers of state, this one has (2,)"),
        ({"kinds": 2}, "registered (2, 2) buffers of state"),
        ({"kinds": 0}, "registered () buffers of state"),
        ({"page": 8192}, "have 8192 bytes"),
        ({"pages": (PAGES,)}, "has 1 kinds of pages, this one 2"),
        ({"pages": (PAGES, WINDOW_PAGES + 1)}, "buffers of 100 and 21 pages overlap"),
        ({"start": START}, "overlap"),
        ({"start": 0}, "do not lie in"),
        ({"start": 1 << 60}, "pointer is not below 2^57"),
        ({"layout": OURS}, "window: 63/0; windowed: 5/0"),
        ({"layout": dataclasses.replace(WINDOWED, window=127)}, "window: 63/127"),
        ({"layout": dataclasses.replace(WINDOWED, windowed="2")}, "windowed: 5/2"),
    ],
)
def test_memory_of_layers_with_a_window(peer: dict[str, Any], words: str | None) -> None:
    reason = refusal(windowed_registration(**peer), windowed_handshake())
    assert reason is None if words is None else reason is not None and words in reason, reason


def test_one_pool_and_two_refuse_each_other() -> None:
    reason = refusal(registration(introduction()), windowed_handshake())
    assert reason is not None and "--disable-hybrid-swa-memory on both or on none" in reason
    reason = refusal(windowed_registration())
    assert reason is not None and "--disable-hybrid-swa-memory on both or on none" in reason
    # One that says that it has one pool, and registers two.
    reason = refusal(windowed_registration(layout=OURS, pages=(PAGES,)))
    assert reason is not None and "buffers of state" in reason
