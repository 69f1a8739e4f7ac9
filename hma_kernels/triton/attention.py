"""Queries attend to a request's pages of one format: the loop that decode and prefill share."""

import triton
import triton.language as tl

from hma_kernels.triton.layout import PAGE
from hma_kernels.triton.pages import load_tile
from hma_kernels.triton.softmax import attend


@triton.jit
def attend_pages(
    state,
    q,
    q_low,
    k_pages,
    v_pages,
    indices,
    pos,
    first,
    last,
    begin,
    end,
    oldest,
    k_page_stride,
    v_page_stride,
    kv_head,
    scale,
    logit_cap,
    BFP8: tl.constexpr,
    WINDOW_PER_QUERY: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    PAGES_PER_TILE: tl.constexpr,
    SPLIT_Q: tl.constexpr,
    CAPPED: tl.constexpr,
    MMA: tl.constexpr,
):
    """The softmax state after the pages of entries first..last-1 of `indices` and `pos`.

    Tokens outside positions begin..end-1 are not read. With WINDOW_PER_QUERY, query i does not see
    those before position oldest[i] either.
    """
    token = tl.arange(0, PAGES_PER_TILE * PAGE)
    page_of_tile, row = token // PAGE, token % PAGE
    for tile in range(first, last, PAGES_PER_TILE):
        entry = tile + page_of_tile
        k, v, position, valid = load_tile(
            *(k_pages, v_pages, indices, pos, entry, entry < last, row, begin, end),
            *(k_page_stride, v_page_stride, kv_head),
            *(BFP8, DIM, V_DIM, DIM_PADDED, V_PADDED, MMA),
        )
        visible = valid[None, :]
        if WINDOW_PER_QUERY:
            visible = visible & (position[None, :] >= oldest[:, None])
        state = attend(state, q, q_low, k, v, visible, scale, logit_cap, SPLIT_Q, CAPPED)
    return state
