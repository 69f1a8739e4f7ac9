"""Prefill attention in Triton against the float64 reference, over random prefixes."""

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from kernel_cases import Spec, random_cache
from test_triton_decode import to

from hma_kernels import PAGE, bfp8_round, reference
from hma_kernels.base import ExtendCall
from hma_kernels.triton import prefill


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trial", range(6))
def test_equals_reference(
    rng: np.random.Generator,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    trial: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(
        prefill, "ROWS_PER_BLOCK", int(rng.choice([16, 32]))
    )  # several blocks a request
    heads, gqa_group_size = int(rng.integers(1, 3)), int(rng.choice([1, 2, 3]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 96], 2))
    batch = int(rng.integers(1, 4))
    prefixes = (rng.integers(0, 5, batch) * PAGE - rng.integers(0, 2, batch)).clip(0).tolist()
    cache = random_cache(rng, Spec(prefixes, heads, dim, v_dim))
    indptr = np.concatenate([[0], rng.integers(0, 50, batch).cumsum()])
    rows = int(indptr[-1])

    def normal(count: int, width: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((rows, count, width), np.float32))

    q = normal(heads * gqa_group_size, dim).to(dtype)
    k, v = (bfp8_round(normal(heads, width)).to(dtype) for width in (dim, v_dim))
    options = {
        "scale": dim**-0.5,
        "logit_cap": float(rng.choice([0, 0, 20])),
        "sliding_window": int(rng.choice([-1, -1, 0, 9, 50])),
    }
    moved = to(cache, device)
    out = torch.full((rows, heads * gqa_group_size, v_dim), torch.nan, dtype=dtype, device=device)
    if rows:
        prefill.extend(
            ExtendCall(
                *(x.to(device) for x in (q, k, v)),
                moved.kv,
                1,
                moved.table,
                torch.from_numpy(indptr),
                **options,
                out=out,
            )
        )
    expected = reference.extend_attention(
        *(x.double().numpy() for x in (q, k, v)), *cache.reference(1), indptr, **options
    )
    assert_accurate(out.cpu(), expected)
