"""XXH3 in Triton against the xxhash library."""

import numpy as np
import pytest
import torch
import xxhash

from hma_kernels.portable.xxh3 import merge
from hma_kernels.triton.xxh3 import accumulate


@pytest.mark.parametrize(("count", "length"), [(1, 248), (5, 1088), (6, 2 * 1088), (4, 2048)])
def test_equals_the_library(
    count: int, length: int, device: torch.device, rng: np.random.Generator
) -> None:
    rows = rng.integers(0, 256, (count, length), dtype=np.uint8)
    data = torch.from_numpy(rows).to(device)
    order = rng.permutation(count)
    got = merge(accumulate(data.data_ptr() + order * length, length, device), length)
    assert got.tolist() == [xxhash.xxh3_64_intdigest(rows[i].tobytes()) for i in order]
