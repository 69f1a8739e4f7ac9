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


def page_counts(start: int, prompt_end: int, end: int) -> tuple[int, int]:
    """(BFP8, BF16) pages that positions start..end of a request open."""
    first = -(-start // PAGE)
    opened = max(0, -(-end // PAGE) - first)
    full = min(max(0, prompt_end // PAGE - first), opened)
    return full, opened - full


def tail_to_come(spans: list[tuple[int, int]]) -> int:
    """BF16 pages to keep free while these spans are placed: 1 if one may be a chunk, else 0.

    A chunk ends on a page's edge, and its prompt was admitted with room for its
    part-full last page. BFP8 pages must not take the last slab that could hold it.
    Only one prompt at a time is in chunks.
    """
    return int(any(end % PAGE == 0 for _, end in spans))
