"""Two pools for a model that mixes layers with and without a sliding window.

SGLang's allocator of such a model composes two page allocators, of slab arenas here: a token has a
slot in the full layers' pool, and another one in the window layers' pool as long as the window
reaches it. SGLang frees the second one earlier. The pools choose the formats of their pages each
by itself; a prompt's full pages hold the same values in either.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from typing_extensions import override

from hma_kernels.layout import PAGE, SLAB_TOKENS
from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.arena import SlabArena
from sglang_hma.kvcache.budget import TwoPoolBudget
from sglang_hma.kvcache.demand import PageDemand
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.kvcache.pool import Bfp8KVPool


class TwoFormats(NamedTuple):
    """Which of a request's pages are BF16, bool [pages], in each pool; in the window layers' one
    from position `start` on."""

    full: torch.Tensor
    window: torch.Tensor
    start: int


class TwoPoolAllocator(PageDemand, SWATokenToKVPoolAllocator):
    """Slots of both pools, or of neither: where one pool is too full, nothing is taken.

    `full_to_swa_index_mapping`: int64, of each slot of the full layers' pool the slot in the window
    layers' pool, 0 where that is freed or there is none.

    `window` is how many tokens layers with a window see before a new one, for those who ask for the
    pages that a peer writes: these are a prompt's last window alone.
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
        self.window = 0

    @property
    def pools(self) -> tuple[SlabPageAllocator, SlabPageAllocator]:
        return self.full_attn_allocator, self.swa_attn_allocator

    @property
    def tokens_ahead(self) -> int:
        return self.full_attn_allocator.tokens_ahead

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

    # -- on decode: pages that a peer writes, as SlabPageAllocator gives them --

    def window_start(self, end: int) -> int:
        """The edge of a page: from there on, tokens before `end` have pages for their windows."""
        return max(0, end - self.window) // PAGE * PAGE

    def alloc_landing(self, prompt_len: int, end: int, start: int = 0) -> torch.Tensor | None:
        """Slots int64 [end - start] on the host in the full layers' pool; in the other one those of
        the last window, with a landing page of its own. None if one of the pools is full."""
        full, window = self.pools
        begin = max(start, self.window_start(end))
        return self._both(
            full.alloc_landing(prompt_len, end, start),
            lambda: window.alloc_landing(prompt_len, end, begin),
        )

    def alloc_again(self, formats: TwoFormats, tokens: int) -> torch.Tensor | None:
        """Slots int64 [tokens] on the host, in pages of these formats. None if it is full."""
        full, window = self.pools
        return self._both(
            full.alloc_again(formats.full, tokens),
            lambda: window.alloc_again(formats.window, tokens - formats.start),
        )

    def _both(
        self, slots: torch.Tensor | None, alloc_window: Callable[[], torch.Tensor | None]
    ) -> torch.Tensor | None:
        """`slots` of the full layers' pool, the last of them paired with those of the other one."""
        if slots is None:
            return None
        there = alloc_window()
        if there is None:
            self.full_attn_allocator.free(slots)
            return None
        first = len(slots) - len(there)
        self.clear_full_to_swa_mapping(self.to_device(slots[:first]))
        self.set_full_to_swa_mapping(self.to_device(slots[first:]), self.to_device(there))
        return slots

    def fits_landing(
        self,
        prompt_len: int,
        end: int,
        start: int = 0,
        *,
        when_empty: bool = False,
        beside: int = 0,
    ) -> bool:
        """Whether `alloc_landing` would succeed, up to `end` or before it, and leave room for the
        first step; `beside`: BF16 pages more in the window layers' pool."""
        full, window = self.pools
        begin = max(start, self.window_start(prompt_len))
        return full.fits_landing(
            prompt_len, end, start, when_empty=when_empty
        ) and window.fits_landing(prompt_len, end, begin, when_empty=when_empty, beside=beside)

    def fits_again(
        self, formats: TwoFormats, end: int, *, when_empty: bool = False, beside: int = 0
    ) -> bool:
        full, window = self.pools
        return full.fits_again(formats.full, end, when_empty=when_empty) and window.fits_again(
            formats.window, end - formats.start, when_empty=when_empty, beside=beside
        )

    def formats_of(self, slots: torch.Tensor) -> TwoFormats:
        there = self.full_to_swa_index_mapping[slots.long()]
        start = self.behind_window(slots)
        full, window = self.pools
        return TwoFormats(full.formats_of(slots), window.formats_of(there[start:]), start)

    def saved_formats(self, saved: Any) -> TwoFormats:
        """Of what SWAKVPool.get_cpu_copy has saved. The last token's page is in both pools."""
        start = int((~saved["swa_mask"]).sum())
        return TwoFormats(saved["full"].in_bf16, saved["swa"].in_bf16, start)

    def behind_window(self, slots: torch.Tensor) -> int:
        """How many of one request's slots, the first of them, have none in the other pool."""
        return int((self.full_to_swa_index_mapping[slots.long()] <= 0).sum())

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        return self.full_attn_allocator.to_device(host)

    def transfer_pages(self, pages: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return self.full_attn_allocator.transfer_pages(pages)

    @override
    def translate_swa_indices_for_transfer(self, kv_indices: torch.Tensor) -> torch.Tensor:
        """Of slots in the full layers' pool those in the other one, where a peer writes them: a
        page with a landing page is reached there."""
        there = self.translate_loc_from_full_to_swa(kv_indices)
        pages = self.swa_attn_allocator.transfer_pages((there // PAGE).cpu().numpy())
        return torch.from_numpy(pages).to(there) * PAGE + there % PAGE

    def commit_landing(self, page: int) -> None:
        """Of the request that has this page in the full layers' pool, in both."""
        there = int(self.full_to_swa_index_mapping[page * PAGE]) // PAGE
        self.full_attn_allocator.commit_landing(page)
        self.swa_attn_allocator.commit_landing(there)

    def empty(self, slots: torch.Tensor) -> None:
        self.full_attn_allocator.empty(slots)
        there = self.full_to_swa_index_mapping[slots.long()]
        self.swa_attn_allocator.empty(there[there > 0])

    @override
    def reclaim_for_prealloc(
        self, tree_cache: Any, full_tokens: int, swa_tokens: int
    ) -> str | None:
        """The pages are there: `fits_landing` or `fits_again` has found them."""
        return None

    # -- capacity questions that SGLang asks its allocator --

    @override
    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> PrefillBudget:
        self._evict_until(tree_cache, lambda pool: pool.fits_generated(1))
        return TwoPoolBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def make_room(self, tree_cache: Any, satisfied: Callable[[SlabArena], bool]) -> bool:
        return self._evict_until(tree_cache, lambda pool: satisfied(pool.arena))

    def evict_until(self, tree_cache: Any, satisfied: Callable[[], bool]) -> bool:
        """Whether `satisfied()`, with all returned pages back. On decode, the only one to ask so of
        both pools, no prefixes are kept that could be evicted."""
        assert tree_cache is None or not tree_cache.supports_prefix_sharing()
        return satisfied() or any(pool.evict_until(None, satisfied) for pool in self.pools)

    def _evict_until(self, tree_cache: Any, satisfied: Callable[[SlabPageAllocator], bool]) -> bool:
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


def note_window(pool: SWAKVPool, window: int) -> None:
    """How many tokens the layers of the second pool see before a new one, for `wire_format`."""
    pool.hma_window = window


def wire_format(pool: Any) -> KVFormat | None:
    """Of a server's two pools of BFP8 pages; None of any other pool."""
    if not isinstance(pool, SWAKVPool) or not isinstance(pool.full_kv_pool, Bfp8KVPool):
        return None
    windowed = [layer for layer, (_, has_window) in pool.layers_mapping.items() if has_window]
    return dataclasses.replace(
        pool.full_kv_pool.hma_format,
        layers=pool.layer_num,
        window=pool.hma_window,
        windowed=KVFormat.layer_mask(windowed),
    )
