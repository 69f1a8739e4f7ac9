"""Page tables on a GPU in tensors that stay where they are, made without waiting for it."""

from functools import cache

import torch
import triton
import triton.language as tl

from hma_kernels.layout import IDS_PER_SLAB, PAGE
from hma_kernels.paged import PageTable
from hma_kernels.triton.pages import bf16_index

BLOCK = 128


@triton.jit
def _page_formats(slots, slab_is_bf16, index, count, PAGE: tl.constexpr, SLAB: tl.constexpr):
    """Page ids, and 1 where a page is BF16, of a request's pages `index`; 0 beyond `count`."""
    live = index < count
    page = tl.load(slots + index * PAGE, mask=live, other=0).to(tl.int64) // PAGE
    is16 = tl.load(slab_is_bf16 + page // SLAB, mask=live, other=0).to(tl.int64)
    return page, is16, live


@triton.jit
def _count(
    req_to_token,
    rows,
    seq_lens,
    slab_is_bf16,
    lengths,
    counts,
    row_stride,
    batch,
    PAGE: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: how many pages of each format it has."""
    request = tl.program_id(0)
    length = tl.load(seq_lens + request).to(tl.int64)
    pages = (length + PAGE - 1) // PAGE
    slots = req_to_token + tl.load(rows + request).to(tl.int64) * row_stride
    found = tl.zeros([], tl.int64)
    for first in range(0, pages, BLOCK):
        index = first + tl.arange(0, BLOCK)
        _, is16, _ = _page_formats(slots, slab_is_bf16, index, pages, PAGE, SLAB)
        found += tl.sum(is16, 0)
    tl.store(lengths + request, length)
    tl.store(counts + request, pages - found)
    tl.store(counts + batch + request, found)


@triton.jit
def _place(
    req_to_token,
    rows,
    slab_is_bf16,
    counts,
    start8,
    ids8,
    pos8,
    start16,
    ids16,
    pos16,
    row_stride,
    batch,
    PAGE: tl.constexpr,
    SLAB: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: its entries in both lists, behind those of the requests before."""
    request = tl.program_id(0)
    each = tl.arange(0, BATCH)
    before = each < request
    at8 = tl.sum(tl.load(counts + each, mask=before, other=0), 0)
    at16 = tl.sum(tl.load(counts + batch + each, mask=before, other=0), 0)
    count8, count16 = tl.load(counts + request), tl.load(counts + batch + request)
    tl.store(start8 + request, at8)
    tl.store(start16 + request, at16)
    if request == batch - 1:
        tl.store(start8 + batch, at8 + count8)
        tl.store(start16 + batch, at16 + count16)
    pages = count8 + count16
    slots = req_to_token + tl.load(rows + request).to(tl.int64) * row_stride
    for first in range(0, pages, BLOCK):
        index = first + tl.arange(0, BLOCK)
        page, is16, live = _page_formats(slots, slab_is_bf16, index, pages, PAGE, SLAB)
        is8 = tl.where(live, 1 - is16, 0)
        to8 = at8 + tl.cumsum(is8, 0) - 1
        to16 = at16 + tl.cumsum(is16, 0) - 1
        position = index.to(tl.int64) * PAGE
        tl.store(ids8 + to8, page, mask=is8 != 0)
        tl.store(pos8 + to8, position, mask=is8 != 0)
        tl.store(ids16 + to16, bf16_index(page), mask=is16 != 0)
        tl.store(pos16 + to16, position, mask=is16 != 0)
        at8 += tl.sum(is8, 0)
        at16 += tl.sum(is16, 0)


class StaticPageTables:
    """Room for the page table of any batch up to `max_batch` requests of `max_tokens` tokens.

    `fill` returns the same tensors for each batch size; their contents last until the next call.
    """

    def __init__(
        self,
        req_to_token: torch.Tensor,
        slab_is_bf16: torch.Tensor,
        *,
        max_batch: int,
        max_tokens: int,
    ) -> None:
        self._req_to_token = req_to_token
        self._slab_is_bf16 = slab_is_bf16
        device = req_to_token.device
        pages = max_batch * -(-max_tokens // PAGE)

        def room(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self._counts = room(2 * max_batch)
        self._seq_lens = room(max_batch)
        self._starts = room(max_batch + 1), room(max_batch + 1)
        self._lists = tuple(room(pages) for _ in range(4))
        self._table = cache(self._make_table)

    def _make_table(self, batch: int) -> PageTable:
        (start8, start16), (ids8, pos8, ids16, pos16) = self._starts, self._lists
        return PageTable(
            *(start8[: batch + 1], ids8, pos8, start16[: batch + 1], ids16, pos16),
            self._seq_lens[:batch],
        )

    def fill(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> PageTable:
        """rows, seq_lens: [B] on the GPU. Only enqueues."""
        batch = len(rows)
        slots, formats = self._req_to_token, self._slab_is_bf16
        (start8, start16), (ids8, pos8, ids16, pos16) = self._starts, self._lists
        _count[(batch,)](
            *(slots, rows, seq_lens, formats, self._seq_lens, self._counts),
            *(slots.stride(0), batch),
            PAGE=PAGE,
            SLAB=IDS_PER_SLAB,
            BLOCK=BLOCK,
        )
        _place[(batch,)](
            *(slots, rows, formats, self._counts),
            *(start8, ids8, pos8, start16, ids16, pos16),
            *(slots.stride(0), batch),
            PAGE=PAGE,
            SLAB=IDS_PER_SLAB,
            BATCH=triton.next_power_of_2(batch),
            BLOCK=BLOCK,
        )
        return self._table(batch)
