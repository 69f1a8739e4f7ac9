"""The BFP8 codec in Triton; arguments are those of hma_kernels.ops, checked there."""

import torch
import triton
import triton.language as tl

from hma_kernels import layout
from hma_kernels.layout import Rounding, padded
from hma_kernels.triton.layout import (
    GROUP,
    TILE,
    TILE_BYTES,
    data_of_column,
    data_of_row,
    exponent_of_group,
    exponent_of_row,
)
from hma_kernels.triton.pages import load_bfp8

ROWS = tl.constexpr(16)  # rows of one program


@triton.jit
def _quantize_device(bits):
    """float32 bits [R, G, 16] -> shared exponents [R, G], data bytes [R, G, 16]: the upper 16 bits
    rounded half away from zero."""
    exponent = (bits >> 23) & 0xFF
    fraction = (bits >> 16) & 0x7F
    # NaN becomes infinity, a denormal zero.
    fraction = tl.where(exponent == 255, 0, fraction)
    mantissa = tl.where(exponent == 0, 0, 128 | fraction)
    shared = tl.max(exponent, 2)
    # A shift of 8 leaves nothing: mantissa + 256 < 512.
    shift = tl.minimum(shared[:, :, None] - exponent, 8)
    q = tl.minimum((mantissa + (1 << shift)) >> (shift + 1), 127)
    return shared, tl.where((bits < 0) & (q > 0), q | 0x80, q)


@triton.jit
def _quantize_host(bits):
    """As _quantize_device, but all 32 bits rounded half to even."""
    exponent = (bits >> 23) & 0xFF
    shared = tl.max(exponent, 2)
    mantissa = ((bits & 0x7FFFFF) | 0x800000) >> tl.minimum(shared[:, :, None] - exponent, 31)
    # Just under a half, plus q's lowest bit, carries exactly where half-to-even rounds up.
    q = (mantissa + 0xFFFF + ((mantissa >> 17) & 1)) >> 17
    q = tl.where(exponent == 0, 0, tl.minimum(q, 127))
    return shared, tl.where((bits < 0) & (q > 0), q | 0x80, q)


@triton.jit
def _pack_rows(
    x,
    out,
    page_ids,
    page_rows,
    count,
    heads,
    outer_stride,
    row_stride,
    column_stride,
    page_stride,
    height,
    PADDED_HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HOST: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Packs rows of x, [outer, height, width], into tiles.

    Row i is row i % PADDED_HEIGHT of matrix i // PADDED_HEIGHT. With SCATTER it is head i % heads
    of token i // heads, which goes to row page_rows[token] of page page_ids[token].
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = i < count
    if SCATTER:
        token, head = i // heads, i % heads
        source = token * outer_stride + head * row_stride
        row = tl.load(page_rows + token, mask=valid, other=0)
        page = tl.load(page_ids + token, mask=valid, other=0)
        strip = page * page_stride + head * (TILES * TILE_BYTES)
        has_source = valid
    else:
        source_row = i % PADDED_HEIGHT
        source = i // PADDED_HEIGHT * outer_stride + source_row * row_stride
        row = source_row % TILE
        strip = i // TILE * (TILES * TILE_BYTES)
        has_source = valid & (source_row < height)
    column = tl.arange(0, COLUMNS)
    value = tl.load(
        x + source[:, None] + (column * column_stride)[None, :],
        mask=has_source[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    groups = bits.reshape(ROWS, COLUMNS // GROUP, GROUP)
    if HOST:
        shared, data = _quantize_host(groups)
    else:
        shared, data = _quantize_device(groups)
    tl.store(
        out + (strip + data_of_row(row))[:, None] + data_of_column(column)[None, :],
        data.reshape(ROWS, COLUMNS).to(tl.uint8),
        mask=valid[:, None] & (column < TILES * TILE)[None, :],
    )
    group = tl.arange(0, COLUMNS // GROUP)
    tl.store(
        out + (strip + exponent_of_row(row))[:, None] + exponent_of_group(group)[None, :],
        shared.to(tl.uint8),
        mask=valid[:, None] & (group < TILES * TILE // GROUP)[None, :],
    )


@triton.jit
def _unpack_rows(tiles, out, count, strip_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = i < count
    values = load_bfp8(tiles, i // TILE * strip_stride, i % TILE, valid, WIDTH, COLUMNS)
    column = tl.arange(0, COLUMNS)
    if out.dtype.element_ty == tl.bfloat16:
        # The upper half of the bits; a conversion would not keep those of a NaN.
        upper = values.to(tl.int32, bitcast=True) >> 16
        values = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(
        out + (i * WIDTH)[:, None] + column[None, :],
        values,
        mask=valid[:, None] & (column < WIDTH)[None, :],
    )


def pack(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    height, width = x.shape[-2:]
    x = x.reshape(-1, height, width)
    count = x.shape[0] * padded(height)
    _pack_rows[_grid(count)](
        *(x, out, out, out, count, 1, *x.stride(), 0, height),
        PADDED_HEIGHT=padded(height),
        WIDTH=width,
        TILES=padded(width) // layout.TILE,
        COLUMNS=triton.next_power_of_2(padded(width)),
        HOST=rounding == "host",
        SCATTER=False,
    )


def write_rows(
    pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
) -> None:
    count, heads, width = x.shape
    _pack_rows[_grid(count * heads)](
        *(x, pages, page_ids, rows, count * heads, heads, *x.stride(), pages.stride(0), 0),
        PADDED_HEIGHT=layout.TILE,
        WIDTH=width,
        TILES=width // layout.TILE,
        COLUMNS=triton.next_power_of_2(width),
        HOST=False,
        SCATTER=True,
    )


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    width = tiles.shape[-2] * layout.TILE
    strips = tiles.reshape(-1, tiles.shape[-2] * layout.TILE_BYTES)
    count = len(strips) * layout.TILE
    _unpack_rows[_grid(count)](
        *(strips, out, count, strips.shape[1]),
        WIDTH=width,
        COLUMNS=triton.next_power_of_2(width),
    )


def round_values(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    """Packs and unpacks x; meanwhile the tiles and a padded copy of x take memory."""
    rows = x.reshape(-1, x.shape[-1])
    height, width = padded(rows.shape[0]), padded(rows.shape[1])
    tiles = torch.empty(
        (height // layout.TILE, width // layout.TILE, layout.TILE_BYTES),
        dtype=torch.uint8,
        device=x.device,
    )
    pack(rows, rounding, tiles)
    values = torch.empty((height, width), dtype=x.dtype, device=x.device)
    unpack(tiles, values)
    out.view(rows.shape).copy_(values[: len(rows), : rows.shape[1]])


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS.value),)
