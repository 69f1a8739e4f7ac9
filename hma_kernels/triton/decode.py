"""Decode attention over BFP8 and BF16 pages, split over the keys.

A program takes one work item of the schedule (some of one request's pages, BFP8 first) and one KV
head with all of its query heads, and writes a partial softmax state. A second kernel merges the
states of each request's items exactly.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton.attention import attend_pages
from hma_kernels.triton.merge import PartialStates
from hma_kernels.triton.schedule import Schedule
from hma_kernels.triton.softmax import empty_state, mma_type, split_query
from hma_kernels.triton.visible import VisiblePages

PAGES_PER_TILE = 2
MIN_ROWS = 16  # rows of a matrix product on tensor cores; a row is a query head


@triton.jit
def _partial(
    query,
    partial_out,
    partial_max,
    partial_sum,
    k_bfp8,
    v_bfp8,
    k_bf16,
    v_bf16,
    bfp8_indptr,
    bfp8_indices,
    bfp8_pos,
    bf16_indptr,
    bf16_indices,
    bf16_pos,
    seq_lens,
    item_indptr,
    item_request,
    batch_size,
    sliding_window,
    scale,
    logit_cap,
    query_stride,
    query_head_stride,
    k_bfp8_stride,
    v_bfp8_stride,
    k_bf16_stride,
    v_bf16_stride,
    KV_HEADS: tl.constexpr,
    GQA_GROUP_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES_PER_TILE: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    item, kv_head = tl.program_id(0), tl.program_id(1)
    request = tl.load(item_request + item)
    if request >= batch_size:
        return
    seq_len = tl.load(seq_lens + request)
    begin = tl.where(sliding_window >= 0, tl.maximum(seq_len - 1 - sliding_window, 0), 0)

    # The item's pages as a range of the request's, which count BFP8 first.
    bfp8_start, bf16_start = tl.load(bfp8_indptr + request), tl.load(bf16_indptr + request)
    bfp8_pages = tl.load(bfp8_indptr + request + 1) - bfp8_start
    pages = bfp8_pages + tl.load(bf16_indptr + request + 1) - bf16_start
    first_item = tl.load(item_indptr + request)
    items = tl.load(item_indptr + request + 1) - first_item
    tiles = (pages + PAGES_PER_TILE - 1) // PAGES_PER_TILE
    first = tiles * (item - first_item) // items * PAGES_PER_TILE
    last = tl.minimum(tiles * (item - first_item + 1) // items * PAGES_PER_TILE, pages)
    last_bfp8, first_bf16 = tl.minimum(last, bfp8_pages), tl.maximum(first, bfp8_pages)

    row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PADDED)
    query_head = kv_head * GQA_GROUP_SIZE + row
    given = tl.load(
        query
        + request * query_stride
        + (query_head * query_head_stride)[:, None]
        + column[None, :],
        mask=(row < GQA_GROUP_SIZE)[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    q, q_low = split_query(given, MMA)
    state = empty_state(ROWS, V_PADDED)
    state = attend_pages(
        *(state, q, q_low, k_bfp8, v_bfp8, bfp8_indices, bfp8_pos),
        *(bfp8_start + first, bfp8_start + last_bfp8, begin, seq_len, None),
        *(k_bfp8_stride, v_bfp8_stride, kv_head, scale, logit_cap, True, False),
        *(DIM, V_DIM, DIM_PADDED, V_PADDED, PAGES_PER_TILE, SPLIT_Q, CAPPED, MMA),
    )
    bf16_start -= bfp8_pages
    state = attend_pages(
        *(state, q, q_low, k_bf16, v_bf16, bf16_indices, bf16_pos),
        *(bf16_start + first_bf16, bf16_start + last, begin, seq_len, None),
        *(k_bf16_stride, v_bf16_stride, kv_head, scale, logit_cap, False, False),
        *(DIM, V_DIM, DIM_PADDED, V_PADDED, PAGES_PER_TILE, SPLIT_Q, CAPPED, MMA),
    )

    state_max, state_sum, state_out = state
    slot = (item * KV_HEADS + kv_head) * GQA_GROUP_SIZE + row
    stored = row < GQA_GROUP_SIZE
    tl.store(partial_max + slot, state_max, mask=stored)
    tl.store(partial_sum + slot, state_sum, mask=stored)
    v_column = tl.arange(0, V_PADDED)
    tl.store(
        partial_out + slot[:, None] * V_DIM + v_column[None, :],
        state_out,
        mask=stored[:, None] & (v_column < V_DIM)[None, :],
    )


class DecodePlan:
    """hma_kernels.DecodePlan on a GPU."""

    def __init__(self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> None:
        self._kv = kv
        self._visible = VisiblePages(table, sliding_window)
        self._table = self._visible.table
        self._gqa_group_size = heads // kv.kv_heads
        self._sliding_window = sliding_window
        self._schedule = Schedule(self._table, kv.kv_heads)
        self._states = PartialStates(self._schedule.max_items, heads, kv.v_head_dim, kv.device)

    def refresh(self) -> None:
        self._visible.update()
        self._schedule.update()

    def run(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, out: torch.Tensor
    ) -> None:
        self._attend(q if q.stride(2) == 1 else q.contiguous(), layer, scale, logit_cap)
        self._states.merge(self._schedule, out)

    def _attend(self, q: torch.Tensor, layer: int, scale: float, logit_cap: float) -> None:
        """Writes the partial states. The last dimension of q is contiguous."""
        kv, table, schedule, states = self._kv, self._table, self._schedule, self._states
        k_bfp8, v_bfp8 = kv.k_bfp8[layer], kv.v_bfp8[layer]
        k_bf16, v_bf16 = kv.k_bf16[layer], kv.v_bf16[layer]
        _partial[(schedule.max_items, kv.kv_heads)](
            *(q, states.out, states.max, states.sum, k_bfp8, v_bfp8, k_bf16, v_bf16),
            *(table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos),
            *(table.bf16_indptr, table.bf16_indices, table.bf16_pos, table.seq_lens),
            *(schedule.item_indptr, schedule.item_request, table.batch_size),
            *(self._sliding_window, scale, logit_cap, q.stride(0), q.stride(1)),
            *(k_bfp8.stride(0), v_bfp8.stride(0), k_bf16.stride(0), v_bf16.stride(0)),
            KV_HEADS=kv.kv_heads,
            GQA_GROUP_SIZE=self._gqa_group_size,
            DIM=kv.head_dim,
            V_DIM=kv.v_head_dim,
            DIM_PADDED=triton.next_power_of_2(kv.head_dim),
            V_PADDED=triton.next_power_of_2(kv.v_head_dim),
            ROWS=max(MIN_ROWS, triton.next_power_of_2(self._gqa_group_size)),
            PAGES_PER_TILE=PAGES_PER_TILE,
            SPLIT_Q=q.dtype != torch.bfloat16,
            CAPPED=logit_cap > 0,
            MMA=mma_type(kv.device),
            num_warps=4,
            num_stages=2,
        )
