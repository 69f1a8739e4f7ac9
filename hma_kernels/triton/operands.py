"""Pages of one KV head as operands of one warp's tensor cores, straight from memory.

Products have `COLUMNS` columns: HEADS query heads, twice. A tile of 32 dims has two groups, whose
exponents differ; the first half of the columns is for the first group, the second for the second.
So one product does for both groups:
  keys    [32 tokens, 32 dims] times queries, which are zero in the other half's dims: each half
          gets its group's products, to be multiplied by its group's exponents (`key_scales`).
  values  [32 dims, 32 tokens] times weights, which each half has multiplied by its group's
          exponents (`scale_weights`): of the result, each half's own dims count.

Row 8*j + r of `values` is dim 4*r + j of the tile. The dimensions that tensors are loaded with are
ordered so that Triton loads into the very lanes and registers that an m16n8k16 takes operands
from, four bytes at a time: nothing goes through shared memory. Were that to change with Triton,
results would not: benchmark/kernels/sass_triton.py counts what it costs.
"""

import triton
import triton.language as tl

from hma_kernels.triton.bytes import scale_of, scaled, widen, widen_pairs
from hma_kernels.triton.layout import (
    FACE,
    GROUP,
    PAGE,
    TILE,
    TILE_BYTES,
    data_of_row,
    exponent_of_row,
)


@triton.jit
def along(SIZE: tl.constexpr, DIMENSION: tl.constexpr, RANK: tl.constexpr):
    """0..SIZE-1 along one of RANK dimensions."""
    index = tl.arange(0, SIZE)
    for i in tl.static_range(RANK):
        if i != DIMENSION:
            index = tl.expand_dims(index, i)
    return index


@triton.jit
def load_query(row, head_stride, heads, T: tl.constexpr, HEADS: tl.constexpr, RUN: tl.constexpr):
    """Dims of tile T of query heads, as `keys` are multiplied by: [32 dims, COLUMNS].

    row: the first head's; zeros from head `heads` on. RUN: neighbouring dims that a lane has.
    """
    COLUMNS: tl.constexpr = 2 * HEADS
    column = along(COLUMNS // 8, 0, 5) * 8 + along(8, 2, 5)
    dim = along(TILE // (4 * RUN), 1, 5) * (4 * RUN) + along(4, 3, 5) * RUN + along(RUN, 4, 5)
    head = column % HEADS
    query = tl.load(
        row + head * head_stride + T * TILE + dim,
        mask=(head < heads) & (column // HEADS == dim // GROUP),
        other=0.0,
    )
    return query.permute(1, 3, 4, 0, 2).reshape(TILE, COLUMNS)


@triton.jit
def bfp8_keys(page, T: tl.constexpr, MMA: tl.constexpr):
    """Tile T of a BFP8 page, without exponents: [32 tokens, 32 dims]."""
    token = along(4, 0, 5) * 8 + along(8, 2, 5)
    group_and_dim = along(2, 1, 5) * (FACE * FACE) + along(4, 3, 5) * 4 + along(4, 4, 5)
    byte = tl.load(page + T * TILE_BYTES + data_of_row(token) + group_and_dim)
    return widen(byte, MMA).permute(0, 2, 1, 3, 4).reshape(PAGE, TILE)


@triton.jit
def key_scales(page, T: tl.constexpr, HEADS: tl.constexpr):
    """What the products with `bfp8_keys` are to be multiplied by: float32 [32 tokens, COLUMNS]."""
    COLUMNS: tl.constexpr = 2 * HEADS
    eight, column = along(4, 0, 4), along(COLUMNS // 8, 1, 4) * 8 + along(4, 3, 4) * 2
    # The mask changes nothing, but hides from Triton that exponents are neighbours: it would load
    # several into one lane.
    row = along(8, 2, 4) & 7
    of_token = exponent_of_row(eight * 8) + row
    scale = scale_of(tl.load(page + T * TILE_BYTES + of_token + column // HEADS * FACE))
    scale = scale[:, :, :, :, None].broadcast_to(4, COLUMNS // 8, 8, 4, 2)
    return scale.permute(0, 2, 1, 3, 4).reshape(PAGE, COLUMNS)


@triton.jit
def bfp8_values(page, T: tl.constexpr, MMA: tl.constexpr):
    """Tile T of a BFP8 page, without exponents: [32 dims, 32 tokens]."""
    token = along(2, 0, 5) * 16 + along(4, 3, 5) * 4 + along(2, 1, 5) * 2
    r = along(8, 2, 5)
    dim = (r >> 2) * (FACE * FACE) + (r & 3) * 4 + along(4, 4, 5)
    byte = page + T * TILE_BYTES + data_of_row(token) + dim
    pairs = widen_pairs(tl.load(byte), tl.load(byte + GROUP), MMA)
    return pairs.permute(4, 2, 0, 3, 1, 5).reshape(TILE, PAGE)


@triton.jit
def seen_by_weights(begin, end, HEADS: tl.constexpr):
    """What `scale_weights` takes: 255 for tokens begin..end-1, else 0."""
    token = along(2, 1, 5) * 16 + along(4, 3, 5) * 4 + along(4, 4, 5)
    seen = tl.where((token >= begin) & (token < end), 255, 0).to(tl.uint8)
    return seen.broadcast_to(2 * HEADS // 8, 2, 8, 4, 4)


@triton.jit
def scale_weights(weights, page, seen, T: tl.constexpr, HEADS: tl.constexpr, MMA: tl.constexpr):
    """weights [32 tokens, COLUMNS] (MMA) times the exponents that tile T of a page has for them.

    Weights of tokens that are not `seen` must be zero, and are zero then: nobody knows what their
    exponents are.
    """
    COLUMNS: tl.constexpr = 2 * HEADS
    column = along(COLUMNS // 8, 0, 5) * 8 + along(8, 2, 5)
    face = along(2, 1, 5) * 2 + column // HEADS
    row = along(4, 3, 5) * 4 + along(4, 4, 5)
    exponent = tl.load(page + T * TILE_BYTES + face * FACE + row)
    weights = weights.reshape(2, 4, 4, COLUMNS // 8, 8).permute(3, 0, 4, 1, 2)
    return scaled(weights, exponent, seen, MMA).permute(1, 3, 4, 0, 2).reshape(PAGE, COLUMNS)


@triton.jit
def bf16_keys(page, T: tl.constexpr, begin, end, DIM: tl.constexpr):
    """Tile T of a BF16 page: [32 tokens, 32 dims]; zeros but for tokens begin..end-1."""
    token = along(4, 0, 5) * 8 + along(8, 2, 5)
    dim = along(4, 1, 5) * 8 + along(4, 3, 5) * 2 + along(2, 4, 5)
    keys = tl.load(
        page + token * DIM + T * TILE + dim, mask=(token >= begin) & (token < end), other=0.0
    )
    return keys.permute(0, 2, 1, 3, 4).reshape(PAGE, TILE)


@triton.jit
def bf16_values(page, T: tl.constexpr, begin, end, DIM: tl.constexpr):
    """Tile T of a BF16 page: [32 dims, 32 tokens]; zeros but for tokens begin..end-1."""
    token = along(4, 0, 4) * 8 + along(4, 2, 4) * 2
    value = page + token * DIM + T * TILE + along(8, 1, 4) * 4 + along(4, 3, 4)
    even = tl.load(value, mask=(token >= begin) & (token < end), other=0.0)
    odd = tl.load(value + DIM, mask=(token + 1 >= begin) & (token + 1 < end), other=0.0)
    return tl.join(even, odd).permute(3, 1, 0, 2, 4).reshape(TILE, PAGE)
