"""SlabArena against a model that only knows bytes and sets of pages."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hma_kernels.layout import IDS_PER_SLAB
from sglang_hma.kvcache.arena import CAPACITY, PageFormat, SlabArena, longest_run

BFP8, BF16 = PageFormat.BFP8, PageFormat.BF16
# One BFP8 page is 17 units of memory, one BF16 page 32: both fill a slab of 544.
UNITS = {BFP8: 17, BF16: 32}
SLAB_UNITS = 544


def byte_span(page: int, fmt: PageFormat) -> tuple[int, int]:
    slab, index = divmod(page, IDS_PER_SLAB)
    start = slab * SLAB_UNITS + index * UNITS[fmt]
    return start, start + UNITS[fmt]


class ArenaMachine(RuleBasedStateMachine):
    @initialize(slabs=st.integers(1, 6))
    def start(self, slabs: int) -> None:
        self.arena = SlabArena(slabs)
        self.owned: dict[int, PageFormat] = {}

    @rule(fmt=st.sampled_from([BFP8, BF16]), count=st.integers(0, 80))
    def alloc(self, fmt: PageFormat, count: int) -> None:
        room = self.arena.available(fmt)
        fits = self.arena.fits(bfp8=count * (fmt is BFP8), bf16=count * (fmt is BF16))
        pages = self.arena.alloc(fmt, count)
        assert (pages is not None) == (count <= room) == fits
        if pages is not None:
            assert len(set(pages.tolist())) == count
            assert not set(pages.tolist()) & set(self.owned)
            self.owned |= dict.fromkeys(pages.tolist(), fmt)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.owned:
            some = data.draw(st.lists(st.sampled_from(sorted(self.owned)), unique=True))
            self.arena.free(some)
            for page in some:
                del self.owned[page]

    @rule(bfp8=st.integers(0, 100), bf16=st.integers(0, 60))
    def joint_answers_are_true(self, bfp8: int, bf16: int) -> None:
        """`fits` and `available_beside` agree with what really can be taken."""
        fits = self.arena.fits(bfp8=bfp8, bf16=bf16)
        beside = self.arena.available_beside(bf16)
        assert fits == (beside >= bfp8)
        empty = SlabArena(self.arena.num_slabs)
        assert empty.any_format_beside(bf16) == empty.any_format_when_empty(bf16)
        pages = self.arena.alloc_both(bfp8=bfp8, bf16=bf16)
        assert (pages is not None) == fits
        if pages is not None:
            assert [len(kind) for kind in pages] == [bfp8, bf16]
            self.arena.free(np.concatenate(pages))

    @rule(bf16=st.integers(0, 20))
    def either_format_room_is_true(self, bf16: int) -> None:
        if self.arena.available_beside(bf16) < 0:
            return
        room = self.arena.any_format_beside(bf16)
        tails = self.arena.alloc(BF16, bf16)
        bfp8 = self.arena.alloc(BFP8, self.arena.available(BFP8))
        rest = self.arena.alloc(BF16, self.arena.available(BF16))
        assert tails is not None and bfp8 is not None and rest is not None
        assert len(bfp8) + len(rest) == room
        self.arena.free(np.concatenate([tails, bfp8, rest]))

    @rule(page=st.integers(-40, 300))
    def foreign_pages_are_refused(self, page: int) -> None:
        if page not in self.owned:
            with pytest.raises(ValueError, match="not handed out"):
                self.arena.free([page])

    @invariant()
    def no_two_pages_share_a_byte(self) -> None:
        spans = sorted(byte_span(page, fmt) for page, fmt in self.owned.items())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert not spans or spans[0][0] >= SLAB_UNITS, "slab 0 is reserved"

    @invariant()
    def counts_are_true(self) -> None:
        assert self.arena.live_pages == len(self.owned)
        for fmt in (BFP8, BF16):
            assert self.arena.used(fmt) == list(self.owned.values()).count(fmt)
        formats = {page // IDS_PER_SLAB: fmt for page, fmt in self.owned.items()}
        expected = [formats.get(slab, PageFormat.FREE) for slab in range(self.arena.num_slabs + 1)]
        assert self.arena.formats.tolist() == expected
        if not self.owned:
            assert self.arena.available(BFP8) == 32 * self.arena.num_slabs
            assert self.arena.available(BF16) == 17 * self.arena.num_slabs
            assert self.arena.free_in_bfp8_pages() == 32 * self.arena.num_slabs
        assert not set(self.arena.free_page_ids().tolist()) & set(self.owned)


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=25)


@given(st.integers(0, 2**32 - 1))
def test_longest_run(mask: int) -> None:
    runs = [(len(r), -start) for start, r in runs_of(mask)]
    length, start = max(runs, default=(0, 0))
    assert longest_run(mask) == (-start, length)


def runs_of(mask: int) -> list[tuple[int, str]]:
    bits = "".join(str(mask >> i & 1) for i in range(32)) + "0"
    found, start = [], None
    for i, bit in enumerate(bits):
        if bit == "1" and start is None:
            start = i
        if bit == "0" and start is not None:
            found.append((start, bits[start:i]))
            start = None
    return found


@pytest.mark.parametrize("pages", [1, 31, 32, 33, 100, 320])
def test_a_prompt_in_an_empty_arena_is_one_run(pages: int) -> None:
    taken = SlabArena(16).alloc(BFP8, pages)
    assert taken is not None and np.array_equal(np.diff(taken), np.ones(pages - 1))


def test_slab_geometry_is_exact() -> None:
    assert CAPACITY[BFP8] * UNITS[BFP8] == CAPACITY[BF16] * UNITS[BF16] == SLAB_UNITS
