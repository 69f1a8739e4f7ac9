"""Which code does the work on a device: C++ on the host, Triton on a GPU, else torch."""

import functools
import importlib
import os
from typing import Any

import torch

from hma_kernels.base import Implementation

ENVIRONMENT = "HMA_KERNELS"
CHOICES = ("auto", "cpu", "triton", "portable")


def wanted() -> str:
    """The value of HMA_KERNELS, "auto" by default. Raises ValueError if it is not in CHOICES."""
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
    """The implementation for a device's tensors. HMA_KERNELS=portable selects torch; =cpu raises
    ImportError where the C++ kernels are missing; =triton does so where Triton is, and does without
    CUDA C++."""
    return _host() if device.type == "cpu" else _gpu()


def describe(device: torch.device) -> str:
    """For a log line: which kernels are used, and the reason if they are slow."""
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
