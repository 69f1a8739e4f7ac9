"""hma_kernels.layout for Triton kernels: its constants, and where a BFP8 byte lies.

A byte's offset within a strip of tiles is a part that depends on its row plus a part that depends
on its column.
"""

import triton
import triton.language as tl

from hma_kernels import layout

TILE = tl.constexpr(layout.TILE)
FACE = tl.constexpr(layout.FACE)
GROUP = tl.constexpr(layout.GROUP)
PAGE = tl.constexpr(layout.PAGE)
EXPONENT_BYTES = tl.constexpr(layout.EXPONENT_BYTES)
TILE_BYTES = tl.constexpr(layout.TILE_BYTES)
IDS_PER_SLAB = tl.constexpr(layout.IDS_PER_SLAB)
BF16_PAGES_PER_SLAB = tl.constexpr(layout.BF16_PAGES_PER_SLAB)


@triton.jit
def bf16_index(page):
    """layout.bf16_index, for page ids in registers."""
    return page // IDS_PER_SLAB * BF16_PAGES_PER_SLAB + page % IDS_PER_SLAB


@triton.jit
def data_of_row(row):
    return row // FACE * (2 * FACE * FACE) + row % FACE * GROUP + EXPONENT_BYTES


@triton.jit
def data_of_column(column):
    return column // TILE * TILE_BYTES + column // GROUP % 2 * (FACE * FACE) + column % GROUP


@triton.jit
def exponent_of_row(row):
    return row // FACE * (2 * FACE) + row % FACE


@triton.jit
def exponent_of_group(group):
    return group // 2 * TILE_BYTES + group % 2 * FACE
