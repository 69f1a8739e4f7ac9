"""The pages that a sliding window leaves visible, chosen on the GPU without waiting for it.

Both decode kernels divide and read the table that is left. So pages that no query sees are nobody's
share of the work.
"""

import torch
import triton
import triton.language as tl

from hma_kernels import layout
from hma_kernels.paged import PageTable
from hma_kernels.triton.layout import PAGE

BLOCK = 512


@triton.jit
def _visible(pos, entry, last, oldest, seq_len):
    """Positions of entries' pages, and which of them hold a token of oldest..seq_len-1."""
    valid = entry < last
    position = tl.load(pos + entry, mask=valid, other=0)
    return position, valid & (position + PAGE > oldest) & (position < seq_len)


@triton.jit
def _count_entries(indptr, pos, request, oldest, seq_len, BLOCK: tl.constexpr):
    last = tl.load(indptr + request + 1)
    count = tl.zeros([], tl.int64)
    for first in range(tl.load(indptr + request), last, BLOCK):
        _, visible = _visible(pos, first + tl.arange(0, BLOCK), last, oldest, seq_len)
        count += tl.sum(visible.to(tl.int64), 0)
    return count


@triton.jit
def _keep_entries(
    indptr,
    indices,
    pos,
    kept_indptr,
    kept_indices,
    kept_pos,
    page_counts,
    request,
    batch_size,
    oldest,
    seq_len,
    BATCH_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    each = tl.arange(0, BATCH_PADDED)
    kept = tl.sum(tl.load(page_counts + each, mask=each < request, other=0), 0)
    tl.store(kept_indptr + request, kept)
    last = tl.load(indptr + request + 1)
    for first in range(tl.load(indptr + request), last, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        position, visible = _visible(pos, entry, last, oldest, seq_len)
        page = tl.load(indices + entry, mask=visible, other=0)
        place = kept + tl.cumsum(visible.to(tl.int64), 0) - 1
        tl.store(kept_indices + place, page, mask=visible)
        tl.store(kept_pos + place, position, mask=visible)
        kept += tl.sum(visible.to(tl.int64), 0)
    if request == batch_size - 1:
        tl.store(kept_indptr + batch_size, kept)


@triton.jit
def _count(
    bfp8_indptr,
    bfp8_pos,
    bf16_indptr,
    bf16_pos,
    seq_lens,
    page_counts,
    sliding_window,
    batch_size,
    BLOCK: tl.constexpr,
):
    """One program a request: how many of its pages of each format are visible.

    page_counts: [2 * batch_size], all BFP8 counts before the BF16 counts.
    """
    request = tl.program_id(0)
    seq_len = tl.load(seq_lens + request)
    oldest = seq_len - 1 - sliding_window
    bfp8_pages = _count_entries(bfp8_indptr, bfp8_pos, request, oldest, seq_len, BLOCK)
    bf16_pages = _count_entries(bf16_indptr, bf16_pos, request, oldest, seq_len, BLOCK)
    tl.store(page_counts + request, bfp8_pages)
    tl.store(page_counts + batch_size + request, bf16_pages)


@triton.jit
def _keep(
    bfp8_indptr,
    bfp8_indices,
    bfp8_pos,
    bf16_indptr,
    bf16_indices,
    bf16_pos,
    seq_lens,
    kept_bfp8_indptr,
    kept_bfp8_indices,
    kept_bfp8_pos,
    kept_bf16_indptr,
    kept_bf16_indices,
    kept_bf16_pos,
    page_counts,
    sliding_window,
    batch_size,
    BATCH_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request: its visible entries of both formats, behind those of the requests
    before, in their order."""
    request = tl.program_id(0)
    seq_len = tl.load(seq_lens + request)
    oldest = seq_len - 1 - sliding_window
    _keep_entries(
        *(bfp8_indptr, bfp8_indices, bfp8_pos, kept_bfp8_indptr, kept_bfp8_indices, kept_bfp8_pos),
        *(page_counts, request, batch_size, oldest, seq_len, BATCH_PADDED, BLOCK),
    )
    _keep_entries(
        *(bf16_indptr, bf16_indices, bf16_pos, kept_bf16_indptr, kept_bf16_indices, kept_bf16_pos),
        *(page_counts + batch_size, request, batch_size, oldest, seq_len, BATCH_PADDED, BLOCK),
    )


class VisiblePages:
    """Of a page table, the pages that hold a token which the query at a request's end sees.

    table: those, in tensors that stay where they are; what they hold is that of the last update().
    Without a window (-1) it is the given table itself. Pages of a request must not overlap.
    """

    def __init__(self, table: PageTable, sliding_window: int) -> None:
        self._given, self._sliding_window = table, sliding_window
        self.table = table if sliding_window < 0 else self._empty()
        self._page_counts = table.seq_lens.new_zeros(2 * table.batch_size)
        self.update()

    def _empty(self) -> PageTable:
        """With room for all that the window can leave."""
        given = self._given
        # sliding_window + 1 tokens, of which the first may be a page's last
        pages = given.batch_size * (-(-self._sliding_window // layout.PAGE) + 1)

        def room(entries: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(entries[:pages])

        return PageTable(
            *(torch.zeros_like(given.bfp8_indptr), room(given.bfp8_indices), room(given.bfp8_pos)),
            *(torch.zeros_like(given.bf16_indptr), room(given.bf16_indices), room(given.bf16_pos)),
            seq_lens=given.seq_lens,
        )

    def update(self) -> None:
        """Chooses anew after the contents of the given table's tensors have changed. Only
        enqueues."""
        given, kept, batch_size = self._given, self.table, self._given.batch_size
        if kept is given or batch_size == 0:
            return
        _count[(batch_size,)](
            *(given.bfp8_indptr, given.bfp8_pos, given.bf16_indptr, given.bf16_pos),
            *(given.seq_lens, self._page_counts, self._sliding_window, batch_size),
            BLOCK=BLOCK,
        )
        _keep[(batch_size,)](
            *(given.bfp8_indptr, given.bfp8_indices, given.bfp8_pos),
            *(given.bf16_indptr, given.bf16_indices, given.bf16_pos, given.seq_lens),
            *(kept.bfp8_indptr, kept.bfp8_indices, kept.bfp8_pos),
            *(kept.bf16_indptr, kept.bf16_indices, kept.bf16_pos),
            *(self._page_counts, self._sliding_window, batch_size),
            BATCH_PADDED=triton.next_power_of_2(batch_size),
            BLOCK=BLOCK,
        )
