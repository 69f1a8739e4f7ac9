"""The operations in Triton, for GPUs. What is exact in float64 (float32 queries) is left to torch.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly: that is how they are tested where
there is no GPU.
"""

from functools import cached_property

import torch

from hma_kernels import portable
from hma_kernels.implementation import ExtendCall, Plan
from hma_kernels.paged import PagedKV, PageTable
from hma_kernels.triton import codec, decode, prefill
from hma_kernels.triton.codec import pack, round_values, write_rows

__all__ = ["decode_plan", "extend", "pack", "round_values", "unpack", "write_rows"]


class _Plan:
    def __init__(self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> None:
        self._arguments = kv, table, heads, sliding_window

    @cached_property
    def _fast(self) -> Plan:
        return decode.DecodePlan(*self._arguments)

    @cached_property
    def _exact(self) -> Plan:
        return portable.decode_plan(*self._arguments)

    def run(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, out: torch.Tensor
    ) -> None:
        plan = self._exact if q.dtype == torch.float32 else self._fast
        plan.run(q, layer, scale, logit_cap, out)


def decode_plan(kv: PagedKV, table: PageTable, heads: int, sliding_window: int) -> Plan:
    return _Plan(kv, table.to(kv.device), heads, sliding_window)


def extend(call: ExtendCall) -> None:
    (portable if call.q.dtype == torch.float32 else prefill).extend(call)


def unpack(tiles: torch.Tensor, out: torch.Tensor) -> None:
    (portable if out.dtype == torch.float64 else codec).unpack(tiles, out)
