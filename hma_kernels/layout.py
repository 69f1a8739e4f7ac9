"""Where each byte of a BFP8 tile lies, and how pages of both formats share a slab.

A 32x32 tile is 1088 bytes: 64 shared exponents, then 1024 data bytes, both ordered by face
(rows 0-15 left, rows 0-15 right, rows 16-31 left, rows 16-31 right) and by row within a face.
A group is 16 neighbouring columns of one row, which share an exponent. A strip is a row of tiles
that lie one after another: 32 rows of any multiple of 32 columns.

A page is 32 tokens of one layer's K or V. It takes 1088 bytes a tile in BFP8 and 2048 in BF16, a
ratio of 17 to 32 for every head count and head dim: a slab holds 32 BFP8 pages or 17 BF16 pages.
Page id = slab * 32 + i, with i < 32 (BFP8) or i < 17 (BF16).

Source: the bfloat8_b tile format of Tenstorrent's ttnn 0.81.1, measured from its packers.
"""

from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch

TILE = 32
GROUP = 16
FACE = 16
PAGE = 32
EXPONENT_BYTES = TILE * TILE // GROUP
TILE_BYTES = EXPONENT_BYTES + TILE * TILE

BFP8_PAGES_PER_SLAB = 32
BF16_PAGES_PER_SLAB = 17
IDS_PER_SLAB = BFP8_PAGES_PER_SLAB
SLAB_TOKENS = IDS_PER_SLAB * PAGE

Rounding: TypeAlias = Literal["device", "host"]
T = TypeVar("T", int, torch.Tensor, np.ndarray[Any, Any])


def bf16_index(page: T) -> T:
    """Row of a BF16 page id in the [pages, kv_heads, 32, dim] view of its arena; elementwise."""
    index: T = page // IDS_PER_SLAB * BF16_PAGES_PER_SLAB + page % IDS_PER_SLAB
    return index


def _face(row: T, group: T) -> T:
    face: T = row // FACE * 2 + group % 2
    return face


def exponent_offset(row: T, group: T) -> T:
    """Byte, within a strip, of the exponent shared by columns 16*group..16*group+15 of row.

    row: 0..31. group: counted over the whole strip. Integers or integer arrays, elementwise.
    """
    offset: T = group // 2 * TILE_BYTES + _face(row, group) * FACE + row % FACE
    return offset


def data_offset(row: T, group: T) -> T:
    """First of the 16 data bytes, within a strip, of columns 16*group..16*group+15 of row."""
    in_face = row % FACE * GROUP
    face_start = _face(row, group) * (FACE * FACE) + EXPONENT_BYTES
    offset: T = group // 2 * TILE_BYTES + face_start + in_face
    return offset


def padded(size: int) -> int:
    """size rounded up to a multiple of a tile's edge."""
    return -(-size // TILE) * TILE
