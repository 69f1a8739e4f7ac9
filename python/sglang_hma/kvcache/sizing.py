"""KV capacity from true bytes: 8.5 bits an element instead of the model dtype's 16 or 32."""

from typing import Any

from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator, MemoryPoolConfig
from typing_extensions import override

from hma_kernels.layout import BF16_PAGES_PER_SLAB, BFP8_PAGES_PER_SLAB, SLAB_TOKENS
from sglang_hma.config import HmaConfig


class HmaPoolConfigurator(DefaultPoolConfigurator):
    """SGLang's token budget with BFP8's bytes a token.

    A pool that mixes page formats is whole slabs, so its capacity is a multiple
    of 1,024 tokens; one more slab holds the page that padded tokens write to.
    """

    @override
    def _compute_cell_size(self, kvc: Any, num_layers: int) -> int:
        elements = super()._compute_cell_size(kvc, num_layers) // kvc.kv_cache_dtype.itemsize
        return elements * BF16_PAGES_PER_SLAB * 2 // BFP8_PAGES_PER_SLAB

    @override
    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        sizes = super().calculate_pool_sizes(available_bytes, page_size)
        return self.usable(sizes, reserved=1)

    @override
    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        sizes = super().calculate_pool_sizes_from_max_tokens(max_total_num_tokens, page_size)
        return self.usable(sizes, reserved=0)

    def usable(self, sizes: MemoryPoolConfig, *, reserved: int) -> MemoryPoolConfig:
        """Whole slabs, `reserved` of them beside those of the capacity."""
        tokens = sizes.max_total_num_tokens
        if HmaConfig.require().mixes_page_formats:
            slabs = tokens // SLAB_TOKENS - reserved
            if slabs < 1:
                raise RuntimeError(
                    f"Room for {tokens} KV tokens, but pages come in slabs of {SLAB_TOKENS}: "
                    f"raise --max-total-tokens or --mem-fraction-static to hold at least "
                    f"{(1 + reserved) * SLAB_TOKENS} tokens."
                )
            sizes.max_total_num_tokens = slabs * SLAB_TOKENS
        return sizes
