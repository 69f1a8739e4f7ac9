"""KV capacity from true bytes: 8.5 bits an element instead of the model dtype's 16 or 32."""

from collections.abc import Callable
from typing import Any

from sglang.srt.model_executor.pool_configurator import (
    DefaultPoolConfigurator,
    HybridSWAPoolConfigurator,
    MemoryPoolConfig,
)
from typing_extensions import override

from hma_kernels.layout import BF16_PAGES_PER_SLAB, BFP8_PAGES_PER_SLAB, PAGE, SLAB_TOKENS
from sglang_hma.config import HmaConfig


class HmaPoolConfigurator(DefaultPoolConfigurator):
    """SGLang's token budget with BFP8's bytes a token.

    A pool that mixes page formats is whole slabs, so its capacity is a multiple
    of 1,024 tokens; one more slab holds the page that padded tokens write to.
    """

    @override
    def _compute_cell_size(self, kvc: Any, num_layers: int) -> int:
        return packed_bytes(super()._compute_cell_size(kvc, num_layers), kvc)

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


def packed_bytes(size: int, kvc: Any) -> int:
    """In BFP8, of what takes `size` bytes in the KV dtype."""
    return size // int(kvc.kv_cache_dtype.itemsize) * BF16_PAGES_PER_SLAB * 2 // BFP8_PAGES_PER_SLAB


class TwoPoolConfigurator(HybridSWAPoolConfigurator):
    """Both pools of a model that mixes layers with and without a window, each in whole slabs, one
    more for padded tokens; --swa-full-tokens-ratio relates them, as SGLang's."""

    _full_per_token: int
    _swa_per_token: int

    @override
    def __init__(self, kvc: Any) -> None:
        super().__init__(kvc)
        self._full_per_token = packed_bytes(self._full_per_token, kvc)
        self._swa_per_token = packed_bytes(self._swa_per_token, kvc)
        self._recompute_cell_size()

    @override
    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        return self._in_slabs(int(available_bytes // self._cell_size), reserved=1)

    @override
    def calculate_pool_sizes_from_max_tokens(
        self, max_total_num_tokens: int, page_size: int
    ) -> MemoryPoolConfig:
        return self._in_slabs(max_total_num_tokens, reserved=0)

    def _in_slabs(self, tokens: int, *, reserved: int) -> MemoryPoolConfig:
        """`tokens`: of the full layers, `reserved` slabs of either pool among them."""
        full = tokens // SLAB_TOKENS - reserved
        window = int(tokens * self._swa_full_tokens_ratio) // SLAB_TOKENS - reserved
        # A window that is locked, one that is computed, and a page at either end of both. One slab
        # may have to be for BF16 pages, of which one is a prompt's last.
        least = 2 * -(-self._sliding_window_size // PAGE) + 4
        usable = window * BFP8_PAGES_PER_SLAB - (BFP8_PAGES_PER_SLAB - BF16_PAGES_PER_SLAB + 1)
        if full < 1 or window < 1 or usable < least:
            raise RuntimeError(
                f"Room for {tokens} KV tokens of full layers and {self._swa_full_tokens_ratio:g} "
                f"times as many of layers with a window of {self._sliding_window_size}, which need "
                f"{least} pages at least, in slabs of {SLAB_TOKENS} tokens: raise "
                "--max-total-tokens, --mem-fraction-static or --swa-full-tokens-ratio, or keep all "
                "layers in one pool with --disable-hybrid-swa-memory."
            )
        return self._make_pool_config(full * SLAB_TOKENS, window * SLAB_TOKENS)


def create_configurator(original: Callable[[Any], Any], kvc: Any) -> Any:
    """Around SGLang's choice of a configurator."""
    return TwoPoolConfigurator(kvc) if kvc.is_hybrid_swa else original(kvc)
