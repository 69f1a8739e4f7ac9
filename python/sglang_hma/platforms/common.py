"""What every sglang-hma platform answers, whatever the device."""

from typing import Any

import torch
from sglang.srt.platforms.interface import SRTPlatform
from typing_extensions import override

from sglang_hma.config import HmaConfig
from sglang_hma.gauges import GAUGES


class HmaPlatformMixin(SRTPlatform):
    """Pools, allocator and weights of sglang-hma."""

    @override
    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        config = HmaConfig.require()
        if kind != "mha":
            return None
        if not config.packs_kv:
            from sglang_hma.kvcache.layer_gate import NativeKVPool

            return NativeKVPool if config.sends_early else None
        if config.on_card:
            from sglang_hma.prefill.ttnn.pool import CardKVPool

            return CardKVPool
        from sglang_hma.kvcache import pool

        return pool.MixedKVPool if config.mixes_page_formats else pool.Bfp8KVPool

    @override
    def get_paged_allocator_cls(self) -> type | None:
        config = HmaConfig.require()
        if config.mixes_page_formats:
            from sglang_hma.kvcache.allocator import SlabPageAllocator

            return SlabPageAllocator
        if config.sends_early:
            from sglang_hma.kvcache.holds import HoldingAllocator

            return HoldingAllocator
        return None

    @override
    def get_torch_profiler_activity_str(self) -> str:
        return "CUDA" if self.is_cuda() else "CPU"

    @override
    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        activities = torch.profiler.ProfilerActivity
        return activities.CUDA if self.is_cuda() else activities.CPU

    @override
    def post_load_model(self, model: Any) -> None:
        from sglang_hma import seams
        from sglang_hma.prefill import reference

        # The launcher verified its own process; this is the one that serves.
        config = HmaConfig.require()
        seams.verify(config)
        GAUGES.start()
        if not config.on_card:
            reference.prepare_model(model)
