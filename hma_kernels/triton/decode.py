"""Decode attention over BFP8 and BF16 pages, split over the keys.

A program is one warp. It takes one work item of the schedule (some of one request's pages, BFP8
first) and up to 8 query heads of one KV head, and writes a partial softmax state. A second kernel
merges the states of each request's items exactly.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.base import DecodeCall
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton.attention import attend_columns, empty_state, store_state
from hma_kernels.triton.merge import PartialStates
from hma_kernels.triton.schedule import Schedule
from hma_kernels.triton.softmax import mma_type
from hma_kernels.triton.visible import VisiblePages

OPTIONS = {"num_warps": 1, "num_stages": 1}


def heads_of_program(
    head_dim: int, v_head_dim: int, gqa_group_size: int, dtype: torch.dtype
) -> int:
    """How many query heads a program has at most. Registers are short beside wide heads, and
    queries that are not bfloat16 take twice as many."""
    width = max(head_dim, v_head_dim) * (1 if dtype == torch.bfloat16 else 2)
    return 4 if gqa_group_size <= 4 or width > 128 else 8


def specialization(
    head_dim: int, v_head_dim: int, kv_heads: int, gqa_group_size: int, dtype: torch.dtype
) -> dict[str, int | bool]:
    """What the kernel is compiled for, but for the cap of logits and the operands' type."""
    heads = heads_of_program(head_dim, v_head_dim, gqa_group_size, dtype)
    shape = {"KV_HEADS": kv_heads, "GQA_GROUP_SIZE": gqa_group_size, "HEADS": heads}
    return shape | {"DIM": head_dim, "V_DIM": v_head_dim, "SPLIT_Q": dtype != torch.bfloat16}


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
    HEADS: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    # Programs that read the same pages are neighbours.
    HEAD_BLOCKS: tl.constexpr = (GQA_GROUP_SIZE + HEADS - 1) // HEADS
    kv_head, first_head = tl.program_id(0) // HEAD_BLOCKS, tl.program_id(0) % HEAD_BLOCKS * HEADS
    item = tl.program_id(1)
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
    first = pages * (item - first_item) // items
    last = pages * (item - first_item + 1) // items
    last_bfp8, first_bf16 = tl.minimum(last, bfp8_pages), tl.maximum(first, bfp8_pages)

    heads = GQA_GROUP_SIZE - first_head
    query_row = query + request * query_stride
    query_row += (kv_head * GQA_GROUP_SIZE + first_head) * query_head_stride
    state = empty_state(HEADS, V_DIM)
    state = attend_columns(
        *(state, query_row, query_head_stride, heads, k_bfp8, v_bfp8, bfp8_indices, bfp8_pos),
        *(bfp8_start + first, bfp8_start + last_bfp8, begin, seq_len),
        *(k_bfp8_stride, v_bfp8_stride, kv_head, scale, logit_cap, True),
        *(HEADS, DIM, V_DIM, SPLIT_Q, CAPPED, MMA),
    )
    bf16_start -= bfp8_pages
    state = attend_columns(
        *(state, query_row, query_head_stride, heads, k_bf16, v_bf16, bf16_indices, bf16_pos),
        *(bf16_start + first_bf16, bf16_start + last, begin, seq_len),
        *(k_bf16_stride, v_bf16_stride, kv_head, scale, logit_cap, False),
        *(HEADS, DIM, V_DIM, SPLIT_Q, CAPPED, MMA),
    )
    slot = (item * KV_HEADS + kv_head) * GQA_GROUP_SIZE + first_head
    store_state(state, partial_out, partial_max, partial_sum, slot, heads, HEADS, V_DIM)


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

    def run(self, call: DecodeCall) -> None:
        self._attend(call)
        self._states.merge(self._schedule, call.out, call.sinks)

    def _attend(self, call: DecodeCall) -> None:
        """Writes the partial states."""
        q, layer = call.q if call.q.stride(2) == 1 else call.q.contiguous(), call.layer
        kv, table, schedule, states = self._kv, self._table, self._schedule, self._states
        k_bfp8, v_bfp8 = kv.k_bfp8[layer], kv.v_bfp8[layer]
        k_bf16, v_bf16 = kv.k_bf16[layer], kv.v_bf16[layer]
        constants = specialization(
            *(kv.head_dim, kv.v_head_dim, kv.kv_heads, self._gqa_group_size, q.dtype)
        )
        head_blocks = -(-self._gqa_group_size // constants["HEADS"])
        _partial[(kv.kv_heads * head_blocks, schedule.max_items)](
            *(q, states.out, states.max, states.sum, k_bfp8, v_bfp8, k_bf16, v_bf16),
            *(table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos),
            *(table.bf16_indptr, table.bf16_indices, table.bf16_pos, table.seq_lens),
            *(schedule.item_indptr, schedule.item_request, table.batch_size),
            *(self._sliding_window, call.scale, call.logit_cap, q.stride(0), q.stride(1)),
            *(k_bfp8.stride(0), v_bfp8.stride(0), k_bf16.stride(0), v_bf16.stride(0)),
            **constants,
            CAPPED=call.logit_cap > 0,
            MMA=mma_type(kv.device),
            **OPTIONS,
        )
