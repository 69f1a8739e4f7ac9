"""The interface of an implementation of the operations (hma_kernels/ops.py)."""

from dataclasses import dataclass
from typing import Protocol

import torch

from hma_kernels.layout import Rounding
from hma_kernels.paged import PagedKV, PageTable


@dataclass(frozen=True)
class ExtendCall:
    """The arguments of hma_kernels.extend_attention, and where its result goes; sinks is contiguous
    float32 [Hq]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv: PagedKV
    layer: int
    table: PageTable
    q_indptr: torch.Tensor
    scale: float
    logit_cap: float
    sliding_window: int
    out: torch.Tensor
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """The arguments of hma_kernels.DecodePlan.run; out is contiguous, sinks is contiguous float32
    [Hq]."""

    q: torch.Tensor
    layer: int
    scale: float
    logit_cap: float
    out: torch.Tensor
    sinks: torch.Tensor | None = None


class Plan(Protocol):
    """As hma_kernels.DecodePlan."""

    def run(self, call: DecodeCall) -> None: ...

    def refresh(self) -> None: ...


class Implementation(Protocol):
    """The operations of hma_kernels.ops; arguments are valid and not empty, outputs contiguous."""

    def pack(self, x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None: ...

    def unpack(self, tiles: torch.Tensor, out: torch.Tensor) -> None: ...

    def round_values(self, x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None: ...

    def write_rows(
        self, pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
    ) -> None: ...

    def decode_plan(
        self,
        kv: PagedKV,
        table: PageTable,
        heads: int,
        sliding_window: int,
        q_indptr: torch.Tensor | None = None,
    ) -> Plan: ...

    def extend(self, call: ExtendCall) -> None: ...
