"""Tensors to the extension's attention; arguments are those of hma_kernels.ops, checked there."""

from typing import TypeAlias

import numpy as np
import torch

from hma_kernels.base import DecodeCall, ExtendCall
from hma_kernels.cpu import _ext
from hma_kernels.cpu.codec import TYPES
from hma_kernels.paged import PagedKV, PageTable

Query: TypeAlias = tuple[int, int, int, int]
Pages: TypeAlias = tuple[int, int, int, int]
PageList: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, int]


def _query(x: torch.Tensor) -> Query:
    return x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(1)


def _address(sinks: torch.Tensor | None) -> int:
    return 0 if sinks is None else sinks.data_ptr()


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pages(kv: PagedKV, layer: int) -> tuple[Pages, Pages]:
    """Addresses and page strides in bytes: BFP8's, BF16's."""
    k8, v8, k16, v16 = kv.k_bfp8[layer], kv.v_bfp8[layer], kv.k_bf16[layer], kv.v_bf16[layer]
    return (
        (k8.data_ptr(), v8.data_ptr(), k8.stride(0), v8.stride(0)),
        (k16.data_ptr(), v16.data_ptr(), 2 * k16.stride(0), 2 * v16.stride(0)),
    )


def _lists(kv: PagedKV, table: PageTable) -> tuple[PageList, PageList]:
    return (
        (
            table.bfp8_indptr.numpy(),
            table.bfp8_indices.numpy(),
            table.bfp8_pos.numpy(),
            min(len(kv.k_bfp8[0]), len(kv.v_bfp8[0])),
        ),
        (
            table.bf16_indptr.numpy(),
            table.bf16_indices.numpy(),
            table.bf16_pos.numpy(),
            min(len(kv.k_bf16[0]), len(kv.v_bf16[0])),
        ),
    )


def _heads(kv: PagedKV, heads: int) -> tuple[int, int, int, int]:
    return kv.kv_heads, heads // kv.kv_heads, kv.head_dim, kv.v_head_dim


class DecodePlan:
    """hma_kernels.DecodePlan; float32 queries take extend's float64 kernel, without a work list."""

    def __init__(
        self,
        kv: PagedKV,
        table: PageTable,
        heads: int,
        sliding_window: int,
        q_indptr: torch.Tensor | None = None,
    ) -> None:
        self._kv = kv
        self._table = table
        self._heads = _heads(kv, heads)
        self._window = sliding_window
        self._q_indptr = np.arange(table.batch_size + 1) if q_indptr is None else q_indptr.numpy()
        self.refresh()

    def refresh(self) -> None:
        table = self._table
        self._plan = _ext.DecodePlan(
            *(self._heads, *_lists(self._kv, table), table.seq_lens.numpy()),
            *(self._q_indptr, self._window),
        )

    def run(self, call: DecodeCall) -> None:
        q = _adjacent(call.q)
        pages = _pages(self._kv, call.layer)
        sinks = _address(call.sinks)
        if q.dtype != torch.float32:
            options = call.scale, call.logit_cap
            self._plan.run(*pages, _query(q), *options, sinks, call.out.data_ptr())
            return
        _ext.extend_attention(
            self._heads,
            *pages,
            *_lists(self._kv, self._table),
            self._table.seq_lens.numpy(),
            self._q_indptr,
            *(_query(q),) * 3,
            call.scale,
            call.logit_cap,
            sinks,
            self._window,
            True,
            True,
            call.out.data_ptr(),
        )


def extend(call: ExtendCall) -> None:
    q, k, v = _adjacent(call.q), _adjacent(call.k), _adjacent(call.v)
    _ext.extend_attention(
        _heads(call.kv, q.shape[1]),
        *_pages(call.kv, call.layer),
        *_lists(call.kv, call.table),
        call.table.seq_lens.numpy(),
        call.q_indptr.numpy(),
        _query(q),
        _query(k),
        _query(v),
        call.scale,
        call.logit_cap,
        _address(call.sinks),
        call.sliding_window,
        q.dtype == torch.float32,
        False,
        call.out.data_ptr(),
    )
