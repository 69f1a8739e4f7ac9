"""Decode attention of one warp: query heads as columns of products (triton/operands.py).

A state is a tuple:
  the maximum logit [COLUMNS], in units of log 2
  sums of weights relative to it [8, COLUMNS], whose total is the sum over the first dimension
  a tuple with the weighted sum of V of each tile of dims [32, COLUMNS], not yet divided by it.
Both halves of the columns have the same maxima and sums.
"""

import triton
import triton.language as tl

from hma_kernels.triton.layout import PAGE, TILE, TILE_BYTES
from hma_kernels.triton.operands import (
    along,
    bf16_keys,
    bf16_values,
    bfp8_keys,
    bfp8_values,
    key_scales,
    load_query,
    scale_weights,
    seen_by_weights,
)
from hma_kernels.triton.softmax import LOG2E, split_query


@triton.jit
def _appended(items, item):
    return items + (item,)  # noqa: RUF005


@triton.jit
def empty_state(HEADS: tl.constexpr, V_DIM: tl.constexpr):
    """The state of columns that have seen no key."""
    COLUMNS: tl.constexpr = 2 * HEADS
    state_out = ()
    for _ in tl.static_range(V_DIM // TILE):
        state_out = _appended(state_out, tl.zeros([TILE, COLUMNS], tl.float32))
    maximum = tl.full([COLUMNS], float("-inf"), tl.float32)
    return maximum, tl.zeros([8, COLUMNS], tl.float32), state_out


@triton.jit
def attend_columns(
    state,
    query_row,
    query_head_stride,
    heads,
    k_pages,
    v_pages,
    indices,
    pos,
    first,
    last,
    begin,
    end,
    k_page_stride,
    v_page_stride,
    kv_head,
    scale,
    logit_cap,
    BFP8: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    """The state after the pages of one format at entries first..last-1 of `indices` and `pos`.

    Tokens outside positions begin..end-1 are not seen; what they hold may be anything. query_row
    points to the first of `heads` query heads.
    """
    queries, low_queries = (), ()
    for t in tl.static_range(DIM // TILE):
        given = load_query(query_row, query_head_stride, heads, t, HEADS, 4 if BFP8 else 2)
        high, low = split_query(given, MMA)
        queries = _appended(queries, high)
        low_queries = _appended(low_queries, low)
    k_pages += kv_head * (DIM // TILE * TILE_BYTES if BFP8 else PAGE * DIM)
    v_pages += kv_head * (V_DIM // TILE * TILE_BYTES if BFP8 else PAGE * V_DIM)
    for entry in range(first, last):
        page, position = tl.load(indices + entry), tl.load(pos + entry)
        page_begin, page_end = (begin - position).to(tl.int32), (end - position).to(tl.int32)
        if (page_begin < PAGE) & (page_end > 0):
            k_page, v_page = k_pages + page * k_page_stride, v_pages + page * v_page_stride
            logits = _logits(
                *(queries, low_queries, k_page, page_begin, page_end, scale, logit_cap),
                *(BFP8, HEADS, DIM, SPLIT_Q, CAPPED, MMA),
            )
            state = _add_values(
                *(state, logits, v_page, page_begin, page_end, BFP8, HEADS, V_DIM, MMA)
            )
    return state


@triton.jit
def _logits(
    queries,
    low_queries,
    page,
    begin,
    end,
    scale,
    logit_cap,
    BFP8: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    """float32 [32 tokens, COLUMNS] in units of log 2, -inf but for tokens begin..end-1."""
    COLUMNS: tl.constexpr = 2 * HEADS
    logits = tl.zeros([PAGE, COLUMNS], tl.float32)
    for t in tl.static_range(DIM // TILE):
        if BFP8:
            keys = bfp8_keys(page, t, MMA)
        else:
            keys = bf16_keys(page, t, begin, end, DIM).to(MMA)
        products = tl.dot(keys, queries[t])
        if SPLIT_Q:
            products = tl.dot(keys, low_queries[t], products)
        if BFP8:
            products *= key_scales(page, t, HEADS)
        logits += products
    # A head's logit is the sum over both halves.
    logits = tl.sum(logits.reshape(PAGE, 2, HEADS), 1)
    logits = logits[:, None, :].broadcast_to(PAGE, 2, HEADS).reshape(PAGE, COLUMNS)
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        power = tl.exp2(logits * (scale * (2 * LOG2E / logit_cap)))
        logits = (logit_cap * LOG2E) * (1 - 2 / (power + 1))
    else:
        logits *= scale * LOG2E
    token = along(PAGE, 0, 2)
    return tl.where((token >= begin) & (token < end), logits, float("-inf"))


@triton.jit
def _add_values(
    state,
    logits,
    page,
    begin,
    end,
    BFP8: tl.constexpr,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    MMA: tl.constexpr,
):
    state_max, state_sum, state_out = state
    new_max = tl.maximum(state_max, tl.max(logits, 0))
    # While a query has seen no key, its maximum is -inf; -inf - -inf must not become NaN.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(state_max - base)[None, :]
    weights = tl.exp2(logits - base[None, :])
    # Rows of the same lane only: a sum over lanes would take as many steps for each page.
    state_sum = state_sum * decay + tl.sum(weights.reshape(PAGE // 8, 8, 2 * HEADS), 0)
    weights = weights.to(MMA)
    seen = seen_by_weights(begin, end, HEADS)
    new_out = ()
    for t in tl.static_range(V_DIM // TILE):
        if BFP8:
            values = bfp8_values(page, t, MMA)
            tile_weights = scale_weights(weights, page, seen, t, HEADS, MMA)
        else:
            values = bf16_values(page, t, begin, end, V_DIM).to(MMA)
            tile_weights = weights
        new_out = _appended(new_out, tl.dot(values, tile_weights, state_out[t] * decay))
    return new_max, state_sum, new_out


@triton.jit
def store_state(state, out, maximum, total, slot, heads, HEADS: tl.constexpr, V_DIM: tl.constexpr):
    """Of `heads` query heads; `slot`: the first one's in out [slots, V_DIM], maximum and total."""
    COLUMNS: tl.constexpr = 2 * HEADS
    state_max, state_sum, state_out = state
    column = tl.arange(0, COLUMNS)
    tl.store(maximum + slot + column, state_max, mask=column < heads)
    tl.store(total + slot + column, tl.sum(state_sum, 0), mask=column < heads)
    row, column = along(TILE, 0, 2), along(COLUMNS, 1, 2)
    dim = row % 8 * 4 + row // 8
    own = (column % HEADS < heads) & (dim // (TILE // 2) == column // HEADS)
    for t in tl.static_range(V_DIM // TILE):
        tl.store(out + (slot + column % HEADS) * V_DIM + t * TILE + dim, state_out[t], mask=own)
