"""The package's operations with Triton behind them, and what goes to torch instead."""

import dataclasses

import numpy as np
import pytest
import torch
from accuracy import assert_accurate
from kernel_cases import Spec, random_cache
from test_triton_decode import to

import hma_kernels
from hma_kernels import (
    DecodePlan,
    bfp8_pack,
    bfp8_round,
    bfp8_unpack,
    implementation,
    reference,
)
from hma_kernels import gpu as operations
from hma_kernels.base import DecodeCall


@pytest.fixture(autouse=True)
def in_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_host", lambda: operations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_agrees_with_torch(
    rng: np.random.Generator, device: torch.device, dtype: torch.dtype
) -> None:
    cache = to(random_cache(rng, Spec([70, 33, 1], 2, 64, 32)), device)
    q = torch.from_numpy(rng.standard_normal((3, 8, 64))).to(device, dtype)
    got = DecodePlan(cache.kv, cache.table, num_q_heads=8).run(q, 0, scale=0.125)
    plan = hma_kernels.portable.decode_plan(cache.kv, cache.table, 8, -1)
    expected = torch.empty_like(got)
    plan.run(DecodeCall(q, 0, 0.125, 0.0, expected))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2 if dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_of_several_queries_a_request(
    rng: np.random.Generator, device: torch.device, dtype: torch.dtype
) -> None:
    lengths, counts = [9, 70], rng.integers(1, 9, 2)
    indptr = torch.tensor([0, *counts.cumsum()])
    cache = random_cache(rng, Spec(lengths, 1, 32, 32))
    q = torch.from_numpy(rng.standard_normal((int(indptr[-1]), 4, 32))).to(dtype)
    sinks = torch.from_numpy(rng.standard_normal(4)).float()
    moved = to(cache, device)
    plan = DecodePlan(moved.kv, moved.table, num_q_heads=4, sliding_window=31, q_indptr=indptr)

    def check(seq_lens: np.ndarray) -> None:
        kv, table = cache.reference(1)
        expected = reference.decode_attention(
            *(q.double().numpy(), kv, dataclasses.replace(table, seq_lens=seq_lens)),
            **{"scale": 0.125, "sliding_window": 31, "sinks": sinks.double().numpy()},
            q_indptr=indptr.numpy(),
        )
        got = plan.run(q.to(device), 1, scale=0.125, sinks=sinks.to(device))
        assert_accurate(got.cpu(), expected)

    check(np.array(lengths))
    moved.table.seq_lens.sub_(1)
    plan.refresh()
    check(np.array(lengths) - 1)


def test_codec(rng: np.random.Generator, device: torch.device) -> None:
    x = torch.from_numpy(rng.standard_normal((3, 40, 70), np.float32)).to(device)
    tiles = bfp8_pack(x)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        values = bfp8_unpack(tiles, dtype=dtype)[:, :40, :70]
        assert torch.equal(values, bfp8_unpack(tiles, dtype=torch.float64)[:, :40, :70].to(dtype))
    padded = x[..., :64].contiguous()
    assert torch.equal(
        bfp8_round(padded), bfp8_unpack(bfp8_pack(padded), dtype=torch.float32)[:, :40]
    )
