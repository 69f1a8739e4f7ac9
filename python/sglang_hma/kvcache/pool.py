"""KV pools: the memory behind the pages, and how K and V rows are written to it."""

import logging
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.memory_pool import KvBufferDesc, MHATokenToKVPool, unwrap_write_loc
from sglang.srt.runtime_context import get_parallel
from typing_extensions import override

from hma_kernels import PAGE, TILE, TILE_BYTES, PagedKV, bfp8_round, bfp8_unpack, bfp8_write_rows
from hma_kernels.layout import (
    BF16_PAGES_PER_SLAB,
    BFP8_PAGES_PER_SLAB,
    IDS_PER_SLAB,
    SLAB_TOKENS,
    bf16_index,
)
from sglang_hma.kvcache.format import KVFormat
from sglang_hma.kvcache.layer_gate import GatedPool

logger = logging.getLogger(__name__)


class Bfp8KVPool(GatedPool, MHATokenToKVPool):
    """Pages of raw BFP8 bytes: the prefill pool.

    `k_buffer[layer]` is uint8 [pages, kv_heads, head_dim/32, 1088], so SGLang's
    PD registration publishes one page an item and needs no change. Page 0 takes
    what SGLang writes for padded tokens.
    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Any layout but "nhd" makes SGLang count one page a row.
        kwargs["kv_cache_layout"] = "bfp8_pages"
        kwargs["enable_kv_cache_copy"] = False
        super().__init__(*args, **kwargs)

    @property
    def hma_format(self) -> KVFormat:
        return KVFormat.bfp8(
            kv_heads=self.head_num * get_parallel().attn_tp_size,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            layers=self.layer_num,
        )

    def _num_page_ids(self) -> int:
        return self.size // PAGE + 1

    @override
    def _create_buffers(self) -> None:
        if self.page_size != PAGE:
            raise ValueError(f"--page-size is {self.page_size}, BFP8 pages hold {PAGE} tokens")
        self.store_dtype = torch.uint8
        for name in ("k_scale", "v_scale", "native_k_scale", "native_v_scale", "dq_k", "dq_v"):
            setattr(self, f"{name}_buffer", None)
        self.num_pages = self._num_page_ids()
        self.k_buffer = self._page_bytes(self.head_dim)
        self.v_buffer = self._page_bytes(self.v_head_dim)
        self._kv_buffer_descs = self._build_kv_buffer_descs()
        self._init_data_ptrs_and_strides()
        self.kv = PagedKV(
            k_bfp8=self.k_buffer,
            v_bfp8=self.v_buffer,
            k_bf16=[self._bf16_view(buf, self.head_dim) for buf in self.k_buffer],
            v_bf16=[self._bf16_view(buf, self.v_head_dim) for buf in self.v_buffer],
        )

    @override
    def _finalize_allocation_log(self, num_tokens: int) -> None:
        super()._finalize_allocation_log(num_tokens)
        logger.info(
            "KV capacity: %d prompt tokens in BFP8 (%d bytes a token); "
            "the same memory would hold %d tokens in BF16",
            num_tokens,
            sum(buffer.stride(0) for buffer in self.k_buffer + self.v_buffer) // PAGE,
            num_tokens * BF16_PAGES_PER_SLAB // BFP8_PAGES_PER_SLAB,
        )

    def _page_bytes(self, head_dim: int) -> list[torch.Tensor]:
        shape = (self.num_pages, self.head_num, head_dim // TILE, TILE_BYTES)
        if torch.device(self.device).type == "cpu":
            return [untouched_zeros(shape) for _ in range(self.layer_num)]
        with self.memory_saver_adapter.region("kv_cache"):
            return [
                torch.zeros(shape, dtype=torch.uint8, device=self.device)
                for _ in range(self.layer_num)
            ]

    def _bf16_view(self, buffer: torch.Tensor, head_dim: int) -> torch.Tensor:
        return torch.empty(
            (0, self.head_num, PAGE, head_dim), dtype=torch.bfloat16, device=self.device
        )

    @override
    def _build_kv_buffer_descs(self) -> list[KvBufferDesc]:
        return [
            KvBufferDesc(
                f"{name}{layer}",
                tuple(buffer.shape),
                row_bytes=int(np.prod(buffer.shape[1:])),
                tokens_per_row=PAGE,
            )
            for name, buffers in (("k", self.k_buffer), ("v", self.v_buffer))
            for layer, buffer in enumerate(buffers)
        ]

    @override
    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        buffers = self.k_buffer + self.v_buffer
        item_lens = [buf.stride(0) for buf in buffers]
        return [buf.data_ptr() for buf in buffers], [buf.nbytes for buf in buffers], item_lens

    @override
    def _get_key_buffer(self, layer_id: int) -> torch.Tensor:
        raise NotImplementedError(self._no_rows(layer_id))

    @override
    def _get_value_buffer(self, layer_id: int) -> torch.Tensor:
        raise NotImplementedError(self._no_rows(layer_id))

    def _no_rows(self, layer_id: int) -> str:
        return (
            f"layer {layer_id} of this model reads or writes rows of the KV pool by itself, which "
            "holds BFP8 pages; serve it with --hma-kv-format native"
        )

    @override
    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        *_: Any,
        **kwargs: Any,
    ) -> None:
        raise NotImplementedError("use --attention-backend hma: this pool holds BFP8 pages")

    def wait_for_layer(self, layer_id: int) -> None:
        """For what SGLang brings back from the host's memory into this layer's pages; on a GPU it
        is the stream that waits."""
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(layer_id - self.start_layer)

    def write_prompt(
        self, layer_id: int, loc_info: Any, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store prompt rows k, v [tokens, kv_heads, dim]; return what was stored.

        Both go through the device packer; the returned values are the exact
        unpacked bytes in the input's dtype, which attention must read instead of
        the unrounded rows.
        """
        layer = layer_id - self.start_layer
        loc = unwrap_write_loc(loc_info)[0].long()
        k, v = to_bf16_values(k), to_bf16_values(v)
        self._store_prompt(self.k_buffer[layer], self.kv.k_bf16[layer], loc, k)
        self._store_prompt(self.v_buffer[layer], self.kv.v_bf16[layer], loc, v)
        self.layer_stored(layer)
        return bfp8_round(k), bfp8_round(v)

    def _store_prompt(
        self, pages: torch.Tensor, bf16: torch.Tensor, loc: torch.Tensor, rows: torch.Tensor
    ) -> None:
        bfp8_write_rows(pages, loc // PAGE, loc % PAGE, rows)


@dataclass(frozen=True)
class SavedPages:
    """A request's pages on the host, while it is put aside. `in_bf16`: bool [pages], in its order;
    `layers[layer]`: for K and V its BFP8 pages and its BF16 pages, each kind in that order."""

    in_bf16: torch.Tensor
    layers: list[list[tuple[torch.Tensor, torch.Tensor]]]


class MixedKVPool(Bfp8KVPool):
    """BFP8 prompt pages and BF16 generated pages in one slab arena.

    The allocator decides each slab's format and mirrors it into `slab_is_bf16`.
    """

    def _num_page_ids(self) -> int:
        return (self.size // SLAB_TOKENS + 1) * IDS_PER_SLAB

    @override
    def _create_buffers(self) -> None:
        super()._create_buffers()
        self.slab_is_bf16 = torch.zeros(
            self.num_pages // IDS_PER_SLAB, dtype=torch.bool, device=self.device
        )

    def _bf16_view(self, buffer: torch.Tensor, head_dim: int) -> torch.Tensor:
        pages = self.num_pages // IDS_PER_SLAB * BF16_PAGES_PER_SLAB
        return buffer.view(-1).view(torch.bfloat16).view(pages, self.head_num, PAGE, head_dim)

    def _store_prompt(
        self, pages: torch.Tensor, bf16: torch.Tensor, loc: torch.Tensor, rows: torch.Tensor
    ) -> None:
        in_bf16 = self.slab_is_bf16[loc // SLAB_TOKENS]
        if not bool(in_bf16.any()):
            return super()._store_prompt(pages, bf16, loc, rows)
        packed, plain = ~in_bf16, loc[in_bf16]
        super()._store_prompt(pages, bf16, loc[packed], rows[packed])
        rounded = bfp8_round(rows[in_bf16])
        bf16[bf16_index(plain // PAGE), :, plain % PAGE] = rounded.to(torch.bfloat16)

    def write_generated(
        self, layer_id: int, loc_info: Any, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Store generated rows k, v [tokens, kv_heads, dim] in BF16 pages.

        A row whose slot lies in a BFP8 page is a padded token's (slot 0).
        """
        layer = layer_id - self.start_layer
        slots = unwrap_write_loc(loc_info)[0]
        self._store_generated(slots, k, v, self.kv.k_bf16[layer], self.kv.v_bf16[layer])

    @cached_property
    def _store_generated(self) -> Callable[..., None]:
        if torch.device(self.device).type == "cpu":
            from hma_kernels.portable.store import store_generated
        else:
            from hma_kernels.triton.store import store_generated

        return store_generated

    def unpack_page(self, source: int, target: int) -> None:
        """Copy BFP8 page `source` into BF16 page `target` in every layer, exactly."""
        index = bf16_index(target)
        if torch.device(self.device).type == "cpu":
            for packed, plain in self._kinds():
                for layer in range(self.layer_num):
                    plain[layer][index] = bfp8_unpack(packed[layer][source, :, None])
        else:
            for unpacker in self._unpackers:
                unpacker.unpack(source, index)

    @cached_property
    def _unpackers(self) -> list[Any]:
        from hma_kernels.triton.landing import PageUnpacker

        return [PageUnpacker(packed, plain) for packed, plain in self._kinds()]

    def empty_pages(self, pages: npt.NDArray[np.int32]) -> None:
        """Zeros in these BFP8 pages, in every layer."""
        index = torch.from_numpy(pages).long().to(self.device)
        for buffer in self.k_buffer + self.v_buffer:
            buffer[index] = 0

    def formats_of(self, indices: torch.Tensor) -> torch.Tensor:
        """Which pages behind `indices` (one request's slots in order) are BF16: bool [pages], on
        the host."""
        return self._split_pages(indices)[0].cpu()

    @override
    def get_cpu_copy(self, indices: torch.Tensor, *_: Any, **__: Any) -> SavedPages:
        """Bytes and formats of the pages behind `indices` (one request's slots in order)."""
        in_bf16, bfp8, bf16 = self._split_pages(indices)
        layers = [
            [
                (buffers[layer][bfp8].cpu(), plain[layer][bf16].cpu())
                for buffers, plain in self._kinds()
            ]
            for layer in range(self.layer_num)
        ]
        return SavedPages(in_bf16.cpu(), layers)

    @override
    def load_cpu_copy(
        self, kv_cache_cpu: SavedPages, indices: torch.Tensor, *_: Any, **__: Any
    ) -> None:
        """Inverse of `get_cpu_copy` for slots whose pages have the same formats."""
        in_bf16, bfp8, bf16 = self._split_pages(indices)
        if not torch.equal(in_bf16.cpu(), kv_cache_cpu.in_bf16):
            raise RuntimeError("a retracted request was given pages of other formats than it had")
        for layer, saved in enumerate(kv_cache_cpu.layers):
            for (buffers, plain), (packed_pages, plain_pages) in zip(
                self._kinds(), saved, strict=True
            ):
                buffers[layer][bfp8] = packed_pages.to(self.device)
                plain[layer][bf16] = plain_pages.to(self.device)

    def _kinds(self) -> tuple[tuple[list[torch.Tensor], list[torch.Tensor]], ...]:
        return (self.k_buffer, self.kv.k_bf16), (self.v_buffer, self.kv.v_bf16)

    def _split_pages(
        self, indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which pages are BF16, and the indices of the BFP8 and of the BF16 ones."""
        pages = indices[::PAGE].long() // PAGE
        in_bf16 = self.slab_is_bf16[pages // IDS_PER_SLAB]
        return in_bf16, pages[~in_bf16], bf16_index(pages[in_bf16])


def untouched_zeros(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 zeros on the CPU that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape), flags), dtype=torch.uint8).view(shape)


def to_bf16_values(x: torch.Tensor) -> torch.Tensor:
    """fp32 rows rounded to the nearest BF16 value (still fp32); BF16 unchanged."""
    return x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16).to(x.dtype)
