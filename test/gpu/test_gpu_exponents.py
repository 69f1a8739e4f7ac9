"""The GPU kernels over pages whose exponents lie far apart, and over infinite values."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import NOISE
from kernel_cases import Cache, Spec, absolute, fill_exponents, random_cache
from test_cuda_decode import run as run_cuda
from test_triton_decode import run as run_triton

from hma_kernels import GROUP, PAGE, reference
from hma_kernels.layout import data_offset, exponent_offset

Run = Callable[[Cache, torch.Tensor, torch.device], torch.Tensor]

both = pytest.mark.parametrize("run", [run_cuda, run_triton], ids=["cuda", "triton"])

# Of values q * 2^(E - 133): what tiles.cuh says that sums and products keep.
LOWEST, HIGHEST = 127 - 59 + 7, 127 + 66


@both
@pytest.mark.parametrize("trial", range(4))
def test_exponents_far_apart(
    rng: np.random.Generator, device: torch.device, run: Run, trial: int
) -> None:
    heads, gqa_group_size = int(rng.integers(1, 3)), int(rng.choice([1, 4, 5]))
    dim, v_dim = (int(d) for d in rng.choice([32, 64, 128], 2))
    lengths = rng.integers(1, 140, int(rng.integers(1, 5))).tolist()
    cache = random_cache(rng, Spec(lengths, heads, dim, v_dim))
    # Keys of any magnitude, with queries that make their logits moderate.
    top = int(rng.integers(LOWEST + 6, HIGHEST + 1))
    fill_exponents(rng, cache.kv.k_bfp8[1], top - 6, top)
    fill_exponents(rng, cache.kv.v_bfp8[1], LOWEST, HIGHEST)
    cache.kv.k_bf16[1].mul_(0).nan_to_num_(0)  # they would dwarf or drown in these logits
    shape = len(lengths), heads * gqa_group_size, dim
    q = torch.from_numpy(np.ldexp(rng.standard_normal(shape), 126 - top)).bfloat16()
    kv, table = cache.reference(1)
    got = run(cache, q, device).double().numpy()
    given = q.double().numpy()
    truth = reference.decode_attention(given, kv, table, scale=dim**-0.5)
    size = reference.decode_attention(given, absolute(kv), table, scale=dim**-0.5)
    # The interpreter cuts off where a GPU rounds, and subnormal values of BF16 pages become zero.
    allowed = NOISE * size + np.abs(truth) * torch.finfo(torch.bfloat16).eps
    allowed += np.finfo(np.float32).tiny
    assert np.isfinite(got).all()
    assert (np.abs(got - truth) <= allowed).all()


@both
@pytest.mark.parametrize("where", ["k", "v"])
def test_infinite_values_show(
    rng: np.random.Generator, device: torch.device, run: Run, where: str
) -> None:
    """A packer gives a group with an infinity the exponent 255, a byte that is not zero, and zeros
    for what is far smaller. Whoever reads it gets infinities or NaN, never a plausible number, and
    nobody else does."""
    visible = np.array([])
    while not len(visible):  # pages are of random formats
        cache = random_cache(rng, Spec([100], 2, 64, 64))
        visible = np.flatnonzero(cache.table.bfp8_pos.numpy() < 100)
    at = int(rng.choice(visible))
    page, pos = int(cache.table.bfp8_indices[at]), int(cache.table.bfp8_pos[at])
    row, group = int(rng.integers(min(PAGE, 100 - pos))), int(rng.integers(64 // GROUP))
    head = getattr(cache.kv, f"{where}_bfp8")[1][page, 0].view(-1)
    head[exponent_offset(row, group)] = 255
    head[data_offset(row, group) :][:GROUP] = 0
    head[data_offset(row, group)] = 64
    got = run(cache, torch.ones(1, 4, 64, dtype=torch.bfloat16), device)
    wild = ~torch.isfinite(got[0])
    assert wild[:2].any(-1).all(), "heads that read it"
    assert not wild[2:].any(), "heads that do not"
