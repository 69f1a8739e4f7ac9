"""Attention of new rows over a cached prefix of either format, and causally over themselves."""

import torch
import triton
import triton.language as tl

from hma_kernels.base import ExtendCall
from hma_kernels.triton.attention import attend_pages
from hma_kernels.triton.layout import PAGE
from hma_kernels.triton.softmax import attend, empty_state, mma_type, split_query

ROWS_PER_BLOCK = 64  # new rows of one query head in one program
PAGES_PER_TILE = 2


@triton.jit
def _extend(
    query,
    key,
    value,
    out,
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
    prefix_lens,
    q_indptr,
    block_request,
    block_first_row,
    sliding_window,
    scale,
    logit_cap,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    k_bfp8_stride,
    v_bfp8_stride,
    k_bf16_stride,
    v_bf16_stride,
    HEADS: tl.constexpr,
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
    state = attend_pages(
        *(state, q, q_low, k_bfp8, v_bfp8, bfp8_indices, bfp8_pos),
        *(tl.load(bfp8_indptr + request), tl.load(bfp8_indptr + request + 1), 0, prefix, oldest),
        *(k_bfp8_stride, v_bfp8_stride, kv_head, scale, logit_cap, True, True),
        *(DIM, V_DIM, DIM_PADDED, V_PADDED, PAGES_PER_TILE, SPLIT_Q, CAPPED, MMA),
    )
    state = attend_pages(
        *(state, q, q_low, k_bf16, v_bf16, bf16_indices, bf16_pos),
        *(tl.load(bf16_indptr + request), tl.load(bf16_indptr + request + 1), 0, prefix, oldest),
        *(k_bf16_stride, v_bf16_stride, kv_head, scale, logit_cap, False, True),
        *(DIM, V_DIM, DIM_PADDED, V_PADDED, PAGES_PER_TILE, SPLIT_Q, CAPPED, MMA),
    )

    # New rows up to the block's last one.
    for first_key in range(0, tl.minimum(first + ROWS, rows), PAGES_PER_TILE * PAGE):
        key_row = first_key + tl.arange(0, PAGES_PER_TILE * PAGE)
        valid = key_row < rows
        source = start + key_row
        k = tl.load(
            key + (source * key_stride + kv_head * key_head_stride)[:, None] + column[None, :],
            mask=valid[:, None] & (column < DIM)[None, :],
            other=0.0,
        ).to(MMA)
        v = tl.load(
            value
            + (source * value_stride + kv_head * value_head_stride)[:, None]
            + v_column[None, :],
            mask=valid[:, None] & (v_column < V_DIM)[None, :],
            other=0.0,
        ).to(MMA)
        key_position = (prefix + key_row)[None, :]
        causal = (key_position <= position[:, None]) & (key_position >= oldest[:, None])
        visible = valid[None, :] & causal
        state = attend(state, q, q_low, k, v, visible, scale, logit_cap, SPLIT_Q, CAPPED)

    _, state_sum, state_out = state
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
    k_bfp8, v_bfp8 = kv.k_bfp8[layer], kv.v_bfp8[layer]
    k_bf16, v_bf16 = kv.k_bf16[layer], kv.v_bf16[layer]
    heads = q.shape[1]
    _extend[(len(request), heads)](
        *(q, k, v, call.out, k_bfp8, v_bfp8, k_bf16, v_bf16),
        *(table.bfp8_indptr, table.bfp8_indices, table.bfp8_pos),
        *(table.bf16_indptr, table.bf16_indices, table.bf16_pos),
        *(table.seq_lens, call.q_indptr.to(device), request.to(device), first_row.to(device)),
        *(call.sliding_window, call.scale, call.logit_cap),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(k_bfp8.stride(0), v_bfp8.stride(0), k_bf16.stride(0), v_bf16.stride(0)),
        HEADS=heads,
        GQA_GROUP_SIZE=heads // kv.kv_heads,
        DIM=kv.head_dim,
        V_DIM=kv.v_head_dim,
        DIM_PADDED=triton.next_power_of_2(kv.head_dim),
        V_PADDED=triton.next_power_of_2(kv.v_head_dim),
        ROWS=ROWS_PER_BLOCK,
        PAGES_PER_TILE=PAGES_PER_TILE,
        SPLIT_Q=q.dtype != torch.bfloat16,
        CAPPED=call.logit_cap > 0,
        MMA=mma_type(device),
        num_warps=4,
        num_stages=2,
    )
