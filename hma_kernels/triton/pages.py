"""Pages of either format as tiles of values in registers, exact in BF16."""

import triton
import triton.language as tl

GROUP = tl.constexpr(16)
TILE_BYTES = tl.constexpr(1088)
EXPONENTS = tl.constexpr(64)


@triton.jit
def bfp8_value(byte, exponent):
    """value = +-q * 2^(E-133), exact: q becomes a float by its bits, never by a conversion."""
    q = (0x4B000000 | (byte & 0x7F).to(tl.int32)).to(tl.float32, bitcast=True) - 8388608.0
    shared = exponent.to(tl.int32)
    scale_bits = tl.where(shared > 6, (shared - 6) << 23, 1 << (shared + 16))
    scale = scale_bits.to(tl.float32, bitcast=True)
    sign = (byte & 0x80).to(tl.int32) << 24
    bits = (q * scale).to(tl.int32, bitcast=True) | sign
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_bfp8(pages, page_offset, row, live, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Token rows as float32 [N, PADDED]; zeros where not live and beyond DIM.

    page_offset [N]: bytes from `pages` to the row's page of one KV head; row [N]: 0..31.
    """
    column = tl.arange(0, PADDED)
    group = tl.arange(0, PADDED // GROUP)
    face_of_row = row // 16 * 2
    # Where a row's 16 bytes of a group lie; hma_kernels/layout.py.
    within = face_of_row * 256 + row % 16 * 16 + EXPONENTS
    data_at = column // 32 * TILE_BYTES + column // GROUP % 2 * 256 + column % GROUP
    exponent_at = group // 2 * TILE_BYTES + group % 2 * 16
    byte = tl.load(
        pages + (page_offset + within)[:, None] + data_at[None, :],
        mask=live[:, None] & (column < DIM)[None, :],
        other=0,
    )
    exponent = tl.load(
        pages + (page_offset + face_of_row * 16 + row % 16)[:, None] + exponent_at[None, :],
        mask=live[:, None] & (group * GROUP < DIM)[None, :],
        other=0,
    )
    each = exponent[:, :, None].broadcast_to(exponent.shape[0], PADDED // GROUP, GROUP)
    return bfp8_value(byte, each.reshape(exponent.shape[0], PADDED))


@triton.jit
def load_bf16(pages, page_offset, row, live, DIM: tl.constexpr, PADDED: tl.constexpr):
    """As load_bfp8, but bfloat16; page_offset in elements."""
    column = tl.arange(0, PADDED)
    return tl.load(
        pages + (page_offset + row * DIM)[:, None] + column[None, :],
        mask=live[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
