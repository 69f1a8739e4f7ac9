"""The operations on a GPU: Triton kernels, CUDA C++ for decode attention where it can be compiled,
and torch where results must be exact in float64 (float32 queries).

Under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors, slowly. That is how they are tested
where there is no GPU.
"""

import torch

from hma_kernels import portable
from hma_kernels.base import ExtendCall, Plan
from hma_kernels.cuda import decode as cuda_decode
from hma_kernels.implementation import wanted
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton import codec, decode, prefill
from hma_kernels.triton.codec import pack, round_values, write_rows

__all__ = ["decode_plan", "extend", "pack", "round_values", "unpack", "write_rows"]


class _RowsPlan:
    """Several queries a request: each is a request of its own to kernels that know one query, so
    a page is read for each of them. A new table on every refresh, which waits for the GPU."""

    def __init__(
        self,
        kv: PagedKV,
        table: PageTable,
        heads: int,
        sliding_window: int,
        q_indptr: torch.Tensor,
    ) -> None:
        self._arguments = kv, table, heads, sliding_window, q_indptr
        self.refresh()

    def refresh(self) -> None:
        kv, table, heads, sliding_window, q_indptr = self._arguments
        self._plan = _DecodePlan(kv, table.of_rows(q_indptr), heads, sliding_window)

    def run(
        self,
        q: torch.Tensor,
        layer: int,
        scale: float,
        logit_cap: float,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self._plan.run(q, layer, scale, logit_cap, out, sinks)


class _DecodePlan:
    """Makes a plan for each dtype of queries when the first ones come."""

    def __init__(self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> None:
        self._arguments = kv, table, heads, sliding_window
        self._plans: dict[torch.dtype, Plan] = {}

    def refresh(self) -> None:
        # The float64 plan waits for the GPU, which no refresh may do: it is made anew when needed.
        self._plans.pop(torch.float32, None)
        for plan in self._plans.values():
            plan.refresh()

    def run(
        self,
        q: torch.Tensor,
        layer: int,
        scale: float,
        logit_cap: float,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if q.dtype not in self._plans:
            self._plans[q.dtype] = _plan_for(q.dtype, *self._arguments)
        self._plans[q.dtype].run(q, layer, scale, logit_cap, out, sinks)


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
    table = table.to(kv.device)
    if q_indptr is None:
        return _DecodePlan(kv, table, heads, sliding_window)
    return _RowsPlan(kv, table, heads, sliding_window, q_indptr)


def extend(call: ExtendCall) -> None:
    (portable if call.q.dtype == torch.float32 else prefill).extend(call)


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    (portable if out.dtype == torch.float64 else codec).unpack(tiles, out)
