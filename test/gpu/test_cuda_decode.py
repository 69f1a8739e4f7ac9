"""Decode attention in CUDA C++ against the float64 reference: on a GPU where there is one, else its
source compiled for threads on the host, whose tensor cores and copies follow the PTX ISA."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_host import eager_copies, library
from kernel_cases import Cache, Spec, empty_table, random_cache
from test_triton_decode import check_against_reference, to

from hma_kernels.base import DecodeCall
from hma_kernels.cuda import probe
from hma_kernels.cuda.build import Instance
from hma_kernels.cuda.decode import DecodePlan, instance_for, library_for
from hma_kernels.cuda.library import DecodeLibrary
from hma_kernels.paged import PagedKV, PageTable


def compiled(
    kv: PagedKV, gqa_group_size: int, dtype: torch.dtype, device: torch.device, stages: int = 3
) -> DecodeLibrary:
    if device.type == "cuda":
        found = library_for(kv, gqa_group_size * kv.kv_heads, dtype)
        assert found is not None, "no CUDA kernel on this GPU: see the log"
        return found
    return library(instance_for(kv.head_dim, kv.v_head_dim, gqa_group_size, dtype, stages=stages))


def run(
    cache: Cache,
    q: torch.Tensor,
    device: torch.device,
    *,
    window: int = -1,
    cap: float = 0.0,
    stages: int = 3,
    blocks: int | None = None,
) -> torch.Tensor:
    moved = to(cache, device)
    gqa_group_size = q.shape[1] // moved.kv.kv_heads
    kernel = compiled(moved.kv, gqa_group_size, q.dtype, device, stages)
    plan = DecodePlan(moved.kv, moved.table, q.shape[1], window, kernel, blocks)
    out = q.new_full((*q.shape[:2], cache.kv.v_head_dim), torch.nan, device=device)
    plan.run(DecodeCall(q.to(device), 1, q.shape[2] ** -0.5, cap, out))
    return out.cpu()


SHAPES = [
    *((128, 128, 4, torch.bfloat16), (128, 128, 17, torch.float16), (64, 64, 8, torch.bfloat16)),
    *((96, 64, 3, torch.float16), (256, 256, 5, torch.bfloat16), (32, 96, 1, torch.bfloat16)),
]


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize(("dim", "v_dim", "gqa_group_size", "dtype"), SHAPES)
def test_equals_reference(
    rng: np.random.Generator,
    device: torch.device,
    dim: int,
    v_dim: int,
    gqa_group_size: int,
    dtype: torch.dtype,
    eager: bool,
) -> None:
    eager_copies(eager)
    # Sums keep full precision while |V| is between 2^-59 and 2^67, products for |K| above 2^-59.
    magnitude = 0 if dtype == torch.float16 else int(rng.choice([0, 0, -40, 40]))
    v_magnitude = 0 if dtype == torch.float16 else int(rng.choice([0, 0, -40, 50]))
    heads = int(rng.integers(1, 3))
    lengths = rng.integers(1, 900, int(rng.integers(1, 4))).tolist()
    cache = random_cache(rng, Spec(lengths, heads, dim, v_dim, magnitude, v_magnitude))
    q = np.ldexp(rng.standard_normal((len(lengths), heads * gqa_group_size, dim)), -magnitude)
    query = torch.from_numpy(q).to(dtype)
    blocks = int(rng.choice([1, 2, 3, 5, 8, 21, 100]))
    check_against_reference(
        rng, cache, query, lambda **options: run(cache, query, device, blocks=blocks, **options)
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_any_number_of_stages(rng: np.random.Generator, device: torch.device, stages: int) -> None:
    cache = random_cache(rng, Spec([700], 1, 64, 64))
    q = torch.from_numpy(rng.standard_normal((1, 4, 64))).bfloat16()
    expected = run(cache, q, device)
    assert torch.equal(run(cache, q, device, stages=stages), expected)


@pytest.mark.parametrize("requests", [20, 70], ids=["8 warps merge", "2 warps merge"])
def test_many_requests(rng: np.random.Generator, device: torch.device, requests: int) -> None:
    cache = random_cache(rng, Spec(rng.integers(0, 100, requests).tolist(), 2, 32, 32))
    q = torch.from_numpy(rng.standard_normal((requests, 8, 32))).bfloat16()
    check_against_reference(
        rng, cache, q, lambda **options: run(cache, q, device, blocks=64, **options)
    )


def test_nothing_to_see_is_zero(rng: np.random.Generator, device: torch.device) -> None:
    cache = random_cache(rng, Spec([0, 40, 0], 2, 64, 64))
    q = torch.from_numpy(rng.standard_normal((3, 8, 64))).bfloat16()
    got = run(cache, q, device)
    assert not got[[0, 2]].any() and got[1].any()
    assert not run(Cache(cache.kv, empty_table(3)), q, device).any()


def test_no_logit_is_finite(rng: np.random.Generator, device: torch.device) -> None:
    """Of one head, while others rise from page to page: its output is zero, theirs are theirs."""
    cache = random_cache(rng, Spec([500], 1, 64, 64))
    q = torch.from_numpy(rng.standard_normal((1, 4, 64))).bfloat16()
    expected = run(cache, q, device, cap=5.0)
    q[0, 2] = torch.inf
    got = run(cache, q, device, cap=5.0)
    assert torch.equal(got[:, [0, 1, 3]], expected[:, [0, 1, 3]])


def test_same_bits_from_run_to_run(rng: np.random.Generator, device: torch.device) -> None:
    cache = random_cache(rng, Spec([300, 5, 90], 1, 64, 64))
    q = torch.from_numpy(rng.standard_normal((3, 4, 64))).bfloat16()
    first = run(cache, q, device)
    assert all(torch.equal(first, run(cache, q, device)) for _ in range(3))


def test_probe_tells_right_from_wrong(device: torch.device) -> None:
    def plan(kv: PagedKV, table: PageTable, heads: int) -> DecodePlan:
        kernel = compiled(kv, heads // kv.kv_heads, torch.bfloat16, device)
        return DecodePlan(kv, table, heads, -1, kernel)

    probe.check(plan, 64, 64, 8, torch.bfloat16, device)

    class Wrong(DecodePlan):
        def run(self, call: DecodeCall) -> None:
            super().run(replace(call, scale=2 * call.scale))

    with pytest.raises(RuntimeError, match="off by"):
        probe.check(
            lambda kv, table, heads: Wrong(kv, table, heads, -1, plan(kv, table, heads)._library),
            *(64, 64, 8, torch.bfloat16, device),
        )


def test_instances_have_names_of_their_own() -> None:
    made = {
        Instance(query, dim, v_dim, tiles, stages).name
        for query in ("__nv_bfloat16", "__half")
        for dim, v_dim in ((64, 128), (128, 64))
        for tiles in (1, 2)
        for stages in (2, 3)
    }
    assert len(made) == 16
