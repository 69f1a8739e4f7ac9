"""Decode attention over BFP8 and BF16 pages: split over the keys, merged exactly.

A program takes one item of the schedule (pages of one request, BFP8 first) and one KV head with all
of its query heads, and leaves a partial softmax state; a second kernel merges each request's.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton.merge import PartialStates
from hma_kernels.triton.pages import load_tile
from hma_kernels.triton.schedule import Schedule
from hma_kernels.triton.softmax import attend, empty_state, mma_type, split_query

PAGES_A_TILE = 2
ROWS = 16  # query heads a tensor-core tile holds


@triton.jit
def _partial(
    query,
    out,
    maxima,
    sums,
    k8,
    v8,
    k16,
    v16,
    ids8,
    pos8,
    start8,
    ids16,
    pos16,
    start16,
    seq_lens,
    item_request,
    item_start,
    batch,
    window,
    scale,
    logit_cap,
    query_stride,
    head_stride,
    k8_page,
    v8_page,
    k16_page,
    v16_page,
    KV_HEADS: tl.constexpr,
    GROUPED: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    item, head = tl.program_id(0), tl.program_id(1)
    request = tl.load(item_request + item)
    if request >= batch:
        return
    stop = tl.load(seq_lens + request)
    begin = tl.where(window >= 0, tl.maximum(stop - 1 - window, 0), 0)
    first8, first16 = tl.load(start8 + request), tl.load(start16 + request)
    count8 = tl.load(start8 + request + 1) - first8
    count = count8 + tl.load(start16 + request + 1) - first16
    first_item = tl.load(item_start + request)
    items = tl.load(item_start + request + 1) - first_item
    tiles = (count + PAGES - 1) // PAGES
    first = tiles * (item - first_item) // items * PAGES
    last = tl.minimum(tiles * (item - first_item + 1) // items * PAGES, count)

    query_row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PADDED)
    q_at = query + request * query_stride + (head * GROUPED + query_row)[:, None] * head_stride
    given = tl.load(
        q_at + column[None, :],
        mask=(query_row < GROUPED)[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    q, q_low = split_query(given, MMA)

    top, total, acc = empty_state(ROWS, V_PADDED)
    token = tl.arange(0, PAGES * 32)
    page_of, row = token // 32, token % 32

    last8 = tl.minimum(last, count8)
    for page in range(first, last8, PAGES):
        k, v, _, live = load_tile(
            k8,
            v8,
            ids8,
            pos8,
            first8 + page + page_of,
            page + page_of < last8,
            row,
            begin,
            stop,
            k8_page,
            v8_page,
            head,
            True,
            DIM,
            V_DIM,
            DIM_PADDED,
            V_PADDED,
            MMA,
        )
        top, total, acc = attend(
            top, total, acc, q, q_low, k, v, live[None, :], scale, logit_cap, SPLIT_Q, CAPPED
        )

    for page in range(tl.maximum(first, count8), last, PAGES):
        k, v, _, live = load_tile(
            k16,
            v16,
            ids16,
            pos16,
            first16 + page - count8 + page_of,
            page + page_of < last,
            row,
            begin,
            stop,
            k16_page,
            v16_page,
            head,
            False,
            DIM,
            V_DIM,
            DIM_PADDED,
            V_PADDED,
            MMA,
        )
        top, total, acc = attend(
            top, total, acc, q, q_low, k, v, live[None, :], scale, logit_cap, SPLIT_Q, CAPPED
        )

    slot = (item * KV_HEADS + head) * GROUPED + query_row
    held = query_row < GROUPED
    tl.store(maxima + slot, top, mask=held)
    tl.store(sums + slot, total, mask=held)
    v_column = tl.arange(0, V_PADDED)
    tl.store(
        out + slot[:, None] * V_DIM + v_column[None, :],
        acc,
        mask=held[:, None] & (v_column < V_DIM)[None, :],
    )


class DecodePlan:
    """hma_kernels.DecodePlan on a GPU."""

    def __init__(self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> None:
        self._kv = kv
        self._table = table
        self._heads = heads
        self._window = sliding_window
        self._schedule = Schedule(table, kv.kv_heads)
        self._states = PartialStates(self._schedule.bound, heads, kv.v_head_dim, kv.device)

    def refresh(self) -> None:
        self._schedule.update()

    def run(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, out: torch.Tensor
    ) -> None:
        self._attend(q if q.stride(2) == 1 else q.contiguous(), layer, scale, logit_cap)
        self._states.merge(self._schedule, out)

    def _attend(self, q: torch.Tensor, layer: int, scale: float, logit_cap: float) -> None:
        """Fills the states; q's last dimension is contiguous."""
        kv, table, schedule, states = self._kv, self._table, self._schedule, self._states
        k8, v8, k16, v16 = kv.k_bfp8[layer], kv.v_bfp8[layer], kv.k_bf16[layer], kv.v_bf16[layer]
        grouped = self._heads // kv.kv_heads
        _partial[(schedule.bound, kv.kv_heads)](
            *(q, states.partial, states.maxima, states.sums, k8, v8, k16, v16),
            *(table.bfp8_indices, table.bfp8_pos, table.bfp8_indptr),
            *(table.bf16_indices, table.bf16_pos, table.bf16_indptr),
            *(table.seq_lens, schedule.item_request, schedule.item_start, table.batch_size),
            *(self._window, scale, logit_cap, q.stride(0), q.stride(1)),
            *(k8.stride(0), v8.stride(0), k16.stride(0), v16.stride(0)),
            KV_HEADS=kv.kv_heads,
            GROUPED=grouped,
            DIM=kv.head_dim,
            V_DIM=kv.v_head_dim,
            DIM_PADDED=triton.next_power_of_2(kv.head_dim),
            V_PADDED=triton.next_power_of_2(kv.v_head_dim),
            ROWS=max(ROWS, triton.next_power_of_2(grouped)),
            PAGES=PAGES_A_TILE,
            SPLIT_Q=q.dtype != torch.bfloat16,
            CAPPED=logit_cap > 0,
            MMA=mma_type(kv.device),
            num_warps=4,
            num_stages=2,
        )
