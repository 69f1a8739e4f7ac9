"""How SGLang's scheduler counts what a prefill batch may take of a pool."""

from typing import Any, NamedTuple

from sglang.srt.mem_cache.prefill_budget import PrefillBudget, SWAPrefillBudget
from typing_extensions import override

from hma_kernels.layout import PAGE
from sglang_hma.config import HmaConfig
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


class WorkerInfo(NamedTuple):
    """What SGLang's scheduler learns of its model worker, in its order; lengths in tokens."""

    max_total_num_tokens: int
    max_prefill_tokens: int
    max_running_requests: int
    max_queued_requests: int | None
    max_req_len: int
    max_req_input_len: int
    random_seed: int
    device: Any
    forward_stream: Any
    requests: int
    max_context_len: int
    pool_tokens: int


def get_worker_info(original: Any, worker: Any) -> WorkerInfo:
    """Around TpModelWorker.get_worker_info: a request is no longer than an empty pool admits.

    SGLang refuses what is longer than the pool, but admits only what leaves a page of it. What lies
    between waited for ever, and everybody behind it.
    """
    info = WorkerInfo(*original(worker))
    most = longest_request(worker.model_runner.token_to_kv_pool_allocator)
    if most >= info.max_req_len:
        return info
    reserved = info.max_req_len - info.max_req_input_len
    return info._replace(max_req_len=most, max_req_input_len=most - reserved)


def longest_request(allocator: Any) -> int:
    """Tokens of the longest prompt with its answer that is admitted while nothing else is there."""
    config = HmaConfig.require()
    if not config.mixes_page_formats:
        return int(allocator.size) - PAGE
    arena: SlabArena = getattr(allocator, "full_attn_allocator", allocator).arena
    return (arena.any_format_when_empty(1) - 1) * PAGE
