"""What SGLang hands to a prefill manager, and what it keeps for nobody."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import KVTransferError
from sglang.srt.mem_cache.common import kv_to_page_num

from sglang_hma.transfer.decode.manager import control_ports
from sglang_hma.transfer.prefill import strays
from sglang_hma.transfer.prefill.manager import MAX_BATCH_ENTRIES, HmaPrefillManager

from .real_managers import Pair, until


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


def test_a_request_that_is_aborted_before_its_pass_leaves_nothing(
    managers: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang drops it then without a word to the transfer but `abort`."""
    room = next(managers.rooms)
    sender, receiver = managers.sender(room), managers.receiver(room)
    receiver.send_metadata(np.array([1], dtype=np.int32), aux_index=1)
    until(lambda: sender.poll() == KVPoll.WaitingForInput)
    prefill = managers.prefill
    assert prefill.sender is not None
    claims = prefill.sender.claims
    until(lambda: room in claims._claimants)
    sender.abort()
    assert room not in claims._opened_s and room not in claims._claimants
    monkeypatch.setattr(strays, "KEPT_S", -1.0)
    prefill.forget_strays()
    prefill.forget_strays()
    for table in (prefill.transfer_infos, prefill.request_status, prefill.failure_records):
        assert room not in table
    receiver.abort()
    receiver.clear()


def test_decode_gets_its_pages_back_though_its_registration_was_lost(managers: Pair) -> None:
    """Prefill listens to no server that has not registered."""
    receiver = managers.receiver(next(managers.rooms))
    room, decode = receiver.bootstrap_room, managers.decode
    registrations = managers.prefill.intake.registrations
    until(lambda: registrations.get(decode.get_session_id()))
    with registrations._lock:
        registrations._sessions.clear()
    receiver.send_metadata(np.array([1], dtype=np.int32), aux_index=1)
    receiver.abort()
    ranks = control_ports(receiver.bootstrap_infos)
    decode.repeat_abort(room, receiver._abort_generation, ranks)
    until(lambda: decode.confirmed_ranks(room) == {0})
    decode.clear_deferred_abort_state(room)
    receiver.clear()


def test_a_prefix_longer_than_the_prompt_ends_the_request(managers: Pair) -> None:
    room, tokens = next(managers.rooms), 40
    sender, receiver = managers.sender(room), managers.receiver(room)
    receiver.send_metadata(np.array([1], dtype=np.int32), aux_index=0, decode_prefix_len=64)
    until(lambda: room in managers.prefill.req_to_decode_prefix_len)
    prefix = sender.pop_decode_prefix_len()
    assert prefix == 64
    sender.init(kv_to_page_num(tokens - prefix, 32), 0)
    assert sender.poll() == KVPoll.Failed
    with pytest.raises(KVTransferError, match="more of the prompt than there is"):
        sender.failure_exception()
    until(lambda: receiver.poll() == KVPoll.Failed)
    for end in (sender, receiver):
        end.clear()


def test_what_decode_says_of_a_room_that_never_begins_is_forgotten(
    managers: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang keeps it until the request ends here."""
    stray, begun = next(managers.rooms), next(managers.rooms)
    sender = managers.sender(begun)
    receivers = [managers.receiver(room) for room in (stray, begun)]
    for row, receiver in enumerate(receivers):
        receiver.send_metadata(np.array([row], dtype=np.int32), aux_index=row)
    prefill = managers.prefill
    tables = prefill.transfer_infos, prefill.request_status, prefill.req_to_decode_prefix_len
    until(lambda: all({stray, begun} <= table.keys() for table in tables))
    prefill.forget_strays()
    assert all({stray, begun} <= table.keys() for table in tables)
    monkeypatch.setattr(strays, "KEPT_S", -1.0)
    prefill.forget_strays()
    rooms = [*map(set, tables), set(prefill.intake.rooms())]
    assert all(begun in found and stray not in found for found in rooms)
    for receiver in receivers:
        receiver.abort()
    until(lambda: sender.poll() == KVPoll.Failed)
    for end in (sender, *receivers):
        end.clear()
