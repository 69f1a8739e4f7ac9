"""Copies of BFP8 pages in the host's memory: SGLang's hierarchical cache on a prefill server.

A copy is a page's raw bytes. SGLang's cache decides what is copied, evicted and brought back, in
whole pages; its engine copies back layer by layer, and the forward waits for each layer's copies
before it reads them (HmaAttnBackend), so that a layer gate opens behind them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.pool_host.base import HostKVCache
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
from typing_extensions import override

from hma_kernels import PAGE
from sglang_hma.kvcache.pool import Bfp8KVPool


class Bfp8HostPool(HostKVCache):
    """`k_copies` and `v_copies`: uint8 [layers, pages, kv_heads, head_dim/32, 1088]."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device_pool: Bfp8KVPool = kwargs.pop("device_pool")
        self.layer_num = self.target_layer_num = self.device_pool.layer_num
        super().__init__(*args, **kwargs, size_per_token=self.get_size_per_token())

    @override
    def get_size_per_token(self) -> int:
        """Bytes of K and V in all layers."""
        buffers = self.device_pool.k_buffer + self.device_pool.v_buffer
        return sum(buffer[0].nbytes for buffer in buffers) // PAGE

    @override
    def init_kv_buffer(self) -> list[torch.Tensor]:
        allocate = ALLOC_MEMORY_FUNCS[torch.device(self.device_pool.device).type]
        self.k_copies, self.v_copies = (
            allocate(
                (self.layer_num, self.page_num, *pages.shape[1:]),
                dtype=torch.uint8,
                device=self.device,
                pin_memory=self.pin_memory,
                allocator=self.allocator,
            )
            for pages in (self.device_pool.k_buffer[0], self.device_pool.v_buffer[0])
        )
        return [self.k_copies, self.v_copies]

    @override
    def backup_from_device_all_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        io_backend: str,
    ) -> None:
        """To `host_indices`, from `device_indices`: token slots, whole pages in the same order."""
        runs = page_runs(host_indices, device_indices)
        for layer in range(self.layer_num):
            for copies, pages in self._layer(device_pool, layer):
                for host, device, count in runs:
                    copies[host : host + count].copy_(
                        pages[device : device + count], non_blocking=True
                    )

    @override
    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        """The other way, one layer."""
        for copies, pages in self._layer(device_pool, layer_id):
            for host, device, count in page_runs(host_indices, device_indices):
                pages[device : device + count].copy_(copies[host : host + count], non_blocking=True)

    def _layer(self, pool: Bfp8KVPool, layer: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return (
            (self.k_copies[layer], pool.k_buffer[layer]),
            (self.v_copies[layer], pool.v_buffer[layer]),
        )

    @override
    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        raise NotImplementedError(NO_STORAGE)

    @override
    def get_dummy_flat_data_page(self) -> torch.Tensor:
        raise NotImplementedError(NO_STORAGE)

    @override
    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        raise NotImplementedError(NO_STORAGE)


NO_STORAGE = "BFP8 pages go to no storage behind the host's memory"


def page_runs(
    host_indices: torch.Tensor, device_indices: torch.Tensor
) -> list[tuple[int, int, int]]:
    """(first host page, first device page, pages) of each stretch that is one in both."""
    host, device = ((each.cpu().numpy()[::PAGE] // PAGE) for each in (host_indices, device_indices))
    if not len(host):
        return []
    cuts = np.flatnonzero((np.diff(host) != 1) | (np.diff(device) != 1)) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [len(host)]]))
    return [(int(host[i]), int(device[i]), int(n)) for i, n in zip(starts, lengths, strict=True)]


def copies_of(
    pool: Bfp8KVPool,
    ratio: float,
    size: float,
    page_size: int,
    layout: str,
    *,
    allocator_type: str = "default",
    pool_label: str = "kv",
) -> Bfp8HostPool:
    """For `size` GB of copies, or if that is 0 for `ratio` times the pool's tokens."""
    return Bfp8HostPool(
        device_pool=pool,
        dtype=torch.uint8,
        device_capacity_tokens=pool.size,
        start_layer=pool.start_layer,
        end_layer=pool.end_layer,
        host_to_device_ratio=ratio,
        host_size=size,
        page_size=page_size,
        layout=layout,
        pin_memory=torch.device(pool.device).type == "cuda",
        device="cpu",
        allocator_type=allocator_type,
        pool_label=pool_label,
    )


def mha_host_inputs(original: Callable[..., Any], pool: Any, drafts: Any = ()) -> Any:
    """Around hybrid_pool_assembler._mha_host_inputs: (maker, its first argument, keywords)."""
    if isinstance(pool, Bfp8KVPool):
        return copies_of, pool, {}
    return original(pool, drafts)
