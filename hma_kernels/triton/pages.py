"""Rows of BFP8 and BF16 pages as tiles of values in registers."""

import triton
import triton.language as tl

from hma_kernels.triton.layout import (
    GROUP,
    data_of_column,
    data_of_row,
    exponent_of_group,
    exponent_of_row,
)


@triton.jit
def dequantize(byte, exponent):
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
def load_bfp8(pages, page_offset, row, valid, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Token rows as float32 [N, PADDED]; zeros where not valid and beyond DIM.

    page_offset [N]: bytes from `pages` to the row's page of one KV head; row [N]: 0..31.
    """
    column = tl.arange(0, PADDED)
    byte = tl.load(
        pages + (page_offset + data_of_row(row))[:, None] + data_of_column(column)[None, :],
        mask=valid[:, None] & (column < DIM)[None, :],
        other=0,
    )
    group = tl.arange(0, PADDED // GROUP)
    exponent = tl.load(
        pages + (page_offset + exponent_of_row(row))[:, None] + exponent_of_group(group)[None, :],
        mask=valid[:, None] & (group * GROUP < DIM)[None, :],
        other=0,
    )
    per_value = exponent[:, :, None].broadcast_to(exponent.shape[0], PADDED // GROUP, GROUP)
    return dequantize(byte, per_value.reshape(exponent.shape[0], PADDED))


@triton.jit
def load_bf16(pages, page_offset, row, valid, DIM: tl.constexpr, PADDED: tl.constexpr):
    """As load_bfp8, but bfloat16; page_offset in elements."""
    column = tl.arange(0, PADDED)
    return tl.load(
        pages + (page_offset + row * DIM)[:, None] + column[None, :],
        mask=valid[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
