"""KV pages of a Tenstorrent server: one pool in two memories, and its size.

The pool's pages lie in the host's memory, where Mooncake has registered them, and the card's cache
has the same pages under the same ids: a page is written in both by the forward that computes it. So
a radix hit finds its prefix on the card, a transfer finds it on the host, and a freed page is free
in both.
"""

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig
from typing_extensions import override

from sglang_hma.kvcache.pool import Bfp8KVPool
from sglang_hma.kvcache.sizing import HmaPoolConfigurator
from sglang_hma.prefill.ttnn.model import empty_cache
from sglang_hma.prefill.ttnn.readback import store_pages
from sglang_hma.prefill.ttnn.server import CardCausalLM


class CardPoolConfigurator(HmaPoolConfigurator):
    """SGLang's token budget, as far as the card's memory goes."""

    def usable(self, sizes: MemoryPoolConfig, *, reserved: int) -> MemoryPoolConfig:
        model = CardCausalLM.serving
        sizes.max_total_num_tokens = model.fitting_tokens(sizes.max_total_num_tokens)
        return sizes


class CardKVPool(Bfp8KVPool):
    """Host pages, and the same pages on the card."""

    @override
    def _create_buffers(self) -> None:
        super()._create_buffers()
        model = CardCausalLM.serving
        self.card_cache = empty_cache(model.card, model.shape, self.num_pages)
        model.serve_from(self)

    def store_pages(
        self, layer: int, which: int, pages: npt.NDArray[np.integer], head: int, rows: torch.Tensor
    ) -> None:
        """rows: uint8 [pages, heads, head_dim / 32, 1088], of K (0) or V (1) from `head` on."""
        store_pages((self.k_buffer, self.v_buffer)[which][layer], pages, head, rows)
