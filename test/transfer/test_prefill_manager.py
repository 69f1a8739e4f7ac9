"""Long block lists reach Mooncake in batches that it can take."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.disaggregation.base import KVPoll

from sglang_hma.transfer.claims import Claims
from sglang_hma.transfer.handshake import Handshake
from sglang_hma.transfer.message_intake import MessageIntake
from sglang_hma.transfer.prefill import manager, strays
from sglang_hma.transfer.prefill.manager import MAX_BATCH_ENTRIES, HmaPrefillManager


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

    made = object.__new__(HmaPrefillManager)  # without sockets: this needs none
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


def test_what_decode_says_of_a_room_that_never_begins_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang keeps it until the request ends here."""
    made = object.__new__(HmaPrefillManager)
    hours = iter((100.0, 101.0 + strays.KEPT_S))
    monkeypatch.setattr(manager, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    made.transfer_infos, made.request_status, made.req_to_decode_prefix_len = {}, {}, {}
    made._staging_outstanding, made._strays = {}, strays.Strays()
    sizes = [64]
    handshake = Handshake("", sizes, role="prefill", attn_tp=1, stock_allowed=False, plain=True)
    made.__dict__["intake"] = intake = MessageIntake(handshake)
    made.sender = SimpleNamespace(claims=Claims(expected=True))  # type: ignore[assignment]
    for room in (1, 2):
        frames = [str(room), "10.0.0.2", "5000", "10.0.0.2:15001", "", "0", "", "1", "0", "", "77"]
        assert intake.screen([frame.encode() for frame in frames]) is not None
        # As SGLang's receiving thread does for either.
        made.transfer_infos[room], made.req_to_decode_prefix_len[room] = {"session": 0}, 0
        made.request_status[room] = KVPoll.WaitingForInput
    made.sender.claims.opened(2)
    made.forget_strays()
    assert list(made.transfer_infos) == [1, 2]
    made.forget_strays()
    kept = made.transfer_infos, made.request_status, made.req_to_decode_prefix_len
    assert [list(table) for table in kept] == [[2], [2], [2]]
    assert intake.rooms() == [2]
