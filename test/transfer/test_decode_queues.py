"""Pages on decode: a failed request's are kept until each prefill rank has let go, and a request
whose prompt nobody sends reads none of what others left."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.disaggregation.decode import DecodeRequest

from hma_kernels import PAGE
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.transfer.decode import quarantine
from sglang_hma.transfer.decode.manager import HmaDecodeManager
from sglang_hma.transfer.decode.quarantine import Quarantine
from sglang_hma.transfer.decode.queues import HmaDecodeTransferQueue
from sglang_hma.transfer.endpoints import HmaKVReceiver
from sglang_hma.transfer.liveness import Address
from sglang_hma.transfer.request_fields import FAKE_HOST
from test.kvcache.test_allocator import make

ROOM = 7


@pytest.fixture(autouse=True)
def decode_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Liveness:
    """Stands for PeerLiveness: only time tells that one."""

    def __init__(self) -> None:
        self.gone: set[Address] = set()

    def is_gone(self, address: Address) -> bool:
        return address in self.gone


def failed_request(manager: HmaDecodeManager, tp: int) -> HmaKVReceiver:
    """Decode's end of a request that failed, with pages at `tp` prefill ranks."""
    receiver = object.__new__(HmaKVReceiver)
    receiver.kv_mgr, receiver.bootstrap_room = manager, ROOM
    receiver.prefill_info = SimpleNamespace(pp_size=1, attn_cp_size=1)
    receiver.target_tp_ranks, receiver.target_cp_ranks = list(range(tp)), [0]
    receiver.target_pp_ranks = [0]
    receiver.bootstrap_infos = [
        {"rank_ip": "10.0.0.1", "rank_port": 5000 + rank} for rank in range(tp)
    ]
    receiver._abort_generation = manager.register_deferred_abort_room(ROOM)
    return receiver


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_let_go_and_then_died_counts_once(
    alone: None, gone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "COPY_S", 0.0)
    manager = object.__new__(HmaDecodeManager)
    manager.quarantine = Quarantine((), lambda: (), lambda: [])
    manager._gone, manager.repeat_abort = {}, lambda *_: None
    manager._deferred_abort_ack_tracker, manager._deferred_abort_generation = {}, 0
    manager.receiver = None
    queue = object.__new__(HmaDecodeTransferQueue)
    queue._liveness, queue.gloo_group = Liveness(), None  # type: ignore[assignment]
    queue.scheduler = SimpleNamespace(
        disagg_decode_prealloc_queue=SimpleNamespace(kv_manager=manager),
        token_to_kv_pool_allocator=None,
    )
    released = []
    queue._do_release = lambda request, row: released.append(row)
    queue._observe_deferred_kv_release = lambda **_: None
    queue._asked_s = {}
    ended = failed_request(manager, tp=2)
    request = SimpleNamespace(
        bootstrap_room=ROOM, origin_input_ids=[1], kv=SimpleNamespace(cache_protected_len=0)
    )
    entry: Any = SimpleNamespace(kv_receiver=ended, req=request)
    now = time.monotonic()
    queue._is_host_destination = lambda _: False
    queue._deferred_releases = [(entry, now, now + 1e6, 3, 2)]

    assert queue.count_quarantined() == 1
    manager.note_abort_ack(ROOM, 0, ended._abort_generation)
    queue._liveness.gone.add(("10.0.0.1", 5000 + gone))
    queue.resolve_deferred_releases()
    assert released == ([] if gone == 0 else [3]), "rank 1 may still write"
    queue._liveness.gone |= {("10.0.0.1", 5000), ("10.0.0.1", 5001)}
    queue.resolve_deferred_releases()
    assert released == [3] and queue.count_quarantined() == 0


@pytest.mark.parametrize("tokens", [1, PAGE, PAGE + 1, 3 * PAGE + 5])
def test_pages_that_nobody_fills_are_empty(tokens: int) -> None:
    """SGLang's health checks and its warm-up are generated from them."""
    allocator: SlabPageAllocator = make(2)
    pool = allocator.get_kvcache()
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.fill_(0x55)
    slots = allocator.alloc_landing(tokens, tokens)
    assert slots is not None
    table = torch.zeros((1, 8 * PAGE), dtype=torch.int64)
    table[0, :tokens] = slots
    queue = object.__new__(HmaDecodeTransferQueue)
    queue.scheduler = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool_allocator=allocator,
    )
    request = SimpleNamespace(
        bootstrap_host=FAKE_HOST,
        origin_input_ids=list(range(tokens)),
        kv=SimpleNamespace(req_pool_idx=0, cache_protected_len=0),
    )
    queue._empty_pages(DecodeRequest(req=request, kv_receiver=None).req)
    pages = allocator.transfer_pages((slots[::PAGE] // PAGE).numpy())
    others = np.setdiff1d(np.arange(pool.num_pages), pages)
    for buffer in pool.k_buffer + pool.v_buffer:
        assert not buffer[torch.from_numpy(pages).long()].any()
        assert (buffer[torch.from_numpy(others)] == 0x55).all()
