"""The allocator of two pools, as SGLang drives it: windows slide, requests end, a pool is full."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sglang.srt.mem_cache.common import free_kv_row_segments
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from hma_kernels import PAGE
from hma_kernels.layout import IDS_PER_SLAB
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.arena import PageFormat
from sglang_hma.kvcache.pool import MixedKVPool
from sglang_hma.kvcache.two_pools import TwoPoolAllocator
from sglang_hma.platforms.cpu import HmaCpuPlatform

WINDOW = 48


@pytest.fixture(autouse=True)
def both_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", "{}")
    monkeypatch.setattr("sglang.srt.mem_cache.allocator.swa.current_platform", HmaCpuPlatform())


def make(full: int, window: int) -> TwoPoolAllocator:
    """So many slabs."""
    pool = SWAKVPool(
        size=full * 1024,
        size_swa=window * 1024,
        page_size=PAGE,
        dtype=torch.float32,
        head_num=1,
        head_dim=32,
        swa_attention_layer_ids=[0, 2],
        full_attention_layer_ids=[1],
        device="cpu",
        token_to_kv_pool_class=MixedKVPool,
    )
    made = TwoPoolAllocator(
        full * 1024, window * 1024, PAGE, torch.float32, "cpu", pool, need_sort=False
    )
    assert all(isinstance(each, SlabPageAllocator) for each in made.pools)
    return made


def extend(alloc: TwoPoolAllocator, start: int, end: int, last: int) -> torch.Tensor | None:
    starts, ends = torch.tensor([start]), torch.tensor([end])
    return alloc.alloc_extend(starts, starts, ends, ends, torch.tensor([last]), end - start)


class Request:
    """`slots` of the full layers' pool; of the other one the pages before `dead` are freed."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.dead = 0

    def row(self) -> torch.Tensor:
        return torch.tensor(self.slots, dtype=torch.int32)


class TwoPoolMachine(RuleBasedStateMachine):
    """Against what each request owns."""

    @initialize(full=st.integers(1, 3), window=st.integers(1, 2))
    def start(self, full: int, window: int) -> None:
        self.alloc = make(full, window)
        self.requests: list[Request] = []

    def state(self) -> list[object]:
        arenas = [pool.arena for pool in self.alloc.pools]
        counts = [
            [arena.used(fmt) for fmt in (PageFormat.BFP8, PageFormat.BF16)] for arena in arenas
        ]
        return [counts, self.alloc.full_to_swa_index_mapping.tolist()]

    @rule(chunks=st.lists(st.integers(1, 6), max_size=4), tail=st.integers(1, PAGE))
    def prefill(self, chunks: list[int], tail: int) -> None:
        """Chunks of whole pages, then the rest; between them the window slides."""
        request = Request()
        for size in [*(pages * PAGE for pages in chunks), tail]:
            start, before = len(request.slots), self.state()
            last = request.slots[-1] if request.slots else -1
            slots = extend(self.alloc, start, start + size, last)
            if slots is None:
                assert self.state() == before
                break
            request.slots += slots.tolist()
            self.slide(request)
        if request.slots:
            self.requests.append(request)

    @rule(data=st.data(), steps=st.integers(1, 70))
    def decode(self, data: st.DataObject, steps: int) -> None:
        if not self.requests:
            return
        batch = data.draw(st.lists(st.sampled_from(self.requests), unique=True, min_size=1))
        for _ in range(steps):
            lens = torch.tensor([len(request.slots) + 1 for request in batch])
            last = torch.tensor([request.slots[-1] for request in batch])
            opened = int((lens % PAGE == 1).sum())
            before = self.state() if opened else None
            fits = self.alloc.check_decode_capacity(num_tokens=opened * PAGE, tree_cache=None)
            slots = self.alloc.alloc_decode(lens, lens, last)
            assert (slots is not None) == fits
            if slots is None:
                assert before is None or self.state() == before
                return
            for request, slot in zip(batch, slots.tolist(), strict=True):
                request.slots.append(slot)

    @rule(data=st.data())
    def slide_one(self, data: st.DataObject) -> None:
        if self.requests:
            self.slide(data.draw(st.sampled_from(self.requests)))

    def slide(self, request: Request) -> None:
        """As SGLang's free_swa_out_of_window_slots."""
        end = (len(request.slots) - 1 - WINDOW) // PAGE * PAGE
        if end > request.dead:
            freed = request.row()[request.dead : end]
            self.alloc.free_group_begin()
            self.alloc.free_swa_segment(freed, start_pos=request.dead)
            self.alloc.free_group_end()
            request.dead = end

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if not self.requests:
            return
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.alloc.free_group_begin()
        free_kv_row_segments(self.alloc, [(request.row(), 0)], swa_evicted_seqlen=request.dead)
        self.alloc.free_group_end()

    @invariant()
    def each_page_has_one_owner(self) -> None:
        mapping = self.alloc.full_to_swa_index_mapping
        full: list[int] = []
        window: list[int] = []
        mapped = 0
        for request in self.requests:
            there = mapping[request.row().long()]
            assert not there[: request.dead].any() and bool((there[request.dead :] >= PAGE).all())
            mapped += len(there) - request.dead
            for slots, pages in (
                (request.row().long(), full),
                (there[request.dead :], window),
            ):
                assert torch.equal(slots % PAGE, torch.arange(len(slots)) % PAGE)
                own = slots[::PAGE] // PAGE
                assert torch.equal(own.repeat_interleave(PAGE)[: len(slots)], slots // PAGE)
                pages += own.tolist()
        for pool, pages in zip(self.alloc.pools, (full, window), strict=True):
            assert len(set(pages)) == len(pages)
            assert pool.live_tokens() == len(pages) * PAGE
            assert all(page >= IDS_PER_SLAB for page in pages)
            if not pages:
                assert pool.available_size() == pool.size
        assert int((mapping[:-1] > 0).sum()) == mapped and int(mapping[-1]) == -1


TestTwoPools = TwoPoolMachine.TestCase
TestTwoPools.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


class Cache:
    """Prefixes that can be evicted from either pool; `cached`: rows of slots."""

    def __init__(self, alloc: TwoPoolAllocator, rows: list[torch.Tensor]) -> None:
        self.alloc, self.rows, self.asked = alloc, rows, []

    def supports_prefix_sharing(self) -> bool:
        return True

    def evict(self, params: object) -> object:
        from sglang.srt.mem_cache.base_prefix_cache import EvictResult

        self.asked.append((params.num_tokens, params.swa_num_tokens))
        row = self.rows.pop() if self.rows else None
        if row is None:
            return EvictResult()
        if params.num_tokens:
            self.alloc.free_segment(row, start_pos=0)
            return EvictResult(num_tokens_evicted=len(row), swa_num_tokens_evicted=len(row))
        self.alloc.free_swa_segment(row, start_pos=0)
        return EvictResult(swa_num_tokens_evicted=len(row))


def test_eviction_asks_the_pool_that_is_full() -> None:
    """Only the window layers' pool has no page left of the format that is wanted."""
    alloc = make(3, 1)
    rows = [extend(alloc, 0, 8 * PAGE, -1) for _ in range(2)]
    assert all(row is not None for row in rows)
    cache = Cache(alloc, rows)
    assert alloc.check_decode_capacity(num_tokens=PAGE, tree_cache=None)  # of its 17 pages
    assert not alloc.check_decode_capacity(num_tokens=2 * PAGE, tree_cache=None)
    assert alloc.check_decode_capacity(num_tokens=2 * PAGE, tree_cache=cache)
    assert cache.asked == [(0, 1024)]
    assert alloc.full_attn_allocator.live_tokens() == 2 * alloc.swa_attn_allocator.live_tokens()
