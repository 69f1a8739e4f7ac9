"""What SGLang asks of an allocator before it allocates: whether pages of both formats would fit.

SGLang counts tokens. Which pages they take depends on where each request's prompt begins and ends,
so the counts of the question before are kept for the one that follows it.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from typing_extensions import override

from hma_kernels.layout import PAGE
from sglang_hma.kvcache.arena import PageFormat, SlabArena
from sglang_hma.kvcache.opened import page_counts, tail_to_come


class PageDemand(BaseTokenToKVPoolAllocator):
    """Mixed into an allocator of one arena, or of several that a token needs slots of each."""

    _extend_demand: tuple[int, int] | None = None

    @abstractmethod
    def make_room(self, tree_cache: Any, satisfied: Callable[[SlabArena], bool]) -> bool:
        """Evict unlocked prefixes until each arena is `satisfied`, or nothing is left to evict."""

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
        return self.make_room(
            tree_cache,
            lambda arena: (
                arena.available_beside(tails) >= 0 and arena.any_format_beside(tails) >= full
            ),
        )

    @override
    def check_decode_capacity(
        self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None
    ) -> bool:
        pages = -(-num_tokens // PAGE)
        return self.make_room(tree_cache, lambda arena: arena.available(PageFormat.BF16) >= pages)
