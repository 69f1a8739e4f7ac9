"""Decode attention over BFP8 and BF16 pages: split over the keys, merged exactly.

A request's pages, BFP8 first, are cut into items of `pages_per_item`; a program takes one item and
one KV head with all of its query heads, and leaves a partial softmax state. A second kernel merges
the states of each request. Sizes that the host must know are bounds, so nothing waits for the GPU.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton.pages import load_tile
from hma_kernels.triton.softmax import attend, mma_type, split_query

PAGES_A_TILE = 2
ITEMS_A_SM = 4
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
    pages_per_item,
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
    first = (item - tl.load(item_start + request)) * pages_per_item
    last = tl.minimum(first + pages_per_item, count)

    query_row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM_PADDED)
    q_at = query + request * query_stride + (head * GROUPED + query_row)[:, None] * head_stride
    given = tl.load(
        q_at + column[None, :],
        mask=(query_row < GROUPED)[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    q, q_low = split_query(given, MMA)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_PADDED], tl.float32)
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


@triton.jit
def _merge(
    out,
    partial,
    maxima,
    sums,
    item_start,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Softmax states of one request and query head, ITEMS at a time, in a fixed order."""
    request, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(item_start + request), tl.load(item_start + request + 1)
    column = tl.arange(0, V_PADDED)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([V_PADDED], tl.float32)
    for start in range(first, last, ITEMS):
        item = start + tl.arange(0, ITEMS)
        slot = item * HEADS + head
        own = tl.load(maxima + slot, mask=item < last, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(own, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(own - safe)
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(
            weight * tl.load(sums + slot, mask=item < last, other=0.0), 0
        )
        values = tl.load(
            partial + slot[:, None] * V_DIM + column[None, :],
            mask=(item < last)[:, None] & (column < V_DIM)[None, :],
            other=0.0,
        )
        acc = acc * decay + tl.sum(values * weight[:, None], 0)
        top = new_top
    result = acc / tl.where(total == 0, 1.0, total)
    at = out + (request * HEADS + head) * V_DIM + column
    tl.store(at, result.to(out.dtype.element_ty), mask=column < V_DIM)


class DecodePlan:
    """hma_kernels.DecodePlan on a GPU."""

    def __init__(self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> None:
        self._kv = kv
        self._table = table
        self._heads = heads
        self._window = sliding_window
        batch = table.batch_size
        pages = len(table.bfp8_indices) + len(table.bf16_indices)
        wanted = max(1, ITEMS_A_SM * _sms(kv.device) // kv.kv_heads)
        per_item = -(-pages // wanted)
        self._pages_per_item = -(-max(per_item, 1) // PAGES_A_TILE) * PAGES_A_TILE
        counts = table.bfp8_indptr.diff() + table.bf16_indptr.diff()
        items = (counts + self._pages_per_item - 1) // self._pages_per_item
        self._item_start = torch.cat([items.new_zeros(1), items.cumsum(0)])
        # Upper bound, known without asking the GPU.
        self._items = pages // self._pages_per_item + batch
        index = torch.arange(self._items, device=kv.device)
        self._item_request = torch.searchsorted(self._item_start[1:], index, right=True)
        states = self._items * heads
        self._max = torch.empty(states, dtype=torch.float32, device=kv.device)
        self._sum = torch.empty_like(self._max)
        self._partial = torch.empty((states, kv.v_head_dim), dtype=torch.float32, device=kv.device)

    def run(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, out: torch.Tensor
    ) -> None:
        kv, table = self._kv, self._table
        k8, v8, k16, v16 = kv.k_bfp8[layer], kv.v_bfp8[layer], kv.k_bf16[layer], kv.v_bf16[layer]
        q = q if q.stride(2) == 1 else q.contiguous()
        grouped = self._heads // kv.kv_heads
        v_padded = triton.next_power_of_2(kv.v_head_dim)
        _partial[(self._items, kv.kv_heads)](
            *(q, self._partial, self._max, self._sum, k8, v8, k16, v16),
            *(table.bfp8_indices, table.bfp8_pos, table.bfp8_indptr),
            *(table.bf16_indices, table.bf16_pos, table.bf16_indptr),
            *(table.seq_lens, self._item_request, self._item_start, table.batch_size),
            *(self._pages_per_item, self._window, scale, logit_cap, q.stride(0), q.stride(1)),
            *(k8.stride(0), v8.stride(0), k16.stride(0), v16.stride(0)),
            KV_HEADS=kv.kv_heads,
            GROUPED=grouped,
            DIM=kv.head_dim,
            V_DIM=kv.v_head_dim,
            DIM_PADDED=triton.next_power_of_2(kv.head_dim),
            V_PADDED=v_padded,
            ROWS=max(ROWS, triton.next_power_of_2(grouped)),
            PAGES=PAGES_A_TILE,
            SPLIT_Q=q.dtype != torch.bfloat16,
            CAPPED=logit_cap > 0,
            MMA=mma_type(kv.device),
            num_warps=4,
            num_stages=2,
        )
        _merge[(table.batch_size, self._heads)](
            *(out, self._partial, self._max, self._sum, self._item_start),
            HEADS=self._heads,
            V_DIM=kv.v_head_dim,
            V_PADDED=v_padded,
            ITEMS=16,
        )


def _sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # under the interpreter: enough for several items a request
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
