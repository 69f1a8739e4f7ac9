"""Decode attention in Triton against the float64 reference on random paged caches."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from kernel_cases import Cache, Spec, empty_table, random_cache

from hma_kernels import PagedKV, reference
from hma_kernels.base import DecodeCall
from hma_kernels.layout import EXPONENT_BYTES, GROUP
from hma_kernels.triton import decode


def to(cache: Cache, device: torch.device) -> Cache:
    kv = PagedKV(*([layer.to(device) for layer in layers] for layers in vars(cache.kv).values()))
    return Cache(kv, cache.table.to(device))


def run(
    cache: Cache, q: torch.Tensor, device: torch.device, *, window: int = -1, cap: float = 0.0
) -> torch.Tensor:
    moved = to(cache, device)
    plan = decode.DecodePlan(moved.kv, moved.table, q.shape[1], window)
    out = q.new_full((*q.shape[:2], cache.kv.v_head_dim), torch.nan, device=device)
    plan.run(DecodeCall(q.to(device), 1, q.shape[2] ** -0.5, cap, out))
    return out.cpu()


def check_against_reference(
    rng: np.random.Generator, cache: Cache, query: torch.Tensor, run: Callable[..., torch.Tensor]
) -> None:
    """run(window=, cap=) with random options against the float64 definition."""
    cap = float(rng.choice([0, 0, 5, 30]))
    window = int(rng.choice([-1, -1, 0, 1, 17, 32, 100]))
    got = run(window=window, cap=cap)
    expected = reference.decode_attention(
        query.double().numpy(),
        *cache.reference(1),
        scale=query.shape[2] ** -0.5,
        logit_cap=cap,
        sliding_window=window,
    )
    assert_accurate(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trial", range(8))
def test_equals_reference(
    rng: np.random.Generator, device: torch.device, trial: int, dtype: torch.dtype
) -> None:
    magnitude = 0 if dtype == torch.float16 else int(rng.choice([0, 0, -60, 60]))
    v_magnitude = 0 if dtype == torch.float16 else int(rng.choice([0, 0, -100, 100]))
    heads, gqa_group_size = int(rng.integers(1, 3)), int(rng.choice([1, 4, 5, 17]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 96, 128, 256], 2))
    lengths = rng.integers(1, 400, int(rng.integers(1, 4))).tolist()
    cache = random_cache(rng, Spec(lengths, heads, dim, v_dim, magnitude, v_magnitude))
    q = np.ldexp(rng.standard_normal((len(lengths), heads * gqa_group_size, dim)), -magnitude)
    query = torch.from_numpy(q).to(dtype)
    check_against_reference(
        rng, cache, query, lambda **options: run(cache, query, device, **options)
    )


def test_nothing_to_see_is_zero(rng: np.random.Generator, device: torch.device) -> None:
    cache = random_cache(rng, Spec([0, 40, 0], 2, 32, 32))
    q = torch.from_numpy(rng.standard_normal((3, 2, 32))).bfloat16()
    got = run(cache, q, device)
    assert not got[[0, 2]].any() and got[1].any()
    empty = Cache(cache.kv, empty_table(3))
    assert not run(empty, q, device).any()


def test_same_bits_from_run_to_run(rng: np.random.Generator, device: torch.device) -> None:
    cache = random_cache(rng, Spec([300, 5, 90], 1, 64, 64))
    q = torch.from_numpy(rng.standard_normal((3, 4, 64))).bfloat16()
    first = run(cache, q, device)
    assert all(torch.equal(first, run(cache, q, device)) for _ in range(3))


def test_zeros_under_any_finite_exponent_are_zeros(
    rng: np.random.Generator, device: torch.device
) -> None:
    """The exponent of a group of zeros says nothing."""
    cache = random_cache(rng, Spec([70, 33], 2, 64, 64))
    groups = []
    for tiles in [*cache.kv.k_bfp8, *cache.kv.v_bfp8]:  # [pages, heads, tiles, bytes]
        exponents, data = tiles[..., :EXPONENT_BYTES], tiles[..., EXPONENT_BYTES:]
        zeros = torch.from_numpy(rng.random(exponents.shape) < 0.2)
        data.unflatten(-1, (EXPONENT_BYTES, GROUP))[zeros] = 0
        exponents[zeros] = 0
        groups.append((exponents, zeros))
    q = torch.from_numpy(rng.standard_normal((2, 8, 64))).bfloat16()
    expected = run(cache, q, device)
    for exponents, zeros in groups:
        exponents[zeros] = torch.from_numpy(rng.choice([1, 127, 254], int(zeros.sum()))).byte()
    got = run(cache, q, device)
    assert got.isfinite().all() and torch.equal(got, expected)
