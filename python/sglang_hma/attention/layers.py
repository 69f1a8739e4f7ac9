"""Which pool a layer's pages lie in, and what of a batch is the same for all layers of a pool."""

from typing import Any

import torch
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from hma_kernels import DecodePlan, PageTable
from hma_kernels.portable.page_table import page_table
from sglang_hma.kvcache.pool import Bfp8KVPool, MixedKVPool


class PoolLayers:
    """Layers whose pages lie in one pool. `to_here`: int64, of each slot that SGLang gives a token
    its slot in this pool; None where they are the same."""

    def __init__(self, pool: Bfp8KVPool, to_here: torch.Tensor | None = None) -> None:
        self.pool, self.to_here = pool, to_here
        self.table: PageTable | None = None
        self.plans: dict[tuple[int, int], DecodePlan] = {}

    def begin(self, req_to_token: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """A forward: its page table, of the first seq_lens[b] tokens of each request."""
        formats = self.pool.slab_is_bf16 if isinstance(self.pool, MixedKVPool) else None
        self.table = page_table(req_to_token, rows, seq_lens, formats, self.to_here)
        self.plans = {}

    def slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Of SGLang's slots those in this pool."""
        return slots if self.to_here is None else self.to_here[slots.long()]


def layers_of(pool: Any) -> tuple[list[PoolLayers], dict[int, tuple[PoolLayers, int]]]:
    """Of a server's KV pool: its parts, and where each layer lies: (part, number there).

    Raises RuntimeError for pools without BFP8 pages.
    """
    if isinstance(pool, Bfp8KVPool):
        part = PoolLayers(pool)
        layers = range(pool.start_layer, pool.start_layer + pool.layer_num)
        return [part], {layer: (part, layer - pool.start_layer) for layer in layers}
    inner = (pool.full_kv_pool, pool.swa_kv_pool) if isinstance(pool, SWAKVPool) else (pool,)
    if len(inner) == 1 or not all(isinstance(each, Bfp8KVPool) for each in inner):
        raise RuntimeError(f"SGLang built {' and '.join(type(each).__name__ for each in inner)}")
    assert pool.full_to_swa_index_mapping is not None
    parts = [PoolLayers(inner[0]), PoolLayers(inner[1], pool.full_to_swa_index_mapping)]
    where = pool.layers_mapping.items()
    return parts, {layer: (parts[windowed], number) for layer, (number, windowed) in where}
