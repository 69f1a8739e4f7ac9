"""The slab allocator over a real pool: formats, alignment, landing, retraction."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hma_kernels import PAGE, bfp8_pack, bfp8_round, bfp8_unpack
from hma_kernels.layout import IDS_PER_SLAB, bf16_index
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.pool import MixedKVPool

HEADS, DIM, LAYERS = 2, 32, 2


@pytest.fixture(autouse=True)
def decode_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')


def make(slabs: int) -> SlabPageAllocator:
    size = slabs * 1024
    pool = MixedKVPool(
        size=size,
        page_size=PAGE,
        dtype=torch.float32,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    return SlabPageAllocator(
        size, page_size=PAGE, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=True
    )


def extend(alloc: SlabPageAllocator, spans: list[tuple[int, int]], last: list[int]):
    starts = torch.tensor([s for s, _ in spans])
    ends = torch.tensor([e for _, e in spans])
    total = int((ends - starts).sum())
    return alloc.alloc_extend(starts, starts, ends, ends, torch.tensor(last), total)


def is_bf16(alloc: SlabPageAllocator, pages):
    """What kernels are told of the pages."""
    return alloc._kvcache.slab_is_bf16[pages // IDS_PER_SLAB]


class AllocatorMachine(RuleBasedStateMachine):
    """Requests that prefill, decode and leave, against what each of them owns."""

    @initialize(slabs=st.integers(1, 4))
    def start(self, slabs: int) -> None:
        self.alloc = make(slabs)
        self.requests: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.landing: set[int] = set()
        self.next_id = 0

    def add(self, slots: list[int], prompt: int) -> None:
        self.requests[self.next_id] = slots
        self.prompts[self.next_id] = prompt
        self.next_id += 1

    @rule(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4))
    def prefill(self, lengths: list[int]) -> None:
        before = self.alloc.available_size()
        fits = self.alloc.fits_prompts(lengths)
        slots = extend(self.alloc, [(0, n) for n in lengths], [-1] * len(lengths))
        if slots is None:
            assert self.alloc.available_size() == before and not fits
            return
        for piece, n in zip(slots.split(lengths), lengths, strict=True):
            self.add(piece.tolist(), n)

    @rule(length=st.integers(1, 400), generated=st.integers(0, 100))
    def reserve_for_transfer(self, length: int, generated: int) -> None:
        fits = self.alloc.fits_landing(length, length + generated)
        slots = self.alloc.alloc_landing(length, length + generated)
        assert slots is not None or not fits
        if slots is None:
            return
        pages = slots[::PAGE].numpy() // PAGE
        bf16 = is_bf16(self.alloc, pages)
        full = length // PAGE
        assert not bf16[:full].any() and bf16[full:].all()
        targets = self.alloc.transfer_pages(pages[: -(-length // PAGE)].astype("int32"))
        lands = generated == 0 and length % PAGE != 0
        if lands:
            assert not is_bf16(self.alloc, targets).any()
        if generated == 0:
            assert len(set(targets.tolist())) == len(targets)
        if lands:
            self.landing.add(self.next_id)
        self.add(slots.tolist(), length)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if self.landing:
            request = data.draw(st.sampled_from(sorted(self.landing)))
            self.alloc.commit_landing(self.requests[request][-1] // PAGE)
            self.landing.discard(request)

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        ready = sorted(set(self.requests) - self.landing)
        if not ready:
            return
        batch = data.draw(st.lists(st.sampled_from(ready), unique=True, min_size=1))
        lens = torch.tensor([len(self.requests[r]) + 1 for r in batch])
        last = torch.tensor([self.requests[r][-1] for r in batch])
        opened = int((lens % PAGE == 1).sum())
        fits = self.alloc.check_decode_capacity(num_tokens=opened * PAGE, tree_cache=None)
        slots = self.alloc.alloc_decode(lens, lens, last)
        assert (slots is not None) == fits
        if slots is not None:
            for request, slot in zip(batch, slots.tolist(), strict=True):
                assert is_bf16(self.alloc, slot // PAGE)
                self.requests[request].append(slot)

    @rule(data=st.data(), ahead=st.integers(1, 80))
    def room_for_drafts(self, data: st.DataObject, ahead: int) -> None:
        ready = sorted(set(self.requests) - self.landing)
        if not ready:
            return
        batch = data.draw(st.lists(st.sampled_from(ready), unique=True, min_size=1))
        held = [self.requests[request] for request in batch]
        spans = [(len(slots), len(slots) + ahead) for slots in held]
        pages = sum(-(-end // PAGE) - -(-start // PAGE) for start, end in spans)
        fits = self.alloc.check_decode_capacity(num_tokens=pages * PAGE, tree_cache=None)
        got = self.alloc.alloc_generated(spans, [slots[-1] for slots in held])
        assert (got is not None) == fits
        if got is not None:
            for slots, more in zip(held, got.split([ahead] * len(held)), strict=True):
                assert is_bf16(self.alloc, more.numpy() // PAGE).all()
                slots.extend(more.tolist())

    @rule(data=st.data(), as_segment=st.booleans())
    def leave(self, data: st.DataObject, as_segment: bool) -> None:
        if self.requests:
            request = data.draw(st.sampled_from(sorted(self.requests)))
            slots = torch.tensor(self.requests.pop(request))
            self.landing.discard(request)
            if as_segment:
                self.alloc.free_segment(slots, start_pos=0)
            else:
                self.alloc.free(slots)

    @invariant()
    def slots_are_page_aligned_and_owned_once(self) -> None:
        seen: set[int] = set()
        for slots in self.requests.values():
            pages = [slot // PAGE for slot in slots[::PAGE]]
            assert not seen & set(pages) and len(set(pages)) == len(pages)
            seen |= set(pages)
            for position, slot in enumerate(slots):
                assert slot % PAGE == position % PAGE
                assert slot // PAGE == pages[position // PAGE]
        assert self.alloc.live_tokens() == len(seen) * PAGE
        assert len(self.alloc.landing) == len(self.landing)

    @invariant()
    def nothing_leaks(self) -> None:
        if not self.requests:
            assert self.alloc.available_size() == self.alloc.size
            assert self.alloc.arena.live_pages == 0
            assert not self.alloc._kvcache.slab_is_bf16.any()


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=40, stateful_step_count=25)


def test_continuing_inside_a_page() -> None:
    alloc = make(2)
    first = extend(alloc, [(0, 40)], [-1])
    assert first is not None
    more = extend(alloc, [(40, 100)], [int(first[-1])])
    assert more is not None and more[0] == first[-1] + 1
    slots = torch.cat([first, more])
    assert (slots % PAGE == torch.arange(100) % PAGE).all()
    assert slots[63] // PAGE == slots[32] // PAGE != slots[64] // PAGE


def test_prompt_spills_into_bf16_pages_when_no_bfp8_page_is_left() -> None:
    alloc = make(2)
    generated = alloc.alloc_decode(torch.tensor([33]), torch.tensor([33]), torch.tensor([-1]))
    assert generated is not None  # takes a slab for BF16, 16 pages of it stay spare
    slots = extend(alloc, [(0, 40 * PAGE)], [-1])
    assert slots is not None
    assert is_bf16(alloc, slots[::PAGE] // PAGE).sum() == 8


@pytest.mark.parametrize("spare_bfp8", [0, 1, 5])
def test_a_chunked_prompt_keeps_room_for_its_last_page(
    spare_bfp8: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last free slab must not become BFP8 between a prompt's first chunk and its last, on a
    server with both roles; decode computes no prompt in chunks."""
    monkeypatch.setenv("SGLANG_HMA_CONFIG", "{}")
    alloc = make(2)
    assert extend(alloc, [(0, (32 - spare_bfp8) * PAGE)], [-1]) is not None
    budget = alloc.create_prefill_budget(None)
    assert budget.has_tail_room()
    chunks = [(0, 128), (128, 256), (256, 264)]
    last = -1
    for start, end in chunks:
        slots = extend(alloc, [(start, end)], [last])
        assert slots is not None, (start, end)
        last = int(slots[-1])


def test_landed_page_is_unpacked_exactly() -> None:
    alloc = make(2)
    pool = alloc._kvcache
    slots = alloc.alloc_landing(50, 50)
    assert slots is not None
    bf16_page = int(slots[-1]) // PAGE
    landing = alloc.landing[bf16_page]
    rows = torch.randn(HEADS, PAGE, DIM)
    pool.k_buffer[1][landing] = bfp8_pack(rows)[:, 0]
    alloc.commit_landing(bf16_page)
    got = pool.kv.k_bf16[1][int(bf16_index(torch.tensor(bf16_page)))]
    assert torch.equal(got, bfp8_unpack(bfp8_pack(rows)))
    assert not alloc.landing and alloc.live_tokens() == 2 * PAGE


def test_retraction_restores_every_byte() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    alloc = make(3)
    pool = alloc._kvcache
    prompt, end = 70, 130
    slots = alloc.alloc_landing(prompt, end)
    assert slots is not None
    for layer in range(LAYERS):
        rows = torch.randn(prompt, HEADS, DIM)
        stored = pool.write_prompt(layer, slots[:prompt], rows, 2 * rows)
        assert torch.equal(stored[0], bfp8_round(rows.bfloat16().float()))
        new = torch.randn(end - prompt, HEADS, DIM)
        pool.write_generated(layer, slots[prompt:], new, new)
    saved = pool.get_cpu_copy(slots)
    before = [buffer.clone() for buffer in pool.k_buffer + pool.v_buffer]
    alloc.free(slots)
    other = alloc.alloc_landing(300, 300)  # takes the old pages
    again = alloc.alloc_landing(prompt, end)
    assert other is not None and again is not None and not torch.equal(again, slots)
    pool.load_cpu_copy(saved, again)
    restored = pool.get_cpu_copy(again)
    for layer_a, layer_b in zip(saved.layers, restored.layers, strict=True):
        for kinds_a, kinds_b in zip(layer_a, layer_b, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(kinds_a, kinds_b, strict=True))
    assert before[0].shape == pool.k_buffer[0].shape
    wrong = alloc.alloc_landing(end, end)
    assert wrong is not None
    with pytest.raises(RuntimeError, match="other formats"):
        pool.load_cpu_copy(saved, wrong)
