"""The codec in Triton against the reference, byte for byte."""

import numpy as np
import pytest
import torch
from codec_cases import DTYPES, ROUNDINGS, same_bits, source

from hma_kernels import TILE_BYTES, reference
from hma_kernels.triton import codec


def pack(x: torch.Tensor, rounding: str, device: torch.device) -> torch.Tensor:
    expected = reference.pack(x.float().numpy(), rounding)
    out = torch.full(expected.shape, 0xAA, dtype=torch.uint8, device=device)
    codec.pack(x.to(device), rounding, out)
    return out.cpu()


def exact(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Values that bfloat16 holds, by their bits: a conversion would change those of a NaN."""
    upper = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return torch.from_numpy(upper).view(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trial", range(4))
def test_pack_equals_reference(
    rng: np.random.Generator, device: torch.device, trial: int, dtype: torch.dtype, rounding: str
) -> None:
    lead, height, width = int(rng.integers(1, 3)), *rng.integers(1, 80, 2).tolist()
    x = source(int(rng.integers(2**32)), (lead, height, width), dtype)
    expected = reference.pack(x.float().numpy(), rounding)
    np.testing.assert_array_equal(pack(x, rounding, device), expected)
    turned = x.transpose(1, 2)
    np.testing.assert_array_equal(
        pack(turned, rounding, device), reference.pack(turned.float().numpy(), rounding)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_unpack_every_exponent_and_byte(device: torch.device, dtype: torch.dtype) -> None:
    exponent, byte = np.divmod(np.arange(65536), 256)
    tiles = np.empty((64, TILE_BYTES), np.uint8)
    tiles[:, :64] = exponent.reshape(64, 64, 16)[..., 0]
    tiles[:, 64:] = byte.reshape(64, 1024)
    tiles = tiles.reshape(8, 4, 2, TILE_BYTES)
    out = torch.empty((8, 128, 64), dtype=dtype, device=device)
    codec.unpack(torch.from_numpy(tiles).to(device), out)
    assert same_bits(out.cpu(), exact(reference.unpack(tiles), dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_round_is_unpack_of_pack(
    rng: np.random.Generator, device: torch.device, dtype: torch.dtype, rounding: str
) -> None:
    x = source(int(rng.integers(2**32)), (5, 7, 48), dtype)
    out = torch.empty(x.shape, dtype=dtype, device=device)
    codec.round_values(x.to(device), rounding, out)
    packed = reference.pack(x.float().numpy(), rounding)
    assert same_bits(out.cpu(), exact(reference.unpack(packed)[:, :7, :48], dtype))


@pytest.mark.parametrize("trial", range(3))
def test_write_rows_touches_its_rows_only(
    rng: np.random.Generator, device: torch.device, trial: int
) -> None:
    heads, width = int(rng.integers(1, 4)), 32 * int(rng.integers(1, 4))
    count = int(rng.integers(1, 40))
    places = rng.permutation(5 * 32)[:count]
    values = torch.from_numpy(rng.standard_normal((count, heads, width), np.float32)).bfloat16()
    before = rng.integers(0, 256, (5, heads, width // 32, TILE_BYTES), dtype=np.uint8)
    pages = torch.from_numpy(before.copy()).to(device)
    where = torch.from_numpy(places).to(device)
    codec.write_rows(pages, where // 32, where % 32, values.to(device))
    # Every token packed alone, by the reference, in its row of a page.
    plain = reference.unpack(before[:, :, None])
    rows = reference.unpack(reference.pack(values.float().numpy()[:, :, None], "device"))
    for place, row in zip(places, rows, strict=True):
        plain[place // 32, :, place % 32] = row[:, 0]
    got = reference.unpack(pages.cpu().numpy()[:, :, None])
    np.testing.assert_array_equal(got.view(np.uint32), plain.view(np.uint32))
