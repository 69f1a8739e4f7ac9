"""Page tables made on the GPU, and plans that are refreshed as a CUDA graph's must be."""

import numpy as np
import pytest
import torch
from kernel_cases import Spec, random_cache
from test_triton_decode import to

from hma_kernels import PAGE, PagedKV, PageTable
from hma_kernels.base import DecodeCall
from hma_kernels.layout import IDS_PER_SLAB
from hma_kernels.portable.page_table import page_table
from hma_kernels.triton.decode import DecodePlan
from hma_kernels.triton.page_table import StaticPageTables

MAX_BATCH, MAX_TOKENS = 6, 9000


def random_slots(rng: np.random.Generator, device: torch.device) -> tuple[torch.Tensor, ...]:
    """req_to_token of 10 requests with pages anywhere in 40 slabs of either format."""
    slab_is_bf16 = torch.from_numpy(rng.random(40) < 0.4).to(device)
    pages = rng.integers(0, 40, (10, -(-MAX_TOKENS // PAGE))) * IDS_PER_SLAB
    pages += rng.integers(0, 17, pages.shape)
    slots = (pages[..., None] * PAGE + np.arange(PAGE)).reshape(10, -1)[:, :MAX_TOKENS]
    return torch.from_numpy(slots.astype(np.int32)).to(device), slab_is_bf16


@pytest.mark.parametrize("trial", range(4))
def test_equals_torch(rng: np.random.Generator, device: torch.device, trial: int) -> None:
    slots, slab_is_bf16 = random_slots(rng, device)
    tables = StaticPageTables(slots, slab_is_bf16, max_batch=MAX_BATCH, max_tokens=MAX_TOKENS)
    for _ in range(3):
        batch = int(rng.integers(1, MAX_BATCH + 1))
        rows = torch.from_numpy(rng.integers(0, 10, batch)).to(device)
        longest = int(rng.choice([100, MAX_TOKENS]))
        seq_lens = torch.from_numpy(rng.integers(0, longest + 1, batch)).to(device)
        made = tables.fill(rows, seq_lens)
        expected = page_table(slots, rows, seq_lens, slab_is_bf16)
        for name, value in vars(expected).items():
            assert torch.equal(getattr(made, name)[: len(value)], value), name


def test_refreshed_plan_equals_a_new_one(rng: np.random.Generator, device: torch.device) -> None:
    """The same tensors with other contents, among them a batch with fewer pages than before."""
    caches = [to(random_cache(rng, Spec(n, 2, 64, 64)), device) for n in ([700, 3], [40, 90])]
    room = {name: [getattr(c.table, name) for c in caches] for name in vars(caches[0].table)}
    still = {
        name: torch.zeros(max(map(len, values)), dtype=torch.int64, device=device)
        for name, values in room.items()
    }
    kv = PagedKV(
        *(
            [torch.cat(both) for both in zip(one, other, strict=True)]
            for one, other in zip(*(vars(c.kv).values() for c in caches), strict=True)
        )
    )
    offsets = {
        "bfp8_indices": len(caches[0].kv.k_bfp8[0]),
        "bf16_indices": len(caches[0].kv.k_bf16[0]),
    }
    q = torch.from_numpy(rng.standard_normal((2, 8, 64))).bfloat16().to(device)
    plan, outs = None, []
    for turn, cache in enumerate(caches):
        for name, tensor in still.items():
            value = getattr(cache.table, name) + turn * offsets.get(name, 0)
            tensor[: len(value)] = value
        if plan is None:
            plan = DecodePlan(kv, PageTable(**still), 8, -1)
        plan.refresh()
        out = torch.full((2, 8, 64), torch.nan, dtype=q.dtype, device=device)
        plan.run(DecodeCall(q, 1, 0.125, 0.0, out))
        outs.append(out)
    for cache, out in zip(caches, outs, strict=True):
        expected = torch.empty_like(out)
        DecodePlan(cache.kv, cache.table, 8, -1).run(DecodeCall(q, 1, 0.125, 0.0, expected))
        assert torch.equal(out, expected)
