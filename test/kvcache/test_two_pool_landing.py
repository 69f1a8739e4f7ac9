"""Two pools on decode: prompts land in both, requests are put aside and come back into both."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from hma_kernels import PAGE
from hma_kernels.layout import IDS_PER_SLAB

from .test_put_aside import same_bytes
from .test_two_pools import WINDOW, Request, TwoPoolMachine, make


@pytest.fixture(autouse=True)
def decode(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_hma.platforms.cpu import HmaCpuPlatform

    monkeypatch.setenv("SGLANG_HMA_CONFIG", '{"role":"decode"}')
    monkeypatch.setattr("sglang.srt.mem_cache.allocator.swa.current_platform", HmaCpuPlatform())


class Landing(Request):
    """`prompt` is how many tokens it had when it came; `lands` until they are there."""

    def __init__(self, slots: list[int], dead: int) -> None:
        super().__init__()
        self.slots, self.dead, self.prompt, self.lands = slots, dead, len(slots), True


class LandingMachine(TwoPoolMachine):
    """Against what each request owns; a page that a peer writes has one request."""

    requests: list[Landing]

    def prefill(self) -> None:
        """Prompts are computed elsewhere."""

    @rule(length=st.integers(1, 500), beside=st.integers(0, 3))
    def land(self, length: int, beside: int) -> None:
        self.alloc.window = WINDOW
        before = self.state()
        fits = self.alloc.fits_landing(length, length, beside=beside)
        slots = self.alloc.alloc_landing(length, length)
        if slots is None:
            assert not fits and self.state() == before
            return
        dead = self.alloc.behind_window(slots)
        assert dead == max(0, length - WINDOW) // PAGE * PAGE
        assert not self.alloc.full_to_swa_index_mapping[slots[:dead]].any()
        self.requests.append(Landing(slots.tolist(), dead))
        if fits:
            last = torch.tensor([self.requests[-1].slots[-1]])
            assert length % PAGE or self.alloc.check_decode_capacity(
                num_tokens=PAGE, tree_cache=None
            ), last
        self.check_targets()

    def targets(self, request: Landing) -> list[list[int]]:
        """Pages that a peer writes in either pool."""
        row = request.row()[: request.prompt].long()
        window = self.alloc.translate_swa_indices_for_transfer(row[request.dead :])
        full = self.alloc.transfer_pages((row[::PAGE] // PAGE).numpy())
        return [full.tolist(), (window[::PAGE] // PAGE).tolist()]

    def check_targets(self) -> None:
        for kind, pool in enumerate(self.alloc.pools):
            pages = [
                page
                for request in self.requests
                if request.lands
                for page in self.targets(request)[kind]
            ]
            assert len(set(pages)) == len(pages) and all(page >= IDS_PER_SLAB for page in pages)
            slabs = torch.tensor(pages, dtype=torch.int64) // IDS_PER_SLAB
            assert not pool._kvcache.slab_is_bf16[slabs].any(), "peers write BFP8"
            taken = {page for request in self.requests for page in self.own(request)[kind]}
            landing = set(pages) - taken
            assert landing <= set(pool.landing.values())

    def own(self, request: Landing) -> list[list[int]]:
        row = request.row().long()
        window = self.alloc.full_to_swa_index_mapping[row[request.dead :]]
        return [(each[::PAGE] // PAGE).tolist() for each in (row, window)]

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        if landing := [request for request in self.requests if request.lands]:
            request = data.draw(st.sampled_from(landing))
            if request.prompt % PAGE:
                self.alloc.commit_landing(request.slots[-1] // PAGE)
            request.lands = False

    @rule(data=st.data(), steps=st.integers(1, 70))
    def decode(self, data: st.DataObject, steps: int) -> None:
        self.of_those_that_run(lambda: TwoPoolMachine.decode(self, data, steps))

    @rule(data=st.data())
    def slide_one(self, data: st.DataObject) -> None:
        self.of_those_that_run(lambda: TwoPoolMachine.slide_one(self, data))

    def of_those_that_run(self, act) -> None:
        landing = [request for request in self.requests if request.lands]
        self.requests = [request for request in self.requests if not request.lands]
        try:
            act()
        finally:
            self.requests = self.requests + landing

    @rule(data=st.data(), seed=st.integers(0, 2**32 - 1))
    def put_aside(self, data: st.DataObject, seed: int) -> None:
        """And back at once, if there is room: into pages of the same formats and bytes."""
        running = [request for request in self.requests if not request.lands]
        if not running:
            return
        request = data.draw(st.sampled_from(running))
        pool, row = self.alloc.get_kvcache(), request.row()
        generator = torch.Generator().manual_seed(seed)
        for inner in (pool.full_kv_pool, pool.swa_kv_pool):
            for buffer in inner.k_buffer + inner.v_buffer:
                buffer.random_(0, 256, generator=generator)
        saved = self.alloc.get_cpu_copy(row)
        formats = self.alloc.saved_formats(saved)
        assert formats.start == request.dead
        for ours, theirs in zip(formats, self.alloc.formats_of(row), strict=True):
            assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
        assert self.alloc.fits_again(formats, len(row), when_empty=True)
        self.give_back(request)
        for inner in (pool.full_kv_pool, pool.swa_kv_pool):
            for buffer in inner.k_buffer + inner.v_buffer:
                buffer.zero_()
        before, fits = self.state(), self.alloc.fits_again(formats, len(row))
        slots = self.alloc.alloc_again(formats, len(row))
        assert (slots is not None) == fits
        if slots is None:
            assert self.state() == before
            return
        request.slots = slots.tolist()
        self.requests.append(request)
        assert self.alloc.behind_window(slots) == request.dead
        self.alloc.load_cpu_copy(saved, slots)
        again = self.alloc.get_cpu_copy(slots)
        assert torch.equal(again["swa_mask"], saved["swa_mask"])
        assert same_bytes(again["full"], saved["full"]) and same_bytes(again["swa"], saved["swa"])


TestLanding = LandingMachine.TestCase
TestLanding.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("tokens", [1, PAGE, WINDOW, 200, 200 // PAGE * PAGE])
def test_what_lands_is_where_attention_reads_it(tokens: int) -> None:
    """A peer writes each page where it is told to; the last one is unpacked in both pools."""
    from hma_kernels import bfp8_pack, bfp8_unpack
    from hma_kernels.layout import bf16_index

    alloc = make(2, 2)
    alloc.window = WINDOW
    slots = alloc.alloc_landing(tokens, tokens)
    assert slots is not None
    dead = alloc.behind_window(slots)
    pools = alloc.pools
    rows = slots.long(), alloc.full_to_swa_index_mapping[slots[dead:].long()]
    written = (
        alloc.transfer_pages((slots[::PAGE] // PAGE).numpy()).tolist(),
        (alloc.translate_swa_indices_for_transfer(slots[dead:])[::PAGE] // PAGE).tolist(),
    )
    sent = []
    for pool, pages in zip(pools, written, strict=True):
        values = torch.randn(len(pages), 1, PAGE, 32)
        packed = [bfp8_pack(each) for each in values]
        for page, tile in zip(pages, packed, strict=True):
            pool._kvcache.k_buffer[0][page] = tile[:, 0]
        sent.append([bfp8_unpack(tile) for tile in packed])
    if tokens % PAGE:
        alloc.commit_landing(int(slots[-1]) // PAGE)
    for pool, row, values in zip(pools, rows, sent, strict=True):
        kv, own = pool._kvcache, (row[::PAGE] // PAGE).tolist()
        assert not pool.landing and len(own) == len(values)
        for place, (page, value) in enumerate(zip(own, values, strict=True)):
            last = place == len(own) - 1 and tokens % PAGE
            assert bool(kv.slab_is_bf16[page // IDS_PER_SLAB]) == bool(last)
            if last:
                assert torch.equal(kv.kv.k_bf16[0][bf16_index(page)].float(), value.float())
            else:
                assert torch.equal(bfp8_unpack(kv.k_buffer[0][page][:, None]), value)


def test_pages_that_nobody_fills_are_empty() -> None:
    """SGLang's health checks are generated from them."""
    alloc = make(2, 2)
    alloc.window = WINDOW
    slots = alloc.alloc_landing(200, 200)
    assert slots is not None
    inner = [pool._kvcache for pool in alloc.pools]
    for kv in inner:
        for buffer in kv.k_buffer + kv.v_buffer:
            buffer.fill_(0x55)
    alloc.empty(slots[::PAGE])
    dead = alloc.behind_window(slots)
    targets = (
        alloc.transfer_pages((slots[::PAGE] // PAGE).numpy()).tolist(),
        (alloc.translate_swa_indices_for_transfer(slots[dead:])[::PAGE] // PAGE).tolist(),
    )
    for kv, pages in zip(inner, targets, strict=True):
        for buffer in kv.k_buffer + kv.v_buffer:
            zero = (buffer == 0).all(dim=(1, 2, 3)).nonzero()[:, 0].tolist()
            assert sorted(pages) == zero
