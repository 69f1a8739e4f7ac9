"""Attention of new rows over a cached prefix of either format, and causally over themselves.

The prefix of a layer is unpacked once (prefix.py), not again for each query head and block of rows.
"""

import torch
import triton
import triton.language as tl

from hma_kernels.base import ExtendCall
from hma_kernels.triton.prefix import unpack_prefix
from hma_kernels.triton.softmax import attend, empty_state, mma_type, split_query, with_sink

ROWS_PER_BLOCK = 64  # new rows of one query head in one program
KEYS_PER_STEP = 64


@triton.jit
def _attend_rows(
    state,
    q,
    q_low,
    key,
    value,
    key_stride,
    value_stride,
    start,
    begin,
    end,
    first_position,
    position,
    oldest,
    scale,
    logit_cap,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    """The softmax state after rows begin..end-1 of a request, counted from row `start`; row i
    stands at position first_position + i. Query m sees positions oldest[m]..position[m]."""
    column, v_column = tl.arange(0, DIM_PADDED), tl.arange(0, V_PADDED)
    for first in range(begin, end, KEYS):
        row = first + tl.arange(0, KEYS)
        valid = row < end
        k = tl.load(
            key + ((start + row) * key_stride)[:, None] + column[None, :],
            mask=valid[:, None] & (column < DIM)[None, :],
            other=0.0,
        ).to(MMA)
        v = tl.load(
            value + ((start + row) * value_stride)[:, None] + v_column[None, :],
            mask=valid[:, None] & (v_column < V_DIM)[None, :],
            other=0.0,
        ).to(MMA)
        at = (first_position + row)[None, :]
        visible = valid[None, :] & (at <= position[:, None]) & (at >= oldest[:, None])
        state = attend(state, q, q_low, k, v, visible, scale, logit_cap, SPLIT_Q, CAPPED)
    return state


@triton.jit
def _extend(
    query,
    key,
    value,
    out,
    prefix_key,
    prefix_value,
    prefix_starts,
    prefix_lens,
    q_indptr,
    block_request,
    block_first_row,
    sinks,
    sliding_window,
    scale,
    logit_cap,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    GQA_GROUP_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    MMA: tl.constexpr,
):
    """One program a block of a request's new rows and a query head.

    Rows are counted from the request's first new row, which stands at q_indptr[request] of query,
    key, value and out, and at position prefix_lens[request].
    """
    block, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // GQA_GROUP_SIZE
    request = tl.load(block_request + block)
    first = tl.load(block_first_row + block)
    start = tl.load(q_indptr + request)
    rows = tl.load(q_indptr + request + 1) - start
    prefix = tl.load(prefix_lens + request)

    row = first + tl.arange(0, ROWS)
    position = prefix + row
    oldest = tl.where(sliding_window >= 0, position - sliding_window, 0)
    column, v_column = tl.arange(0, DIM_PADDED), tl.arange(0, V_PADDED)
    given = tl.load(
        query
        + ((start + row) * query_stride + head * query_head_stride)[:, None]
        + column[None, :],
        mask=(row < rows)[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    q, q_low = split_query(given, MMA)
    state = empty_state(ROWS, V_PADDED)
    # No row of the block sees what is older than its first row's window.
    window_start = tl.where(sliding_window >= 0, prefix + first - sliding_window, 0)
    heads: tl.constexpr = HEADS // GQA_GROUP_SIZE
    state = _attend_rows(
        *(state, q, q_low, prefix_key + kv_head * DIM, prefix_value + kv_head * V_DIM),
        *(heads * DIM, heads * V_DIM, tl.load(prefix_starts + request)),
        *(tl.minimum(tl.maximum(window_start, 0), prefix), prefix, 0),
        *(position, oldest, scale, logit_cap),
        *(DIM, V_DIM, DIM_PADDED, V_PADDED, KEYS, SPLIT_Q, CAPPED, MMA),
    )
    state = _attend_rows(
        *(state, q, q_low, key + kv_head * key_head_stride, value + kv_head * value_head_stride),
        *(key_stride, value_stride, start),
        *(tl.maximum(window_start - prefix, 0), tl.minimum(first + ROWS, rows), prefix),
        *(position, oldest, scale, logit_cap),
        *(DIM, V_DIM, DIM_PADDED, V_PADDED, KEYS, SPLIT_Q, CAPPED, MMA),
    )
    state_max, state_sum, state_out = state
    if SINKS:
        state_sum = with_sink(state_max, state_sum, tl.load(sinks + head))
    result = state_out / tl.where(state_sum == 0, 1.0, state_sum)[:, None]
    tl.store(
        out + ((start + row) * (HEADS * V_DIM) + head * V_DIM)[:, None] + v_column[None, :],
        result.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & (v_column < V_DIM)[None, :],
    )


def extend(call: ExtendCall) -> None:
    """bfloat16 or float16 queries; call.out is contiguous."""
    kv, table, layer = call.kv, call.table, call.layer
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    device = q.device
    blocks = (call.q_indptr.diff() + ROWS_PER_BLOCK - 1) // ROWS_PER_BLOCK
    request = torch.repeat_interleave(torch.arange(len(blocks)), blocks)
    first_block = (blocks.cumsum(0) - blocks)[request]
    first_row = (torch.arange(len(request)) - first_block) * ROWS_PER_BLOCK
    prefix = unpack_prefix(kv, table, layer)
    heads = q.shape[1]
    _extend[(len(request), heads)](
        *(q, k, v, call.out, *prefix),
        *(table.seq_lens, call.q_indptr.to(device), request.to(device), first_row.to(device)),
        *(call.sinks, call.sliding_window, call.scale, call.logit_cap),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        HEADS=heads,
        GQA_GROUP_SIZE=heads // kv.kv_heads,
        DIM=kv.head_dim,
        V_DIM=kv.v_head_dim,
        DIM_PADDED=triton.next_power_of_2(kv.head_dim),
        V_PADDED=triton.next_power_of_2(kv.v_head_dim),
        ROWS=ROWS_PER_BLOCK,
        KEYS=KEYS_PER_STEP,
        SPLIT_Q=q.dtype != torch.bfloat16,
        CAPPED=call.logit_cap > 0,
        SINKS=call.sinks is not None,
        MMA=mma_type(device),
        num_warps=4,
        num_stages=2,
    )
