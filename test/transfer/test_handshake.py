"""Decode servers that a prefill server refuses, by what they say of themselves."""

import struct

import pytest
from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo

from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer.handshake import FORMAT_FRAME, Handshake

OURS = KVFormat.bfp8(kv_heads=4, head_dim=64, v_head_dim=64, layers=2)
PAGE_BYTES = 8704


def handshake() -> Handshake:
    """Of a prefill server with attention TP 1."""
    sizes = [PAGE_BYTES] * 4
    return Handshake(str(OURS), sizes, role="prefill", attn_tp=1, stock_allowed=False, plain=True)


def registration(
    *extra: bytes, buffers: int = 4, rank: int = 0, tp: int = 1, page: int = PAGE_BYTES
) -> list[bytes]:
    """A decode server's registration message, as SGLang 0.5.23 builds it."""
    pointers = struct.pack(f"{buffers}Q", *range(buffers))
    parallel = [str(n).encode() for n in (rank, tp, page)]
    head = [b"None", b"10.0.0.2", b"5000", b"10.0.0.2:15001", pointers, b"", b"", *parallel]
    sizes = struct.pack(f"{buffers}Q", *[page] * buffers)
    return [*head, b"", b"", b"", b"", b"", b"", b"1", b"0", b"", sizes, *extra]


def refusal(message: list[bytes]) -> str | None:
    made = handshake()
    made.remember(message)
    return made.refuse_decode(KVArgsRegisterInfo.from_zmq(message))


@pytest.mark.parametrize(
    ("frames", "buffers", "words"),
    [
        ([], 4, ["stock SGLang", str(OURS)]),
        ([FORMAT_FRAME + b"hma-kv/9 x=1"], 4, ["hma-kv/9 x=1", str(OURS)]),
        ([FORMAT_FRAME + str(OURS).replace("head_dim=64", "head_dim=96").encode()], 4, ["64/96"]),
        ([FORMAT_FRAME + str(OURS).encode()], 3, ["registered 3 KV buffers", "4"]),
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
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_tensor_parallel_peers(peer: dict[str, int], words: str | None) -> None:
    reason = refusal(registration(FORMAT_FRAME + str(OURS).encode(), **peer))
    assert reason is None if words is None else reason is not None and words in reason, reason


def test_a_peer_that_registers_again_is_judged_anew() -> None:
    made = handshake()
    for frames, accepted in (([FORMAT_FRAME + str(OURS).encode()], True), ([], False)):
        message = registration(*frames)
        made.remember(message)
        reason = made.refuse_decode(KVArgsRegisterInfo.from_zmq(message))
        assert (reason is None) == accepted
