"""Attention sinks in Triton and CUDA C++ against the float64 definition, which test/kernels holds
to a softmax over one logit more."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuda_host import eager_copies
from kernel_cases import Cache, Spec, random_cache
from test_cuda_decode import compiled
from test_triton_decode import to

from hma_kernels import PAGE, reference
from hma_kernels.base import DecodeCall, ExtendCall, Plan
from hma_kernels.cuda.decode import DecodePlan as CudaPlan
from hma_kernels.triton import prefill
from hma_kernels.triton.decode import DecodePlan as TritonPlan

MakePlan = Callable[[Cache, torch.Tensor, int], Plan]
NOISE = 4e-3  # weights are rounded to bfloat16 for the product with V


def triton_plan(cache: Cache, q: torch.Tensor, window: int) -> Plan:
    return TritonPlan(cache.kv, cache.table, q.shape[1], window)


def cuda_plan(blocks: int) -> MakePlan:
    def make(cache: Cache, q: torch.Tensor, window: int) -> Plan:
        group = q.shape[1] // cache.kv.kv_heads
        library = compiled(cache.kv, group, q.dtype, cache.kv.device)
        return CudaPlan(cache.kv, cache.table, q.shape[1], window, library, blocks)

    return make


def random_sinks(rng: np.random.Generator, heads: int) -> torch.Tensor:
    """Beside the logits; the first three heads' are above and below all of them, and none."""
    sinks = rng.normal(0, 3, heads)
    sinks[:3] = np.array([2000.0, -90.0, -np.inf])[: len(sinks[:3])]
    return torch.from_numpy(sinks).float()


def assert_close(got: torch.Tensor, expected: np.ndarray) -> None:
    """As accuracy.py; a sink's share may leave only subnormal numbers. Triton's interpreter cuts
    bfloat16 off."""
    info = torch.finfo(got.dtype)
    allowed = info.eps * np.abs(expected) + info.smallest_normal * info.eps
    allowed += NOISE * np.abs(expected).max(-1, keepdims=True, initial=0)
    error = np.abs(got.double().numpy() - expected)
    assert np.isfinite(error).all() and (error <= allowed).all(), np.max(error / allowed)


def check_decode(
    rng: np.random.Generator, device: torch.device, plan: MakePlan, dtype: torch.dtype, group: int
) -> None:
    heads, (dim, v_dim) = int(rng.integers(1, 3)), (64, int(rng.choice([32, 64])))
    lengths = [*rng.integers(1, 60, 3).tolist(), 0, int(rng.integers(300, 700))]
    cache = random_cache(rng, Spec(lengths, heads, dim, v_dim))
    q = torch.from_numpy(rng.standard_normal((5, heads * group, dim))).to(dtype)
    sinks = random_sinks(rng, heads * group)
    cap, window = float(rng.choice([0, 5])), int(rng.choice([-1, 0, 17, 127]))
    print(f"{lengths=} {heads=} {group=} {v_dim=} {cap=} {window=}")
    made, at = plan(to(cache, device), q.to(device), window), q.to(device)
    out = q.new_full((5, heads * group, v_dim), torch.nan, device=device)
    made.run(DecodeCall(at, 1, dim**-0.5, cap, out, sinks.to(device)))
    expected = reference.decode_attention(
        *(q.double().numpy(), *cache.reference(1)), scale=dim**-0.5, logit_cap=cap,
        sliding_window=window, sinks=sinks.double().numpy(),
    )  # fmt: skip
    assert_close(out.cpu(), expected)
    plain, same = out.clone(), out.clone()
    made.run(DecodeCall(at, 1, dim**-0.5, cap, plain))
    below = torch.full_like(sinks, -torch.inf).to(device)
    made.run(DecodeCall(at, 1, dim**-0.5, cap, same, below))
    assert torch.equal(plain, same)
    assert not torch.equal(plain, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 8])
def test_decode_in_triton(
    rng: np.random.Generator, device: torch.device, dtype: torch.dtype, group: int
) -> None:
    check_decode(rng, device, triton_plan, dtype, group)


@pytest.mark.parametrize("blocks", [1, 3, 40])
@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.bfloat16, 8), (torch.bfloat16, 11), (torch.float16, 4)], ids=str
)
def test_decode_in_cuda(
    rng: np.random.Generator, device: torch.device, dtype: torch.dtype, group: int, blocks: int
) -> None:
    """Requests that one warp finishes, and those whose states are merged."""
    eager_copies(False)
    check_decode(rng, device, cuda_plan(blocks), dtype, group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trial", range(3))
def test_extend_in_triton(
    rng: np.random.Generator, device: torch.device, trial: int, dtype: torch.dtype
) -> None:
    heads, group, dim, v_dim = 2, int(rng.choice([1, 3])), 64, int(rng.choice([32, 64]))
    prefixes = [0, 2 * PAGE - 1, int(rng.integers(1, 120))]
    cache = random_cache(rng, Spec(prefixes, heads, dim, v_dim))
    indptr = np.concatenate([[0], rng.integers(1, 50, 3).cumsum()])
    rows = int(indptr[-1])

    def normal(count: int, width: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((rows, count, width))).to(dtype)

    q, k, v = normal(heads * group, dim), normal(heads, dim), normal(heads, v_dim)
    sinks = random_sinks(rng, heads * group)
    options = {
        "scale": dim**-0.5,
        "logit_cap": float(rng.choice([0, 20])),
        "sliding_window": int(rng.choice([-1, 9, 127])),
    }
    moved = to(cache, device)
    out = torch.full((rows, heads * group, v_dim), torch.nan, dtype=dtype, device=device)
    prefill.extend(
        ExtendCall(
            *(x.to(device) for x in (q, k, v)),
            *(moved.kv, 1, moved.table, torch.from_numpy(indptr)),
            **options, out=out, sinks=sinks.to(device),
        )
    )  # fmt: skip
    expected = reference.extend_attention(
        *(x.double().numpy() for x in (q, k, v)), *cache.reference(1), indptr,
        **options, sinks=sinks.double().numpy(),
    )  # fmt: skip
    assert_close(out.cpu(), expected)
