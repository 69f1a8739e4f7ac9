"""Packing and unpacking in torch; arguments are those of hma_kernels.ops, checked there."""

from functools import lru_cache

import torch

from hma_kernels.layout import (
    EXPONENT_BYTES,
    FACE,
    GROUP,
    TILE,
    TILE_BYTES,
    Rounding,
    data_offset,
    exponent_offset,
    padded,
)

_CHUNK = 1 << 20


def pack(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    *lead, height, width = x.shape
    full_height, full_width = padded(height), padded(width)
    if (full_height, full_width) != (height, width):
        x = torch.nn.functional.pad(x, (0, full_width - width, 0, full_height - height))
    exponents, data = _quantize(x.reshape(-1, GROUP), rounding)
    faces = (*lead, full_height // TILE, 2, FACE, full_width // TILE, 2)
    rank = len(lead)
    tile_order = (*range(rank), rank, rank + 3, rank + 1, rank + 4, rank + 2)
    out[..., :EXPONENT_BYTES] = exponents.view(faces).permute(tile_order).flatten(-3)
    data_order = (*tile_order, rank + 5)
    out[..., EXPONENT_BYTES:] = data.view(*faces, GROUP).permute(data_order).flatten(-4)


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    wide = tiles.shape[-2]
    strips = tiles.reshape(-1, wide, TILE_BYTES)
    per_chunk = max(1, _CHUNK // (wide * TILE * TILE))
    flat = out.view(-1, TILE, wide * TILE)
    for start in range(0, len(strips), per_chunk):
        part = slice(start, start + per_chunk)
        flat[part] = unpack_strips(strips[part], out.dtype)


def round_values(x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None:
    rows, out_rows = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    per_chunk = max(1, _CHUNK // x.shape[-1])
    for start in range(0, len(rows), per_chunk):
        part = rows[start : start + per_chunk]
        exponents, data = _quantize(part.reshape(-1, GROUP), rounding)
        out_rows[start : start + per_chunk] = _dequantize(exponents, data, x.dtype).view(part.shape)


def write_rows(
    pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
) -> None:
    count, heads, width = x.shape
    exponents, data = _quantize(x.reshape(-1, GROUP), "device")
    groups = width // GROUP
    page = page_ids.view(-1, 1, 1)
    head = torch.arange(heads, device=x.device).view(1, -1, 1)
    group = torch.arange(groups, device=x.device).expand(count, 1, -1)
    row = rows.view(-1, 1, 1).expand(-1, 1, groups)
    exponent_at, data_at = exponent_offset(row, group), data_offset(row, group)
    tile, shape = group // 2, (count, heads, groups)
    pages[page, head, tile, exponent_at % TILE_BYTES] = exponents.view(shape)
    byte = data_at[..., None] % TILE_BYTES + torch.arange(GROUP, device=x.device)
    pages[page[..., None], head[..., None], tile[..., None], byte] = data.view(*shape, GROUP)


def unpack_strips(strips: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [S, Wt, 1088] -> dtype [S, 32, Wt*32]; the caller limits S."""
    count, wide, _ = strips.shape
    unit_index, exponent_index = _strip_index(_capacity(count), wide, strips.device)
    groups = count * TILE * wide * TILE // GROUP
    flat = strips.reshape(-1)
    exponents = flat.index_select(0, exponent_index[:groups])
    data = flat.view(-1, GROUP).index_select(0, unit_index[:groups])
    return _dequantize(exponents, data, dtype).view(count, TILE, wide * TILE)


def _capacity(strips: int) -> int:
    return 1 << (strips - 1).bit_length() if strips else 0


@lru_cache(maxsize=16)
def _strip_index(strips: int, wide: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each group, in row-major order: the 16-byte unit of its data, the byte of its exponent."""
    row = torch.arange(TILE, device=device).view(-1, 1)
    group = torch.arange(2 * wide, device=device).view(1, -1)
    start = torch.arange(strips, device=device).view(-1, 1, 1) * (wide * TILE_BYTES)
    data = (start + data_offset(row, group)) // GROUP
    exponent = start + exponent_offset(row, group)
    kind = torch.int32 if strips * wide * TILE_BYTES < 2**31 else torch.int64
    return data.flatten().to(kind), exponent.flatten().to(kind)


def _quantize(groups: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """float [n, 16] -> exponents uint8 [n], data uint8 [n, 16]."""
    exponents = torch.empty(len(groups), dtype=torch.uint8, device=groups.device)
    data = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    for start in range(0, len(groups), _CHUNK // GROUP):
        part = slice(start, start + _CHUNK // GROUP)
        if rounding == "host":
            quantized = _quantize_host(_bits(groups[part].float()))
        elif groups.dtype == torch.bfloat16:
            quantized = _quantize_device(_bits(groups[part]))
        else:
            quantized = _quantize_device(_bits(groups[part].float()) >> 16)
        exponents[part], data[part] = quantized
    return exponents, data


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns as int32, sign-extended."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).to(torch.int32)


def _quantize_host(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = (bits >> 23) & 0xFF
    shared = exponent.amax(-1, keepdim=True)
    mantissa = (bits & 0x7FFFFF) | 0x800000
    mantissa >>= (shared - exponent).clamp_(max=31)
    q = mantissa >> 17
    # Adding just under a half, plus q's lowest bit, carries exactly where half-to-even rounds up.
    q = (mantissa + 0xFFFF + (q & 1)) >> 17
    q = q.clamp_(max=127).masked_fill_(exponent == 0, 0)
    return shared[:, 0].to(torch.uint8), _with_sign(bits, q)


def _quantize_device(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = (bits >> 7) & 0xFF
    shared = exponent.amax(-1, keepdim=True)
    # NaN becomes infinity, a denormal zero.
    mantissa = ((bits & 0x7F) | 0x80).masked_fill_(exponent == 255, 0x80)
    mantissa.masked_fill_(exponent == 0, 0)
    # A shift of 8 leaves nothing: mantissa + 256 < 512.
    shift = (shared - exponent).clamp_(max=8)
    half = torch.ones((), dtype=torch.int32, device=bits.device) << shift
    q = ((mantissa + half) >> (shift + 1)).clamp_(max=127)
    return shared[:, 0].to(torch.uint8), _with_sign(bits, q)


def _with_sign(bits: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.where((bits < 0) & (q > 0), q | 0x80, q).to(torch.uint8)


def _dequantize(exponents: torch.Tensor, data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """exponents uint8 [n], data uint8 [n, 16] -> dtype [n, 16], by value = +-q * 2^(E-133)."""
    if exponents.numel() == 0:
        return torch.empty_like(data, dtype=dtype)
    if data.device.type != "cpu":
        return _dequantize_by_table(exponents, data, dtype)
    byte = data.view(torch.int8)
    negative = byte >> 7
    signed = (byte ^ (negative & 0x7F)).sub_(negative)
    scales = _scale_rows(dtype).index_select(0, exponents.to(torch.int32))
    values = scales.mul_(signed.to(dtype))

    # The product is exact unless it leaves the normal range (E < 7, E = 255) or is -0.
    lowest, highest = (int(e) for e in exponents.aminmax())
    has_negative_zero = int(byte.min()) == -128
    if lowest < 7 or highest == 255 or has_negative_zero:
        special = (exponents < 7) | (exponents == 255)
        if has_negative_zero:
            special |= (byte == -128).any(-1)
        at = special.nonzero().view(-1)
        values[at] = _dequantize_by_table(exponents[at], data[at], dtype)
    return values


def _dequantize_by_table(
    exponents: torch.Tensor, data: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    index = exponents.to(torch.int32)[:, None] << 8 | data
    return _value_table(dtype, data.device)[index]


@lru_cache(maxsize=8)
def _scale_rows(dtype: torch.dtype) -> torch.Tensor:
    """Row E: 2^(E-133), 16 times. Copying whole rows is far faster than broadcasting a value."""
    scale = torch.exp2(torch.arange(256, dtype=torch.float64) - 133)
    return scale.to(dtype)[:, None].repeat(1, GROUP)


@lru_cache(maxsize=8)
def _value_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[65536]: the value of every (exponent, byte) pair, at exponent*256 + byte."""
    exponent, byte = torch.arange(65536) >> 8, torch.arange(65536) & 0xFF
    sign, q = byte >> 7, byte & 0x7F
    leading_zeros = sum(((q < 1 << bit).to(torch.int64) for bit in range(7)), torch.tensor(0))
    normal = (exponent - leading_zeros) << 7 | ((q << (leading_zeros + 1)) & 0x7F)
    bits = torch.where(exponent < leading_zeros, 0, sign << 15 | normal)
    bits = torch.where(q == 0, sign << 15, bits)
    return bits.to(torch.int16).view(torch.bfloat16).to(dtype).to(device)
