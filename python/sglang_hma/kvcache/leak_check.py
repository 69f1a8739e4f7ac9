"""SGLang's KV leak check, in pages: every page handed out has exactly one owner."""

from collections.abc import Callable
from typing import Any

from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.holds import HoldingAllocator


def check_full_pool(
    original: Callable[..., tuple[bool, str]], checker: Any, ps: Any, uncached: int = 0
) -> tuple[bool, str]:
    """(leak, message): tokens that owners hold against tokens of live pages."""
    allocator = checker.token_to_kv_pool_allocator
    if isinstance(allocator, HoldingAllocator):
        return original(checker, ps, uncached + allocator.parked_tokens)
    if not isinstance(allocator, SlabPageAllocator):
        return original(checker, ps, uncached)
    cached = ps.full_evictable_size + checker.tree_cache.protected_size()
    session = checker.pool_stats_observer.session_held_tokens()
    live = allocator.live_tokens()
    message = (
        f"[slab arena] live={live}, cached={cached}, session={session}, uncached={uncached}, "
        f"landing pages={len(allocator.landing)}"
    )
    return live != cached + session + uncached, message
