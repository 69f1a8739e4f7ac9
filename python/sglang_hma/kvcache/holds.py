"""Prefill pages that are on their way: freed by their owner, but not handed out again yet.

Pages leave while the request still computes, under the ids that it was given. When its rows enter
the radix cache, SGLang frees those pages of which the cache has a copy already (the same prompt
before it, or beside it) and points the request to the copy. A write in flight, or a range that
decode asks for again, still reads the freed ones.

All of it happens in the scheduler's thread, and a hold ends where the scheduler ends its request.
So nothing is promised that is not there:
- A held page is never evictable. In the cache it is locked by the request that holds it, which
  unlocks it in the same call that ends the hold.
- A held page that is freed is parked: it counts as used until the hold ends.
- Tensor-parallel ranks, which must decide alike, count the same pages.

Where layers with a window have a pool of their own, its pages are not held: those of a prompt's
last window leave when it has been computed, and until the request ends it owns them, or locks them
in the cache.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from typing_extensions import override

from sglang_hma.kvcache.pool import Bfp8KVPool
from sglang_hma.kvcache.usage import Usage, pool_label, show_usage

PageIds = npt.NDArray[np.integer[Any]]


class HoldingAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's page allocator; pages that are freed while they are held wait until they are not."""

    _held: npt.NDArray[np.bool_]
    _parked: list[torch.Tensor]

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        packs = isinstance(self._kvcache, Bfp8KVPool)
        show_usage(self, ("bfp8" if packs else "native") + pool_label(self._kvcache), usage_of)

    def hold(self, pages: PageIds) -> Callable[[], None]:
        """Keep these pages from being handed out again until the result is called.

        Only their owner may hold pages: raises ValueError for pages that are held already.
        """
        twice = pages[self._held[pages]]
        if len(twice):
            raise ValueError(f"pages {twice.tolist()} are held already")
        self._held[pages] = True
        return partial(self._let_go, pages)

    def _let_go(self, pages: PageIds) -> None:
        self._held[pages] = False
        parked, self._parked = self._parked, []
        if parked:
            self._release_page_ids(*parked)

    @property
    def parked_tokens(self) -> int:
        """Tokens of pages that are neither owned nor free."""
        return sum(len(ids) for ids in self._parked) * int(self.page_size)

    @override
    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        ids = torch.cat(page_ids)
        if self._held.any():
            held = torch.from_numpy(self._held[ids.cpu().numpy()]).to(ids.device)
            self._parked += [ids[held]] if bool(held.any()) else []
            ids = ids[~held]
        super()._release_page_ids(ids)

    @override
    def clear(self) -> None:
        super().clear()
        self._held = np.zeros(self.num_pages + 1, dtype=np.bool_)
        self._parked = []

    @override
    def create_prefill_budget(self, tree_cache: Any, **kwargs: Any) -> PrefillBudget:
        return HoldingBudget(self, tree_cache, **kwargs)


def usage_of(allocator: HoldingAllocator) -> Usage:
    total = int(allocator.num_pages)
    return total - int(allocator.available_size()) // int(allocator.page_size), total


class HoldingBudget(PrefillBudget):
    """A prompt's next chunk waits for parked pages.

    SGLang admits a prompt when all of it fits, and then gives each chunk its pages even from an
    empty budget, because a pool only gains from what others do. Here it may lose: a request that
    points to a cached copy locks the copy and leaves its own page parked.
    """

    @override
    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        # None keeps the prompt for the next pass; an empty budget admits no other request either.
        if self.remaining_total <= 0 and self.allocator.parked_tokens:
            return None
        return super().available_chunk_tokens(chunk_limit)
