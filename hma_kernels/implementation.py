"""Which code does the work on a device: C++ on the host, Triton on a GPU, else torch."""

import functools
import importlib
import os
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hma_kernels.layout import Rounding
from hma_kernels.paged import PagedKV, PageTable

ENVIRONMENT = "HMA_KERNELS"
CHOICES = ("auto", "cpu", "triton", "portable")


@dataclass(frozen=True)
class ExtendCall:
    """The arguments of hma_kernels.extend_attention, and where its result goes."""

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


class Plan(Protocol):
    def run(
        self, q: torch.Tensor, layer: int, scale: float, logit_cap: float, out: torch.Tensor
    ) -> None: ...

    def refresh(self) -> None: ...


class Implementation(Protocol):
    """The operations of hma_kernels.ops: arguments are valid, non-empty, outputs contiguous."""

    def pack(self, x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None: ...

    def unpack(self, tiles: torch.Tensor, out: torch.Tensor) -> None: ...

    def round_values(self, x: torch.Tensor, rounding: Rounding, out: torch.Tensor) -> None: ...

    def write_rows(
        self, pages: torch.Tensor, page_ids: torch.Tensor, rows: torch.Tensor, x: torch.Tensor
    ) -> None: ...

    def decode_plan(
        self, kv: PagedKV, table: PageTable, heads: int, sliding_window: int
    ) -> Plan: ...

    def extend(self, call: ExtendCall) -> None: ...


def wanted() -> str:
    """What HMA_KERNELS says; raises ValueError if it is no choice."""
    choice = os.environ.get(ENVIRONMENT, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{ENVIRONMENT} is {choice!r}; needs one of {', '.join(CHOICES)}")
    return choice


@functools.cache
def _host() -> Implementation:
    choice = wanted()
    if choice == "portable":
        return _portable()
    try:
        return _load("hma_kernels.cpu")
    except ImportError:
        if choice == "cpu":
            raise
        return _portable()


@functools.cache
def _gpu() -> Implementation:
    choice = wanted()
    if choice == "portable":
        return _portable()
    try:
        return _load("hma_kernels.gpu")
    except ImportError:
        if choice == "triton":
            raise
        return _portable()


def _portable() -> Implementation:
    return _load("hma_kernels.portable")


def _load(module: str) -> Implementation:
    loaded: Any = importlib.import_module(module)
    return loaded  # type: ignore[no-any-return]


def implementation_for(device: torch.device) -> Implementation:
    """What works on a device's tensors. HMA_KERNELS=portable keeps to torch, =cpu insists on C++ on
    the host, =triton insists on Triton on a GPU and leaves CUDA C++ out."""
    return _host() if device.type == "cpu" else _gpu()


def describe(device: torch.device) -> str:
    """For a log line: which kernels serve, and why they are slow if they are."""
    if device.type != "cpu":
        if implementation_for(device) is _portable():
            return "kernels: torch"
        return "kernels: Triton" + (
            "" if wanted() == "triton" else ", decode in CUDA C++ if it can"
        )
    if implementation_for(device) is _portable():
        asked = os.environ.get(ENVIRONMENT) == "portable"
        why = "HMA_KERNELS=portable" if asked else "hma_kernels.cpu was not built"
        return f"kernels: torch ({why}); attention is many times slower than in C++"
    from hma_kernels import cpu

    return f"kernels: C++ ({cpu.isa()}, {cpu.threads()} threads)"
