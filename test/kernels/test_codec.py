"""torch against the reference, byte for byte, on fresh data."""

import numpy as np
import pytest
import torch
from codec_cases import BITS, DTYPES, ROUNDINGS, same_bits, source
from hypothesis import given
from hypothesis import strategies as st

from hma_kernels import (
    TILE,
    TILE_BYTES,
    bfp8_pack,
    bfp8_round,
    bfp8_unpack,
    bfp8_write_rows,
    reference,
)
from hma_kernels.layout import data_offset, exponent_offset

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 70)


@given(seeds, st.sampled_from(DTYPES), st.sampled_from(ROUNDINGS), sizes, sizes, st.integers(0, 3))
def test_pack_equals_reference(seed, dtype, rounding, height, width, lead):
    x = source(seed, (lead, height, width), dtype)
    expected = reference.pack(x.float().numpy(), rounding)
    np.testing.assert_array_equal(bfp8_pack(x, rounding=rounding).numpy(), expected)


@given(seeds, st.sampled_from(DTYPES), st.sampled_from(ROUNDINGS))
def test_pack_takes_strides(seed, dtype, rounding):
    x = source(seed, (16, 3, 96), dtype)
    for strided in (x.transpose(0, 1), x.permute(1, 2, 0), x[::2, :, 1:65], x.flip(0)[5:]):
        out = torch.empty_like(bfp8_pack(strided.contiguous(), rounding=rounding))
        assert bfp8_pack(strided, rounding=rounding, out=out) is out
        np.testing.assert_array_equal(out, reference.pack(strided.float().numpy(), rounding))


@pytest.mark.parametrize("dtype", BITS)
def test_unpack_every_exponent_and_byte(dtype):
    """Each tile row of 16 holds 16 of an exponent's 256 bytes."""
    exponent, byte = np.divmod(np.arange(65536), 256)
    tiles = np.empty((64, TILE_BYTES), np.uint8)
    tiles[:, :64] = exponent.reshape(64, 64, 16)[..., 0]
    tiles[:, 64:] = byte.reshape(64, 1024)
    tiles = tiles.reshape(8, 4, 2, TILE_BYTES)
    bits = reference.unpack(tiles).view(np.uint32) >> 16
    expected = torch.from_numpy(bits.astype(np.uint16)).view(torch.bfloat16)
    got = bfp8_unpack(torch.from_numpy(tiles), dtype=dtype)
    assert same_bits(got, expected.to(dtype))
    if dtype == torch.float32:
        q, sign = byte & 127, np.where(byte > 127, -1.0, 1.0)
        plain = (sign * np.ldexp(q.astype(float), exponent - 133)).reshape(256, 256)
        values = reference.dequantize(exponent.astype(np.uint8), byte.astype(np.uint8))
        np.testing.assert_array_equal(values.reshape(256, 256)[7:255], plain[7:255])


@given(seeds, st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
def test_unpack_is_exact_in_bf16(seed, lead, high, wide):
    rng = np.random.default_rng(seed)
    tiles = torch.from_numpy(rng.integers(0, 256, (lead, high, wide, TILE_BYTES), np.uint8))
    if rng.random() < 0.5:
        tiles[..., :64] = rng.integers(7, 255)
    narrow = bfp8_unpack(tiles)
    assert same_bits(narrow.float(), torch.from_numpy(reference.unpack(tiles.numpy())))
    for dtype in (torch.float32, torch.float64):
        assert same_bits(bfp8_unpack(tiles, dtype=dtype), narrow.to(dtype))
    strided = tiles.transpose(1, 2)
    out = torch.empty(lead, wide * TILE, high * TILE, dtype=torch.bfloat16)
    assert bfp8_unpack(strided, out=out) is out
    assert same_bits(out, bfp8_unpack(strided.contiguous()))


@given(seeds, st.sampled_from(DTYPES[:2]), st.sampled_from(ROUNDINGS), sizes, st.integers(1, 9))
def test_round_is_unpack_of_pack(seed, dtype, rounding, height, groups):
    x = source(seed, (height, groups * 16), dtype)
    expected = bfp8_unpack(bfp8_pack(x, rounding=rounding), dtype=dtype)
    expected = expected[: x.shape[0], : x.shape[1]]
    assert same_bits(bfp8_round(x, rounding=rounding), expected)
    assert same_bits(bfp8_round(x.t().contiguous().t(), rounding=rounding), expected)
    assert same_bits(bfp8_round(x[0], rounding=rounding), expected[0])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_large_inputs_go_in_chunks(rng, rounding):
    x = torch.from_numpy(rng.standard_normal((1, 1600, 1408), np.float32))
    tiles = bfp8_pack(x, rounding=rounding)
    np.testing.assert_array_equal(tiles, reference.pack(x.numpy(), rounding))
    values = bfp8_unpack(tiles, dtype=torch.float32)
    np.testing.assert_array_equal(values, reference.unpack(tiles.numpy()))
    assert torch.equal(bfp8_round(x, rounding=rounding), values)


@given(seeds, st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 4))
def test_write_rows_touches_its_rows_only(seed, dtype, heads, wide):
    rng = np.random.default_rng(seed)
    arena = torch.from_numpy(rng.integers(0, 256, (5, 2, heads, wide, TILE_BYTES), np.uint8))
    before, pages = arena.clone(), arena[:, 1]
    slots = rng.choice(5 * TILE, rng.integers(0, 60), replace=False)
    page, row = slots // TILE, slots % TILE
    x = source(seed, (len(slots), heads, wide * TILE), dtype)
    bfp8_write_rows(pages, torch.from_numpy(page), torch.from_numpy(row), x)

    values = np.zeros((5, heads, TILE, wide * TILE), np.float32)
    values[page, :, row] = x.float().numpy()
    packed = reference.pack(values, "device")[:, :, 0].reshape(5, heads, -1)
    expected = before.numpy().copy()
    target = expected[:, 1].reshape(5, heads, -1)
    group = np.arange(2 * wide)
    for at, r in zip(page, row, strict=True):
        for byte in (exponent_offset(r, group), data_offset(r, group)[:, None] + np.arange(16)):
            target[at][:, byte] = packed[at][:, byte]
    expected[:, 1] = target.reshape(expected[:, 1].shape)
    np.testing.assert_array_equal(arena, expected)


def test_write_every_row_is_pack(rng):
    x = torch.from_numpy(rng.standard_normal((3, 2, TILE, 64), np.float32))
    pages = torch.full((3, 2, 2, TILE_BYTES), 0xFF, dtype=torch.uint8)
    slots = torch.from_numpy(rng.permutation(3 * TILE))
    page, row = slots // TILE, slots % TILE
    bfp8_write_rows(pages, page, row, x[page, :, row])
    assert torch.equal(pages, bfp8_pack(x)[:, :, 0])


def test_refuses_what_it_cannot_do():
    x = torch.zeros(32, 32)
    with pytest.raises(TypeError, match="float64"):
        bfp8_pack(x.double())
    with pytest.raises(ValueError, match="nearest"):
        bfp8_pack(x, rounding="nearest")
    with pytest.raises(ValueError, match=r"\[\.\.\., H, W\]"):
        bfp8_pack(x[0])
    with pytest.raises(TypeError, match="float16"):
        bfp8_unpack(bfp8_pack(x), dtype=torch.float16)
    with pytest.raises(ValueError, match="1088"):
        bfp8_unpack(bfp8_pack(x)[..., :1000])
    with pytest.raises(ValueError, match="divide by 16"):
        bfp8_round(x[:, :20])
    with pytest.raises(TypeError, match="float16"):
        bfp8_round(x.half())
    with pytest.raises(ValueError, match="out is"):
        bfp8_pack(x, out=torch.empty(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out has strides"):
        bfp8_unpack(bfp8_pack(x), out=torch.empty(32, 64, dtype=torch.bfloat16)[:, ::2])
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="pages are"):
        bfp8_write_rows(bfp8_pack(x), ids, ids, x[:1, None])
