"""How SGLang's scheduler counts what a prefill batch may take of a slab arena."""

from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget
from typing_extensions import override

from hma_kernels.layout import PAGE
from sglang_hma.kvcache.arena import PageFormat


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
