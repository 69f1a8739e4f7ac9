"""BFP8 bytes and pages of either format as tiles of values in registers.

Offsets within a strip of tiles (hma_kernels/layout.py) are a part that depends on the row and one
that depends on the column.
"""

import triton
import triton.language as tl

from hma_kernels import layout

GROUP = tl.constexpr(layout.GROUP)
IDS_PER_SLAB = tl.constexpr(layout.IDS_PER_SLAB)
BF16_PAGES_PER_SLAB = tl.constexpr(layout.BF16_PAGES_PER_SLAB)


@triton.jit
def bf16_index(page):
    """layout.bf16_index, for page ids in registers."""
    return page // IDS_PER_SLAB * BF16_PAGES_PER_SLAB + page % IDS_PER_SLAB


@triton.jit
def data_of_row(row):
    return 64 + row // 16 * 512 + row % 16 * 16


@triton.jit
def data_of_column(column):
    return column // 32 * 1088 + column // 16 % 2 * 256 + column % 16


@triton.jit
def exponent_of_row(row):
    return row // 16 * 32 + row % 16


@triton.jit
def exponent_of_group(group):
    return group // 2 * 1088 + group % 2 * 16


@triton.jit
def bfp8_value(byte, exponent):
    """float32 of data bytes and their shared exponents E: +-q * 2^(E-133), by the format's rule at
    both ends of the range. q becomes a float by its bits, and E is added to its exponent."""
    q = (byte & 0x7F).to(tl.int32)
    magnitude = (0x4B000000 | q).to(tl.float32, bitcast=True) - 8388608.0
    bits = magnitude.to(tl.int32, bitcast=True) + ((exponent.to(tl.int32) - 133) << 23)
    sign = (byte & 0x80).to(tl.int32) << 24
    # Below the smallest exponent everything is +0, but a zero keeps its sign.
    bits = tl.where(q == 0, sign, tl.where(bits < 0, 0, bits | sign))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_bfp8(pages, page_offset, row, live, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Token rows as float32 [N, PADDED]; zeros where not live and beyond DIM.

    page_offset [N]: bytes from `pages` to the row's page of one KV head; row [N]: 0..31.
    """
    column = tl.arange(0, PADDED)
    byte = tl.load(
        pages + (page_offset + data_of_row(row))[:, None] + data_of_column(column)[None, :],
        mask=live[:, None] & (column < DIM)[None, :],
        other=0,
    )
    group = tl.arange(0, PADDED // GROUP)
    exponent = tl.load(
        pages + (page_offset + exponent_of_row(row))[:, None] + exponent_of_group(group)[None, :],
        mask=live[:, None] & (group * GROUP < DIM)[None, :],
        other=0,
    )
    each = exponent[:, :, None].broadcast_to(exponent.shape[0], PADDED // GROUP, GROUP)
    return bfp8_value(byte, each.reshape(exponent.shape[0], PADDED))


@triton.jit
def load_tile(
    k_pages,
    v_pages,
    ids,
    positions,
    at,
    listed,
    row,
    begin,
    stop,
    k_page,
    v_page,
    head,
    BFP8: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    MMA: tl.constexpr,
):
    """K and V [N, PADDED] of some pages' rows in one KV head, with their positions [N] and which of
    them lie in begin..stop-1; the others are zeros and are not read.

    at [N]: the row's page in the lists `ids` and `positions`; listed [N]: whether it is in them.
    """
    position = tl.load(positions + at, mask=listed, other=0) + row
    live = listed & (position >= begin) & (position < stop)
    page = tl.load(ids + at, mask=live, other=0)
    if BFP8:
        k = load_bfp8(
            k_pages, page * k_page + head * (DIM // 32 * 1088), row, live, DIM, DIM_PADDED
        )
        v = load_bfp8(
            v_pages, page * v_page + head * (V_DIM // 32 * 1088), row, live, V_DIM, V_PADDED
        )
    else:
        k = load_bf16(k_pages, page * k_page + head * (32 * DIM), row, live, DIM, DIM_PADDED)
        v = load_bf16(v_pages, page * v_page + head * (32 * V_DIM), row, live, V_DIM, V_PADDED)
    return k.to(MMA), v.to(MMA), position, live


@triton.jit
def load_bf16(pages, page_offset, row, live, DIM: tl.constexpr, PADDED: tl.constexpr):
    """As load_bfp8, but bfloat16; page_offset in elements."""
    column = tl.arange(0, PADDED)
    return tl.load(
        pages + (page_offset + row * DIM)[:, None] + column[None, :],
        mask=live[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
