"""A layer's cached prefixes as plain rows, unpacked once for all query heads and new rows."""

import torch
import triton
import triton.language as tl

from hma_kernels import layout
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton.layout import PAGE, TILE, TILE_BYTES
from hma_kernels.triton.pages import load_bf16, load_bfp8


@triton.jit
def _gather(
    pages,
    indices,
    first_row,
    out,
    page_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BFP8: tl.constexpr,
):
    """One program an entry of the page table and a KV head."""
    entry, head = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, PAGE), tl.arange(0, DIM_PADDED)
    page = tl.zeros([PAGE], tl.int64) + tl.load(indices + entry) * page_stride
    if BFP8:
        page += head * (DIM // TILE * TILE_BYTES)
        values = load_bfp8(pages, page, row, row < PAGE, DIM, DIM_PADDED)
    else:
        page += head * (PAGE * DIM)
        values = load_bf16(pages, page, row, row < PAGE, DIM, DIM_PADDED)
    target = (tl.load(first_row + entry) + row) * (HEADS * DIM) + head * DIM
    tl.store(
        out + target[:, None] + column[None, :],
        values.to(tl.bfloat16),
        mask=(row < PAGE)[:, None] & (column < DIM)[None, :],
    )


def unpack_prefix(
    kv: PagedKV, table: PageTable, layer: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K [R, H, D] and V [R, H, Dv] in bfloat16, which holds every BFP8 value, and int64 [B]: where
    each request's rows begin. Rows beyond a request's prefix, up to a whole page, are arbitrary.
    Only enqueues."""
    starts = (table.bfp8_indptr + table.bf16_indptr) * layout.PAGE
    formats = (
        (True, table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos, kv.k_bfp8, kv.v_bfp8),
        (False, table.bf16_indptr, table.bf16_indices, table.bf16_pos, kv.k_bf16, kv.v_bf16),
    )
    rows = (len(table.bfp8_indices) + len(table.bf16_indices)) * layout.PAGE
    k, v = (
        torch.empty(rows, kv.kv_heads, dim, dtype=torch.bfloat16, device=kv.device)
        for dim in (kv.head_dim, kv.v_head_dim)
    )
    for bfp8, indptr, indices, pos, k_pages, v_pages in formats:
        entries = len(indices)
        if entries == 0:
            continue
        entry = torch.arange(entries, device=kv.device)
        first_row = starts[torch.searchsorted(indptr, entry, right=True) - 1] + pos
        for pages, out in ((k_pages[layer], k), (v_pages[layer], v)):
            _gather[(entries, kv.kv_heads)](
                *(pages, indices, first_row, out, pages.stride(0)),
                HEADS=kv.kv_heads,
                DIM=out.shape[2],
                DIM_PADDED=triton.next_power_of_2(out.shape[2]),
                BFP8=bfp8,
            )
    return k, v, starts
