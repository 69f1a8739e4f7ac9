"""How SGLang's scheduler counts what a prefill batch may take of a slab arena."""

from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SWAPrefillBudget
from typing_extensions import override

from hma_kernels.layout import PAGE
from sglang_hma.kvcache.arena import PageFormat, SlabArena


class MixedPrefillBudget(PrefillBudget):
    """Admits a prompt only if its pages can be placed, its BF16 last page included."""

    @override
    def __init__(self, allocator: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(allocator, *args, **kwargs)
        self.tails = 0

    @override
    def _available_and_evictable(self) -> int:
        arena = self.allocator.arena
        placeable = arena.any_format_beside(self.tails + 1) if self._has_tail_room() else 0
        return placeable * PAGE + int(self.tree_cache.evictable_size())

    def _has_tail_room(self) -> bool:
        return bool(self.allocator.arena.available(PageFormat.BF16) > self.tails)

    @override
    def has_capacity(self) -> bool:
        return self._has_tail_room() and super().has_capacity()

    @override
    def check_prefill(self, **kwargs: Any) -> tuple[bool, int | None]:
        return super().check_prefill(**kwargs) if self._has_tail_room() else (False, None)

    @override
    def can_allocate_prefill(self, **kwargs: Any) -> bool:
        return self._has_tail_room() and super().can_allocate_prefill(**kwargs)

    @override
    def reserve(self, *args: Any, **kwargs: Any) -> None:
        super().reserve(*args, **kwargs)
        self.tails += 1


class AdmittedBudget(PrefillBudget):
    """On decode: what is asked for has been admitted (transfer/decode/queues.py)."""

    @override
    def _available_and_evictable(self) -> int:
        return 1 << 40


class TwoPoolBudget(SWAPrefillBudget):
    """Admits a prompt only if its pages can be placed in both pools, a BF16 last page in each."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tails = 0
        self._full = self.allocator.full_attn_allocator.arena
        self._window = self.allocator.swa_attn_allocator.arena

    def _placeable(self, arena: SlabArena) -> int:
        """Tokens, beside a BF16 page for each request."""
        return arena.any_format_beside(self.tails + 1) * PAGE if self._has_tail_room() else 0

    @override
    def _available_and_evictable(self) -> int:
        return self._placeable(self._full) + int(self.tree_cache.full_evictable_size())

    @property
    def remaining_swa(self) -> int:
        evictable = int(self.tree_cache.swa_evictable_size())
        return self._placeable(self._window) + evictable - int(self.swa_offset)

    def _has_tail_room(self) -> bool:
        arenas = self._full, self._window
        return all(arena.available(PageFormat.BF16) > self.tails for arena in arenas)

    @override
    def swa_never_fits(self, extend_input_len: int, max_new_tokens: int, **kwargs: Any) -> bool:
        needed = self.swa_tokens(extend_input_len, max_new_tokens, **kwargs)
        return bool(needed >= self._window.any_format_when_empty(1) * PAGE)

    @override
    def has_capacity(self) -> bool:
        return self._has_tail_room() and super().has_capacity()

    @override
    def check_prefill(self, **kwargs: Any) -> tuple[bool, int | None]:
        return super().check_prefill(**kwargs) if self._has_tail_room() else (False, None)

    @override
    def can_allocate_prefill(self, **kwargs: Any) -> bool:
        return self._has_tail_room() and super().can_allocate_prefill(**kwargs)

    @override
    def reserve(self, *args: Any, **kwargs: Any) -> None:
        super().reserve(*args, **kwargs)
        self.tails += 1
