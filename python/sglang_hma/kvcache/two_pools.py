"""Two pools for a model that mixes layers with and without a sliding window.

SGLang's allocator of such a model composes two page allocators, of slab arenas here: a token has a
slot in the full layers' pool, and another one in the window layers' pool as long as the window
reaches it. SGLang frees the second one earlier. The pools choose the formats of their pages each
by itself; a prompt's full pages hold the same values in either.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from typing_extensions import override

from hma_kernels.layout import PAGE, SLAB_TOKENS
from sglang_hma.kvcache.allocator import SlabPageAllocator, page_counts, tail_to_come
from sglang_hma.kvcache.budget import TwoPoolBudget


class TwoPoolAllocator(SWATokenToKVPoolAllocator):
    """Slots of both pools, or of neither: where one pool is too full, nothing is taken.

    `full_to_swa_index_mapping`: int64, of each slot of the full layers' pool the slot in the window
    layers' pool, 0 where that is freed or there is none.
    """

    full_attn_allocator: SlabPageAllocator
    swa_attn_allocator: SlabPageAllocator

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Slab 0 is beside the pool's size, and a slab's ids are as many for either format.
        slots = (self._size_full // SLAB_TOKENS + 1) * SLAB_TOKENS
        mapping = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        mapping[-1] = -1
        self.full_to_swa_index_mapping = mapping
        self._kvcache.register_mapping(mapping)
        self._extend_demand: tuple[int, int] | None = None

    @property
    def pools(self) -> tuple[SlabPageAllocator, SlabPageAllocator]:
        return self.full_attn_allocator, self.swa_attn_allocator

    @override
    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
    ) -> torch.Tensor | None:
        """Slots in the full layers' pool of each request's tokens prefix..seq, all of them prompt
        tokens; those of the other pool are in the mapping. None if one of the pools is full."""
        spans = list(zip(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist(), strict=True))
        if not all(pool.fits_extend(spans) for pool in self.pools):
            return None
        slots: torch.Tensor | None = super().alloc_extend(
            prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens
        )
        return slots

    @override
    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot for each request's next token, as `alloc_extend` gives them."""
        opening = int(((seq_lens_cpu - 1) % PAGE == 0).sum())
        if not all(pool.fits_generated(opening) for pool in self.pools):
            return None
        slots: torch.Tensor | None = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        return slots

    # -- capacity questions that SGLang asks its allocator --

    @override
    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> PrefillBudget:
        self.evict_until(tree_cache, lambda pool: pool.fits_generated(1))
        return TwoPoolBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    @override
    def get_extend_allocation_demand(
        self,
        prefix_lens_cpu: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        *,
        conservative_num_tokens: int,
        shard_size: int,
    ) -> int:
        spans = list(zip(prefix_lens_cpu.tolist(), seq_lens_cpu.tolist(), strict=True))
        counts = [page_counts(start, end, end) for start, end in spans]
        full, tails = (sum(column) for column in zip(*counts, strict=True))
        self._extend_demand = full, tails + tail_to_come(spans)
        return (full + tails) * PAGE

    @override
    def evict_to_free_tokens(self, tree_cache: Any, num_tokens: int) -> bool | None:
        """Before an extend it serves the page counts of `get_extend_allocation_demand`,
        which SGLang calls right before; otherwise all tokens are generated ones."""
        full, tails = self._extend_demand or (0, -(-num_tokens // PAGE))
        self._extend_demand = None
        return self.evict_until(
            tree_cache,
            lambda pool: (
                pool.arena.available_beside(tails) >= 0
                and pool.arena.any_format_beside(tails) >= full
            ),
        )

    @override
    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        pages = -(-num_tokens // PAGE)
        return self.evict_until(tree_cache, lambda pool: pool.fits_generated(pages))

    def evict_until(self, tree_cache: Any, satisfied: Callable[[SlabPageAllocator], bool]) -> bool:
        """Evict unlocked prefixes, of the pool that lacks room, until both are `satisfied` or
        nothing is left to evict."""
        while True:
            full, window = (
                0 if pool.evict_until(None, partial(satisfied, pool)) else SLAB_TOKENS
                for pool in self.pools
            )
            if not full and not window:
                return True
            if tree_cache is None or not tree_cache.supports_prefix_sharing():
                return False
            evicted = tree_cache.evict(EvictParams(num_tokens=full, swa_num_tokens=window))
            if not evicted.num_tokens_evicted and not evicted.swa_num_tokens_evicted:
                return False
