"""Page tables on a GPU in tensors that stay where they are, made without waiting for it."""

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl

from hma_kernels import layout
from hma_kernels.paged import PageTable
from hma_kernels.triton.layout import IDS_PER_SLAB, PAGE, bf16_index

BLOCK = 128


@triton.jit
def _load_pages(slots, slab_is_bf16, index, pages):
    """Of pages `index` of a request: the page id, whether it is BF16 (int64 0 or 1), and whether
    index < pages, else 0."""
    valid = index < pages
    page = tl.load(slots + index * PAGE, mask=valid, other=0).to(tl.int64) // PAGE
    is_bf16 = tl.load(slab_is_bf16 + page // IDS_PER_SLAB, mask=valid, other=0).to(tl.int64)
    return page, is_bf16, valid


@triton.jit
def _count(
    req_to_token,
    rows,
    seq_lens,
    slab_is_bf16,
    table_seq_lens,
    page_counts,
    row_stride,
    batch_size,
    BLOCK: tl.constexpr,
):
    """One program a request: how many pages of each format it has.

    page_counts: [2 * batch_size], all BFP8 counts before the BF16 counts.
    """
    request = tl.program_id(0)
    seq_len = tl.load(seq_lens + request).to(tl.int64)
    pages = (seq_len + PAGE - 1) // PAGE
    slots = req_to_token + tl.load(rows + request).to(tl.int64) * row_stride
    bf16_pages = tl.zeros([], tl.int64)
    for first in range(0, pages, BLOCK):
        index = first + tl.arange(0, BLOCK)
        _, is_bf16, _ = _load_pages(slots, slab_is_bf16, index, pages)
        bf16_pages += tl.sum(is_bf16, 0)
    tl.store(table_seq_lens + request, seq_len)
    tl.store(page_counts + request, pages - bf16_pages)
    tl.store(page_counts + batch_size + request, bf16_pages)


@triton.jit
def _place(
    req_to_token,
    rows,
    slab_is_bf16,
    page_counts,
    bfp8_indptr,
    bfp8_indices,
    bfp8_pos,
    bf16_indptr,
    bf16_indices,
    bf16_pos,
    row_stride,
    batch_size,
    BATCH_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: its entries of both formats, behind those of the requests before."""
    request = tl.program_id(0)
    each = tl.arange(0, BATCH_PADDED)
    before = each < request
    bfp8_end = tl.sum(tl.load(page_counts + each, mask=before, other=0), 0)
    bf16_end = tl.sum(tl.load(page_counts + batch_size + each, mask=before, other=0), 0)
    bfp8_pages = tl.load(page_counts + request)
    bf16_pages = tl.load(page_counts + batch_size + request)
    tl.store(bfp8_indptr + request, bfp8_end)
    tl.store(bf16_indptr + request, bf16_end)
    if request == batch_size - 1:
        tl.store(bfp8_indptr + batch_size, bfp8_end + bfp8_pages)
        tl.store(bf16_indptr + batch_size, bf16_end + bf16_pages)
    pages = bfp8_pages + bf16_pages
    slots = req_to_token + tl.load(rows + request).to(tl.int64) * row_stride
    for first in range(0, pages, BLOCK):
        index = first + tl.arange(0, BLOCK)
        page, is_bf16, valid = _load_pages(slots, slab_is_bf16, index, pages)
        is_bfp8 = tl.where(valid, 1 - is_bf16, 0)
        bfp8_entry = bfp8_end + tl.cumsum(is_bfp8, 0) - 1
        bf16_entry = bf16_end + tl.cumsum(is_bf16, 0) - 1
        position = index.to(tl.int64) * PAGE
        tl.store(bfp8_indices + bfp8_entry, page, mask=is_bfp8 != 0)
        tl.store(bfp8_pos + bfp8_entry, position, mask=is_bfp8 != 0)
        tl.store(bf16_indices + bf16_entry, bf16_index(page), mask=is_bf16 != 0)
        tl.store(bf16_pos + bf16_entry, position, mask=is_bf16 != 0)
        bfp8_end += tl.sum(is_bfp8, 0)
        bf16_end += tl.sum(is_bf16, 0)


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
        max_pages = max_batch * -(-max_tokens // layout.PAGE)

        def room(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self._page_counts = room(2 * max_batch)
        self._largest = PageTable(
            bfp8_indptr=room(max_batch + 1),
            bfp8_indices=room(max_pages),
            bfp8_pos=room(max_pages),
            bf16_indptr=room(max_batch + 1),
            bf16_indices=room(max_pages),
            bf16_pos=room(max_pages),
            seq_lens=room(max_batch),
        )
        self._table = cache(self._make_table)

    def _make_table(self, batch_size: int) -> PageTable:
        return replace(
            self._largest,
            bfp8_indptr=self._largest.bfp8_indptr[: batch_size + 1],
            bf16_indptr=self._largest.bf16_indptr[: batch_size + 1],
            seq_lens=self._largest.seq_lens[:batch_size],
        )

    def fill(self, rows: torch.Tensor, seq_lens: torch.Tensor) -> PageTable:
        """rows, seq_lens: [B] on the GPU. Only enqueues."""
        batch_size, table = len(rows), self._largest
        slots, formats = self._req_to_token, self._slab_is_bf16
        _count[(batch_size,)](
            *(slots, rows, seq_lens, formats, table.seq_lens, self._page_counts),
            *(slots.stride(0), batch_size),
            BLOCK=BLOCK,
        )
        _place[(batch_size,)](
            *(slots, rows, formats, self._page_counts),
            *(table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos),
            *(table.bf16_indptr, table.bf16_indices, table.bf16_pos),
            *(slots.stride(0), batch_size),
            BATCH_PADDED=triton.next_power_of_2(batch_size),
            BLOCK=BLOCK,
        )
        return self._table(batch_size)
