"""Copies of BFP8 pages on the host: bytes that come back to other pages as they left."""

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler

from hma_kernels import PAGE
from sglang_hma.kvcache.host_pool import Bfp8HostPool, copies_of, mha_host_inputs, page_runs
from sglang_hma.kvcache.pool import Bfp8KVPool

LAYERS, PAGES = 3, 24


@pytest.fixture
def pool() -> Bfp8KVPool:
    """Of pages with random bytes."""
    made = Bfp8KVPool(
        size=PAGES * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=64,
        v_head_dim=32,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    for buffer in made.k_buffer + made.v_buffer:
        buffer.random_(0, 256)
    return made


def slots(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).reshape(-1)


def host_pool(pool: Bfp8KVPool, ratio: float) -> Bfp8HostPool:
    return copies_of(pool, ratio, 0, PAGE, "layer_first")


def test_pages_come_back_elsewhere_as_they_left(pool: Bfp8KVPool, seed: int) -> None:
    rng = random.Random(seed)
    copies = host_pool(pool, 2.0)
    assert copies.size_per_token * PAGE == LAYERS * 2 * (2 + 1) * 1088
    kept: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]]] = {}
    for _ in range(4):
        pages = rng.sample(range(1, PAGES + 1), rng.randrange(1, 9))
        host = copies.alloc(len(pages) * PAGE)
        copies.backup_from_device_all_layer(pool, host, slots(pages), "direct")
        kept[tuple(host.tolist())] = host, [b[pages].clone() for b in pool.k_buffer + pool.v_buffer]
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.random_(0, 256)
    for host, expected in kept.values():
        pages = rng.sample(range(1, PAGES + 1), len(host) // PAGE)
        others = [page for page in range(PAGES + 1) if page not in pages]
        before = [buffer[others].clone() for buffer in pool.k_buffer + pool.v_buffer]
        for layer in range(LAYERS):
            copies.load_to_device_per_layer(pool, host, slots(pages), layer, "direct")
        for buffer, page_bytes in zip(pool.k_buffer + pool.v_buffer, expected, strict=True):
            assert torch.equal(buffer[pages], page_bytes)
        for buffer, unchanged in zip(pool.k_buffer + pool.v_buffer, before, strict=True):
            assert torch.equal(buffer[others], unchanged)
        copies.free(host)
    assert copies.available_size() == copies.size


def test_one_layer_at_a_time(pool: Bfp8KVPool) -> None:
    copies = host_pool(pool, 1.0)
    host = copies.alloc(2 * PAGE)
    copies.backup_from_device_all_layer(pool, host, slots([3, 4]), "direct")
    before = [buffer.clone() for buffer in pool.k_buffer + pool.v_buffer]
    copies.load_to_device_per_layer(pool, host, slots([9, 8]), 1, "direct")
    for index, (buffer, unchanged) in enumerate(
        zip(pool.k_buffer + pool.v_buffer, before, strict=True)
    ):
        assert torch.equal(buffer, unchanged) == (index % LAYERS != 1)


def test_runs_cover_the_pages_in_their_order(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        count = rng.randrange(0, 12)
        host, device = (rng.sample(range(16), count) for _ in range(2))
        if rng.random() < 0.5:
            host, device = sorted(host), sorted(device)
        runs = page_runs(slots(host), slots(device)) if count else []
        pairs = [(h + i, d + i) for h, d, n in runs for i in range(n)]
        assert pairs == list(zip(host, device, strict=True))
        follows = [after == (before[0] + 1, before[1] + 1) for before, after in pairwise(pairs)]
        assert len(runs) == len(pairs) - sum(follows)
    empty = torch.empty(0, dtype=torch.int64)
    assert page_runs(empty, empty) == []


def test_other_pools_are_sglangs() -> None:
    other = SimpleNamespace()

    def original(pool: Any, drafts: Any = ()) -> str:
        assert pool is other
        return "theirs"

    assert mha_host_inputs(original, other) == "theirs"
    assert callable(hybrid_pool_assembler._mha_host_inputs)
