"""Attention of new rows over a cached prefix of either format, and causally over themselves."""

import torch
import triton
import triton.language as tl

from hma_kernels.base import ExtendCall
from hma_kernels.triton.pages import load_tile
from hma_kernels.triton.softmax import attend, empty_state, mma_type, split_query

ROWS = 64  # new rows of one query head a program takes
PAGES_A_TILE = 2


@triton.jit
def _extend(
    query,
    key,
    value,
    out,
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
    prefix_lens,
    row_start,
    block_request,
    block_first,
    window,
    scale,
    logit_cap,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    k8_page,
    v8_page,
    k16_page,
    v16_page,
    HEADS: tl.constexpr,
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
    block, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // GROUPED
    request = tl.load(block_request + block)
    first = tl.load(block_first + block)
    own, own_end = tl.load(row_start + request), tl.load(row_start + request + 1)
    prefix = tl.load(prefix_lens + request)

    line = first + tl.arange(0, ROWS)  # among the request's new rows
    asked = line < own_end - own
    at = prefix + line
    oldest = tl.where(window >= 0, at - window, 0)
    column, v_column = tl.arange(0, DIM_PADDED), tl.arange(0, V_PADDED)
    given = tl.load(
        query + ((own + line) * query_stride + head * query_head_stride)[:, None] + column[None, :],
        mask=asked[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    q, q_low = split_query(given, MMA)
    top, total, acc = empty_state(ROWS, V_PADDED)
    token = tl.arange(0, PAGES * 32)
    page_of, row = token // 32, token % 32

    begin8, end8 = tl.load(start8 + request), tl.load(start8 + request + 1)
    for page in range(begin8, end8, PAGES):
        k, v, position, live = load_tile(
            k8,
            v8,
            ids8,
            pos8,
            page + page_of,
            page + page_of < end8,
            row,
            0,
            prefix,
            k8_page,
            v8_page,
            kv_head,
            True,
            DIM,
            V_DIM,
            DIM_PADDED,
            V_PADDED,
            MMA,
        )
        visible = live[None, :] & (position[None, :] >= oldest[:, None])
        top, total, acc = attend(
            top, total, acc, q, q_low, k, v, visible, scale, logit_cap, SPLIT_Q, CAPPED
        )

    begin16, end16 = tl.load(start16 + request), tl.load(start16 + request + 1)
    for page in range(begin16, end16, PAGES):
        k, v, position, live = load_tile(
            k16,
            v16,
            ids16,
            pos16,
            page + page_of,
            page + page_of < end16,
            row,
            0,
            prefix,
            k16_page,
            v16_page,
            kv_head,
            False,
            DIM,
            V_DIM,
            DIM_PADDED,
            V_PADDED,
            MMA,
        )
        visible = live[None, :] & (position[None, :] >= oldest[:, None])
        top, total, acc = attend(
            top, total, acc, q, q_low, k, v, visible, scale, logit_cap, SPLIT_Q, CAPPED
        )

    # New rows up to the block's last one.
    for start in range(0, tl.minimum(first + ROWS, own_end - own), PAGES * 32):
        new = start + token
        live = new < own_end - own
        source = own + new
        k = tl.load(
            key + (source * key_stride + kv_head * key_head_stride)[:, None] + column[None, :],
            mask=live[:, None] & (column < DIM)[None, :],
            other=0.0,
        ).to(MMA)
        v = tl.load(
            value
            + (source * value_stride + kv_head * value_head_stride)[:, None]
            + v_column[None, :],
            mask=live[:, None] & (v_column < V_DIM)[None, :],
            other=0.0,
        ).to(MMA)
        position = prefix + new
        causal = (position[None, :] <= at[:, None]) & (position[None, :] >= oldest[:, None])
        visible = live[None, :] & causal
        top, total, acc = attend(
            top, total, acc, q, q_low, k, v, visible, scale, logit_cap, SPLIT_Q, CAPPED
        )

    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    to = out + ((own + line) * (HEADS * V_DIM) + head * V_DIM)[:, None] + v_column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=asked[:, None] & (v_column < V_DIM)[None, :])


def extend(call: ExtendCall) -> None:
    """bfloat16 or float16 queries; call.out is contiguous."""
    kv, table, layer = call.kv, call.table, call.layer
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    device = q.device
    counts = (call.q_indptr.diff() + ROWS - 1) // ROWS
    request = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = (torch.arange(len(request)) - (counts.cumsum(0) - counts)[request]) * ROWS
    k8, v8, k16, v16 = kv.k_bfp8[layer], kv.v_bfp8[layer], kv.k_bf16[layer], kv.v_bf16[layer]
    heads = q.shape[1]
    _extend[(len(request), heads)](
        *(q, k, v, call.out, k8, v8, k16, v16),
        *(table.bfp8_indices, table.bfp8_pos, table.bfp8_indptr),
        *(table.bf16_indices, table.bf16_pos, table.bf16_indptr),
        *(table.seq_lens, call.q_indptr.to(device), request.to(device), first.to(device)),
        *(call.sliding_window, call.scale, call.logit_cap),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(k8.stride(0), v8.stride(0), k16.stride(0), v16.stride(0)),
        HEADS=heads,
        GROUPED=heads // kv.kv_heads,
        DIM=kv.head_dim,
        V_DIM=kv.v_head_dim,
        DIM_PADDED=triton.next_power_of_2(kv.head_dim),
        V_PADDED=triton.next_power_of_2(kv.v_head_dim),
        ROWS=ROWS,
        PAGES=PAGES_A_TILE,
        SPLIT_Q=q.dtype != torch.bfloat16,
        CAPPED=call.logit_cap > 0,
        MMA=mma_type(device),
        num_warps=4,
        num_stages=2,
    )
