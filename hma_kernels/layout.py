"""Where each byte of a BFP8 tile lies.

A 32x32 tile is 1088 bytes: 64 shared exponents, then 1024 data bytes, both ordered by face
(rows 0-15 left, rows 0-15 right, rows 16-31 left, rows 16-31 right) and by row within a face.
A group is 16 neighbouring columns of one row; it shares one exponent. A strip is a row of tiles
that lie one after another: 32 rows of any multiple of 32 columns.

Source: the bfloat8_b tile format of Tenstorrent's ttnn 0.81.1, measured from its packers.
"""

from typing import Any, Literal

import numpy as np
import torch

TILE = 32
GROUP = 16
FACE = 16
PAGE = 32
EXPONENT_BYTES = TILE * TILE // GROUP
TILE_BYTES = EXPONENT_BYTES + TILE * TILE

type Rounding = Literal["device", "host"]


def _face[T: (int, torch.Tensor, np.ndarray[Any, Any])](row: T, group: T) -> T:
    face: T = row // FACE * 2 + group % 2
    return face


def exponent_offset[T: (int, torch.Tensor, np.ndarray[Any, Any])](row: T, group: T) -> T:
    """Byte, within a strip, of the exponent shared by columns 16*group..16*group+15 of row.

    row: 0..31. group: counted over the whole strip. Integers or integer arrays, elementwise.
    """
    offset: T = group // 2 * TILE_BYTES + _face(row, group) * FACE + row % FACE
    return offset


def data_offset[T: (int, torch.Tensor, np.ndarray[Any, Any])](row: T, group: T) -> T:
    """First of the 16 data bytes, within a strip, of columns 16*group..16*group+15 of row."""
    in_face = row % FACE * GROUP
    face_start = _face(row, group) * (FACE * FACE) + EXPONENT_BYTES
    offset: T = group // 2 * TILE_BYTES + face_start + in_face
    return offset


def padded(size: int) -> int:
    """size rounded up to a multiple of a tile's edge."""
    return -(-size // TILE) * TILE
