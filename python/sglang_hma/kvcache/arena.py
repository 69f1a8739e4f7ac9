"""The slab arena: one range of memory for BFP8 and BF16 pages.

A slab holds 32 BFP8 pages or 17 BF16 pages (hma_kernels/layout.py). It takes a
format when its first page is handed out and loses it when its last page
returns, so neither format has a fixed share. Slab 0 is never handed out:
SGLang writes padded tokens to slot 0.
"""

from bisect import insort
from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hma_kernels.layout import BF16_PAGES_PER_SLAB, BFP8_PAGES_PER_SLAB, IDS_PER_SLAB

PageIds = npt.NDArray[np.int64]


class PageFormat(IntEnum):
    """Format of a slab; FREE slabs have none."""

    FREE = 0
    BFP8 = 1
    BF16 = 2


CAPACITY = {PageFormat.BFP8: BFP8_PAGES_PER_SLAB, PageFormat.BF16: BF16_PAGES_PER_SLAB}


class SlabArena:
    """Which pages are handed out. Holds no memory; only the scheduler's thread uses it."""

    def __init__(self, num_slabs: int) -> None:
        """`num_slabs` usable slabs, beside the reserved slab 0."""
        if num_slabs < 1:
            raise ValueError(f"an arena needs at least 1 slab, got {num_slabs}")
        self.num_slabs = num_slabs
        self.formats = np.zeros(num_slabs + 1, dtype=np.uint8)
        self._free_mask = [0] * (num_slabs + 1)
        self._free_slabs = list(range(1, num_slabs + 1))
        self._partial: dict[PageFormat, set[int]] = {f: set() for f in CAPACITY}
        self._spare = dict.fromkeys(CAPACITY, 0)
        self.live_pages = 0

    def available(self, fmt: PageFormat) -> int:
        """Pages of `fmt` that could be handed out if nothing else is."""
        return self._spare[fmt] + CAPACITY[fmt] * len(self._free_slabs)

    def used(self, fmt: PageFormat) -> int:
        """Pages of `fmt` that are handed out; from another thread, about as many."""
        return CAPACITY[fmt] * int((self.formats == fmt).sum()) - self._spare[fmt]

    def fits(self, *, bfp8: int, bf16: int) -> bool:
        """Whether both counts could be handed out together."""
        return self._slabs_needed(bfp8, bf16) <= len(self._free_slabs)

    def available_beside(self, bf16: int) -> int:
        """BFP8 pages that could be handed out beside `bf16` BF16 pages, -1 if those do not fit."""
        slabs = len(self._free_slabs) - self._slabs_needed(0, bf16)
        return self._spare[PageFormat.BFP8] + slabs * BFP8_PAGES_PER_SLAB if slabs >= 0 else -1

    def any_format_beside(self, bf16: int) -> int:
        """Pages of either format that could be handed out beside `bf16` BF16 pages; 0 if those do
        not fit."""
        bfp8 = self.available_beside(bf16)
        slabs = self._slabs_needed(0, bf16)
        spare_bf16 = self._spare[PageFormat.BF16] + slabs * BF16_PAGES_PER_SLAB - bf16
        return bfp8 + spare_bf16 if bfp8 >= 0 else 0

    def any_format_when_empty(self, bf16: int) -> int:
        """`any_format_beside` with nothing handed out."""
        slabs = -(-bf16 // BF16_PAGES_PER_SLAB)
        bfp8 = (self.num_slabs - slabs) * BFP8_PAGES_PER_SLAB
        return bfp8 + slabs * BF16_PAGES_PER_SLAB - bf16 if bfp8 >= 0 else 0

    def fits_when_empty(self, *, bfp8: int, bf16: int) -> bool:
        slabs = -(-bfp8 // BFP8_PAGES_PER_SLAB) - (-bf16 // BF16_PAGES_PER_SLAB)
        return slabs <= self.num_slabs

    def free_in_bfp8_pages(self) -> int:
        """All free room, counted in BFP8 pages; a spare BF16 page is as large as 32/17 of one."""
        bf16 = self._spare[PageFormat.BF16] * BFP8_PAGES_PER_SLAB // BF16_PAGES_PER_SLAB
        return self.available(PageFormat.BFP8) + bf16

    def alloc(self, fmt: PageFormat, count: int) -> PageIds | None:
        """`count` pages in runs as long as the arena allows, or None if it is too full.

        BF16 pages open as few slabs as possible; BFP8 pages prefer whole slabs,
        because a transfer of one run is faster than one of many.
        """
        if count > self.available(fmt):
            return None
        whole = count // CAPACITY[fmt]
        if fmt is PageFormat.BF16:
            whole = min(whole, self._slabs_needed(0, count))
        taken: list[int] = []
        for slab in self._free_run(whole):
            taken += self._open(slab, fmt, CAPACITY[fmt])
        while len(taken) < count:
            rest = count - len(taken)
            partial = self._best_partial(fmt, rest)
            if partial is None:
                taken += self._open(self._free_slabs[0], fmt, rest)
            else:
                taken += self._take(partial, fmt, rest)
        return np.asarray(taken, dtype=np.int64)

    def alloc_both(self, *, bfp8: int, bf16: int) -> tuple[PageIds, PageIds] | None:
        """Both counts, or None (and nothing taken) unless `fits`."""
        if not self.fits(bfp8=bfp8, bf16=bf16):
            return None
        # BF16 first: it opens exactly the slabs that `fits` counted for it.
        bf16_pages = self.alloc(PageFormat.BF16, bf16)
        bfp8_pages = self.alloc(PageFormat.BFP8, bfp8)
        assert bfp8_pages is not None and bf16_pages is not None
        return bfp8_pages, bf16_pages

    def free(self, pages: Iterable[int]) -> None:
        """Return pages. Raises ValueError for a page that is not handed out."""
        for page in pages:
            slab, index = divmod(int(page), IDS_PER_SLAB)
            if not 0 < slab <= self.num_slabs or self.formats[slab] == PageFormat.FREE:
                raise ValueError(f"page {page} is not handed out")
            fmt = PageFormat(self.formats[slab])
            if index >= CAPACITY[fmt] or self._free_mask[slab] >> index & 1:
                raise ValueError(f"page {page} is not handed out")
            self._free_mask[slab] |= 1 << index
            self._spare[fmt] += 1
            self.live_pages -= 1
            if self._free_mask[slab] == (1 << CAPACITY[fmt]) - 1:
                self._close(slab, fmt)
            else:
                self._partial[fmt].add(slab)

    def free_page_ids(self) -> PageIds:
        """Ids that could be handed out, a free slab's counted as BFP8 pages."""
        ids: list[int] = []
        for slab in range(1, self.num_slabs + 1):
            free = self.formats[slab] == PageFormat.FREE
            mask = (1 << IDS_PER_SLAB) - 1 if free else self._free_mask[slab]
            ids += [slab * IDS_PER_SLAB + i for i in range(IDS_PER_SLAB) if mask >> i & 1]
        return np.asarray(ids, dtype=np.int64)

    def _slabs_needed(self, bfp8: int, bf16: int) -> int:
        new_bfp8 = max(0, bfp8 - self._spare[PageFormat.BFP8])
        new_bf16 = max(0, bf16 - self._spare[PageFormat.BF16])
        return -(-new_bfp8 // BFP8_PAGES_PER_SLAB) - (-new_bf16 // BF16_PAGES_PER_SLAB)

    def _free_run(self, count: int) -> list[int]:
        """Up to `count` free slabs, adjacent ones if there is such a run."""
        count = min(count, len(self._free_slabs))
        for start in range(len(self._free_slabs) - count + 1):
            run = self._free_slabs[start : start + count]
            if count and run[-1] - run[0] == count - 1:
                return run
        return self._free_slabs[:count]

    def _best_partial(self, fmt: PageFormat, count: int) -> int | None:
        """The slab whose longest run of free pages is the shortest that holds `count`, else the
        slab with the longest run."""

        def waste(slab: int) -> tuple[bool, int, int]:
            run = longest_run(self._free_mask[slab])[1]
            return (run < count, abs(run - count), slab)

        return min(self._partial[fmt], key=waste, default=None)

    def _open(self, slab: int, fmt: PageFormat, count: int) -> list[int]:
        self._free_slabs.remove(slab)
        self.formats[slab] = fmt
        self._free_mask[slab] = (1 << CAPACITY[fmt]) - 1
        self._spare[fmt] += CAPACITY[fmt]
        self._partial[fmt].add(slab)
        return self._take(slab, fmt, count)

    def _close(self, slab: int, fmt: PageFormat) -> None:
        self._spare[fmt] -= CAPACITY[fmt]
        self._partial[fmt].discard(slab)
        self.formats[slab] = PageFormat.FREE
        self._free_mask[slab] = 0
        insort(self._free_slabs, slab)

    def _take(self, slab: int, fmt: PageFormat, count: int) -> list[int]:
        """Pages from the start of the slab's longest free run, at most `count`."""
        start, run = longest_run(self._free_mask[slab])
        count = min(count, run)
        self._free_mask[slab] &= ~(((1 << count) - 1) << start)
        self._spare[fmt] -= count
        self.live_pages += count
        if not self._free_mask[slab]:
            self._partial[fmt].discard(slab)
        return [slab * IDS_PER_SLAB + i for i in range(start, start + count)]


def longest_run(mask: int) -> tuple[int, int]:
    """(start, length) of the longest run of ones in `mask`, the lowest if several."""
    length, survivors = 0, mask
    ends = mask
    while survivors:
        ends = survivors
        survivors &= survivors << 1
        length += 1
    if not length:
        return 0, 0
    end = (ends & -ends).bit_length() - 1
    return end - length + 1, length
