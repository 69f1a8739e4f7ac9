"""Generated rows written by Triton as torch writes them."""

import numpy as np
import pytest
import torch

from hma_kernels import PAGE
from hma_kernels.layout import BF16_PAGES_PER_SLAB, IDS_PER_SLAB
from hma_kernels.portable import store
from hma_kernels.triton.store import store_generated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trial", range(3))
def test_equals_torch(
    rng: np.random.Generator, device: torch.device, trial: int, dtype: torch.dtype
) -> None:
    slabs, heads, count = 5, int(rng.integers(1, 4)), int(rng.integers(0, 30))
    dims = [int(dim) for dim in rng.choice([32, 64, 96], 2)]
    places = rng.permutation(slabs * BF16_PAGES_PER_SLAB * PAGE)[:count]
    slab, within = np.divmod(places, BF16_PAGES_PER_SLAB * PAGE)
    slots = torch.from_numpy(slab * IDS_PER_SLAB * PAGE + within).to(device)
    pages = [
        torch.from_numpy(
            rng.standard_normal((slabs * BF16_PAGES_PER_SLAB, heads, PAGE, dim), np.float32)
        )
        .bfloat16()
        .to(device)
        for dim in dims
    ]
    # A view of one projection's output, as SGLang passes K and V.
    both = torch.from_numpy(rng.standard_normal((count, heads * sum(dims)), np.float32))
    k, v = (
        part.view(count, heads, dim)
        for part, dim in zip(
            both.to(device, dtype).split([heads * d for d in dims], 1), dims, strict=True
        )
    )
    expected = [page.clone() for page in pages]
    store.store_generated(slots, k, v, *expected)
    store_generated(slots, k, v, *pages)
    for got, wanted in zip(pages, expected, strict=True):
        assert torch.equal(got.view(torch.int16), wanted.view(torch.int16))
