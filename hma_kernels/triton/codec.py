"""The BFP8 codec in Triton; arguments are those of hma_kernels.ops, checked there."""

import torch
import triton
import triton.language as tl

from hma_kernels.layout import TILE, TILE_BYTES, Rounding, padded
from hma_kernels.triton.pages import (
    GROUP,
    data_of_column,
    data_of_row,
    exponent_of_group,
    exponent_of_row,
    load_bfp8,
)

ROWS = tl.constexpr(16)


@triton.jit
def _encode_device(bits):
    """float32 bits [R, G, 16] -> shared exponents [R, G], data bytes; half away from zero on the
    upper 16 bits."""
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
def _encode_host(bits):
    """As _encode_device; half to even on all 32 bits."""
    exponent = (bits >> 23) & 0xFF
    shared = tl.max(exponent, 2)
    mantissa = ((bits & 0x7FFFFF) | 0x800000) >> tl.minimum(shared[:, :, None] - exponent, 31)
    # Just under a half, plus q's lowest bit, carries exactly where half-to-even rounds up.
    q = (mantissa + 0xFFFF + ((mantissa >> 17) & 1)) >> 17
    q = tl.where(exponent == 0, 0, tl.minimum(q, 127))
    return shared, tl.where((bits < 0) & (q > 0), q | 0x80, q)


@triton.jit
def _encode_rows(
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
    """Rows of x, [outer][height][width], to where they lie in tiles.

    Row i is row i % PADDED_HEIGHT of strip i // PADDED_HEIGHT; with SCATTER it is head i % heads of
    token i // heads, which goes to row page_rows[token] of page page_ids[token].
    """
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = i < count
    if SCATTER:
        token, head = i // heads, i % heads
        source = token * outer_stride + head * row_stride
        row = tl.load(page_rows + token, mask=live, other=0)
        page = tl.load(page_ids + token, mask=live, other=0)
        strip = page * page_stride + head * (TILES * 1088)
        filled = live
    else:
        line = i % PADDED_HEIGHT
        source = i // PADDED_HEIGHT * outer_stride + line * row_stride
        row = line % 32
        strip = i // 32 * (TILES * 1088)
        filled = live & (line < height)
    column = tl.arange(0, COLUMNS)
    value = tl.load(
        x + source[:, None] + (column * column_stride)[None, :],
        mask=filled[:, None] & (column < WIDTH)[None, :],
        other=0.0,
    )
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    groups = bits.reshape(ROWS, COLUMNS // GROUP, GROUP)
    if HOST:
        shared, data = _encode_host(groups)
    else:
        shared, data = _encode_device(groups)
    at = out + (strip + data_of_row(row))[:, None] + data_of_column(column)[None, :]
    stored = live[:, None] & (column < TILES * 32)[None, :]
    tl.store(at, data.reshape(ROWS, COLUMNS).to(tl.uint8), mask=stored)
    group = tl.arange(0, COLUMNS // GROUP)
    at = out + (strip + exponent_of_row(row))[:, None] + exponent_of_group(group)[None, :]
    tl.store(at, shared.to(tl.uint8), mask=live[:, None] & (group < TILES * 2)[None, :])


@triton.jit
def _decode_rows(tiles, out, count, strip_stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    i = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = i < count
    values = load_bfp8(tiles, i // 32 * strip_stride, i % 32, live, WIDTH, COLUMNS)
    column = tl.arange(0, COLUMNS)
    if out.dtype.element_ty == tl.bfloat16:
        # The upper half of the bits; a conversion would not keep those of a NaN.
        upper = values.to(tl.int32, bitcast=True) >> 16
        values = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(
        out + (i * WIDTH)[:, None] + column[None, :],
        values,
        mask=live[:, None] & (column < WIDTH)[None, :],
    )


def pack(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    height, width = x.shape[-2:]
    x = x.reshape(-1, height, width)
    count = x.shape[0] * padded(height)
    _encode_rows[_grid(count)](
        *(x, out, out, out, count, 1, *x.stride(), 0, height),
        PADDED_HEIGHT=padded(height),
        WIDTH=width,
        TILES=padded(width) // TILE,
        COLUMNS=triton.next_power_of_2(padded(width)),
        HOST=rounding == "host",
        SCATTER=False,
    )


def write_rows(
    pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
) -> None:
    count, heads, width = x.shape
    _encode_rows[_grid(count * heads)](
        *(x, pages, page_ids, rows, count * heads, heads, *x.stride(), pages.stride(0), 0),
        PADDED_HEIGHT=TILE,
        WIDTH=width,
        TILES=width // TILE,
        COLUMNS=triton.next_power_of_2(width),
        HOST=False,
        SCATTER=True,
    )


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    wide = tiles.shape[-2]
    strips = tiles.reshape(-1, wide * TILE_BYTES)
    count = len(strips) * TILE
    _decode_rows[_grid(count)](
        *(strips, out, count, wide * TILE_BYTES),
        WIDTH=wide * TILE,
        COLUMNS=triton.next_power_of_2(wide * TILE),
    )


def round_values(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    """Through packed tiles: a third of the memory of `out`, for as long as it takes."""
    rows = x.reshape(-1, x.shape[-1])
    wide = padded(rows.shape[1]) // TILE
    tiles = torch.empty(
        (padded(len(rows)) // TILE, wide, TILE_BYTES), dtype=torch.uint8, device=x.device
    )
    pack(rows, rounding, tiles)
    values = torch.empty((padded(len(rows)), wide * TILE), dtype=x.dtype, device=x.device)
    unpack(tiles, values)
    out.view(rows.shape).copy_(values[: len(rows), : rows.shape[1]])


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS.value),)
