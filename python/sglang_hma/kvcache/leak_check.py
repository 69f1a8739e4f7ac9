"""SGLang's KV leak check, in pages: every page handed out has exactly one owner."""

from collections.abc import Callable
from typing import Any

from sglang_hma.kvcache.allocator import SlabPageAllocator
from sglang_hma.kvcache.holds import HoldingAllocator
from sglang_hma.kvcache.two_pools import TwoPoolAllocator


def check_full_pool(
    original: Callable[..., tuple[bool, str]], checker: Any, ps: Any, uncached: int = 0
) -> tuple[bool, str]:
    """(leak, message): tokens that owners hold against tokens of live pages."""
    allocator = checker.token_to_kv_pool_allocator
    if isinstance(allocator, HoldingAllocator):
        return original(checker, ps, uncached + allocator.parked_tokens)
    if isinstance(allocator, TwoPoolAllocator):
        pool, protected = allocator.full_attn_allocator, checker.tree_cache.full_protected_size()
    elif isinstance(allocator, SlabPageAllocator):
        pool, protected = allocator, checker.tree_cache.protected_size()
    else:
        return original(checker, ps, uncached)
    session = checker.pool_stats_observer.session_held_tokens()
    return owned_once(pool, ps.full_evictable_size + protected, session, uncached)


def check_window_pool(
    original: Callable[..., tuple[bool, str]], checker: Any, ps: Any, uncached: int = 0
) -> tuple[bool, str]:
    """The same of the window layers' pool, where there are two."""
    allocator = checker.token_to_kv_pool_allocator
    if not isinstance(allocator, TwoPoolAllocator):
        return original(checker, ps, uncached)
    cached = ps.swa_evictable_size + checker.tree_cache.swa_protected_size()
    session = checker.pool_stats_observer.session_held_swa_tokens()
    return owned_once(allocator.swa_attn_allocator, cached, session, uncached)


def owned_once(
    pool: SlabPageAllocator, cached: int, session: int, uncached: int
) -> tuple[bool, str]:
    """(leak, message) of one arena."""
    live = pool.live_tokens()
    message = (
        f"[slab arena] live={live}, cached={cached}, session={session}, uncached={uncached}, "
        f"landing pages={len(pool.landing)}"
    )
    return live != cached + session + uncached, message
