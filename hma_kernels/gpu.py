"""The operations on a GPU: Triton kernels, CUDA C++ for decode attention where it can be compiled,
and torch where results must be exact in float64 (float32 queries).

Under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors, slowly. That is how they are tested
where there is no GPU.
"""

import torch

from hma_kernels import portable
from hma_kernels.base import DecodeCall, ExtendCall, Plan
from hma_kernels.cuda import decode as cuda_decode
from hma_kernels.implementation import wanted
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton import codec, decode, prefill
from hma_kernels.triton.codec import pack, round_values, write_rows

__all__ = ["decode_plan", "extend", "pack", "round_values", "unpack", "write_rows"]


class _DecodePlan:
    """Makes a plan for each dtype of queries when the first ones come. With `q_indptr` each query
    is a request of its own to kernels that know one query, so a page is read for each of them, and
    a refresh makes all anew, which waits for the GPU."""

    def __init__(
        self,
        kv: PagedKV,
        table: PageTable,
        heads: int,
        sliding_window: int,
        q_indptr: torch.Tensor | None,
    ) -> None:
        self._kv, self._given, self._q_indptr = kv, table, q_indptr
        self._heads, self._sliding_window = heads, sliding_window
        self._table = table
        self._plans: dict[torch.dtype, Plan] = {}
        self.refresh()

    def refresh(self) -> None:
        if self._q_indptr is not None:
            self._table = self._given.of_rows(self._q_indptr)
            self._plans.clear()
        # The float64 plan waits for the GPU, which no refresh may do: it is made anew when needed.
        self._plans.pop(torch.float32, None)
        for plan in self._plans.values():
            plan.refresh()

    def run(self, call: DecodeCall) -> None:
        dtype = call.q.dtype
        if dtype not in self._plans:
            shape = self._kv, self._table, self._heads, self._sliding_window
            self._plans[dtype] = _plan_for(dtype, *shape)
        self._plans[dtype].run(call)


def _plan_for(
    dtype: torch.dtype, kv: PagedKV, table: PageTable, heads: int, sliding_window: int
) -> Plan:
    if dtype == torch.float32:
        return portable.decode_plan(kv, table, heads, sliding_window)
    library = None if wanted() == "triton" else cuda_decode.library_for(kv, heads, dtype)
    if library is None:
        return decode.DecodePlan(kv, table, heads, sliding_window)
    return cuda_decode.DecodePlan(kv, table, heads, sliding_window, library)


def decode_plan(
    kv: PagedKV,
    table: PageTable,
    heads: int,
    sliding_window: int,
    q_indptr: torch.Tensor | None = None,
) -> Plan:
    return _DecodePlan(kv, table.to(kv.device), heads, sliding_window, q_indptr)


def extend(call: ExtendCall) -> None:
    (portable if call.q.dtype == torch.float32 else prefill).extend(call)


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    (portable if out.dtype == torch.float64 else codec).unpack(tiles, out)
