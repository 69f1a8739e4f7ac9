"""XXH3 of many blocks at once, by every implementation, against the xxhash library."""

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

import hma_kernels.xxh3
from hma_kernels import xxh3_64

CPU = torch.device("cpu")


def check(count: int, length: int, seed: int) -> None:
    """Blocks that do not start on a 64-byte boundary, in any order."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, count * (length + 8) + 8, dtype=np.uint8)
    starts = rng.permutation(count) * (length + 8) + 8
    got = xxh3_64(int(data.ctypes.data) + starts, length, CPU)
    for start, value in zip(starts, got, strict=True):
        assert int(value) == xxhash.xxh3_64_intdigest(data[start : start + length].tobytes())


@given(st.integers(0, 9), st.integers(31, 700).map(lambda n: 8 * n), st.integers(0, 2**32 - 1))
@example(3, 1024, 0)
@example(3, 1032, 0)
@example(3, 248, 0)
@example(2, 34816, 0)
def test_equals_the_library(kernels: str, count: int, length: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if kernels == "portable":
            patch.setattr(hma_kernels.xxh3, "_compiled", lambda: None)
        check(count, length, seed)


@pytest.mark.parametrize("length", [0, 64, 240, 1025, 1084])
def test_other_lengths_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"blocks have {length} bytes"):
        xxh3_64(np.zeros(1, dtype=np.int64), length, CPU)
