"""What the manager does with a peer's messages and with long block lists."""

import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_hma.kvcache.format import KVFormat
from sglang_hma.transfer.handshake import FORMAT_FRAME
from sglang_hma.transfer.manager import MAX_BATCH_ENTRIES, HmaKVManager

OURS = KVFormat.bfp8(kv_heads=4, head_dim=64, v_head_dim=64, layers=2)


def manager(kv_layout: str = str(OURS)) -> HmaKVManager:
    """A manager without sockets, for the parts that need none."""
    made = object.__new__(HmaKVManager)
    made.kv_layout = kv_layout
    made._plain_pages = True
    made.attn_tp_size = 1
    made.disaggregation_mode = SimpleNamespace(value="prefill")
    made.kv_args = SimpleNamespace(kv_data_ptrs=[0] * 4, kv_item_lens=[8704] * 4)
    return made


def registration(
    *extra: bytes, buffers: int = 4, rank: int = 0, tp: int = 1, page: int = 8704
) -> list[bytes]:
    pointers = struct.pack(f"{buffers}Q", *range(buffers))
    parallel = [str(n).encode() for n in (rank, tp, page)]
    head = [b"None", b"10.0.0.2", b"5000", b"10.0.0.2:15001", pointers, b"", b"", *parallel]
    sizes = struct.pack(f"{buffers}Q", *[page] * buffers)
    return [*head, b"", b"", b"", b"", b"", b"", b"1", b"0", b"", sizes, *extra]


@given(st.lists(st.binary(max_size=40), max_size=24))
def test_no_message_raises(message: list[bytes]) -> None:
    manager()._accepts(message)


@given(st.integers(0, 9), st.binary(max_size=12))
def test_broken_registrations_are_dropped_or_parsed(field: int, junk: bytes) -> None:
    message = registration(FORMAT_FRAME + str(OURS).encode())
    message[field] = junk
    manager()._accepts(message)


def test_negative_pages_are_dropped() -> None:
    bad = struct.pack("2i", 5, -1)
    message = [b"77", b"10.0.0.2", b"5000", b"s", bad, b"0", b"", b"1", b"0", b""]
    assert not manager()._accepts(message)
    message[4] = struct.pack("2i", 5, 6)
    assert manager()._accepts(message)


@pytest.mark.parametrize(
    ("frames", "buffers", "words"),
    [
        ([], 4, ["stock SGLang", str(OURS)]),
        ([FORMAT_FRAME + b"hma-kv/9 x=1"], 4, ["hma-kv/9 x=1", str(OURS)]),
        ([FORMAT_FRAME + str(OURS).replace("head_dim=64", "head_dim=96").encode()], 4, ["64/96"]),
        ([FORMAT_FRAME + str(OURS).encode()], 3, ["registered 3 KV buffers", "4"]),
    ],
)
def test_foreign_decode_servers_are_rejected(
    frames: list[bytes], buffers: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"prefill"}')
    from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo

    made = manager()
    message = registration(*frames, buffers=buffers)
    assert made._accepts(message)
    accepted, reason = made._validate_peer_state_layout(KVArgsRegisterInfo.from_zmq(message))
    assert not accepted and reason is not None
    assert all(word in reason for word in words), reason


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
def test_tensor_parallel_peers(
    peer: dict[str, int], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"prefill"}')
    from sglang.srt.disaggregation.mooncake.conn import KVArgsRegisterInfo

    made = manager()
    message = registration(FORMAT_FRAME + str(OURS).encode(), **peer)
    assert made._accepts(message)
    reason = made.handshake.refuse_decode(KVArgsRegisterInfo.from_zmq(message))
    assert reason is None if words is None else reason is not None and words in reason, reason


def test_long_block_lists_travel_in_bounded_batches() -> None:
    """2,500 scattered blocks through two real Mooncake engines on loopback."""
    from mooncake.engine import TransferEngine

    blocks, size = 2500, 64
    engines = [TransferEngine() for _ in range(2)]
    for engine in engines:
        assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    source = torch.randint(0, 256, (blocks, size), dtype=torch.uint8)
    target = torch.zeros_like(source)
    assert engines[0].register_memory(source.data_ptr(), source.nbytes) == 0
    assert engines[1].register_memory(target.data_ptr(), target.nbytes) == 0
    batches: list[int] = []

    def batch_transfer_sync(session: str, src: list[int], dst: list[int], n: list[int]) -> int:
        batches.append(len(src))
        return int(engines[0].batch_transfer_sync_write(session, src, dst, n))

    made = manager()
    made.engine = SimpleNamespace(batch_transfer_sync=batch_transfer_sync)
    session = f"127.0.0.1:{engines[1].get_rpc_port()}"
    order = torch.randperm(blocks).tolist()
    wanted = [
        (source.data_ptr() + i * size, target.data_ptr() + j * size, size)
        for i, j in enumerate(order)
    ]
    assert made._transfer_data(session, wanted) == 0
    assert max(batches) <= MAX_BATCH_ENTRIES and sum(batches) == blocks
    assert torch.equal(target[order], source)
