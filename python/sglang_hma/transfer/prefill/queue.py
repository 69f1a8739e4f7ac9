"""Prefill's bootstrap queue, which makes the KV manager of a prefill server."""

from typing import Any

from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue
from typing_extensions import override

from sglang_hma.kvcache.holds import HoldingAllocator
from sglang_hma.kvcache.layer_gate import GatedPool


class HmaPrefillBootstrapQueue(PrefillBootstrapQueue):
    """As SGLang's; the sender learns of the allocator's holds."""

    scheduler: Any
    token_to_kv_pool: Any

    @override
    def _init_kv_manager(self) -> Any:
        """Without holds the sender sends nothing early: a page that is freed before it has been
        sent must not be handed out."""
        manager = super()._init_kv_manager()
        allocator = self.scheduler.token_to_kv_pool_allocator
        gated = isinstance(self.token_to_kv_pool, GatedPool)
        if gated and isinstance(allocator, HoldingAllocator) and manager.sender is not None:
            manager.sender.holds = allocator.holds
        return manager
