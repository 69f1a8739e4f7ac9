"""A landed page in every layer by Triton, as torch unpacks it."""

import numpy as np
import pytest
import torch

from hma_kernels import PAGE, TILE, TILE_BYTES, bfp8_unpack
from hma_kernels.layout import BF16_PAGES_PER_SLAB, IDS_PER_SLAB
from hma_kernels.triton.landing import PageUnpacker


@pytest.mark.parametrize("dim", [32, 96, 128])
def test_equals_torch(rng: np.random.Generator, device: torch.device, dim: int) -> None:
    layers, heads, slabs = 3, int(rng.integers(1, 4)), 2
    shape = (slabs * IDS_PER_SLAB, heads, dim // TILE, TILE_BYTES)
    packed = [
        torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).to(device)
        for _ in range(layers)
    ]
    pages = slabs * BF16_PAGES_PER_SLAB
    plain = [x.view(-1).view(torch.bfloat16).view(pages, heads, PAGE, dim) for x in packed]
    source = int(rng.integers(IDS_PER_SLAB))
    target = int(rng.integers(BF16_PAGES_PER_SLAB, pages))  # of another slab
    expected = [x.clone() for x in packed]
    for layer in expected:
        rows = layer.view(-1).view(torch.bfloat16).view(pages, heads, PAGE, dim)
        rows[target] = bfp8_unpack(layer[source, :, None].cpu()).to(device)
    PageUnpacker(packed, plain).unpack(source, target)
    for got, wanted in zip(packed, expected, strict=True):
        assert torch.equal(got, wanted)
