"""The operations on a GPU: Triton, decode attention in CUDA C++ where it can be compiled, and torch
for what is exact in float64 (float32 queries).

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly: that is how they are tested where
there is no GPU.
"""

from functools import cached_property

import torch

from hma_kernels import portable
from hma_kernels.base import ExtendCall, Plan
from hma_kernels.cuda import decode as cuda_decode
from hma_kernels.implementation import wanted
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton import codec, decode, prefill
from hma_kernels.triton.codec import pack, round_values, write_rows

__all__ = ["decode_plan", "extend", "pack", "round_values", "unpack", "write_rows"]


class _Plan:
    def __init__(self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> None:
        self._arguments = kv, table, heads, sliding_window
        self._made: dict[torch.dtype, Plan] = {}

    @cached_property
    def _exact(self) -> Plan:
        return portable.decode_plan(*self._arguments)

    def refresh(self) -> None:
        self.__dict__.pop("_exact", None)
        for plan in self._made.values():
            plan.refresh()

    def run(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, out: torch.Tensor
    ) -> None:
        if q.dtype == torch.float32:
            self._exact.run(q, layer, scale, logit_cap, out)
            return
        if q.dtype not in self._made:
            self._made[q.dtype] = _fast_plan(q.dtype, *self._arguments)
        self._made[q.dtype].run(q, layer, scale, logit_cap, out)


def _fast_plan(dtype: torch.dtype, kv: PagedKV, table: PageTable, heads: int, window: int) -> Plan:
    library = None if wanted() == "triton" else cuda_decode.library_for(kv, heads, dtype)
    if library is None:
        return decode.DecodePlan(kv, table, heads, window)
    return cuda_decode.DecodePlan(kv, table, heads, window, library)


def decode_plan(kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> Plan:
    return _Plan(kv, table.to(kv.device), heads, sliding_window)


def extend(call: ExtendCall) -> None:
    (portable if call.q.dtype == torch.float32 else prefill).extend(call)


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    (portable if out.dtype == torch.float64 else codec).unpack(tiles, out)
